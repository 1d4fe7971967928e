"""bilateral_upsample: the law is ops.reference.bilateral_upsample, bit for bit."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError
from zsseg_rt.ops import reference

ALIGNS = ["half_pixel", "corners"]


def random_floats(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def sides(grid_hw, scale, align):
    return tuple((n - 1) * scale + 1 if align == "corners" else n * scale for n in grid_hw)


def patches(batch, height, width, *, side=4):
    """Guides of flat patches, so that some neighbours are alike and others are not."""
    coarse = np.random.default_rng(height).random((batch, 3, height, width), np.float32)
    return np.ascontiguousarray(coarse.repeat(side, 2).repeat(side, 3)[..., :height, :width])


@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        ((1, 1, 1, 1), 3),
        ((1, 2, 1, 9), 5),
        ((2, 3, 7, 1), 7),
        ((1, 40, 6, 31), 5),  # more classes than a thread takes, more points than a block
        ((3, 5, 2, 45), 9),
        ((1, 33, 4, 90), 3),
    ],
)
def test_matches_the_reference_in_every_bit(device, shape, scale, align):
    logits, guide = random_floats(*shape), patches(shape[0], *sides(shape[2:], scale, align))
    settings = {"scale": scale, "reach": 0.4, "align": align}
    expected = reference.bilateral_upsample(logits, guide, **settings)
    out = device.place(np.full(expected.shape, np.nan, np.float32))
    placed = device.place(logits), device.place(guide)
    assert ops.bilateral_upsample(*placed, **settings, out=out, stream=device.stream) is out
    np.testing.assert_array_equal(device.fetch(out), expected)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
@pytest.mark.parametrize("align", ALIGNS)
def test_every_instruction_set_and_thread_count(align):
    logits, guide = random_floats(1, 21, 33, 33), patches(1, *sides((33, 33), 5, align))
    expected = reference.bilateral_upsample(logits, guide, align=align)
    found = ops.bilateral_upsample(logits, guide, align=align)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("align", ALIGNS)
def test_one_colour_changes_nothing(align):
    logits = random_floats(1, 4, 5, 6)
    size_hw = sides((5, 6), 5, align)
    guide = np.full((1, 3, *size_hw), 0.3, np.float32)
    found = ops.bilateral_upsample(logits, guide, align=align)
    expected = reference.upsample_bilinear(logits, size_hw, align=align)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    plain, _ = ops.upsample_argmax(logits, (97, 61), align=align)
    refined, _ = ops.upsample_argmax(found, (97, 61), align=align)
    assert np.mean(plain == refined) > 0.999


@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("beyond", [1, 2, 3, 4, 5])
def test_labels_move_to_an_edge_between_two_cells(align, beyond):
    logits = np.zeros((1, 2, 4, 6), np.float32)
    logits[:, 0, :, :3], logits[:, 1, :, 3:] = 4, 4
    height, width = sides((4, 6), 5, align)
    edge = (10 if align == "corners" else 12) + beyond  # from the middle of the third cell
    guide = np.full((1, 3, height, width), 0.2, np.float32)
    guide[..., edge:] = 0.9
    labels = ops.bilateral_upsample(logits, guide, align=align).argmax(axis=1)
    np.testing.assert_array_equal(labels[0], np.tile(np.arange(width) >= edge, (height, 1)))


def test_the_middle_of_a_cell_keeps_its_logit():
    logits = random_floats(1, 3, 6, 8)
    guide = np.random.default_rng(2).random((1, 3, 18, 24), np.float32)
    found = ops.bilateral_upsample(logits, guide, scale=3)
    np.testing.assert_array_equal(found[..., 1::3, 1::3], logits)


def test_a_guide_without_a_colour_is_like_no_cell():
    logits = random_floats(1, 3, 4, 4)
    guide = np.full((1, 3, 12, 12), np.nan, np.float32)
    found = ops.bilateral_upsample(logits, guide, scale=3)
    expected = reference.upsample_bilinear(logits, (12, 12))
    np.testing.assert_allclose(found, expected, atol=1e-5)


LOGITS, GUIDE = np.zeros((1, 3, 2, 2), np.float32), np.zeros((1, 3, 10, 10), np.float32)


@pytest.mark.parametrize(
    ("changes", "error", "argument"),
    [
        ({"logits": LOGITS.astype(np.float16)}, DTypeError, "logits"),
        ({"logits": LOGITS[0]}, ShapeError, "logits"),
        ({"logits": np.zeros((1, 0, 2, 2), np.float32)}, ShapeError, "logits"),
        ({"logits": np.zeros((1, 1, 1, 7000), np.float32)}, ShapeError, "logits"),
        ({"guide": GUIDE[:, :2].copy()}, ShapeError, "guide"),
        ({"guide": np.zeros((1, 3, 9, 10), np.float32)}, ShapeError, "guide"),
        ({"guide": GUIDE.astype(np.uint8)}, DTypeError, "guide"),
        ({"align": "corners"}, ShapeError, "guide"),
        ({"align": "centre"}, ArgumentError, "align"),
        ({"scale": 4}, ArgumentError, "scale"),
        ({"scale": 11}, ArgumentError, "scale"),
        ({"reach": 0.0}, ArgumentError, "reach"),
        ({"reach": float("nan")}, ArgumentError, "reach"),
        ({"out": np.zeros((1, 3, 10, 9), np.float32)}, ShapeError, "out"),
        ({"out": GUIDE}, ArgumentError, "out"),
    ],
)
def test_errors_name_the_argument(changes, error, argument):
    given = {"logits": LOGITS, "guide": GUIDE, **changes}
    with refused(error, argument):
        ops.bilateral_upsample(given.pop("logits"), given.pop("guide"), **given)
