"""Overlays of frames on a GPU stay there up to the encoder, with stand-ins for NVIDIA's parts.

The GPU is the emulated one; GStreamer's own libgstcuda runs on a stand-in for the driver.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import require_cuda
from support import nvidia_stand_in
from support.cuda_counts import counts_reader
from support.gstreamer import WITHIN, OverlayServer, environment, require_gstreamer, watch

pytest.importorskip("av")
pytestmark = pytest.mark.needs_cuda

ADDRESS = "rtsp://@127.0.0.1:0/seg"
TOLD = "through the CPU's memory"
CUDA, NVMM = ("nvh264enc",), ("nvv4l2h264enc", "nvvidconv")
FREE = {"memories": 0, "surfaces": 0, "images": 0, "resources": 0}
JPEGS = Path(nvidia_stand_in.__file__).with_name("gpu_jpegs.py")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    require_cuda()
    counts_reader()  # skips on a real GPU
    require_gstreamer()
    return nvidia_stand_in.build(tmp_path_factory.mktemp("nvidia"))


@pytest.fixture(scope="module")
def expected():
    """The picture that x264 makes of an overlay in the CPU's memory."""
    require_gstreamer()
    with OverlayServer(ADDRESS) as server, watch(server.url()) as seen:
        return [next(seen) for _ in range(3)][-1].astype(int)


@pytest.fixture
def serve(library, tmp_path):
    """Starts servers of frames on the GPU that end with the test."""
    running = []
    (tmp_path / "v4l2-nvenc").touch()

    def start(elements, *options):
        nvenc = ("--nvenc", str(tmp_path / "v4l2-nvenc"))
        given = ("--jetson", *elements, *nvenc, "--nvidia", str(library), *options)
        running.append(OverlayServer(ADDRESS, *given))
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


def is_close(image, expected):
    """Within what H.264 loses, which is most at edges."""
    away = np.abs(image.astype(int) - expected)
    return image.shape == expected.shape and away.mean() < 3 and np.median(away) <= 4


def held(facts):
    return {name: facts["held"][name] for name in FREE}


@pytest.mark.parametrize(
    ("elements", "path", "options"),
    [(CUDA, "cuda", ()), (CUDA, "cuda", ("--order", "bgr")), (NVMM, "nvmm", ()),
     (NVMM, "nvmm", ("--blocks",))],
)  # fmt: skip
def test_no_picture_is_fetched_and_all_memory_is_freed(serve, expected, elements, path, options):
    server = serve(elements, *options)
    with watch(server.url()) as seen:
        assert is_close([next(seen) for _ in range(3)][-1], expected)
        begun = server.facts()
        later = server.wait_until(lambda facts: facts["written"] >= begun["written"] + 10)
        frames = (later["held"]["copies"] - begun["held"]["copies"]) / 2
        assert frames == pytest.approx(later["written"] - begun["written"], abs=1)
        assert later["cuda"]["copies_to_host"] == begun["cuda"]["copies_to_host"]
        assert (later["path"], later["painted"]) == (path, "gpu")
        assert held(later) != FREE
    server.wait_until(lambda facts: held(facts) == FREE)  # nobody watches
    with watch(server.url()) as again:
        assert is_close([next(again) for _ in range(3)][-1], expected)
        server.close()
    assert held(server.last) == FREE
    assert TOLD not in server.log
    assert "not mine" not in server.log
    assert "CRITICAL" not in server.log  # GStreamer's word on calls that it refuses


@pytest.mark.parametrize(
    ("elements", "fails", "call"),
    [
        (NVMM, 1, "NvBufSurfaceMapEglImage: expected 0, got -1"),
        (NVMM, 2, "cuGraphicsEGLRegisterImage: expected 0, got 999"),
        (NVMM, 3, "cuMemcpy2DAsync_v2: expected 0, got 1"),
        (NVMM, 5, "NvBufSurfaceCreate: expected 0, got -1"),
        (NVMM, nvidia_stand_in.ABSENT, "NvBufSurfaceMapEglImage: expected it in libabsent.so"),
        (CUDA, 3, "cuMemcpy2DAsync_v2: expected 0, got 1"),
        (CUDA, 6, "gst_buffer_pool_set_config: expected 1, got 0"),
        (CUDA, 7, "cuDevicePrimaryCtxRetain: expected 0, got 101"),
        (CUDA, nvidia_stand_in.ABSENT, "gst_cuda_load_library: expected it in libabsent.so"),
    ],
)
def test_what_fails_is_told_once_and_pictures_pass_the_cpu(serve, expected, elements, fails, call):
    server = serve(elements, "--fails", str(fails))
    with watch(server.url()) as seen:
        assert is_close([next(seen) for _ in range(3)][-1], expected)
    facts = server.facts()
    assert (facts["path"], held(facts)) == ("host", FREE)
    server.close()
    assert server.log.count(TOLD) == 1
    assert call in server.log


