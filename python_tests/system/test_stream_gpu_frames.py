"""Frames on their way to a GPU: uploaded as they were decoded, in one copy."""

import numpy as np
import pytest

from support.gstreamer import read, require_gstreamer
from support.host_arrays import HostArray, host_core
from zsseg_rt import Nv12Frame, ops
from zsseg_rt.ops import reference
from zsseg_rt.stream.conversion import Converter, Uploads, host_picture
from zsseg_rt.stream.runner import on_device
from zsseg_rt.stream.uris import open_sources

av = pytest.importorskip("av")


@pytest.mark.parametrize(("size", "planes"), [("64x48", [[48, 64], [24, 32, 2]]), ("63x47", [])])
def test_frames_of_gstreamer_are_uploaded_as_they_were_decoded(size, planes):
    """Odd sizes have no colour of their own for the last pixels: they go as RGB."""
    require_gstreamer()
    width, height = size.split("x")
    caps = f"video/x-raw,format=I420,width={width},height={height}"
    run = read(f"gst:videotestsrc is-live=true pattern=red ! {caps}", 2, "--on-gpu")
    assert [p["planes"] for p in run.frames] == [planes] * 2
    assert run.frames[0]["left"] == pytest.approx([255, 0, 0], abs=6)


def test_colours_that_no_kernel_knows_are_converted_by_gstreamer():
    require_gstreamer()
    caps = "video/x-raw,format=NV12,width=64,height=48,colorimetry=bt2020"
    run = read(f"gst-file:videotestsrc pattern=red ! {caps}", 12, "--on-gpu")
    assert [p["planes"] for p in run.frames] == [[]] * 12
    assert run.log.count("neither BT.601 nor BT.709") == 1
    assert run.log.count("by sample") <= 6  # those in the queue; then the pipeline converts
    assert run.frames[0]["left"] == run.frames[-1]["left"] == pytest.approx([248, 0, 0], abs=10)


def test_a_jetson_s_decoder_s_frames_are_uploaded(rtsp_cameras):
    elements = ("--jetson", "nvv4l2decoder", "nvvidconv")
    run = read(rtsp_cameras().url, 5, "--on-gpu", *elements)
    times = [p["shown"] for p in run.frames]
    assert times == sorted(set(times))
    assert "H.264 decoded by nvv4l2decoder" in run.log


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt601-full", "bt709-full"])
def test_the_picture_for_the_cpu_is_what_the_kernels_see(matrix, order):
    rng = np.random.default_rng(0)
    luma = rng.integers(16, 236, (30, 46), np.uint8)
    chroma = rng.integers(16, 241, (15, 23, 2), np.uint8)
    planes = [HostArray(plane.shape) for plane in (luma, chroma)]
    planes[0].array[:], planes[1].array[:] = luma, chroma
    plain = {"size_hw": luma.shape, "mean": (0, 0, 0), "std": (1, 1, 1)}
    exact = reference.preprocess((luma, chroma), colour_matrix=matrix, **plain)
    exact = np.rint(255 * exact).transpose(1, 2, 0)[..., :: 1 if order == "rgb" else -1]
    image = host_picture(Nv12Frame(*planes, matrix), order)
    assert (image.dtype, image.flags.c_contiguous) == (np.uint8, True)
    np.testing.assert_array_equal(image, exact)


@pytest.mark.parametrize(
    ("kind", "size", "matrix"),
    [
        ("yuv420p", (70, 48), "bt601"), ("nv12", (70, 48), "bt601"),
        ("yuvj420p", (70, 48), "bt601-full"),
        ("yuv422p", (70, 48), None), ("yuv420p", (69, 47), None),
    ],
)  # fmt: skip
def test_a_decoded_frame_is_uploaded_as_it_is_or_converted_first(monkeypatch, kind, size, matrix):
    monkeypatch.setattr(ops, "core", host_core())
    frame, rng = av.VideoFrame(*size, kind), np.random.default_rng(0)
    for plane in frame.planes:
        plane.update(rng.integers(0, 256, plane.buffer_size, np.uint8).tobytes())
    fields = Converter("bgr", turns=False, device="cuda:0").take(frame)
    if matrix is None:
        expected = Converter("bgr", turns=False).take(frame)["image"]
        np.testing.assert_array_equal(fields["on_gpu"].array, expected)
        np.testing.assert_array_equal(fields["image"](), expected)
        return
    assert fields["on_gpu"].colour_matrix == matrix
    if kind != "yuvj420p":
        decoded = frame.reformat(format="nv12").to_ndarray()
        np.testing.assert_array_equal(fields["on_gpu"].luma.array, decoded[:48])
        np.testing.assert_array_equal(fields["on_gpu"].chroma.array.reshape(24, 70), decoded[48:])


@pytest.mark.parametrize("integrated", [False, True])
def test_frames_stay_what_they_were_though_memory_is_used_again_or_shared(monkeypatch, integrated):
    monkeypatch.setattr(ops, "core", host_core(integrated=integrated))
    HostArray.uploads = 0
    uploads = Uploads("cuda:0", "rgb")
    frames = [uploads.image(np.full((4, 6, 3), number, np.uint8))["on_gpu"] for number in range(3)]
    assert [set(frame.array.ravel().tolist()) for frame in frames] == [{0}, {1}, {2}]
    assert HostArray.uploads == (0 if integrated else 3)  # a Jetson's GPU reads in place


def test_sources_that_can_hand_frames_to_a_gpu_are_told_which(tmp_path):
    uris = ["rtsp://cam/1", "csi://0", "0", "gst:videotestsrc", str(tmp_path / "a.mp4"), "a.jpg"]
    sources = on_device(open_sources(uris), "cuda:1")
    assert [getattr(source, "device", None) for source in sources] == ["cuda:1"] * 5 + [None]
