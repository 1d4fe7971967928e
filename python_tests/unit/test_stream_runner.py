"""Sources that end, fail, hang and come back; labels go on, and nothing is repeated or invented."""

import gc
import logging
import threading
import time

import numpy as np
import pytest

from support.errors import refused
from support.streams import LONG, label, number_of, numbered, write_video
from zsseg_rt.errors import ArgumentError, BackendUnavailableError, ShapeError, SourceError
from zsseg_rt.stream.hand_off import MOST_ON_GPU
from zsseg_rt.stream.opening import StreamOptions
from zsseg_rt.stream.runner import Stream
from zsseg_rt.stream.source import Picture
from zsseg_rt.stream.uris import open_sources
from zsseg_rt.stream.watch import Patience
from zsseg_rt.stream.writers import Writer

AT_ONCE = Patience(first_retry=0.0, longest_retry=0.0)


class Script:
    """A source that does, each time it is opened, what the next list says.

    Numbers are pictures, errors are raised, events are waited for, functions are called.
    """

    def __init__(self, name, *attempts, live=True):
        self.name, self.live, self.attempts = name, live, list(attempts)
        self.opened = 0
        self.closed = threading.Semaphore(0)

    def pictures(self, reader):
        steps = self.attempts[min(self.opened, len(self.attempts) - 1)]
        self.opened += 1
        try:
            for step in steps:
                if isinstance(step, threading.Event):
                    step.wait(LONG)
                elif isinstance(step, Exception):
                    raise step
                elif callable(step):
                    step()
                else:
                    yield Picture(image=numbered(step), captured_at=0.0, clock="arrival",
                                  pts_seconds=step / 1000)  # fmt: skip
        finally:
            self.closed.release()


def file(name, count):
    return Script(name, range(count), live=False)


def lost():
    return SourceError("cam: gone")


def seen(stream, count=None):
    found = []
    for seg in stream:
        found.append((seg.frame.source, seg.frame.index, number_of(seg.frame.image)))
        if len(found) == count:
            stream.close()
            break
    return found


def test_every_frame_of_a_file_is_labelled_in_order():
    stream = Stream([file("a", 25)], label)
    found = list(stream)
    assert [number_of(seg.frame.image) for seg in found] == list(range(25))
    assert [seg.frame.index for seg in found] == list(range(25))
    assert (found[3].labels == found[3].frame.image[..., 0]).all()
    stats = stream.stats()["a"]
    assert (stats.state, stats.captured, stats.labelled, stats.dropped) == ("ended", 25, 25, 0)
    assert set(stats.age_ms) == {"p50", "p95", "p99"}
    assert next(stream, None) is None


def test_sources_take_turns_and_none_loses_a_frame():
    found = seen(Stream([file("a", 10), file("b", 20)], label))
    for name, count in (("a", 10), ("b", 20)):
        assert [f[1:] for f in found if f[0] == name] == [(n, n) for n in range(count)]


def test_a_slow_engine_gets_the_newest_frame_of_a_camera():
    labelling, given, forever = threading.Event(), threading.Event(), threading.Event()
    camera = Script("cam", [0, labelling, *range(1, 6), given.set, forever])

    def slow(image):
        labelling.set()
        assert given.wait(LONG)
        return label(image)

    stream = Stream([camera], slow)
    first, second = next(stream).frame, next(stream).frame
    assert (first.index, first.dropped_before) == (0, 0)
    assert number_of(second.image) == second.index == 5
    assert second.dropped_before == 4
    stats = stream.stats()["cam"]
    assert (stats.captured, stats.labelled, stats.dropped) == (6, 2, 4)
    forever.set()


def test_a_camera_that_was_lost_comes_back(caplog):
    caplog.set_level(logging.INFO)
    forever = threading.Event()
    camera = Script("cam", [0, 1, lost()], [lost()], [lost()], [2, 3, forever])
    stream = Stream([camera], label, policy="all", patience=AT_ONCE)
    assert seen(stream, 4) == [("cam", n, n) for n in range(4)]
    assert camera.opened == 4
    stats = stream.stats()["cam"]
    assert (stats.reconnects, stats.error, stats.state) == (1, None, "running")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["cam: running", "cam: lost: gone", "cam: running again"]
    forever.set()


def test_a_thread_that_hangs_is_abandoned_and_what_it_still_gives_is_discarded():
    hangs, forever = threading.Event(), threading.Event()
    camera = Script("cam", [0, hangs, 9], [1, hangs.set, 2, forever])
    patience = Patience(stalled_after=0.1, lost_after=1.0, first_retry=0.0)
    stream = Stream([camera], label, policy="all", patience=patience)
    assert seen(stream, 3) == [("cam", n, n) for n in range(3)]
    assert camera.closed.acquire(timeout=LONG)  # the first attempt ended by itself
    assert stream.stats()["cam"].captured == 3
    forever.set()