@pytest.mark.parametrize("elements", [CUDA, NVMM])
def test_a_failure_at_a_later_frame_cuts_nobody_off(serve, expected, elements):
    server = serve(elements)
    with watch(server.url()) as seen:
        assert is_close([next(seen) for _ in range(3)][-1], expected)
        server.tell("fail 3")
        facts = server.wait_until(lambda facts: facts["path"] == "host")
        server.wait_until(lambda facts: held(facts) == FREE)
        for _ in range(facts["written"] + 10):  # what was on its way is shown first
            image = next(seen)
        assert is_close(image, expected)
    server.close()
    assert server.log.count(TOLD) == 1


@pytest.mark.parametrize("elements", [CUDA, NVMM])
def test_sources_and_their_viewers_share_no_memory(serve, expected, elements):
    server = serve(elements)
    server.tell("source second")
    begun = server.facts()["written"]
    server.wait_until(lambda facts: facts["written"] >= begun + 2)
    with watch(server.url("seg")) as first, watch(server.url("seg-2")) as second:
        with watch(server.url("seg")) as another:
            assert is_close([next(another) for _ in range(3)][-1], expected)
        assert is_close([next(first) for _ in range(20)][-1], expected)
        assert is_close([next(second) for _ in range(20)][-1], expected)
        assert server.facts()["configure"] == 2
    server.close()
    assert held(server.last) == FREE
    # GLib-GIO's own: an RTSP server may part with a viewer while it reads what he says.
    told = [line for line in server.log.splitlines() if "CRITICAL" in line]
    assert [line for line in told if "g_pollable_input_stream_read" not in line] == []


def test_a_new_size_takes_new_memory_and_frees_the_old(serve):
    server = serve(CUDA, "--size", "240x320")
    with watch(server.url()) as seen:
        assert next(seen).shape == (240, 320, 3)
        server.tell("size 181x303")
        changed = next(image for image in seen if image.shape != (240, 320, 3))
        assert changed.shape == (182, 304, 3)
        assert server.facts()["path"] == "cuda"
    server.close()
    assert held(server.last) == FREE


def encode_jpegs(library, *options, **variables):
    call = [sys.executable, str(JPEGS), *options, "--nvidia", str(library)]
    done = subprocess.run(
        call, capture_output=True, text=True, check=False, timeout=WITHIN,
        env=environment(ZSSEG_EXTENSION=os.environ["ZSSEG_EXTENSION"], **variables),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.parametrize("elements", [("nvjpegenc",), ("board:nvjpegenc",)])
def test_the_page_s_jpegs_are_encoded_from_the_gpu(library, elements):
    sizes = ("96x130", "64x80", "96x130", "95x131")
    told, log = encode_jpegs(library, *sizes, "--elements", *elements)
    assert [facts["shape"][:2] for facts in told] == [[96, 130], [64, 80], [96, 130], [95, 131]]
    assert all(facts["away"] < 1 for facts in told)  # of the GPU's rounding
    assert [facts["fetched"] for facts in told] == [0, 0, 0, 1]  # odd sides are OpenCV's
    assert [facts["copies"] for facts in told] == [6, 12, 18, 18]
    assert TOLD not in log


@pytest.mark.parametrize(
    ("elements", "fetched"),
    [
        (("nvjpegenc", "cudascale"), 0),
        (("board:nvjpegenc", "scaler:nvvidconv"), 0),
        (("nvjpegenc",), 1),
    ],
)
def test_what_is_too_large_is_made_smaller_on_the_gpu(library, elements, fetched):
    told, _ = encode_jpegs(library, "200x300", "--longest", "150", "--elements", *elements)
    assert told[0]["shape"] == [100, 150, 3]
    assert told[0]["away"] < 2
    assert told[0]["fetched"] == 0  # the host's path scales the CPU's own frame
    assert (told[0]["copies"] == 0) == (fetched == 1)


def test_a_jpeg_that_fails_there_is_encoded_from_the_cpu_s_memory(library):
    options = ("--elements", "nvjpegenc", "--fails-at", "1")
    told, log = encode_jpegs(library, *["96x130"] * 4, *options)
    assert [facts["copies"] for facts in told] == [6] * 4
    assert all(facts["away"] < 2 for facts in told)
    assert {name: told[-1][name] for name in FREE} == FREE
    assert log.count(TOLD) == 1
