"""When a camera counts as stalled or lost, and when it is tried again: by times alone."""

import logging

import pytest

from zsseg_rt.errors import SourceError
from zsseg_rt.stream.watch import Patience, SourceWatch, jitter

LOST = SourceError("cam: cannot be read: gone")


def watch(live=True, **patience):
    return SourceWatch("cam", live=live, patience=Patience(**patience), spread=lambda: 1.0)


def running(at=0.0):
    camera = watch()
    assert camera.tick(at) == "open"
    camera.frame(at)
    return camera


def test_a_source_is_opened_once_and_silence_stalls_it_until_a_frame():
    camera = watch()
    assert (camera.tick(-0.2), camera.tick(-0.1), camera.state) == ("open", "none", "starting")
    camera.frame(0.0)
    assert camera.state == "running"
    assert camera.next_tick(0.0) == 2.0
    assert (camera.tick(1.9), camera.state) == ("none", "running")
    assert (camera.tick(2.0), camera.state) == ("none", "stalled")
    assert camera.next_tick(2.0) == 8.0
    camera.frame(2.5)
    assert (camera.state, camera.reconnects) == ("running", 0)


def test_a_long_silence_abandons_the_thread_and_opens_anew():
    camera = running()
    camera.tick(2.0)
    assert (camera.tick(10.0), camera.state) == ("abandon", "lost")
    assert "none came for 10 s" in str(camera.error)
    assert camera.tick(10.4) == "none"
    assert camera.tick(10.5) == "open"
    camera.frame(10.6)
    assert (camera.state, camera.reconnects, camera.error) == ("running", 1, None)


def test_the_end_of_a_stream_is_a_loss_and_the_wait_doubles_up_to_five_seconds():
    camera, now, waits = running(), 1.0, []
    camera.over(now, None)
    assert camera.state == "lost"
    assert "stream ended" in str(camera.error)
    camera = running()
    for _ in range(6):
        camera.over(now, LOST)
        waits.append(camera.next_tick(now))
        now += waits[-1]
        assert camera.tick(now) == "open"
    assert waits == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    camera.frame(now)
    camera.over(now, LOST)
    assert camera.next_tick(now) == 0.5


def test_waits_are_spread():
    waits = {jitter() for _ in range(100)}
    assert len(waits) > 50
    assert 0.8 <= min(waits) <= max(waits) <= 1.2


@pytest.mark.parametrize("error", [None, LOST])
def test_the_end_of_a_file_is_its_end(error):
    file = watch(live=False)
    assert file.tick(0.0) == "open"
    assert file.next_tick(0.0) is None
    assert file.tick(1000.0) == "none"  # a slow disk is no camera
    file.over(1000.0, error)
    assert (file.state, file.error) == ("ended", error)
    assert file.tick(2000.0) == "none"
    assert file.next_tick(2000.0) is None


def test_a_file_that_fails_is_a_warning_with_its_reason(caplog):
    file = watch(live=False)
    file.tick(0.0)
    file.over(1.0, LOST)
    file.log_news()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "cam: ended: cannot be read: gone"
