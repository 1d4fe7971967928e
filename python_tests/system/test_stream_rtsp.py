"""RTSP cameras that are killed, frozen and started again, and frames that are late on the way."""

import gc
import itertools
import logging
import os
import re
import socket
import time
from functools import partial

import pytest

from support import gstreamer
from support.rtsp_camera import shown_time
from support.streams import (
    LONG,
    MjpegServer,
    ReaderNow,
    Script,
    events,
    follow,
    label,
    lose_and_find,
    numbered,
)
from zsseg_rt.errors import SourceError
from zsseg_rt.stream import video
from zsseg_rt.stream.conversion import Converter
from zsseg_rt.stream.runner import Stream
from zsseg_rt.stream.source import Lateness, Picture
from zsseg_rt.stream.uris import open_sources
from zsseg_rt.stream.watch import Patience

pytest.importorskip("av")

OTHER = "test://?size=64x48&rate=50"
SOON = Patience(first_retry=0.1, longest_retry=0.4)


def read(url, count):
    (source,) = open_sources(url)
    pictures = source.pictures(ReaderNow())
    frames = list(itertools.islice(pictures, count))
    pictures.close()
    return frames


def times_of(pictures):
    return [shown_time(picture.image) for picture in pictures]


def sound(times):
    """Whether no picture was damaged, repeated or shown after a newer one."""
    return None not in times and times == sorted(set(times))


@pytest.fixture(params=["gstreamer", "pyav"])
def library(request):
    if request.param == "gstreamer":
        gstreamer.require_gstreamer()
    return {"ZSSEG_RTSP_LIBRARY": request.param}


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_every_picture_is_one_that_the_camera_made(rtsp_cameras, codec, library):
    started = time.monotonic()
    frames = gstreamer.read(rtsp_cameras(codec=codec).url, 20, **library).frames
    times = [frame["shown"] for frame in frames]
    assert len(times) == 20
    assert sound(times)
    assert started < times[0]
    for frame in frames:
        assert frame["shown"] < frame["captured_at"] < frame["taken_at"]
        assert (frame["shape"], frame["clock"]) == ([240, 320, 3], "arrival")
    assert min(frame["captured_at"] - frame["shown"] for frame in frames) < 5.0
    stamps = [p["pts"] for p in frames[1:]]  # the first one's comes with the sender's report
    assert stamps == sorted(set(stamps))


def test_the_first_picture_is_the_first_that_the_camera_made(rtsp_cameras):
    camera = rtsp_cameras(rate=5)  # whoever waits for the next key frame waits for three seconds
    (first,) = times_of(read(camera.url, 1))
    assert first == camera.first_time()


def test_a_camera_may_change_its_size_and_its_loss_is_an_error(rtsp_cameras, library):
    camera = rtsp_cameras(sizes=("320x240", "480x384"))
    with gstreamer.reading(camera.url, **library) as lines:
        shown = [next(lines) for _ in range(5)]
        camera.change_size()
        shown.append(next(line for line in lines if line.get("shape") != [240, 320, 3]))
        shown += [next(lines) for _ in range(5)]
        camera.kill()
        end = next(line for line in lines if "shape" not in line)
    assert [line["shape"] for line in shown] == [[240, 320, 3]] * 5 + [[384, 480, 3]] * 6
    assert sound([line["shown"] for line in shown])
    assert end["error"] == "SourceError"


def test_a_login_is_needed_and_never_shown(rtsp_cameras, library):
    camera = rtsp_cameras(login="us er:p@s#s/w")
    good = "us%20er:p%40s%23s%2Fw"
    cases = {
        camera.url_for(good): "",
        camera.url: r"401 Unauthorized.*\. It asks for a login",
        camera.url_for("us%20er:hush"): r"401 Unauthorized.*\. Check user and password",
        camera.url_for("nobody:hush"): r"401 Unauthorized.*\. Check user and password",
        camera.url_for(good, "none"): r"404 Not Found\. Check the path",
    }
    run = gstreamer.read(list(cases), 3, **library)
    assert len(run.frames) == 3
    for end, reason in zip(run.ends[1:], list(cases.values())[1:], strict=True):
        assert end["error"] == "SourceError"
        assert re.search(reason, end["message"]), end
    for secret in ("hush", "p%40s", "p@s"):
        assert secret not in run.log + str(run.ends)


