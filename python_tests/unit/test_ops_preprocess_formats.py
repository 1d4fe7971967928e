"""preprocess of NV12 frames and to half precision; the law is ops.reference.preprocess."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DeviceError, DTypeError, ShapeError
from zsseg_rt.ops import reference

CLIP = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
# Two float32 lerps of values up to 255, divided by 255 * 0.26: worst seen 1.5e-6.
TOLERANCE = 4e-6
HALF_TOLERANCE = 2e-3  # values below 4 that round to neighbouring float16 numbers


def nv12_frame(height, width):
    """Every brightness beside every colour, out of the limited range too."""
    generator = np.random.default_rng(height + width)
    return (
        generator.integers(0, 256, (height, width), np.uint8),
        generator.integers(0, 256, (height // 2, width // 2, 2), np.uint8),
    )


def placed(device, frame):
    return tuple(map(device.place, frame)) if isinstance(frame, tuple) else device.place(frame)


@pytest.mark.parametrize("frame_hw", [(2, 2), (6, 14), (210, 308)])
@pytest.mark.parametrize("size_hw", [(1, 1), (7, 13), (97, 260)])
@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt601-full", "bt709-full"])
def test_nv12_matches_reference(device, frame_hw, size_hw, matrix):
    frame = nv12_frame(*frame_hw)
    settings = {"size_hw": size_hw, "colour_matrix": matrix, **CLIP}
    out = ops.preprocess(placed(device, frame), stream=device.stream, **settings)
    assert device.holds(out)
    expected = reference.preprocess(frame, **settings)
    np.testing.assert_allclose(device.fetch(out), expected, rtol=0, atol=TOLERANCE)


def test_bt601_is_opencv_s():
    cv2 = pytest.importorskip("cv2")
    frame = nv12_frame(64, 96)
    planes = np.concatenate([frame[0], frame[1].reshape(32, 96)])
    rgb = cv2.cvtColor(planes, cv2.COLOR_YUV2RGB_NV12)
    settings = {"size_hw": (64, 96), "mean": (0, 0, 0), "std": (1, 1, 1)}
    np.testing.assert_array_equal(
        np.rint(reference.preprocess(frame, **settings) * 255), rgb.transpose(2, 0, 1)
    )


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("matrix", "weights"), [("bt601", (0.299, 0.114)),
                                                 ("bt709", (0.2126, 0.0722))])  # fmt: skip
def test_the_matrices_undo_the_standards_equations(matrix, weights, full):
    """Red and blue have these weights in brightness; 219 and 224 steps lie between the limits."""
    red, blue = weights
    matrix += "-full" if full else ""
    black, grey_steps, colour_steps = (0, 255, 255) if full else (16, 219, 224)
    rgb = np.random.default_rng(0).uniform(0.2, 0.8, (8, 3))
    luma = rgb @ np.array([red, 1 - red - blue, blue])
    u, v = (rgb[:, 2] - luma) / (2 - 2 * blue), (rgb[:, 0] - luma) / (2 - 2 * red)
    y = np.rint(black + grey_steps * luma).astype(np.uint8).repeat(2)[None].repeat(2, axis=0)
    uv = np.rint(128 + colour_steps * np.stack([u, v], -1)).astype(np.uint8)[None]
    settings = {"size_hw": (2, 16), "mean": (0, 0, 0), "std": (1, 1, 1)}
    got = reference.preprocess((y, uv), colour_matrix=matrix, **settings)
    np.testing.assert_allclose(got[:, 0, ::2].T, rgb, atol=0.012)  # rounded to bytes three times


@pytest.mark.usefixtures("cpu_isa", "num_threads")
def test_every_instruction_set_and_thread_count():
    frame = nv12_frame(480, 642)
    out = ops.preprocess(frame, size_hw=(509, 383), **CLIP)
    expected = reference.preprocess(frame, size_hw=(509, 383), **CLIP)
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)
    half = np.full((3, 509, 383), np.nan, np.float16)
    ops.preprocess(frame, size_hw=(509, 383), out=half, **CLIP)
    np.testing.assert_array_equal(half, out.astype(np.float16))


@pytest.mark.parametrize("size_hw", [(29, 23), (30, 64), (1, 131)])
@pytest.mark.parametrize("nv12", [False, True])
def test_a_half_precision_result_is_the_rounded_one(device, size_hw, nv12):
    frame = nv12_frame(34, 46) if nv12 else np.stack([nv12_frame(34, 46)[0]] * 3, -1)
    out = device.poisoned((3, *size_hw), np.float16)
    result = ops.preprocess(
        placed(device, frame), size_hw=size_hw, out=out, stream=device.stream, **CLIP
    )
    assert result is out
    expected = reference.preprocess(frame, size_hw=size_hw, **CLIP)
    np.testing.assert_allclose(device.fetch(out), expected, rtol=0, atol=HALF_TOLERANCE)
    same = reference.preprocess(frame, size_hw=size_hw, out=np.empty_like(expected, "f2"), **CLIP)
    assert same.dtype == np.float16


LUMA, CHROMA = nv12_frame(4, 6)
GOOD = {"frame": (LUMA, CHROMA), "size_hw": (2, 3), **CLIP}
BAD = [
    ({"frame": (LUMA,)}, ArgumentError, "frame"),
    ({"frame": (LUMA, [1])}, DTypeError, "frame[1]"),
    ({"frame": (LUMA.astype("u2"), CHROMA)}, DTypeError, "frame[0]"),
    ({"frame": (LUMA, CHROMA.astype("u2"))}, DTypeError, "frame[1]"),
    (
        {"frame": (LUMA[0], CHROMA)},
        ShapeError,
        "frame[0]",
    ),
    ({"frame": (LUMA, LUMA)}, ShapeError, "frame[1]"),
    (
        {"frame": (LUMA[:3], CHROMA)},
        ShapeError,
        "frame[0]",
    ),
    ({"frame": (LUMA[:0], CHROMA)}, ShapeError, "frame"),
    ({"channel_order": "bgr"}, ArgumentError, "channel_order"),
    ({"colour_matrix": "bt2020"}, ArgumentError, "colour_matrix"),
    ({"out": np.zeros((3, 2, 2), np.float16)}, ShapeError, "out"),
]


@pytest.mark.parametrize(("change", "error", "argument"), BAD)
def test_bad_arguments_are_refused(change, error, argument):
    with refused(error, argument):
        ops.preprocess(**{**GOOD, **change})


@pytest.mark.needs_cuda
def test_planes_of_two_devices_are_refused(device):
    if device.name == "cpu":
        pytest.skip("needs arrays on a GPU")
    with refused(DeviceError, "frame[1]"):
        ops.preprocess((device.place(LUMA), CHROMA), size_hw=(2, 3), **CLIP)
