"""Overlays on a GPU to NVIDIA's own encoders, on a machine that has them.

Needs GStreamer with nvcodec or a Jetson's elements, PyAV and OpenCV.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import require_cuda
from support import gstreamer

pytestmark = pytest.mark.needs_cuda

JPEGS = Path(gstreamer.__file__).with_name("gpu_jpegs.py")
TOLD = "through the CPU's memory"
WHICH = """
from zsseg_rt.stream.gstreamer import encoders, jpeg
from zsseg_rt.stream.gstreamer.library import load
gst = load().Gst
print(encoders.encoder_of(gst), jpeg.ENCODER if jpeg.has_nvjpeg(gst) else "none")
"""


@pytest.fixture(scope="module")
def encoders():
    """The elements that encode H.264 and JPEGs here."""
    require_cuda()
    for package in ("av", "cv2", "uvicorn"):
        pytest.importorskip(package)
    gstreamer.require_gstreamer()
    call = [sys.executable, "-c", WHICH]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()


def picture_of(*options):
    """What a viewer sees, how it reached the encoder, and the log."""
    with gstreamer.OverlayServer("rtsp://@127.0.0.1:0/seg", *options) as server:
        with gstreamer.watch(server.url()) as seen:
            image = [next(seen) for _ in range(10)][-1].astype(int)
        path = server.facts()["path"]
        server.close()
    return image, path, server.log


def test_h264_is_encoded_from_the_gpu(encoders):
    if encoders[0] == "x264enc":
        pytest.skip("no encoder of NVIDIA's found")
    image, path, log = picture_of("--on-gpu")
    assert path in ("cuda", "nvmm"), log
    away = np.abs(image - picture_of()[0])
    assert away.mean() < 3  # H.264's loss, of two encoders


def test_jpegs_are_encoded_from_the_gpu(encoders):
    if encoders[1] == "none":
        pytest.skip("no nvjpegenc found")
    call = [sys.executable, str(JPEGS), "480x640", "240x320", "1080x1920"]
    done = subprocess.run(
        call, capture_output=True, text=True, check=False, timeout=gstreamer.WITHIN
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [facts["shape"][:2] for facts in told] == [[480, 640], [240, 320], [720, 1280]]
    assert all(facts["away"] < 3 for facts in told)  # two encoders, and two ways to make it smaller
    assert TOLD not in done.stderr