def test_a_dead_camera_delays_no_other():
    never = threading.Event()
    dead, broken = Script("dead", [never]), Script("broken", [lost()])
    stream = Stream([dead, broken, file("a", 20)], label)
    found = seen(stream, 20)
    assert found == [("a", n, n) for n in range(20)]
    assert stream.stats()["dead"].state == "starting"
    assert stream.stats()["broken"].state == "lost"
    never.set()


def test_what_fails_at_the_start_is_an_error(caplog):
    with refused(SourceError, "cam"):
        next(Stream([Script("cam", [lost()])], label))
    assert caplog.text == ""  # the error says it
    both = [Script("cam", [lost()]), Script("file", [SourceError("file: absent")], live=False)]
    with refused(SourceError, "cam"):
        next(Stream(both, label))


def test_a_camera_that_gives_nothing_at_the_start_is_an_error():
    never = threading.Event()
    patience = Patience(stalled_after=0.01, lost_after=0.02)
    with refused(SourceError, "cam") as caught:
        next(Stream([Script("cam", [never])], label, patience=patience))
    assert "gone" not in str(caught.value)
    never.set()


def test_cameras_that_are_off_at_the_start_are_waited_for_if_that_is_asked(caplog):
    patience = Patience(first_retry=0.0, longest_retry=0.0, at_start=True)
    forever = threading.Event()
    camera = Script("cam", [lost()], [lost()], [lost()], [0, forever])
    absent = Script("file", [SourceError("file: absent")], live=False)
    assert seen(Stream([camera, absent], label, patience=patience), 1) == [("cam", 0, 0)]
    forever.set()
    assert caplog.messages[0] == "cam: lost: gone"
    with refused(SourceError, "file"):
        next(Stream([absent], label, patience=patience))


def test_a_file_that_fails_leaves_the_others():
    broken = Script("broken", [SourceError("broken: absent")], live=False)
    stream = Stream([broken, file("a", 3)], label)
    assert len(seen(stream)) == 3
    assert stream.stats()["broken"].error == "broken: absent"


def picky(image):
    """Takes no picture numbered 2 or more."""
    if number_of(image) >= 2:
        raise ShapeError("frame: expected another")
    return label(image)


def test_a_frame_that_cannot_be_labelled_loses_its_source_alone():
    camera, forever = Script("cam", [5, 6], [0, 1] * 50), threading.Event()
    camera.attempts[1].append(forever)
    stream = Stream([camera, file("a", 4), file("b", 2)], picky, policy="all", patience=AT_ONCE)
    found = []
    while stream.stats()["a"].error is None or ("b", 1, 1) not in found:
        seg = next(stream)
        found.append((seg.frame.source, seg.frame.index, number_of(seg.frame.image)))
    assert sorted(f for f in found if f[0] != "cam") == [
        ("a", 0, 0), ("a", 1, 1), ("b", 0, 0), ("b", 1, 1),
    ]  # fmt: skip
    from_camera = [f[2] for f in found if f[0] == "cam"]
    assert from_camera == ([0, 1] * 50)[: len(from_camera)]
    stats = stream.stats()
    assert stats["a"].error == "a: cannot be labelled: frame: expected another"
    assert (stats["b"].error, stats["cam"].error) == (None, None)
    forever.set()


@pytest.mark.parametrize("live", [True, False])
def test_a_source_of_which_no_frame_can_be_labelled_is_an_error(live):
    source = Script("cam", [3, 4, 5, 6, 7, 8], live=live)
    with refused(SourceError, "cam"):
        next(Stream([source], picky, patience=AT_ONCE))


def test_an_absent_package_is_told_at_once():
    script = Script("cam", [BackendUnavailableError("av: none")], live=False)
    with refused(BackendUnavailableError, "av"):
        list(Stream([file("a", 3), script], label))


def test_an_error_of_ours_while_reading_is_no_silent_end(monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda details: shown.append(details.exc_type))
    stream = Stream([Script("cam", [0, ZeroDivisionError()], live=False)], label)
    assert len(list(stream)) == 1
    assert "reading failed" in stream.stats()["cam"].error
    assert shown == [ZeroDivisionError]


@pytest.mark.parametrize("way", ["stop", "close"])
def test_a_stream_that_waits_for_a_camera_can_be_stopped(way):
    waits, forever = threading.Event(), threading.Event()
    stream = Stream([Script("cam", [0, waits.set, forever])], label)
    next(stream)
    assert waits.wait(LONG)
    stopper = threading.Thread(target=getattr(stream, way))
    stopper.start()
    assert next(stream, None) is None
    stopper.join()
    forever.set()


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
        assert (writer.found, writer.closed) == ([0], 1)  # files are finished


