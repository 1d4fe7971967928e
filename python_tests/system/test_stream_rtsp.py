"""Network cameras over RTSP: a real server that is killed, frozen and started again."""

import gc
import itertools
import logging
import os
import socket
import time

import pytest

from support.rtsp_camera import shown_time
from support.streams import ReaderNow, follow, label
from zsseg_rt.errors import SourceError
from zsseg_rt.stream import video
from zsseg_rt.stream.runner import Stream
from zsseg_rt.stream.uris import open_sources
from zsseg_rt.stream.watch import Patience

pytest.importorskip("av")

OTHER = "test://?size=64x48&rate=50"
SOON = Patience(first_retry=0.1, longest_retry=0.4)


def read(url, count):
    """So many pictures of a camera."""
    (source,) = open_sources(url)
    pictures = source.pictures(ReaderNow())
    found = list(itertools.islice(pictures, count))
    pictures.close()
    return found


def times_of(pictures):
    return [shown_time(picture.image) for picture in pictures]


def sound(times):
    """Whether no picture was damaged, repeated or shown after a newer one."""
    return None not in times and times == sorted(set(times))


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_every_picture_is_one_that_the_camera_made(rtsp_cameras, codec):
    started = time.monotonic()
    found = read(rtsp_cameras(codec=codec).url, 20)
    times = times_of(found)
    assert sound(times)
    assert started < times[0]
    assert all(made < p.captured_at for made, p in zip(times, found, strict=True))
    assert min(p.captured_at - made for made, p in zip(times, found, strict=True)) < 5.0
    assert {p.clock for p in found} == {"arrival"}
    assert {p.image.shape for p in found} == {(240, 320, 3)}
    stamps = [p.pts_seconds for p in found[1:]]  # the first one's comes with the sender's report
    assert stamps == sorted(set(stamps))


def test_the_first_picture_is_the_first_that_the_camera_made(rtsp_cameras):
    camera = rtsp_cameras(rate=5)  # whoever waits for the next key frame waits for three seconds
    (first,) = times_of(read(camera.url, 1))
    assert first == camera.first_made()


def test_a_camera_may_change_its_size(rtsp_cameras):
    camera = rtsp_cameras(sizes=("320x240", "480x384"))
    (source,) = open_sources(camera.url)
    pictures = source.pictures(ReaderNow())
    found = list(itertools.islice(pictures, 5))
    camera.change_size()
    for picture in pictures:
        found.append(picture)
        if len(found) > 5 and found[-5].image.shape == (384, 480, 3):
            break
        assert len(found) < 500
    pictures.close()
    assert sound(times_of(found))
    assert {p.image.shape for p in found} == {(240, 320, 3), (384, 480, 3)}


@pytest.mark.parametrize("password", ["secret", "p%40ss:secret%20word"])
def test_who_knows_the_password_is_let_in(rtsp_cameras, password):
    camera = rtsp_cameras(login="user:p@ss:secret word" if "%" in password else "user:secret")
    url = camera.url_for(f"user:{password}")
    assert sound(times_of(read(url, 3)))
    assert "secret" not in open_sources(url)[0].name


@pytest.mark.parametrize(
    ("login", "path", "told"),
    [
        ("user:wrong-secret", "camera", "401 Unauthorized .*Check user and password"),
        (None, "camera", "401 Unauthorized .*It asks for a login"),
        ("nobody:secret", "camera", "401 Unauthorized .*Check user and password"),
        ("user:secret", "absent", "404 Not Found. Check the path"),
    ],
)
def test_a_camera_that_refuses_is_told_with_its_remedy(rtsp_cameras, capfd, login, path, told):
    camera = rtsp_cameras(login="user:secret")
    with pytest.raises(SourceError, match=told) as raised:
        next(Stream(open_sources(camera.url_for(login, path)), label))
    assert "secret" not in str(raised.value)
    assert raised.value.__suppress_context__
    assert "secret" not in "".join(capfd.readouterr())


