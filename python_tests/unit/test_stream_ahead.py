"""Files whose frames are labelled several at a time: in order, bounded, and ended cleanly."""

import threading
from unittest.mock import Mock

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt.errors import BackendError, EngineStateError
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.runtime.lane_pool import InOrder
from zsseg_rt.stream.opening import StreamOptions, StreamParts
from zsseg_rt.stream.runner import Stream
from zsseg_rt.stream.source import Picture

LONG = 30


class File:
    live = False

    def __init__(self, count, name="file"):
        self.name, self.count, self.given = name, count, 0

    def pictures(self, reader):
        for number in range(self.count):
            self.given += 1
            image = np.full((2, 3, 3), number % 256, np.uint8)
            yield Picture(image=image, captured_at=float(number), clock="file")


class Camera(File):
    live = True


class FakeLanes:
    """Lanes whose frames finish in the order that a test chooses."""

    def __init__(self, num_lanes, hold=()):
        self.num_lanes, self.closed = num_lanes, 0
        self.released = {number: threading.Event() for number in hold}
        self.begun, self.changed = [], threading.Condition()
        self.busy = self.most_busy = 0

    def segment(self, image):
        number = int(image[0, 0, 0])
        with self.changed:
            self.begun.append(number)
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
            self.changed.notify_all()
        if number in self.released:
            assert self.released[number].wait(LONG)
        with self.changed:
            self.busy -= 1
            self.changed.notify_all()
        return Segmentation(labels=image[..., 0], names=("a",) * 99, vocabulary_version=1)

    def close(self):
        self.closed += 1

    def wait_until(self, is_so):
        with self.changed:
            assert self.changed.wait_for(is_so, LONG)


def refuse(image):
    raise AssertionError("lanes label, not the engine's own")


def open_stream(source, lanes, **settings):
    return Stream([source], refuse, lanes=lanes, **settings)


def test_results_keep_their_order_while_lanes_overtake_each_other():
    lanes = FakeLanes(2, hold=[0])
    with open_stream(File(20), lanes) as stream:
        first = []
        reader = threading.Thread(target=lambda: first.append(next(stream)))
        reader.start()
        lanes.wait_until(lambda: 2 in lanes.begun)  # overtakes frame 0
        assert not first
        lanes.released[0].set()
        reader.join(LONG)
        found = [*first, *stream]
    assert [int(seg.labels[0, 0]) for seg in found] == [*range(20)]
    assert [seg.frame.index for seg in found] == [*range(20)]
    assert lanes.most_busy == 2
    assert lanes.closed == 1


def test_no_more_frames_are_begun_than_lanes_and_one():
    lanes, source = FakeLanes(2), File(1000)
    with open_stream(source, lanes) as stream:
        next(stream)
        lanes.wait_until(lambda: lanes.busy == 0)
        assert len(lanes.begun) <= 3
    assert source.given < 20


def test_a_stream_that_is_stopped_finishes_what_runs_and_frees_the_lanes():
    lanes = FakeLanes(2, hold=[1, 2])
    stream = open_stream(File(100), lanes)
    next(stream)
    lanes.wait_until(lambda: {1, 2} <= set(lanes.begun))
    stream.stop()
    for event in lanes.released.values():
        event.set()
    assert list(stream) == []
    assert lanes.closed == 1
    assert lanes.busy == 0


def test_an_error_of_a_lane_comes_at_its_frame_s_turn_and_ends_the_stream():
    class Failing(FakeLanes):
        def segment(self, image):
            if image[0, 0, 0] == 3:
                raise BackendError("outputs: expected numbers, got NaN")
            return super().segment(image)

    lanes = Failing(2)
    stream = open_stream(File(10), lanes)
    assert [next(stream).frame.index for _ in range(3)] == [0, 1, 2]
    with refused(BackendError, "outputs"):
        next(stream)
    assert lanes.closed == 1
    assert list(stream) == []


def parts(sources, *writers, memories=None, **options):
    options = StreamOptions(**options)
    return StreamParts(
        options=options, sources=sources, memories=memories, following=None, writers=writers
    )


@pytest.mark.parametrize(
    ("sources", "policy", "expected"),
    [
        ([File(1)], None, True),
        ([File(1)], "all", True),
        ([File(1)], "latest", False),
        ([Camera(1)], None, False),
        ([Camera(1)], "all", False),
        ([File(1, "a"), Camera(1, "b")], None, False),
    ],
)
def test_only_files_wait_for_their_labels(sources, policy, expected):
    assert parts(sources, policy=policy).takes_lanes is expected


def test_a_forgotten_stream_frees_its_lanes():
    lanes = FakeLanes(2)
    stream = open_stream(File(100), lanes)
    next(stream)
    del stream
    assert lanes.closed == 1


def test_lanes_may_be_closed_by_one_of_their_own_threads():
    closed = threading.Event()
    frames = InOrder(lambda frame: frames.close(), 1, on_close=closed.set)
    assert frames.next(iter([None]).__next__) is None
    assert closed.wait(LONG)


def test_sinks_are_closed_if_the_lanes_cannot_be_opened():
    def busy():
        raise EngineStateError("engine: is busy in another thread. Wait for it.")

    sink = Mock()
    with refused(EngineStateError, "engine"):
        parts([File(1)], sink).start(Mock(), busy)
    sink.close.assert_called_once_with()
    parts([Camera(1)]).start(Mock(), busy).close()  # it takes no lanes
    parts([File(1)], memories={"file": None}).start(Mock(), busy).close()
