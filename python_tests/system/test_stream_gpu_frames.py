"""Frames that stay in a GPU's memory, from GStreamer to arrays of ours, with NVIDIA's stand-ins."""

import numpy as np
import pytest

from support import nvidia_stand_in
from support.gstreamer import read, require_gstreamer
from zsseg_rt import Nv12Frame
from zsseg_rt.ops import reference
from zsseg_rt.stream.conversion import host_picture

CSI = ("nvarguscamerasrc", "nvvidconv")
DECODER = ("nvv4l2decoder", "nvvidconv")
RED_AND_BLUE = ([255, 0, 0], [0, 0, 255])
BT601, NV12_10LE = 6, 29  # of NvBufSurfaceColorFormat


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    require_gstreamer()
    return nvidia_stand_in.build(tmp_path_factory.mktemp("nvidia"))


def read_on_gpu(uri, count, library, *options, elements=CSI):
    given = ("--jetson", *elements, "--nvidia", str(library), "--colour", str(BT601), *options)
    return read(uri, count, *given)


def test_a_csi_camera_s_frames_are_copied_within_the_gpu(library):
    told = read_on_gpu("csi://0?size=322x240", 3, library)
    assert {p["path"] for p in told.pictures} == {"nvmm"}
    assert told.pictures[0]["planes"] == [[240, 322], [120, 161, 2]]
    for picture in told.pictures:
        assert picture["shape"] == [240, 322, 3]
        assert picture["left"] == pytest.approx(RED_AND_BLUE[0], abs=6)
        assert picture["right"] == pytest.approx(RED_AND_BLUE[1], abs=6)
        assert picture["clock"] == "pipeline"
    assert told.stand_in == {"images": 0, "resources": 0, "copies": 6}
    assert "CPU" not in told.log


def test_frames_in_blocks_are_copied_as_arrays(library):
    told = read_on_gpu("csi://0?size=320x240", 2, library, "--blocks")
    assert {p["path"] for p in told.pictures} == {"nvmm"}
    assert told.pictures[0]["left"] == pytest.approx(RED_AND_BLUE[0], abs=6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--fails", "1"), "NvBufSurfaceMapEglImage: expected 0, got -1"),
        (("--fails", "2"), "cuGraphicsEGLRegisterImage: expected 0, got 999"),
        (("--fails", "3"), "cuMemcpy2DAsync_v2: expected 0, got 1"),
        (
            ("--fails", str(nvidia_stand_in.ABSENT)),
            "libabsent.so: expected NVIDIA's library, found none",
        ),
        (("--colour", str(NV12_10LE)), "expected NV12, got colour format 29"),
    ],
)
def test_a_frame_that_cannot_be_mapped_changes_the_path_once_and_is_told(library, options, reason):
    told = read_on_gpu("csi://0?size=320x240", 2, library, *options, "--opened", "2")
    assert [p["path"] for p in told.pictures] == ["host"] * 4
    assert told.pictures[0]["left"] == pytest.approx(RED_AND_BLUE[0], abs=6)
    assert told.log.count("frames pass through the CPU's memory") == 1
    assert reason in told.log
    assert told.stand_in["images"] == told.stand_in["resources"] == 0


def test_the_environment_may_keep_frames_in_the_cpu_s_memory(library):
    given = ("--jetson", *CSI, "--nvidia", str(library))
    told = read("csi://0?size=320x240", 1, *given, ZSSEG_CAMERA_FRAMES="host")
    assert [p["path"] for p in told.pictures] == ["host"]
    assert told.pictures[0]["left"] == pytest.approx(RED_AND_BLUE[0], abs=6)
    assert "pass through" not in told.log


def test_an_absent_camera_is_no_reason_for_the_other_path(library):
    told = read_on_gpu("csi://1", 1, library)
    assert "No cameras available" in told.end["message"]
    assert "through the CPU" not in told.log


def test_a_jetson_s_decoder_hands_over_its_frames(rtsp_cameras, library):
    told = read_on_gpu(rtsp_cameras().url, 5, library, elements=DECODER)
    assert {p["path"] for p in told.pictures} == {"nvmm"}
    times = [p["shown"] for p in told.pictures]
    assert times == sorted(set(times))
    assert {p["clock"] for p in told.pictures} == {"arrival"}


@pytest.mark.parametrize(("size", "planes"), [("64x48", [[48, 64], [24, 32, 2]]), ("63x47", [])])
def test_frames_in_the_cpu_s_memory_are_uploaded_as_they_were_decoded(library, size, planes):
    """Odd sizes have no colour of their own for the last pixels: they go as RGB."""
    width, height = size.split("x")
    caps = f"video/x-raw,format=I420,width={width},height={height}"
    uri = f"gst:videotestsrc is-live=true pattern=red ! {caps}"
    told = read_on_gpu(uri, 2, library)
    assert {p["path"] for p in told.pictures} == {"host"}
    assert [p["planes"] for p in told.pictures] == [planes] * 2
    assert told.pictures[0]["left"] == pytest.approx(RED_AND_BLUE[0], abs=6)
    assert "CPU" not in told.log


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt601-full", "bt709-full"])
def test_the_picture_for_the_cpu_is_what_the_kernels_see(matrix, order):
    rng = np.random.default_rng(0)
    luma = rng.integers(16, 236, (30, 46), np.uint8)
    chroma = rng.integers(16, 241, (15, 23, 2), np.uint8)
    planes = [nvidia_stand_in.HostArray(plane.shape) for plane in (luma, chroma)]
    planes[0].array[:], planes[1].array[:] = luma, chroma
    plain = {"size_hw": luma.shape, "mean": (0, 0, 0), "std": (1, 1, 1)}
    exact = reference.preprocess((luma, chroma), colour_matrix=matrix, **plain)
    exact = np.rint(255 * exact).transpose(1, 2, 0)[..., :: 1 if order == "rgb" else -1]
    picture = host_picture(Nv12Frame(*planes, matrix), order)
    assert picture.dtype == np.uint8
    assert picture.flags.c_contiguous
    np.testing.assert_array_equal(picture, exact)
