"""Labels that motion carries: to where things are, said to be moved, and never to other frames."""

import contextlib
import threading
import time
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import cv2
import numpy as np
import pytest

from support import streams
from support.errors import refused
from support.streams import Script, wait_until
from zsseg_rt.errors import ArgumentError
from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.runtime.frame_memory import Glance, LabelMover, Way, follow_size
from zsseg_rt.stream.follow import Following, KeyFrames, NewestFrames, following_of
from zsseg_rt.stream.photo_folder import PhotoSource
from zsseg_rt.stream.runner import Stream
from zsseg_rt.stream.source import Picture
from zsseg_rt.stream.watch import Patience

HW = (120, 160)
LONG = 30


def scene(seed=0, size=(260, 400)):
    """Smooth random colours, so that every place looks different."""
    noise = np.random.default_rng(seed).standard_normal((*size, 3))
    noise = cv2.GaussianBlur(noise, (0, 0), 3)
    return np.clip(128 + 50 * noise / noise.std(), 0, 255).astype(np.uint8)


def window(image, x=0, y=0, hw=HW):
    return np.ascontiguousarray(image[y : y + hw[0], x : x + hw[1]])


SCENE = scene()
STRIPES = np.repeat(np.arange(400) // 20, 260).reshape(400, 260).T.astype(np.uint8)


def frame_at(index, x=0, *, rate=30.0, source="cam", hw=HW, image=SCENE):
    return Frame(source=source, index=index, image=window(image, x, hw=hw),
                 captured_at=index / rate, clock="arrival")  # fmt: skip


def label(frame, version=1, took=20.0):
    """The true labels of a window at 3 pixels per frame, after so many milliseconds."""
    return Segmentation(labels=window(STRIPES, 3 * frame.index, hw=frame.image.shape[:2]),
                        names=("a",) * 99, vocabulary_version=version, frame=frame,
                        times={"total": took},
                        labelled_age=0.0, scores=np.ones(HW, np.float32))  # fmt: skip


def look(image):
    return Glance.at(image, "rgb", follow_size(image.shape[:2]))


def moved(images, labels, *, holds=False):
    mover, before = LabelMover(holds=holds), look(images[0])
    way = Way.begin(before)
    for image in images[1:]:
        glance = look(image)
        mover.extend(before, glance, way)
        before = glance
    return mover.move(labels, way, before)


def wrong(labels, x):
    """Share of labels that differ from the truth, of those that are known."""
    labelled = labels != np.iinfo(labels.dtype).max
    return float((labels != window(STRIPES, x))[labelled].mean())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("steps", [2, 8])
def test_labels_move_with_what_they_name(dtype, steps):
    images = [window(SCENE, 3 * n) for n in range(steps + 1)]
    before = window(STRIPES).astype(dtype)
    labels = moved(images, before)
    assert labels.dtype == dtype
    assert wrong(labels, 3 * steps) < 0.1 < wrong(before, 3 * steps)
    unknown = labels == np.iinfo(dtype).max
    assert unknown[:, 3 - 3 * steps :].mean() > 0.6  # what has come in
    assert unknown[:, : -3 * steps - 6].mean() < 0.02
    filled = moved(images, before, holds=True)
    assert (filled[:, -2:] == before[:, -2:]).all()


@pytest.mark.parametrize("times", [1, 5])
def test_noise_moves_nothing(times):
    rng = np.random.default_rng(1)
    image, labels = (window(one).repeat(times, 0).repeat(times, 1) for one in (SCENE, STRIPES))
    labels[::2, ::3] += 1  # of every pixel's own
    noise = rng.normal(0, 3, (9, *image.shape))
    still = np.clip(image + noise, 0, 255).astype(np.uint8)
    assert (moved(still, labels) == labels).mean() > 0.999


@pytest.mark.parametrize("hw", [(2, 3), (40, 1000), (700, 9), (720, 1280)])
def test_frames_of_any_shape_are_followed(hw):
    image = np.zeros((*hw, 3), np.uint8)
    labels = np.full(hw, 7, np.uint8)
    assert min(follow_size(hw)) >= 32
    assert (moved([image, image], labels) == labels).all()


class SlowNetwork:
    """Labels when told to, and says that each frame took 0.27 s."""

    def __init__(self, **settings):
        self.version, self.newest = 1, None
        self.labelled, self.begun, self.free = [], [], threading.Semaphore(0)
        self.frames = NewestFrames(self.label, Following(**settings), lambda: self.version)

    def label(self, frame):
        version = self.version
        self.begun.append(frame)
        assert self.free.acquire(timeout=LONG)
        self.labelled.append(frame.index)
        return label(frame, version, 270.0)

    def next(self, frame, labels=0):
        """The result of a frame, before which so many others have got their labels."""
        for _ in range(labels):
            done = len(self.labelled)
            waits = self.newest is not None and self.newest not in self.begun[:done]
            self.free.release()
            if waits:
                wait_until(lambda done=done: len(self.labelled) > done)
                self.wait_until_begun()
        self.newest = frame
        return self.frames.next(lambda: frame)

    def wait_until_begun(self):
        """The network has the newest frame, or had it."""
        wait_until(lambda: self.newest in self.begun)


@pytest.fixture
def network(request):
    slow = SlowNetwork(**getattr(request, "param", {}))
    yield slow
    slow.free.release(9)
    slow.frames.close()


def test_every_frame_gets_labels_while_the_network_has_another(network):
    first = network.next(frame_at(0), labels=1)
    assert (first.moved_from, first.scores is None) == (None, False)
    for index in range(1, 9):
        seg = network.next(frame_at(index, 3 * index))
        assert (seg.moved_from, seg.frame.index, seg.scores) == (0, index, None)
        assert wrong(seg.labels, 3 * index) < 0.1
        if index == 1:
            network.wait_until_begun()
    assert network.labelled == [0]  # the network has frame 1
    seg = network.next(frame_at(9, 27), labels=1)  # whose labels have come, and are moved on
    assert (seg.moved_from, network.labelled) == (1, [0, 1])
    assert wrong(seg.labels, 27) < 0.1
    assert set(seg.times) == {"move", "total"}
    seg = network.next(frame_at(10, 30), labels=1)
    assert seg.moved_from == 8  # it took the newest one at once, before frame 9 came
    assert wrong(seg.labels, 30) < 0.1


def test_a_network_that_keeps_up_labels_each_frame_itself():
    frames = NewestFrames(label, Following())  # each frame takes 0.02 s of 0.033
    segs = [frames.next(lambda n=n: frame_at(n, 3 * n)) for n in range(12)]
    assert [seg.moved_from for seg in segs] == [None] * 12
    frames.close()


def test_a_first_label_that_took_seconds_is_carried_over_what_was_dropped_meanwhile(network):
    network.next(frame_at(0), labels=1)
    late = replace(frame_at(100, 3), captured_at=100 / 30)  # 3.3 s later
    assert network.next(late).moved_from == 0


# Another size, and time that goes back or leaps.
@pytest.mark.parametrize("change", [{"hw": (90, 160)}, {"rate": -30.0}, {"rate": 0.5}])
def test_a_frame_that_does_not_follow_gets_labels_of_its_own(change, network):
    network.next(frame_at(0), labels=1).labels[:] = 77  # the caller's own: carried nowhere
    assert 77 not in network.next(frame_at(1, 3)).labels
    odd = frame_at(2, 6, **change)
    seg = network.next(odd, labels=2)  # those of frame 1 are of no use any more
    assert (seg.moved_from, seg.frame) == (None, odd)
    assert seg.labels.shape == odd.image.shape[:2]


def test_other_classes_begin_anew(network):
    network.next(frame_at(0), labels=1)
    assert network.next(frame_at(1, 3)).vocabulary_version == 1
    network.wait_until_begun()  # with the old ones
    network.version = 2
    seg = network.next(frame_at(2, 6), labels=2)
    assert (seg.moved_from, seg.vocabulary_version) == (None, 2)


@pytest.mark.parametrize(
    ("network", "holds"), [({}, False), ({"holds": True}, True)], indirect=["network"]
)
def test_after_a_cut_labels_are_unknown_or_held_until_there_are_new_ones(network, holds):
    first = network.next(frame_at(0), labels=1)
    seg = network.next(frame_at(1, image=scene(5)))
    network.wait_until_begun()
    assert (seg.labels == (first.labels if holds else 255)).all()
    assert network.next(frame_at(2, image=scene(5)), labels=1).moved_from == 1


def test_sources_share_the_network_and_keep_their_own_labels(network):
    network.next(frame_at(0), labels=1)
    seg = network.next(frame_at(0, source="b"), labels=1)
    assert (seg.moved_from, seg.frame.source) == (None, "b")
    segs = [network.next(frame_at(n, 3 * n, source=s)) for n in (1, 2) for s in ("cam", "b")]
    assert [(seg.frame.source, seg.moved_from) for seg in segs] == [("cam", 0), ("b", 0)] * 2


def key_frames(frames, every=4):
    """Results and the frames that were labelled."""
    work, waiting, segs = Mock(side_effect=label), iter(frames), []
    keys = KeyFrames(work, Following(every=every))
    with contextlib.suppress(StopIteration):
        while True:
            segs.append(keys.next(waiting.__next__))
    return segs, [call.args[0].index for call in work.call_args_list]


def test_frames_between_take_the_nearer_labels():
    segs, labelled = key_frames([frame_at(n, 3 * n) for n in range(11)])
    assert labelled == [0, 4, 8]
    assert [seg.frame.index for seg in segs] == [*range(11)]
    origins = [None, 0, 0, 4, None, 4, 4, 8, None, 8, 8]  # the last two have nothing after them
    assert [seg.moved_from for seg in segs] == origins
    assert all(wrong(seg.labels, 3 * n) < 0.1 for n, seg in enumerate(segs))


def test_no_label_goes_to_another_size_or_over_a_leap():
    small = (90, 160)
    frames = [*(frame_at(n, 3 * n) for n in range(3)), frame_at(3, 9),
              *(frame_at(n, 3 * n, hw=small) for n in (4, 5)),
              replace(frame_at(6, 18, hw=small), captured_at=60.0)]  # fmt: skip
    segs, labelled = key_frames(frames, every=8)
    assert labelled == [0, 4, 6]
    assert [seg.moved_from for seg in segs] == [None, 0, 0, 0, None, 4, None]
    assert [seg.labels.shape for seg in segs] == [HW] * 4 + [small] * 3


def camera(count, then, seconds=0.0):
    """A camera that says nothing more after its frames."""

    def picture(index):
        time.sleep(seconds)
        at = time.monotonic() if seconds else index / 30
        return Picture(image=window(SCENE, 3 * index), captured_at=at, clock="arrival")

    return Script("cam", [*(partial(picture, index) for index in range(count)), then])


def test_frames_do_not_wait_for_a_camera_that_stopped_between_two_labelled_ones():
    then = threading.Event()
    patience = Patience(stalled_after=0.1, lost_after=LONG)
    settings = {"policy": "all", "patience": patience, "following": Following(every=6)}
    with Stream([camera(7, then)], streams.label, **settings) as stream:
        segs = [next(stream) for _ in range(7)]
    assert [seg.moved_from for seg in segs] == [None, 0, 0, 0, 6, 6, None]
    stream = Stream([camera(5, then)], streams.label, **settings)
    assert [next(stream).moved_from for _ in range(5)] == [None, 0, 0, 0, 0]
    stats = stream.stats()["cam"]
    assert (stats.labelled, stats.given_out, stats.captured) == (1, 5, 5)
    assert set(stats.labelled_age_ms) == set(stats.age_ms) == {"p50", "p95", "p99"}
    then.set()
    stream.close()


def test_a_live_stream_gives_out_more_than_it_labels():
    then = threading.Event()

    def segment(image):
        then.wait(0.2)
        return streams.label(image)

    with Stream([camera(40, then, 0.02)], segment, following=Following()) as stream:
        segs = [next(stream) for _ in range(20)]
        stats = stream.stats()["cam"]
        assert stats.given_out == 20
        assert 1 <= stats.labelled < 12
        ages = [seg.labelled_age for seg in segs if seg.moved_from is not None]
        assert len(ages) >= 8
        assert max(*ages, stats.age_ms["p99"] / 1000) < 2.0
        then.set()


LIVE, FILE = Script("cam", [0]), PhotoSource(name="p", path="p")


@pytest.mark.parametrize(
    ("settings", "sources", "says"),
    [
        ({"follow": "sometimes"}, [LIVE], ("follow", "sometimes")),
        ({"follow": True, "every": 1}, [LIVE], ("every", "2", "64")),
        ({"follow": True, "every": 8.0}, [LIVE], ("every", "8.0")),
        ({"follow": False, "every": 8}, [LIVE], ("every",)),
        ({"follow": True, "policy": "all"}, [LIVE], ("follow", "every=K")),
        ({"follow": True, "every": 8}, [LIVE], ("every", "latest")),
        ({"follow": True, "every": 8}, [FILE], ("follow", "p")),
    ],
)  # fmt: skip
def test_what_gains_nothing_is_refused(settings, sources, says):
    settings = {"every": None, "policy": None, **settings}
    with refused(ArgumentError, *says):
        following_of(sources=sources, channel_order="rgb", **settings)


@pytest.mark.parametrize(
    ("policy", "sources", "expected"),
    [("latest", [LIVE], True), (None, [LIVE], True), ("all", [LIVE], False), (None, [FILE], False),
     ("latest", [LIVE, FILE], False)],
)  # fmt: skip
def test_by_default_a_server_follows_cameras(policy, sources, expected):
    assert (following_of(None, None, policy, sources, "rgb") is not None) is expected