def test_a_camera_that_answers_nothing_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setattr(video, "OPENS_WITHIN", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"rtsp://user:secret@127.0.0.1:{silent.getsockname()[1]}/camera"
        with pytest.raises(SourceError, match="Check the address, and that the camera is on"):
            read(url, 1)


@pytest.mark.parametrize("freezes", [False, True])
def test_a_camera_that_is_lost_comes_back_and_others_go_on_meanwhile(rtsp_cameras, caplog, freezes):
    caplog.set_level(logging.INFO)
    camera = rtsp_cameras(login="user:secret")
    lose, cure = (camera.freeze, camera.thaw) if freezes else (camera.kill, camera.start)
    uris = [camera.url_for("user:secret"), OTHER]
    frames, *stats = lose_and_find(uris, lose, cure, stalled_after=0.7, lost_after=2.0)
    assert "secret" not in f"{stats} {caplog.text} {frames}"
    states = events(caplog.messages, camera.url)
    assert [event for event in states if event != "stalled"] == ["running", "lost", "running again"]
    assert not freezes or ("none came for" in stats[0].error and "stalled" in states)
    assert sound(times_of(frames))


def use():
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def test_threads_and_descriptors_stay_as_many_over_reconnections(rtsp_cameras):
    camera = rtsp_cameras()
    gc.collect()
    gc.disable()  # nothing may wait for it: it may come after hours
    try:
        with Stream(open_sources([camera.url, OTHER]), label, patience=SOON) as stream:
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


def test_lateness_is_what_a_frame_lost_against_the_best():
    def of(frames):
        lateness = Lateness()
        return [round(lateness.of(stamp, at), 2) for stamp, at in frames]

    # a slow start; then a link that carries half of what is sent; then one that catches up
    assert of([(0.0, 9.0), (1.0, 9.5), (2.0, 10.5)]) == [0.0, 0.0, 0.0]
    assert of([(n, 10.0 + 2 * n) for n in range(4)]) == [0.0, 1.0, 2.0, 3.0]
    assert of([(0, 10), (1, 13), (2, 13), (3, 13)]) == [0.0, 2.0, 1.0, 0.0]
    for jump in (-1000.0, -0.5, 1000.0):  # a source that sets its clock is not late
        frames = [(n / 10 + jump * (n >= 20), 5 + n / 10) for n in range(40)]
        assert max(of(frames)) == 0.0
    # nor is one without stamps, or with a slow crystal
    assert of([(None, 1.0), (None, 9.0)]) == [0.0, 0.0]
    assert max(of([(n * 60 * (1 - 1e-4), n * 60) for n in range(24 * 60)])) < 0.01  # a day


def late_camera(*late):
    """Its frames come so late until it is opened anew."""

    def frame(seconds):
        time.sleep(0.02)
        now = time.monotonic()
        return Picture(image=numbered(0), captured_at=now - seconds, clock="arrival", late=seconds)

    return Script("cam", *([partial(frame, at) for at in part] for part in (late, (0.0,) * 1000)))


PATIENCE = Patience(first_retry=0.0, late_by=3.0, late_for=0.3)


def test_a_camera_that_stays_behind_is_opened_anew_and_that_is_counted():
    camera = late_camera(*(4.0,) * 1000)
    with Stream([camera], label, patience=PATIENCE) as stream:
        follow(stream, lambda: stream.stats()["cam"].labelled == 2)
        assert stream.stats()["cam"].age_ms["p50"] > 4000
        follow(stream, lambda: stream.stats()["cam"].reconnects == 1)
        stats = stream.stats()["cam"]
    assert (stats.fell_behind, camera.opened, stats.error) == (1, 2, None)


@pytest.mark.parametrize(
    ("late", "policy"),
    [((2.9,) * 60, "latest"), ((4.0,) * 60, "all"), ((*(4.0,) * 5, 0.0) * 10, "latest")],
)
def test_a_camera_that_catches_up_or_must_lose_nothing_is_left_alone(late, policy):
    with Stream([late_camera(*late)], label, policy=policy, patience=PATIENCE) as stream:
        last = len(late) - 10 if policy == "latest" else len(late)
        follow(stream, lambda: stream.stats()["cam"].captured >= last)
        assert stream.stats()["cam"].fell_behind == 0


def test_a_starved_decoder_shows_and_is_shed(rtsp_cameras, monkeypatch):
    take = Converter.take

    def slowly(self, frame):
        time.sleep(0.06)  # at 30 per second there are 0.033 s for each
        return take(self, frame)

    monkeypatch.setattr(Converter, "take", slowly)
    (source,) = open_sources(rtsp_cameras().url)
    patience = Patience(first_retry=0.0, late_by=1.0, late_for=0.2)
    ages, ends_at = [], time.monotonic() + LONG
    with Stream([source], label, patience=patience) as stream:
        for seg in stream:
            now, drawn_at = time.monotonic(), shown_time(seg.frame.image)
            if drawn_at is not None:
                ages.append((now - drawn_at, now - seg.frame.captured_at))
            stats = stream.stats()[source.name]
            if stats.fell_behind and stats.reconnects:
                break
            assert now < ends_at, (stats, ages[-1])
    assert max(true for true, _ in ages[:-1]) > 1.0  # it fell behind
    assert max(true - stated for true, stated in ages) < 1.0  # and was said to
    assert ages[-1][0] < 1.5  # the first one after it was opened anew
    assert stats.age_ms["p99"] > 900


def test_jpegs_over_http_have_no_clock_and_are_never_late():
    with MjpegServer() as camera:
        camera.images.release(20)
        pictures = open_sources(camera.url)[0].pictures(ReaderNow())
        next(pictures)
        time.sleep(1.5)  # longer than the 0.04 s that FFmpeg makes up
        camera.images.release(20)
        assert max(next(pictures).late for _ in range(20)) == 0.0
        pictures.close()