def test_a_camera_that_answers_nothing_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setattr(video, "OPENS_WITHIN", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"rtsp://user:secret@127.0.0.1:{silent.getsockname()[1]}/camera"
        with pytest.raises(SourceError, match="Check the address, and that the camera is on"):
            read(url, 1)


def events(caplog, name):
    """What the log says of a source: the first word of each line."""
    lines = [record.getMessage() for record in caplog.records]
    return [line.removeprefix(f"{name}: ").split(":")[0] for line in lines if name in line]


def test_a_camera_that_dies_comes_back_and_others_go_on_meanwhile(rtsp_cameras, caplog):
    caplog.set_level(logging.INFO)
    camera = rtsp_cameras(login="user:secret")
    sources = open_sources([camera.url_for("user:secret"), OTHER])
    name = sources[0].name
    with Stream(sources, label, patience=SOON) as stream:
        frames = follow(stream, lambda: stream.stats()[name].labelled >= 5)
        camera.kill()
        frames += follow(stream, lambda: stream.stats()[name].state == "lost")
        others = stream.stats()[OTHER].labelled
        frames += follow(stream, lambda: stream.stats()[OTHER].labelled >= others + 50)
        camera.start()
        frames += follow(stream, lambda: stream.stats()[name].reconnects == 1)
        back_at = stream.stats()[name].labelled
        frames += follow(stream, lambda: stream.stats()[name].labelled >= back_at + 5)
        stats = stream.stats()
    assert "secret" not in f"{stats} {caplog.text} {frames}"
    assert (stats[name].state, stats[name].error) == ("running", None)
    seen = [event for event in events(caplog, name) if event != "stalled"]
    assert seen.count("lost") == 1
    assert seen[0] == "running"
    assert seen[-1] == "running again"
    mine = [frame for frame in frames if frame.source == name]
    assert sound(times_of(mine))
    assert_counted(mine)


def assert_counted(frames):
    """Every index is either there or counted as dropped."""
    for older, newer in itertools.pairwise(frames):
        assert newer.index == older.index + 1 + newer.dropped_before


def test_a_camera_that_freezes_is_stalled_then_lost_then_back(rtsp_cameras, caplog):
    caplog.set_level(logging.INFO)
    camera = rtsp_cameras()
    patience = Patience(stalled_after=1.0, lost_after=3.0, first_retry=0.1, longest_retry=0.4)
    with Stream(open_sources([camera.url, OTHER]), label, patience=patience) as stream:
        frames = follow(stream, lambda: stream.stats()[camera.url].labelled >= 5)
        camera.freeze()
        frames += follow(stream, lambda: stream.stats()[camera.url].state == "stalled")
        frames += follow(stream, lambda: stream.stats()[camera.url].state == "lost")
        assert "none came for" in stream.stats()[camera.url].error
        others = stream.stats()[OTHER].labelled
        frames += follow(stream, lambda: stream.stats()[OTHER].labelled >= others + 20)
        camera.thaw()
        frames += follow(stream, lambda: stream.stats()[camera.url].reconnects == 1)
        frames.append(next(stream).frame)
        stats = stream.stats()[camera.url]
    assert (stats.state, stats.error) == ("running", None)
    seen = events(caplog, camera.url)
    assert seen.count("lost") == 1
    assert seen.index("stalled") < seen.index("lost") < seen.index("running again")
    mine = [frame for frame in frames if frame.source == camera.url]
    assert sound(times_of(mine))
    assert_counted(mine)


def use():
    """Threads and descriptors of this process."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def test_threads_and_descriptors_stay_as_many_over_reconnections(rtsp_cameras):
    camera = rtsp_cameras()
    gc.collect()
    gc.disable()  # nothing may wait for it: it may come after hours
    try:
        with Stream(open_sources([camera.url, OTHER]), label, patience=SOON) as stream:
            follow(stream, lambda: stream.stats()[OTHER].labelled > 0)
            for count in range(8):
                follow(stream, lambda: stream.stats()[camera.url].state == "running")
                if count == 1:
                    threads, descriptors = use()
                camera.kill()
                follow(stream, lambda: stream.stats()[camera.url].state == "lost")
                camera.start()
            follow(stream, lambda: stream.stats()[camera.url].reconnects == 8)
            # An old thread may be about to end.
            follow(stream, lambda: use()[0] <= threads and use()[1] <= descriptors)
    finally:
        gc.enable()
