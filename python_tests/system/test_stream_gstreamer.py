"""GStreamer's pipelines and CSI cameras; RTSP cameras that are killed, frozen and started again."""

import gc
import itertools
import logging
import os
import re
import signal
import time
from functools import partial

import pytest

from support import streams
from support.gstreamer import read, reading, require_gstreamer, shown_time
from support.streams import ReaderNow, follow, label, level, numbered, write_video
from support.throttle import SlowLink
from zsseg_rt.stream.runner import Stream
from zsseg_rt.stream.uris import open_sources
from zsseg_rt.stream.watch import Patience

pytest.importorskip("av")

LIVE = "gst:videotestsrc is-live=true"
OTHER = "test://?size=64x48&rate=50"


@pytest.fixture(autouse=True)
def _has_gstreamer():
    require_gstreamer()


def ordered(values):
    """Whether none is missing, repeated or behind a greater one."""
    return None not in values and values == sorted(set(values))


@pytest.mark.parametrize(("order", "colour"), [("rgb", [255, 0, 0]), ("bgr", [0, 0, 255])])
def test_a_live_pipeline_gives_frames_in_the_order_asked_for(order, colour):
    begun = time.monotonic()
    run = read(f"{LIVE} pattern=red ! video/x-raw,width=322,height=241", 5, "--order", order)
    assert len(run.frames) == 5
    for frame in run.frames:
        assert (frame["shape"], frame["clock"]) == ([241, 322, 3], "pipeline")  # rows are padded
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


def test_what_fails_is_told_with_its_remedy():
    run = read(list(FAILURES), 9)
    assert "hush" not in run.log + str(run.ends)
    for end, (error, reason) in zip(run.ends, FAILURES.values(), strict=True):
        assert (end["error"], reason in end["message"]) == (error, True), end


def test_a_csi_camera_s_own_pipeline_runs():
    uris = ["csi://0?size=320x240&rate=29.97", "csi://0?size=320x240&flip=2", "csi://1"]
    run = read(uris, 3, "--jetson", "nvarguscamerasrc", "nvvidconv")
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
    pipeline = "gst-file:videotestsrc num-buffers=20 ! videoconvert ! appsink"
    file = read(pipeline, 40, "--slow", "0.02")
    assert {p["dropped"] for p in file.frames} == {0}
    assert len(file.frames) == 20


@pytest.fixture(params=["gstreamer", "pyav"])
def library(request):
    return {"ZSSEG_RTSP_LIBRARY": request.param}


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_every_picture_is_one_that_the_camera_made(rtsp_cameras, codec, library):
    started = time.monotonic()
    frames = read(rtsp_cameras(codec=codec).url, 20, **library).frames
    times = [frame["shown"] for frame in frames]
    assert len(times) == 20
    assert ordered(times)
    assert started < times[0]
    for frame in frames:
        assert frame["shown"] < frame["captured_at"] < frame["taken_at"]
        assert (frame["shape"], frame["clock"]) == ([240, 320, 3], "arrival")
    assert min(frame["captured_at"] - frame["shown"] for frame in frames) < 5.0
    stamps = [p["pts"] for p in frames[1:]]  # the first one's comes with the sender's report
    assert stamps == sorted(set(stamps))


def test_the_first_picture_is_the_first_that_the_camera_made(rtsp_cameras):
    camera = rtsp_cameras(rate=5)  # whoever waits for the next key frame waits for three seconds
    pictures = open_sources(camera.url)[0].pictures(ReaderNow())
    assert shown_time(next(pictures).image) == camera.first_time()
    pictures.close()


def test_a_camera_may_change_its_size_and_its_loss_is_an_error(rtsp_cameras, library):
    camera = rtsp_cameras(sizes=("320x240", "480x384"))
    with reading(camera.url, **library) as lines:
        shown = [next(lines) for _ in range(5)]
        camera.send(signal.SIGUSR1)
        shown.append(next(line for line in lines if line.get("shape") != [240, 320, 3]))
        shown += [next(lines) for _ in range(5)]
        camera.kill()
        end = next(line for line in lines if "shape" not in line)
    assert [line["shape"] for line in shown] == [[240, 320, 3]] * 5 + [[384, 480, 3]] * 6
    assert ordered([line["shown"] for line in shown])
    assert end["error"] == "SourceError"


def test_a_login_is_needed_and_never_shown(rtsp_cameras, library):
    camera = rtsp_cameras(login="us er:p@s#s/w")
    good = camera.url.replace("//", "//us%20er:p%40s%23s%2Fw@")
    cases = {
        camera.url: r"401 Unauthorized.*\. It asks for a login",
        camera.url.replace("//", "//us%20er:hush@"): r"401 Un.*\. Check user and password",
        camera.url.replace("//", "//nobody:hush@"): r"401 Un.*\. Check user and password",
        good.replace("camera", "none"): r"404 Not Found\. Check the path",
    }
    run = read([good, *cases], 3, **library)
    assert len(run.frames) == 3
    for end, reason in zip(run.ends[1:], cases.values(), strict=True):
        assert end["error"] == "SourceError"
        assert re.search(reason, end["message"]), end
    assert not re.search("hush|p%40s|p@s", run.log + str(run.ends))


def test_a_camera_that_freezes_comes_back_and_others_go_on_meanwhile(rtsp_cameras, caplog):
    caplog.set_level(logging.INFO)
    camera = rtsp_cameras(login="user:secret")
    lose, cure = partial(camera.send, signal.SIGSTOP), partial(camera.send, signal.SIGCONT)
    uris = [camera.url.replace("//", "//user:secret@"), OTHER]
    frames, *stats = streams.lose_and_find(uris, lose, cure, stalled_after=0.7, lost_after=2.0)
    assert "secret" not in f"{stats} {caplog.text} {frames}"
    assert "none came for" in stats[0].error
    states = streams.events(caplog.messages, camera.url)
    assert states == ["running", "stalled", "lost", "running again"]
    assert ordered([shown_time(frame.image) for frame in frames])


def test_threads_and_descriptors_stay_as_many_over_reconnections(rtsp_cameras):
    def use():
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    camera, patience = rtsp_cameras(), Patience(first_retry=0.1, longest_retry=0.4)
    gc.collect()
    gc.disable()  # nothing may wait for it: it may come after hours
    try:
        with Stream(open_sources([camera.url, OTHER]), label, patience=patience) as stream:
            follow(stream, lambda: stream.stats()[OTHER].labelled > 0)
            for count in range(4):
                follow(stream, lambda: stream.stats()[camera.url].state == "running")
                if count == 1:
                    threads, descriptors = use()
                camera.kill()
                follow(stream, lambda: stream.stats()[camera.url].state == "lost")
                camera.start()
            follow(stream, lambda: stream.stats()[camera.url].reconnects == 4)
            # An old thread may be about to end.
            follow(stream, lambda: use()[0] <= threads and use()[1] <= descriptors)
    finally:
        gc.enable()


def test_what_waits_on_a_slow_link_counts_as_age(rtsp_cameras, library):
    camera = rtsp_cameras()
    with SlowLink(camera.port, bytes_per_second=4000, buffer_bytes=1 << 24) as link:
        run = read(camera.url.replace(str(camera.port), str(link.port)), 40, **library)
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
        camera.send(signal.SIGUSR1)
        end = next(line for line in lines if line.get("shape") != [240, 320, 3])
    assert "got 480x360" in end["message"]
