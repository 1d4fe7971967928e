"""preprocess: the law is ops.reference.preprocess."""

import numpy as np
import pytest

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
    ({"frame": [[0]]}, DTypeError, r"frame: expected an array, got list\."),
    ({"frame": np.zeros((4, 5, 3))}, DTypeError, r"frame: expected uint8, got float64\."),
    ({"frame": np.zeros((4, 5), np.uint8)}, ShapeError, r"shape \(\*, \*, 3\), got \(4, 5\)\."),
    ({"frame": np.zeros((4, 5, 4), np.uint8)}, ShapeError, r"frame: expected shape"),
    ({"frame": np.zeros((0, 5, 3), np.uint8)}, ShapeError, r"frame: expected sides from 1 to"),
    ({"frame": random_frame(4, 6)[:, ::2]}, ShapeError, r"frame: expected a C-contiguous array"),
    ({"size_hw": (0, 3)}, ShapeError, r"size_hw: expected sides from 1 to 32767, got \(0, 3\)\."),
    ({"size_hw": (2, -1)}, ShapeError, r"got \(2, -1\)\. Pass \(height, width\)\."),
    ({"size_hw": (2, 40000)}, ShapeError, r"size_hw: expected sides"),
    ({"std": (1, 0, 1)}, ArgumentError, r"std: expected 3 finite numbers above 0, got 0\."),
    ({"std": (1, 1)}, ArgumentError, r"std: expected 3 finite numbers above 0, got 2 numbers\."),
    ({"mean": (0, float("nan"), 0)}, ArgumentError, r"mean: expected 3 finite numbers, got nan\."),
    ({"channel_order": "rbg"}, ArgumentError, r"channel_order: expected 'rgb' or 'bgr', got 'rbg'"),
    ({"out": np.zeros((3, 2, 2), np.float32)}, ShapeError, r"out: expected shape \(3, 2, 3\), got"),
    (
        {"out": np.zeros((3, 2, 3))},
        DTypeError,
        r"out: expected float32 or float16 or bfloat16, got",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        ops.preprocess(**{**GOOD, **change})
