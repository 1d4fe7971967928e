"""GStreamer's sources against a real GStreamer: own pipelines, CSI cameras, RTSP cameras."""

import itertools
import time

import pytest

from support.gstreamer import read, reading, require_gstreamer
from support.streams import level, numbered, write_video
from support.throttle import SlowLink

LIVE = "gst:videotestsrc is-live=true"
CSI = ("nvarguscamerasrc", "nvvidconv")


@pytest.fixture(autouse=True)
def _has_gstreamer():
    require_gstreamer()


def ordered(values):
    return None not in values and values == sorted(set(values))


@pytest.mark.parametrize(("order", "colour"), [("rgb", [255, 0, 0]), ("bgr", [0, 0, 255])])
def test_a_live_pipeline_gives_frames_in_the_order_asked_for(order, colour):
    begun = time.monotonic()
    run = read(f"{LIVE} pattern=red ! video/x-raw,width=322,height=241", 5, "--order", order)
    assert [p["shape"] for p in run.frames] == [[241, 322, 3]] * 5  # rows are padded inside
    assert {p["clock"] for p in run.frames} == {"pipeline"}
    for frame in run.frames:
        assert frame["left"] == pytest.approx(colour, abs=2)
        assert frame["right"] == pytest.approx(colour, abs=2)
        assert begun < frame["captured_at"] <= frame["taken_at"]
        assert frame["writable"]
    assert ordered([p["captured_at"] for p in run.frames])
    assert ordered([p["pts"] for p in run.frames])
    assert run.frames[0]["pts"] == 0.0


def test_a_recording_gives_every_frame_and_ends(tmp_path):
    path = write_video(tmp_path / "clip.mp4", (numbered(number) for number in range(28)))
    run = read(f"gst-file:filesrc location={path} ! qtdemux ! h264parse ! avdec_h264", 100)
    levels = [p["left"][0] for p in run.frames]
    assert levels == pytest.approx([level(number) for number in range(28)], abs=3)
    assert [p["pts"] for p in run.frames] == pytest.approx([n / 10 for n in range(28)], abs=1e-3)
    assert {p["clock"] for p in run.frames} == {"file"}
    assert run.end["ended"]


FAILURES = {
    "gst:nosuch ! fakesink": ("BackendUnavailableError", "elements nosuch, found none"),
    "gst:videotestsrc ! nvvidconv": ("BackendUnavailableError", "nvidia-l4t-gstreamer"),
    "csi://0": ("BackendUnavailableError", "nvarguscamerasrc, nvvidconv: sudo apt install"),
    "gst:videotestsrc ! ! appsink": ("SourceError", "syntax error"),
    "gst:videotestsrc bogus=1 user-pw=hush": ("SourceError", 'no property "bogus"'),
    "gst:videotestsrc ! audioconvert": ("SourceError", "could not link"),
    "gst:videotestsrc ! video/x-raw,format=I420 ! appsink": ("SourceError", "in videoconvert"),
    "gst:v4l2src device=/dev/video99": ("SourceError", "No such file"),
    f"{LIVE} num-buffers=1": ("SourceError", "write gst-file: for gst:"),
    "gst-file:filesrc location=/etc/hostname ! decodebin": ("SourceError", "cannot be read"),
    "gst:rtspsrc location=rtsp://u:hush@127.0.0.1:1/ user-pw=hush ! decodebin": (
        "SourceError", "rtsp://127.0.0.1"
    ),
    "rtsp://user:hush@127.0.0.1:1/x": ("SourceError", "Connection refused. Check address and port"),
    "rtsp://user:hush@no.invalid/x": ("SourceError", "Check address and port"),
}  # fmt: skip


@pytest.fixture(scope="module")
def failures():
    require_gstreamer()
    run = read(list(FAILURES), 9)
    assert "hush" not in run.log
    return dict(zip(FAILURES, run.ends, strict=True))


@pytest.mark.parametrize("uri", FAILURES)
def test_what_fails_is_told_with_its_remedy(uri, failures):
    error, reason = FAILURES[uri]
    end = failures[uri]
    assert end["error"] == error
    assert reason in end["message"]
    assert "hush" not in end["message"] + end["name"]


def test_a_csi_camera_s_own_pipeline_runs():
    uris = ["csi://0?size=320x240&rate=29.97", "csi://0?size=320x240&flip=2", "csi://1"]
    run = read(uris, 3, "--jetson", *CSI)
    assert [end["name"] for end in run.ends] == uris
    assert {p["clock"] for p in run.frames} == {"pipeline"}
    assert [p["shape"] for p in run.frames] == [[240, 320, 3]] * 6
    for frame in run.frames[:3]:
        assert frame["left"] == pytest.approx([255, 0, 0], abs=6)
        assert frame["right"] == pytest.approx([0, 0, 255], abs=6)
    for turned in run.frames[3:]:
        assert turned["left"] == pytest.approx([0, 0, 255], abs=6)
    assert run.end["error"] == "SourceError"
    assert "No cameras available" in run.end["message"]
    assert "nvargus-daemon" in run.end["message"]


def test_frames_that_the_appsink_drops_are_counted():
    run = read(f"{LIVE} ! video/x-raw,framerate=50/1", 8, "--slow", "0.15")
    numbers = [round(p["pts"] * 50) for p in run.frames]
    gaps = [newer - older - 1 for older, newer in itertools.pairwise(numbers)]
    assert sum(gaps) > 10
    # The count comes with the next frame taken, after those that waited in the appsink's queue.
    assert sum(gaps) <= sum(p["dropped"] for p in run.frames) <= sum(gaps) + 50
    file = read(
        "gst-file:videotestsrc num-buffers=20 ! videoconvert ! appsink", 40, "--slow", "0.02"
    )
    assert {p["dropped"] for p in file.frames} == {0}
    assert len(file.frames) == 20


def test_what_waits_on_a_slow_link_counts_as_age(rtsp_cameras):
    camera = rtsp_cameras()
    with SlowLink(camera.port, bytes_per_second=4000, buffer_bytes=1 << 24) as link:
        run = read(camera.url.replace(str(camera.port), str(link.port)), 40)
    last = run.frames[-1]
    assert last["late"] > 0.5
    assert last["captured_at"] - last["shown"] < last["taken_at"] - last["shown"] - 0.5
    assert "CRITICAL" not in run.log


def test_frames_that_are_too_large_never_reach_the_decoder(rtsp_cameras):
    end = read(rtsp_cameras().url, 1, "--most-pixels", "76799").end
    assert end["error"] == "SourceError"
    assert "expected frames of at most 76799 pixels, got 320x240 = 76800" in end["message"]
    camera = rtsp_cameras(sizes=("320x240", "480x360"))
    with reading(camera.url, "--most-pixels", "76800") as lines:
        assert next(lines)["shape"] == [240, 320, 3]
        camera.change_size()
        end = next(line for line in lines if line.get("shape") != [240, 320, 3])
    assert "got 480x360" in end["message"]
