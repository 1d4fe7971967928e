"""Two frames in flight, on a clock of our own: more labels, and none of them older."""

import itertools
import threading
import time
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt.errors import BackendError
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.stream.ahead import InTime
from zsseg_rt.stream.runner import Stream
from zsseg_rt.stream.source import Picture

LONG = 30


@dataclass(kw_only=True)
class Machine:
    """Milliseconds that things take on a machine with a GPU."""

    frame: float = 1000 / 30  # from one to the next
    arrival: float = 8.0  # from capture until it is on the GPU
    start: float = 0.3  # the host's part before a frame's graphs
    preprocess: float = 0.2
    graphs: float = 15.0
    finish: float = 0.1  # until a thread has the labels
    thread: float = 0.05  # from one thread to another
    caller: float = 0.5  # between two calls of the stream
    jitter: float = 0.0  # share by which the host's part, graphs and the caller vary
    contention: float = 1.0  # share of a preprocessing by which it holds up another frame's graphs


class Future:
    def __init__(self, world, chosen, given, begin, end):
        self.world, self.chosen, self.given, self.begin, self.end = world, chosen, given, begin, end

    @property
    def ended(self):
        return self.end + self.world.times.finish

    def done(self):
        return self.world.now >= self.ended

    def exception(self, seconds):
        if self.world.now + seconds < self.ended:
            self.world.now += seconds
            raise Late
        self.world.now = max(self.world.now, self.ended)

    def result(self):
        self.exception(np.inf)
        self.world.now += self.world.times.thread
        return *self.chosen, self.given, self.end - self.begin, self.ended

    def add_done_callback(self, call):
        pass  # ``look`` knows


