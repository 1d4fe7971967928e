"""Where cells and pixels lie, for preprocess and upsample_argmax: the law is ops.reference."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError
from zsseg_rt.ops import reference

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def random_frame(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("frame_hw", [(1, 1), (7, 13), (211, 307)])
@pytest.mark.parametrize("size_hw", [(1, 1), (2, 9), (97, 129)])
def test_corners_of_an_image_match_the_reference(device, frame_hw, size_hw):
    frame, settings = random_frame(*frame_hw), {"size_hw": size_hw, "align": "corners", **PLAIN}
    out = ops.preprocess(device.place(frame), stream=device.stream, **settings)
    expected = reference.preprocess(frame, **settings)
    # Two float32 lerps of values up to 255, divided by 255: worst seen 3e-7.
    np.testing.assert_allclose(device.fetch(out), expected, rtol=0, atol=1e-6)


def test_outermost_pixels_meet():
    frame = random_frame(11, 9)
    image = ops.preprocess(frame, size_hw=(33, 65), align="corners", **PLAIN)
    corners = frame[[0, 0, -1, -1], [0, -1, 0, -1]].T / 255
    np.testing.assert_allclose(image[:, [0, 0, -1, -1], [0, -1, 0, -1]], corners, rtol=1e-6)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (7, 4), (33, 33)])
@pytest.mark.parametrize("out_hw", [(1, 1), (2, 3), (61, 83), (33, 130)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_corners_of_a_grid_match_the_reference(device, grid, out_hw, dtype):
    logits = np.random.default_rng(3).standard_normal((2, 9, *grid)).astype(dtype)
    found, scores = ops.upsample_argmax(
        device.place(logits), out_hw, align="corners", with_scores=True, stream=device.stream
    )
    labels, expected = reference.upsample_argmax(logits, out_hw, align="corners", with_scores=True)
    np.testing.assert_array_equal(device.fetch(found), labels)
    np.testing.assert_array_equal(device.fetch(scores), expected)


def test_an_overlay_follows_the_alignment(device):
    logits = np.random.default_rng(3).standard_normal((1, 3, 5, 5)).astype(np.float32)
    frame, palette = random_frame(40, 52), np.uint8([[250, 0, 0], [0, 250, 0], [0, 0, 250]])
    given = [device.place(array) for array in (logits, frame, palette)]
    labels, _, picture = ops.upsample_argmax_overlay(*given, align="corners", stream=device.stream)
    expected = reference.upsample_argmax_overlay(logits, frame, palette, align="corners")
    np.testing.assert_array_equal(device.fetch(labels), expected[0])
    np.testing.assert_array_equal(device.fetch(picture), expected[2])


def test_the_reference_agrees_with_torch():
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(5).standard_normal((1, 4, 6, 9)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(logits), size=(50, 31), mode="bilinear", align_corners=True
    )
    found = reference.upsample_bilinear(logits, (50, 31), "corners")
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)  # positions in float32


def test_other_words_are_refused():
    with refused(ArgumentError, "align"):
        ops.preprocess(random_frame(4, 4), size_hw=(2, 2), align="centres", **PLAIN)
    with refused(ArgumentError, "align"):
        ops.upsample_argmax(np.zeros((1, 2, 2, 2), np.float32), (4, 4), align="corner")
