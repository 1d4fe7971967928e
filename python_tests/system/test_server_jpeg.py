"""The page's JPEGs by ``nvjpegenc``, a stand-in in this process, or by OpenCV without it."""

import cv2
import numpy as np
import pytest

from support.gstreamer import require_gstreamer
from zsseg_rt.server.preview import JpegEncoder, encode_jpeg
from zsseg_rt.stream.gstreamer import jpeg

HEIGHT, WIDTH = 96, 130  # rows that GStreamer pads


@pytest.fixture(scope="module", autouse=True)
def _element():
    require_gstreamer()
    from support import jetson_elements

    jetson_elements.register("nvjpegenc")


def picture(height=HEIGHT, width=WIDTH):
    """Black, white and colours, of which limited range would lose some."""
    colours = np.array(
        [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255], [20, 200, 60]], np.uint8
    )
    return np.ascontiguousarray(np.broadcast_to(
        colours[np.arange(width) * len(colours) // width], (height, width, 3)
    ))  # fmt: skip


def decoded(data):
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).astype(int)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_a_gpu_s_jpegs_are_those_of_opencv_but_for_rounding(order, monkeypatch):
    encode, encoded = JpegEncoder("cuda:0"), []
    run = jpeg.NvJpeg._pulled
    monkeypatch.setattr(jpeg.NvJpeg, "_pulled", lambda *given: encoded.append(given) or run(*given))
    for height, width in ((HEIGHT, WIDTH), (64, 80), (HEIGHT, WIDTH)):
        image = picture(height, width)
        found, expected = (decoded(one(image, order)) for one in (encode, encode_jpeg))
        assert found.shape == expected.shape == (height, width, 3)
        assert np.abs(found - expected).mean() < 2.5
        middles = (2 * np.arange(5) + 1) * width // 10
        np.testing.assert_allclose(
            found[height // 2, middles], expected[height // 2, middles], atol=8
        )
    assert len(encoded) == 3
    assert len(encode._nvidia._pipelines) == 2


def test_what_it_does_not_take_and_an_engine_on_the_cpu_are_opencv_s(monkeypatch):
    odd, even = picture(95, 131), picture()
    assert JpegEncoder("cuda:0")(odd, "rgb") == encode_jpeg(odd, "rgb")
    assert JpegEncoder("cpu")(even, "rgb") == encode_jpeg(even, "rgb")
    monkeypatch.setattr(jpeg, "_ELEMENTS", (*jpeg._ELEMENTS, "absentelement"))
    assert JpegEncoder("cuda:0")(even, "rgb") == encode_jpeg(even, "rgb")


def test_an_encoder_that_fails_is_left_with_one_warning(monkeypatch, caplog):
    monkeypatch.setenv("NVJPEG_FAILS", "1")
    encode, image = JpegEncoder("cuda:0"), picture()
    found = [encode(image, "rgb") for _ in range(4)]
    assert found[1:] == [encode_jpeg(image, "rgb")] * 3
    assert [r.message.partition(":")[0] for r in caplog.records] == [
        "JPEGs are encoded on the CPU from now on"
    ]
    assert encode._nvidia._pipelines == {}