class World:
    """A camera, a GPU, and the clock; stands for the hand-off, the lanes and their threads."""

    is_closed = False

    def __init__(self, times, seed=0):
        self.times, self.now, self.taken = times, 0.0, -1
        self.random = np.random.default_rng(seed)
        self.shift = self.random.uniform(0.0, times.frame)
        self.num_lanes, self.last = 2, None  # what the GPU was given last
        self.turns = SimpleNamespace(
            last=lambda: (self.last.given, self.last.end - self.last.begin)
        )

    def varied(self, value):
        return value * (1.0 + self.times.jitter * self.random.uniform(-1.0, 1.0))

    def arrives(self, number):
        return self.shift + number * self.times.frame + self.times.arrival

    def newest(self):
        return int((self.now - self.arrives(0)) // self.times.frame)

    @property
    def is_empty(self):
        return self.newest() <= self.taken

    def take(self):
        self.taken = self.newest()
        return self.taken

    def next_frame(self):
        if self.is_empty:
            self.now = self.arrives(self.taken + 1) + 1e-9
        return self.take()

    def look(self, seconds):
        ends = self.now + seconds
        if self.last is not None and not self.last.done():
            ends = min(ends, self.last.ended)
        self.now = max(self.now, min(ends, self.arrives(self.taken + 1) + 1e-9))
        return None if self.is_empty else self.take()

    def submit(self, work, frame, chosen, *, hop=True):
        times, before = self.times, self.last
        ready = chosen + self.varied(times.start) + (times.thread if hop else 0.0)
        begins = ready + times.preprocess
        if before is not None:
            if before.end > ready:  # both on one GPU: the graphs are held up
                before.end += times.contention * min(times.preprocess, before.end - ready)
            begins = max(begins, before.end)
        ends = begins + self.varied(times.graphs)
        self.last = Future(self, (frame, chosen), ready, begins, ends)
        return self.last

    def label(self, frame):
        """In the calling thread."""
        future = self.submit(None, frame, self.now, hop=False)
        self.now = future.ended
        return frame


def simulate(times, *, two, frames=600, seeds=12):
    """Ages of labels when the caller has them: mean, p50, p95; and how many it gets per second."""
    ages, rates = [], []
    for seed in range(seeds):
        world = World(times, seed)
        in_time = InTime(world.label, world, world, lambda world=world: world.now)
        in_time._threads = world
        for number in range(frames):
            if two:
                frame = in_time.next(world.next_frame, world.look)
            else:
                frame = world.label(world.next_frame())
            if number >= 50:
                ages.append(world.now - world.shift - frame * times.frame)
            world.now += world.varied(times.caller)
        rates.append(frames * 1000 / world.now)
    return np.array([np.mean(ages), *np.percentile(ages, (50, 95))]), np.mean(rates)


CASES = [
    replace(Machine(), frame=1000.437 / rate, **settings)
    for rate, graphs, preprocess, caller, jitter in itertools.product(
        (30, 60), (5, 15, 20, 33, 50), (0.2, 5), (0.1, 2), (0.03, 0.3)
    )
    for settings in [
        {"graphs": graphs, "preprocess": preprocess, "caller": caller, "jitter": jitter}
    ]
]


@pytest.mark.parametrize("contention", [0.0, 1.0])
@pytest.mark.parametrize("times", CASES[::3], ids=str)
def test_no_label_is_older_and_no_rate_lower(times, contention):
    """But for a thread's part, and what a GPU that is full takes from graphs to preprocess."""
    times = replace(times, contention=contention)
    alone, rate = simulate(times, two=False)
    ages, more = simulate(times, two=True)
    noise = 0.02 * times.graphs  # of means of 6600 ages, of which neighbours are alike
    assert np.all(ages <= alone + 2 * times.thread + contention * times.preprocess / 2 + noise)
    assert more >= rate - 0.01


def test_what_is_gained():
    """The host's part and, where the GPU has room, preprocessing cost no time of their own."""
    orin = Machine(frame=1000.437 / 60, graphs=20, caller=2, jitter=0.03, contention=0.0)
    (_, middle, late), rate = simulate(orin, two=False)
    (_, middle_of_two, late_of_two), rate_of_two = simulate(orin, two=True)
    assert rate_of_two > 1.09 * rate
    assert abs(middle_of_two - middle) < 0.3
    keeps_up = replace(orin, graphs=15)  # alone 17.6 ms per frame, and the camera's 16.7
    (_, middle, late), _ = simulate(keeps_up, two=False)
    (_, middle_of_two, late_of_two), _ = simulate(keeps_up, two=True)
    assert middle_of_two < middle - 6
    assert late_of_two < late - 12


def test_a_quick_engine_labels_in_the_caller_s_thread():
    times = Machine(graphs=5)
    ages, _ = simulate(times, two=True, seeds=1)
    np.testing.assert_allclose(ages, simulate(times, two=False, seeds=1)[0])


def test_a_slow_caller_gets_labels_as_new_as_from_one_lane():
    times = Machine(graphs=5, caller=40)
    ages, rate = simulate(times, two=True)
    expected, rate_of_one = simulate(times, two=False)
    np.testing.assert_allclose(ages, expected)
    assert rate == rate_of_one


class Camera:
    """Frames one millisecond apart, with their number as the only colour."""

    name, live = "camera", True

    def __init__(self, count=10**6):
        self.count = count

    def pictures(self, reader):
        for number in range(self.count):
            image = np.full((2, 3, 3), number % 256, np.uint8)
            yield Picture(image=image, captured_at=time.monotonic(), clock="arrival")
            if reader.wait(0.001):
                return


class Lanes:
    """Two lanes that take turns on a GPU of their own; a label takes 10 ms, and late ones fail."""

    num_lanes, most_busy, closed, fails_from = 2, 0, 0, 256

    def __init__(self):
        self.turns, self.gpu, self.thread = self, threading.Lock(), threading.local()
        self.busy, self.lock = 0, threading.Lock()

    def last(self):
        return self.thread.began, 0.01

    def segment(self, image):
        with self.lock:
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        self.thread.began = time.monotonic()
        with self.gpu:
            time.sleep(0.01)
        with self.lock:
            self.busy -= 1
        if image[0, 0, 0] >= self.fails_from:
            raise BackendError("outputs: expected numbers, got NaN")
        return Segmentation(labels=image[..., 0], names=("a",) * 256, vocabulary_version=1)

    def close(self):
        self.closed += 1


def test_a_stream_has_two_frames_in_flight_and_keeps_their_order():
    lanes = Lanes()
    with Stream([Camera()], lanes.segment, lanes=lanes) as stream:
        frames, deadline = [next(stream).frame for _ in range(50)], time.monotonic() + LONG
        while (
            lanes.most_busy < 2 and time.monotonic() < deadline
        ):  # a busy machine's caller is slow
            frames.append(next(stream).frame)
    assert lanes.most_busy == 2
    assert lanes.closed == 1
    for before, after in itertools.pairwise(frames):
        assert after.index == before.index + 1 + after.dropped_before


def test_a_camera_s_last_frames_are_labelled_and_the_stream_ends():
    class Recording(Camera):
        live = False

    lanes = Lanes()
    with Stream([Recording(40)], lanes.segment, policy="all", lanes=lanes) as stream:
        assert [seg.frame.index for seg in stream] == [*range(40)]
    assert lanes.busy == 0


def test_an_error_comes_at_its_frame_s_turn_and_ends_the_stream():
    lanes = Lanes()
    lanes.fails_from, found = 100, []
    stream = Stream([Camera(250)], lanes.segment, policy="all", lanes=lanes)
    with refused(BackendError, "outputs"):
        found.extend(seg.frame.index for seg in stream)
    assert found == [*range(100)]
    assert list(stream) == []
    assert (lanes.closed, lanes.busy) == (1, 0)


def test_a_stream_that_is_stopped_or_forgotten_frees_its_lanes():
    for end in (Stream.stop, lambda stream: None):
        lanes = Lanes()
        stream = Stream([Camera()], lanes.segment, lanes=lanes)
        for _ in range(10):
            next(stream)
        end(stream)
        if end is Stream.stop:
            assert list(stream) == []
        del stream
        assert (lanes.closed, lanes.busy) == (1, 0)