@pytest.mark.parametrize("where", ["source", "sink"])
def test_a_stream_may_be_closed_by_its_own_threads(where):
    closed, forever = threading.Event(), threading.Event()
    streams = []

    def close():
        streams[0].close()
        closed.set()

    writer = Notes("sink")
    if where == "sink":
        writer.write = lambda seg: close()
    steps = [0, close, forever] if where == "source" else [0, forever]
    streams.append(Stream([Script("cam", steps)], label, writers=[writer]))
    next(streams[0], None)  # the stream may end before its frame is taken
    assert closed.wait(LONG)
    forever.set()


def test_a_file_is_played_at_its_own_speed_when_only_the_latest_frame_counts(tmp_path):
    pytest.importorskip("av")
    path = write_video(tmp_path / "a.mp4", [numbered(n) for n in range(10)])
    found = seen(Stream(open_sources(path), label, policy="latest"))
    assert found[-1][1] == 9
    assert len(found) > 3  # nearly all, on a machine that is not busy


@pytest.mark.parametrize("jump", [-500.0, 500.0])
def test_a_jump_in_a_file_s_times_keeps_nobody_waiting(jump):
    class Joined:
        name, live = "joined", False

        def pictures(self, reader):
            for number in range(8):
                stamp = number / 10 + (jump if number > 3 else 0.0)
                yield Picture(image=numbered(number), captured_at=0.0, clock="file",
                              pts_seconds=stamp)  # fmt: skip

    began_at = time.monotonic()
    found = seen(Stream([Joined()], label, policy="latest"))
    assert found[-1][1] == 7
    assert 0.5 < time.monotonic() - began_at < LONG  # both parts at their own speed


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"policy": "newest"}, "policy"),
        ({"max_staleness": 0.0}, "max_staleness"),
        ({"max_staleness": float("nan")}, "max_staleness"),
        ({"max_staleness": "1"}, "max_staleness"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, argument):
    with refused(ArgumentError, argument):
        StreamOptions(**settings)


class Notes(Writer):
    """Notes what it is given; fails at one frame if told so."""

    def __init__(self, name, fails_at=None):
        super().__init__(name)
        self.found, self.fails_at, self.closed = [], fails_at, 0

    def write(self, seg):
        if seg.frame.index == self.fails_at:
            raise SourceError(f"{self.name}: the disk is full")
        self.found.append(seg.frame.index)

    def close(self):
        self.closed += 1


def test_every_result_goes_to_every_sink_and_one_that_fails_fails_alone():
    sound, broken = Notes("sound"), Notes("broken", fails_at=3)
    stream = Stream([file("a", 40)], label, writers=[sound, broken])
    assert len(list(stream)) == 40
    assert sound.found == list(range(40))
    assert broken.found == [0, 1, 2]
    assert (sound.closed, broken.closed) == (1, 1)
    first, second = stream.sink_stats()
    assert (first.name, first.written, first.error) == ("sound", 40, None)
    assert (second.name, second.error) == ("broken", "broken: the disk is full")


def test_frames_on_a_gpu_are_labelled_there_and_fetched_only_for_those_who_look():
    fetched, labelled = [], []

    class OnGpu:
        name, live = "cam", False

        def pictures(self, reader):
            for number in range(3):

                def fetch(number=number):
                    fetched.append(number)
                    return numbered(number)

                yield Picture(image=fetch, on_gpu=f"planes {number}", path="nvmm",
                              captured_at=0.0, clock="file")  # fmt: skip

    def label_there(frame):
        labelled.append(frame)
        return label(numbered(0))

    with Stream([OnGpu()], label_there) as stream:
        found = list(stream)
        assert stream.stats()["cam"].path == "nvmm"
    assert labelled == ["planes 0", "planes 1", "planes 2"]
    assert fetched == []
    assert number_of(found[1].frame.image) == 1
    assert found[1].frame.image is found[1].frame.image
    assert fetched == [1]
    assert found[1].frame.on_gpu == "planes 1"


def test_frames_that_are_kept_leave_the_gpu_but_for_the_newest():
    fetched = []

    class OnGpu:
        name, live = "video", False

        def pictures(self, reader):
            for number in range(MOST_ON_GPU + 8):

                def fetch(number=number):
                    fetched.append(number)
                    return np.full((2, 3, 3), number, np.uint8)

                yield Picture(image=fetch, on_gpu="planes", captured_at=0.0, clock="file")

    kept = list(Stream([OnGpu()], lambda frame: label(numbered(0))))
    assert fetched == list(range(8))
    assert [seg.frame.on_gpu for seg in kept] == [None] * 8 + ["planes"] * MOST_ON_GPU
    assert [int(seg.frame.image[0, 0, 0]) for seg in kept] == list(range(MOST_ON_GPU + 8))
    fetched.clear()
    for _ in Stream([OnGpu()], lambda frame: label(numbered(0))):
        pass
    assert fetched == []  # nobody kept one
