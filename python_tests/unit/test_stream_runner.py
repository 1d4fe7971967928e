"""Streams: sources come and go, frames wait, lanes overtake; nothing is repeated or invented."""

import gc
import itertools
import logging
import threading
import time
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest

from support.errors import refused
from support.streams import LONG, Script, follow, label, number_of, numbered, wait_until
from zsseg_rt.errors import (
    BackendError,
    BackendUnavailableError,
    EngineStateError,
    ShapeError,
    SourceError,
)
from zsseg_rt.stream.hand_off import MOST_ON_GPU, HandOff
from zsseg_rt.stream.runner import Stream, StreamParts
from zsseg_rt.stream.source import Picture
from zsseg_rt.stream.watch import Patience, SourceWatch, jitter
from zsseg_rt.stream.writers import Writer

AT_ONCE = Patience(first_retry=0.0, longest_retry=0.0)


def picture(number=0, captured_at=0.0, **fields):
    fields = {"image": numbered(number), "clock": "arrival", **fields}
    return Picture(captured_at=captured_at, **fields)


def file(name, *steps):
    return Script(name, steps, live=False)


def lost():
    return SourceError("cam: gone")


def picky(image):
    """Takes no picture numbered 2 or more."""
    if number_of(image) >= 2:
        raise ShapeError("frame: expected another")
    return label(image)


def numbers_of(stream, count=None):
    with stream:
        frames = [seg.frame for seg in itertools.islice(stream, count)]
    return [(frame.source, frame.index, number_of(frame.image)) for frame in frames]


