"""Frames that waited on the way are as old as they are, and what waits there is shed."""

import threading
import time

import pytest

from support.rtsp_camera import shown_time
from support.streams import LONG, label, numbered
from zsseg_rt.stream.conversion import Converter
from zsseg_rt.stream.runner import Stream
from zsseg_rt.stream.source import Lateness, Picture
from zsseg_rt.stream.uris import open_sources
from zsseg_rt.stream.watch import Patience


def of(frames):
    lateness = Lateness()
    return [round(lateness.of(stamp, at), 2) for stamp, at in frames]


def test_lateness_is_what_a_frame_lost_against_the_best():
    # a slow start; then a link that carries half of what is sent; then one that catches up
    assert of([(0.0, 9.0), (1.0, 9.5), (2.0, 10.5)]) == [0.0, 0.0, 0.0]
    assert of([(n, 10.0 + 2 * n) for n in range(4)]) == [0.0, 1.0, 2.0, 3.0]
    assert of([(0, 10), (1, 13), (2, 13), (3, 13)]) == [0.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize("jump", [-1000.0, -0.5, 1000.0])
def test_a_source_that_sets_its_clock_is_not_late(jump):
    frames = [(n / 10, 5 + n / 10) for n in range(20)]
    jumped = [(n / 10 + jump, 5 + n / 10) for n in range(20, 40)]
    assert max(of(frames + jumped)) == 0.0


def test_no_stamps_and_a_slow_crystal_are_not_late():
    assert of([(None, 1.0), (None, 9.0)]) == [0.0, 0.0]
    assert max(of([(n * 60 * (1 - 1e-4), n * 60) for n in range(24 * 60)])) < 0.01  # a day


class Late:
    """A camera of which each frame comes later than the one before, until it is opened anew."""

    name, live = "cam", True

    def __init__(self, *late):
        self.late, self.opened = late, 0

    def pictures(self, reader):
        self.opened += 1
        late = self.late if self.opened == 1 else (0.0,) * 1000
        for number, seconds in enumerate(late):
            yield Picture(image=numbered(number % 28), captured_at=time.monotonic() - seconds,
                          clock="arrival", late=seconds)  # fmt: skip
            if reader.wait(0.02):
                return


PATIENCE = Patience(first_retry=0.0, late_by=3.0, late_for=0.3)


def labelled(stream, is_enough):
    ends_at = time.monotonic() + LONG
    for seg in stream:
        if is_enough(stream.stats()["cam"]):
            return seg
        assert time.monotonic() < ends_at, stream.stats()
    raise AssertionError(f"the stream ended: {stream.stats()}")


def test_a_camera_that_stays_behind_is_opened_anew_and_that_is_counted():
    camera = Late(*(4.0,) * 1000)
    with Stream([camera], label, patience=PATIENCE) as stream:
        labelled(stream, lambda stats: stats.labelled == 2)
        assert stream.stats()["cam"].age_ms["p50"] > 4000
        labelled(stream, lambda stats: stats.reconnects == 1)
        stats = stream.stats()["cam"]
    assert (stats.fell_behind, camera.opened, stats.error) == (1, 2, None)


@pytest.mark.parametrize(
    ("late", "policy"),
    [((2.9,) * 60, "latest"), ((4.0,) * 60, "all"), ((*(4.0,) * 5, 0.0) * 10, "latest")],
)
def test_a_camera_that_catches_up_or_must_lose_nothing_is_left_alone(late, policy):
    camera, forever = Late(*late), threading.Event()
    with Stream([camera], label, policy=policy, patience=PATIENCE) as stream:
        last = len(late) - 10 if policy == "latest" else len(late)
        labelled(stream, lambda stats: stats.captured >= last)
        assert stream.stats()["cam"].fell_behind == 0
    forever.set()


def follow(url, seconds):
    """What a camera's labels told of their age, and how old they were, until it is shed."""
    (source,) = open_sources(url)
    patience = Patience(first_retry=0.0, late_by=1.0, late_for=0.2)
    ages, ends_at = [], time.monotonic() + seconds
    with Stream([source], label, patience=patience) as stream:
        for seg in stream:
            now, made_at = time.monotonic(), shown_time(seg.frame.image)
            if made_at is not None:
                ages.append((now - made_at, now - seg.frame.captured_at))
            stats = stream.stats()[source.name]
            if stats.fell_behind and stats.reconnects:
                return ages, stats
            assert now < ends_at, (stats, ages[-1])
    raise AssertionError("the stream ended")


def check(ages, stats):
    assert max(true for true, _ in ages[:-1]) > 1.0  # it fell behind
    assert max(true - told for true, told in ages) < 1.0  # and was said to
    assert ages[-1][0] < 1.5  # the first one after it was opened anew
    assert stats.age_ms["p99"] > 900


def test_a_starved_decoder_shows_and_is_shed(rtsp_cameras, monkeypatch):
    pytest.importorskip("av")
    take = Converter.take

    def slowly(self, frame):
        time.sleep(0.06)  # at 30 per second there are 0.033 s for each
        return take(self, frame)

    monkeypatch.setattr(Converter, "take", slowly)
    check(*follow(rtsp_cameras().url, LONG))


def test_jpegs_over_http_have_no_clock_and_are_never_late():
    pytest.importorskip("av")
    from support.streams import MjpegServer, ReaderNow

    with MjpegServer() as camera:
        camera.pictures.release(20)
        pictures = open_sources(camera.url)[0].pictures(ReaderNow())
        next(pictures)
        time.sleep(1.5)  # longer than the 0.04 s that FFmpeg makes up
        camera.pictures.release(20)
        assert max(next(pictures).late for _ in range(20)) == 0.0
        pictures.close()
