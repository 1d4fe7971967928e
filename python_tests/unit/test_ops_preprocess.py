"""preprocess: the law is ops.reference.preprocess."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError
from zsseg_rt.ops import reference

CLIP = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
# Two float32 lerps of values up to 255, divided by 255 * 0.26: worst seen 1.5e-6.
TOLERANCE = 4e-6


def random_frame(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("frame_hw", [(1, 1), (7, 13), (1, 640), (211, 307)])
@pytest.mark.parametrize("size_hw", [(1, 1), (7, 13), (97, 260)])
@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
def test_matches_reference(device, frame_hw, size_hw, channel_order):
    frame = random_frame(*frame_hw)
    settings = {"size_hw": size_hw, "channel_order": channel_order, **CLIP}
    out = ops.preprocess(device.place(frame), stream=device.stream, **settings)
    assert device.holds(out)
    expected = reference.preprocess(frame, **settings)
    np.testing.assert_allclose(device.fetch(out), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("cpu_isa", "num_threads")
@pytest.mark.parametrize("frame_hw", [(480, 641), (65, 3)])
def test_every_instruction_set_and_thread_count(frame_hw):
    frame = random_frame(*frame_hw)
    out = ops.preprocess(frame, size_hw=(509, 383), **CLIP)
    expected = reference.preprocess(frame, size_hw=(509, 383), **CLIP)
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


def test_same_size_changes_no_value():
    frame = random_frame(5, 6)
    out = ops.preprocess(frame, size_hw=(5, 6), mean=(0, 0, 0), std=(1, 1, 1))
    np.testing.assert_allclose(out, frame.transpose(2, 0, 1) / 255, rtol=1e-6)


def test_out_is_filled_and_returned(device):
    frame = random_frame(31, 17)
    out = device.poisoned((3, 29, 23), np.float32)
    result = ops.preprocess(
        device.place(frame), size_hw=(29, 23), out=out, stream=device.stream, **CLIP
    )
    assert result is out
    expected = reference.preprocess(frame, size_hw=(29, 23), **CLIP)
    np.testing.assert_allclose(device.fetch(out), expected, rtol=0, atol=TOLERANCE)


def test_out_may_be_a_batch_of_one_reshaped():
    batch = np.full((1, 3, 4, 4), np.nan, np.float32)
    ops.preprocess(random_frame(8, 8), size_hw=(4, 4), out=batch[0], **CLIP)
    assert np.isfinite(batch).all()


GOOD = {"frame": random_frame(4, 5), "size_hw": (2, 3), **CLIP}
BAD = [
    ({"frame": [[0]]}, DTypeError, "frame"),
    ({"frame": np.zeros((4, 5, 3))}, DTypeError, "frame"),
    ({"frame": np.zeros((4, 5), np.uint8)}, ShapeError, "frame"),
    ({"frame": np.zeros((4, 5, 4), np.uint8)}, ShapeError, "frame"),
    ({"frame": np.zeros((0, 5, 3), np.uint8)}, ShapeError, "frame"),
    ({"frame": random_frame(4, 6)[:, ::2]}, ShapeError, "frame"),
    ({"size_hw": (0, 3)}, ShapeError, "size_hw"),
    ({"size_hw": (2, -1)}, ShapeError, "size_hw"),
    ({"size_hw": (2, 40000)}, ShapeError, "size_hw"),
    ({"std": (1, 0, 1)}, ArgumentError, "std"),
    ({"std": (1, 1)}, ArgumentError, "std"),
    ({"mean": (0, float("nan"), 0)}, ArgumentError, "mean"),
    ({"channel_order": "rbg"}, ArgumentError, "channel_order"),
    ({"out": np.zeros((3, 2, 2), np.float32)}, ShapeError, "out"),
    (
        {"out": np.zeros((3, 2, 3))},
        DTypeError,
        "out",
    ),
]


@pytest.mark.parametrize(("change", "error", "argument"), BAD)
def test_bad_arguments_are_refused(change, error, argument):
    with refused(error, argument):
        ops.preprocess(**{**GOOD, **change})