@pytest.fixture
def forever():
    """What a source waits for until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_every_frame_of_files_is_labelled_in_order_and_a_sink_that_fails_fails_alone():
    sound, broken = Notes("sound"), Notes("broken", fails_at=3)
    stream = Stream([file("a", *range(10)), file("b", *range(20))], label, writers=[sound, broken])
    segs = list(stream)
    for name, count in (("a", 10), ("b", 20)):
        mine = [seg for seg in segs if seg.frame.source == name]
        assert [seg.frame.index for seg in mine] == list(range(count))
        assert [number_of(seg.labels) for seg in mine] == list(range(count))
        stats = stream.stats()[name]
        assert (stats.state, stats.captured, stats.labelled) == ("ended", count, count)
        assert (stats.dropped, set(stats.age_ms)) == (0, {"p50", "p95", "p99"})
    assert next(stream, None) is None
    assert sound.indices == [seg.frame.index for seg in segs]
    assert (sound.closed, broken.closed) == (1, 1)
    first, second = stream.sink_stats()
    assert (first.name, first.written, first.error) == ("sound", 30, None)
    assert (second.name, second.error) == ("broken", "broken: the disk is full")


def test_a_slow_engine_gets_the_newest_frame_of_a_camera(forever):
    labelling, all_read = threading.Event(), threading.Event()
    camera = Script("cam", [0, labelling, *range(1, 6), all_read.set, forever])

    def slow(image):
        labelling.set()
        assert all_read.wait(LONG)
        return label(image)

    stream = Stream([camera], slow)
    first, second = next(stream).frame, next(stream).frame
    assert (first.index, first.dropped_before) == (0, 0)
    assert number_of(second.image) == second.index == 5
    assert second.dropped_before == 4
    stats = stream.stats()["cam"]
    assert (stats.captured, stats.labelled, stats.dropped) == (6, 2, 4)


def test_a_camera_that_was_lost_comes_back(caplog, forever):
    caplog.set_level(logging.INFO)
    camera = Script("cam", [0, 1, lost()], [lost()], [lost()], [2, 3, forever])
    stream = Stream([camera], label, policy="all", patience=AT_ONCE)
    assert numbers_of(stream, 4) == [("cam", n, n) for n in range(4)]
    assert camera.opened == 4
    stats = stream.stats()["cam"]
    assert (stats.reconnects, stats.error, stats.state) == (1, None, "running")
    assert caplog.messages == ["cam: running", "cam: lost: gone", "cam: running again"]


def test_a_thread_that_hangs_is_abandoned_and_what_it_still_gives_is_discarded(forever):
    hangs = threading.Event()
    camera = Script("cam", [0, hangs, 9], [1, hangs.set, 2, forever])
    patience = Patience(stalled_after=0.1, lost_after=1.0, first_retry=0.0)
    stream = Stream([camera], label, policy="all", patience=patience)
    assert numbers_of(stream, 3) == [("cam", n, n) for n in range(3)]
    assert camera.closed.acquire(timeout=LONG)  # the first attempt ended by itself
    assert stream.stats()["cam"].captured == 3


NEVER = threading.Event()


@pytest.mark.parametrize(
    ("sources", "error", "name"),
    [
        ([Script("cam", [lost()])], SourceError, "cam"),
        ([Script("cam", [lost()]), file("f", SourceError("f: absent"))], SourceError, "cam"),
        ([Script("cam", [NEVER])], SourceError, "cam"),
        ([Script("cam", [3, 4, 5])], SourceError, "cam"),  # none can be labelled
        ([file("f", 3, 4, 5)], SourceError, "f"),
        ([Script("a", [0]), file("f", BackendUnavailableError("av: none"))],
         BackendUnavailableError, "av"),
    ],
)  # fmt: skip
def test_what_fails_at_the_start_is_an_error(sources, error, name, caplog):
    patience = Patience(stalled_after=0.01, lost_after=0.2, first_retry=0.0, longest_retry=0.0)
    with refused(error, name):
        list(Stream(sources, picky, patience=patience))
    assert "lost: gone" not in caplog.text  # the error says it


def test_an_error_of_ours_while_reading_is_no_silent_end(monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda details: shown.append(details.exc_type))
    stream = Stream([file("cam", 0, ZeroDivisionError())], label)
    assert len(list(stream)) == 1
    assert "reading failed" in stream.stats()["cam"].error
    assert shown == [ZeroDivisionError]


def test_cameras_that_are_off_at_the_start_are_waited_for_if_that_is_asked(caplog, forever):
    patience = Patience(first_retry=0.0, longest_retry=0.0, at_start=True)
    camera = Script("cam", [lost()], [lost()], [lost()], [0, forever])
    absent = file("file", SourceError("file: absent"))
    assert numbers_of(Stream([camera, absent], label, patience=patience), 1) == [("cam", 0, 0)]
    assert caplog.messages[0] == "cam: lost: gone"
    with refused(SourceError, "file"):
        next(Stream([absent], label, patience=patience))


def test_a_frame_that_cannot_be_labelled_loses_its_source_alone(forever):
    camera = Script("cam", [5, 6], [0, 1] * 50 + [forever])
    sources = [camera, file("a", *range(4)), file("b", *range(2))]
    stream = Stream(sources, picky, policy="all", patience=AT_ONCE)
    frames = []
    while stream.stats()["a"].error is None or ("b", 1) not in frames:
        frame = next(stream).frame
        frames.append((frame.source, number_of(frame.image)))
    assert sorted(f for f in frames if f[0] != "cam") == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    from_camera = [number for source, number in frames if source == "cam"]
    assert from_camera == ([0, 1] * 50)[: len(from_camera)]
    stats = stream.stats()
    assert stats["a"].error == "a: cannot be labelled: frame: expected another"
    assert (stats["b"].error, stats["cam"].error) == (None, None)


@pytest.mark.parametrize("way", ["stop", "close"])
def test_a_stream_that_waits_for_a_camera_can_be_stopped(way, forever):
    waits = threading.Event()
    stream = Stream([Script("cam", [0, waits.set, forever])], label)
    next(stream)
    assert waits.wait(LONG)
    stopper = threading.Thread(target=getattr(stream, way))
    stopper.start()
    assert next(stream, None) is None
    stopper.join()


def test_a_stream_that_is_left_or_forgotten_stops_reading():
    for leave in ("with", "forget"):
        camera, writer = Script("cam", [n % 28 for n in range(10**6)]), Notes("sink")
        stream = Stream([camera], label, policy="all", writers=[writer])
        if leave == "with":
            with stream:
                next(stream)
        else:
            next(stream)
        del stream
        gc.collect()
        assert camera.closed.acquire(timeout=LONG)
        assert (writer.indices, writer.closed) == ([0], 1)  # files are finished


@pytest.mark.parametrize("where", ["source", "sink"])
def test_a_stream_may_be_closed_by_its_own_threads(where, forever):
    closed = threading.Event()

    def close(*_):
        stream.close()
        closed.set()

    writer = Notes("sink")
    if where == "sink":
        writer.write = close
    steps = [0, close, forever] if where == "source" else [0, forever]
    stream = Stream([Script("cam", steps)], label, writers=[writer])
    next(stream, None)  # the stream may end before its frame is taken
    assert closed.wait(LONG)


def test_a_jump_in_a_file_s_times_keeps_nobody_waiting():
    stamps = [n / 10 + jump for n, jump in enumerate([0.0] * 4 + [-500.0] * 4 + [500.0] * 4)]
    joined = file("a", *(picture(n, pts_seconds=at) for n, at in enumerate(stamps)))
    began_at = time.monotonic()
    frames = numbers_of(Stream([joined], label, policy="latest"))
    assert frames[-1][1] == 11
    took = time.monotonic() - began_at
    assert 0.8 < took < LONG  # all parts at their own speed
    slow = file("a", *(picture(n, pts_seconds=9.0 * n) for n in range(5)))
    assert len(list(Stream([slow], label))) == 5  # as fast as it is read
    assert time.monotonic() - began_at - took < 9.0


class Notes(Writer):
    """Notes what it is given; fails at one frame if told so."""

    def __init__(self, name, fails_at=None):
        super().__init__(name)
        self.indices, self.fails_at, self.closed = [], fails_at, 0

    def write(self, seg):
        if seg.frame.index == self.fails_at:
            raise SourceError(f"{self.name}: the disk is full")
        self.indices.append(seg.frame.index)

    def close(self):
        self.closed += 1


def test_frames_on_a_gpu_are_labelled_there_and_leave_it_but_for_the_newest_that_are_kept():
    fetched, labelled, count = [], [], MOST_ON_GPU + 8

    def on_gpu():
        def fetch(number):
            fetched.append(number)
            return np.full((2, 3, 3), number, np.uint8)

        steps = (picture(image=partial(fetch, number), on_gpu=number) for number in range(count))
        return file("video", *steps)

    def label_there(frame):
        labelled.append(frame)
        return label(numbered(0))

    for _ in Stream([on_gpu()], label_there):
        pass
    assert (labelled, fetched) == ([*range(count)], [])  # nobody kept one, or looked
    kept = list(Stream([on_gpu()], label_there))
    assert fetched == list(range(8))
    assert [seg.frame.on_gpu for seg in kept] == [None] * 8 + [*range(8, count)]
    assert [int(seg.frame.image[0, 0, 0]) for seg in kept] == list(range(count))
    assert kept[9].frame.image is kept[9].frame.image
    assert fetched == list(range(count))


def test_pictures_that_waited_too_long_are_dropped():
    now = [100.0]
    hand_off = HandOff({"s0": True}, max_staleness=0.5, now=lambda: now[0])
    (slot,) = hand_off.slots
    hand_off.put(slot, picture(captured_at=99.6), lambda: True)
    hand_off.put(slot, picture(captured_at=100.0), lambda: True)
    now[0] = 100.3
    assert not hand_off.is_empty
    frame = hand_off.take(0)
    assert (frame.source, frame.index, frame.dropped_before) == ("s0", 1, 1)
    hand_off.put(slot, picture(captured_at=100.0), lambda: True)
    now[0] = 101.0
    assert hand_off.is_empty
    assert hand_off.take(0) is None
    assert (slot.captured, slot.dropped) == (3, 2)


def late_camera(*late):
    """Its frames come so late until it is opened anew."""

    def frame(seconds):
        time.sleep(0.02)
        return picture(captured_at=time.monotonic() - seconds, late=seconds)

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


def watch():
    camera = SourceWatch("cam", live=True, patience=Patience(), spread=lambda: 1.0)
    assert camera.tick(0.0) == "open"
    return camera


def test_silence_stalls_a_camera_then_abandons_its_thread_until_a_frame():
    camera = watch()
    assert (camera.tick(0.1), camera.state) == ("none", "starting")
    camera.frame(0.0)
    assert (camera.state, camera.next_tick(0.0)) == ("running", 2.0)
    assert (camera.tick(1.9), camera.state) == ("none", "running")
    assert (camera.tick(2.0), camera.state, camera.next_tick(2.0)) == ("none", "stalled", 8.0)
    camera.frame(2.5)
    assert (camera.state, camera.reconnects) == ("running", 0)
    assert (camera.tick(4.5), camera.tick(12.5), camera.state) == ("none", "abandon", "lost")
    assert "none came for 10 s" in str(camera.error)
    assert (camera.tick(12.9), camera.tick(13.0)) == ("none", "open")
    camera.frame(13.1)
    assert (camera.state, camera.reconnects, camera.error) == ("running", 1, None)


def test_the_end_of_a_stream_is_a_loss_and_the_wait_doubles_up_to_five_seconds():
    camera, now, waits = watch(), 1.0, []
    camera.frame(0.0)
    camera.over(now, None)
    assert camera.state == "lost"
    assert "stream ended" in str(camera.error)
    for _ in range(6):
        waits.append(camera.next_tick(now))
        now += waits[-1]
        assert camera.tick(now) == "open"
        camera.over(now, lost())
    assert waits == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    camera.frame(now)
    camera.over(now, lost())
    assert camera.next_tick(now) == 0.5
    assert len({jitter() for _ in range(100)}) > 50


def open_stream(count, segment):
    """A stream of so many frames that two lanes label, and the lanes; they note what they do."""
    lanes = Mock(num_lanes=2, begun=[], ended=[])

    def note(image):
        lanes.begun.append(number_of(image))
        seg = segment(image)
        lanes.ended.append(seg)
        return seg

    lanes.segment = note
    inline = Mock(side_effect=AssertionError("lanes label"))
    return Stream([file("a", *range(count))], inline, lanes=lanes), lanes


def held(events):
    """Label each frame that has an event once that is set."""

    def segment(image):
        event = events.get(number_of(image))
        assert event is None or event.wait(LONG)
        return label(image)

    return segment


def test_results_keep_their_order_while_lanes_overtake_each_other():
    first, second = events = threading.Event(), threading.Event()
    stream, lanes = open_stream(20, held(dict(enumerate(events))))
    segs = []
    reader = threading.Thread(target=lambda: segs.append(next(stream)))
    reader.start()
    wait_until(lambda: {0, 1} <= set(lanes.begun))
    second.set()
    wait_until(lambda: 2 in lanes.begun)  # overtakes frame 0
    assert not segs
    first.set()
    reader.join(LONG)
    segs += stream
    assert [number_of(seg.labels) for seg in segs] == [*range(20)]
    assert [seg.frame.index for seg in segs] == [*range(20)]
    lanes.close.assert_called_once_with()


def test_few_frames_are_begun_ahead_and_a_stopped_stream_frees_its_lanes():
    event = threading.Event()
    stream, lanes = open_stream(28, held({1: event, 2: event}))
    next(stream)
    wait_until(lambda: {1, 2} <= set(lanes.begun))
    assert len(lanes.begun) == 3
    stream.stop()
    event.set()
    assert list(stream) == []
    lanes.close.assert_called_once_with()
    assert len(lanes.ended) == len(lanes.begun)


def test_an_error_of_a_lane_comes_at_its_frame_s_turn_and_ends_the_stream():
    def segment(image):
        if number_of(image) == 3:
            raise BackendError("outputs: expected numbers, got NaN")
        return label(image)

    stream, lanes = open_stream(10, segment)
    assert [next(stream).frame.index for _ in range(3)] == [0, 1, 2]
    with refused(BackendError, "outputs"):
        next(stream)
    lanes.close.assert_called_once_with()
    assert list(stream) == []


def test_sinks_are_closed_if_the_lanes_cannot_be_opened():
    def busy():
        raise EngineStateError("engine: is busy in another thread. Wait for it.")

    sink = Mock()
    with refused(EngineStateError, "engine"):
        StreamParts(sources=[file("a", *range(1))], writers=[sink]).start(Mock(), busy)
    sink.close.assert_called_once_with()
    StreamParts(sources=[Script("cam", [0])]).start(Mock(), busy).close()  # it takes no lanes
    StreamParts(sources=[file("a", *range(1))], memories={"a": None}).start(Mock(), busy).close()
