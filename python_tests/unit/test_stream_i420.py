"""Images as video encoders take them, against the standard's arithmetic."""

import numpy as np
import pytest

from zsseg_rt.stream.conversion import i420

# ITU-R BT.601, limited range: rows Y, U, V from R, G, B in [0, 255].
MATRIX = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]])
OFFSET = np.array([16.0, 128.0, 128.0])


def expected_planes(rgb):
    """Y per pixel, U and V as the mean over each 2x2 pixels; float64."""
    yuv = rgb.astype(np.float64) / 255.0 @ MATRIX.T + OFFSET
    height, width = rgb.shape[:2]
    means = yuv.reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3))
    return yuv[..., 0], means[..., 1], means[..., 2]


def split(planes):
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    u, v = planes[height:].reshape(2, height // 2, width // 2)
    return planes[:height], u, v


@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
@pytest.mark.parametrize("size_hw", [(2, 2), (2, 6), (6, 2), (34, 50), (50, 322), (720, 1280)])
def test_planes_are_those_of_the_standard(size_hw, channel_order):
    rgb = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    image = rgb if channel_order == "rgb" else np.ascontiguousarray(rgb[..., ::-1])
    planes = split(i420(image, channel_order))
    for found, expected in zip(planes, expected_planes(rgb), strict=True):
        # Rounded twice: the mean of four pixels, then 10-bit weights.
        assert np.abs(found - expected).max() <= 2.0
        assert np.abs(found - expected).mean() <= 0.5


@pytest.mark.parametrize("size_hw", [(1, 1), (47, 63), (48, 63), (47, 64)])
def test_odd_sides_repeat_their_last_row_or_column(size_hw):
    rgb = np.random.default_rng(1).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    even = np.pad(rgb, ((0, size_hw[0] % 2), (0, size_hw[1] % 2), (0, 0)), mode="edge")
    np.testing.assert_array_equal(i420(rgb, "rgb"), i420(even, "rgb"))
