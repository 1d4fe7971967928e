"""Recorded CUDA graphs, and the pinned memory that goes with them."""

import gc
import itertools
import threading

import numpy as np
import pytest

from conftest import require_cuda
from support.cuda_counts import counts_reader
from support.errors import refused
from zsseg_rt import _C, ops
from zsseg_rt.errors import CaptureError, DeviceError

pytestmark = pytest.mark.needs_cuda
FRAME_HW, GRID_HW, CLASSES = (37, 53), (5, 7), 9


@pytest.fixture(autouse=True)
def stream():
    require_cuda()
    return ops.Stream(0)


class SmallFrame:
    """A frame and logits in pinned memory become labels and a flag there, on its own buffers."""

    def __init__(self, stream):
        self.stream, handle = stream, stream.handle
        empty = _C.DeviceArray.empty
        height, width = FRAME_HW
        self.frame = _C.PinnedArray((height, width, 3), np.uint8)
        self.logits = _C.PinnedArray((1, CLASSES, *GRID_HW), np.float32)
        self.labels = _C.PinnedArray((1, *FRAME_HW), np.uint8)
        self.finite = _C.PinnedArray((1,), np.uint8)
        self._flag = self.finite.mapped(handle)
        self._frame = empty((height, width, 3), "uint8", stream=handle)
        self._pixels = empty((3, 16, 16), "float32", stream=handle)
        self._logits = empty((1, CLASSES, *GRID_HW), "float32", stream=handle)
        self._labels = empty((1, *FRAME_HW), "uint8", stream=handle)
        self.began, self.ended = ops.Event(0), ops.Event(0, blocking=True)
        self.pixels = _C.PinnedArray((3, 16, 16), np.float32)

    def fill(self, seed):
        rng = np.random.default_rng(seed)
        self.frame.host[...] = rng.integers(0, 256, self.frame.shape, np.uint8)
        self.logits.host[...] = rng.standard_normal(self.logits.shape).astype(np.float32)

    def enqueue(self):
        handle = self.stream.handle
        self.began.record(handle)
        self._frame.copy_from(self.frame.host, handle)
        self._logits.copy_from(self.logits.host, handle)
        ops.preprocess(
            self._frame,
            size_hw=(16, 16),
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.3, 0.4),
            out=self._pixels,
            stream=handle,
        )
        ops.all_finite(self._logits, out=self._flag, stream=handle)
        ops.upsample_argmax(self._logits, FRAME_HW, out=self._labels, stream=handle)
        self._labels.copy_to(self.labels.host, handle, wait=False)
        self._pixels.copy_to(self.pixels.host, handle, wait=False)
        self.ended.record(handle)

    def results(self):
        self.ended.synchronize()
        return self.labels.host.copy(), int(self.finite.host[0]), self.pixels.host.copy()

    def eager(self):
        self.enqueue()
        return self.results()

    def recorded(self):
        capture = _C.Capture(0)
        capture.begin(self.stream.handle)
        self.enqueue()
        capture.end()
        return capture


def assert_equal(arrays, expected):
    for one, other in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_captures_run_on_what_their_inputs_hold_now(stream):
    """Two on one stream; recording runs nothing, and each launch takes its own times."""
    both, captures = (SmallFrame(stream), SmallFrame(stream)), []
    for small in both:
        small.fill(0)
        small.eager()
        small.labels.host[...] = 255
        captures.append(small.recorded())
        stream.synchronize()
        assert (small.labels.host == 255).all()
        assert not captures[-1].is_recording
        assert captures[-1].nodes >= 8  # 4 copies, 4 kernels or more, 2 events
    for seed, (small, capture) in itertools.product((1, 2, 3), zip(both, captures, strict=True)):
        small.fill(seed)
        expected = small.eager()
        small.labels.host[...] = 255
        small.finite.host[...] = 7
        small.pixels.host[...] = np.nan
        capture.launch(stream.handle)
        assert_equal(small.results(), expected)
        assert small.began.elapsed_ms(small.ended) >= 0.0
        assert expected[1] == 1
    small.logits.host[0, 0, 1, 2] = np.nan
    capture.launch(stream.handle)
    assert small.results()[1] == 0


def wait_for_an_event(stream, array):
    event = ops.Event(0, timing=False)
    event.record(stream.handle)
    event.synchronize()


REFUSED = [
    (
        lambda stream, array: stream.synchronize(),
        "cudaErrorStreamCaptureUnsupported.*Wait, allocate",
    ),
    (wait_for_an_event, "cudaErrorCapturedEvent.*before the capture begins"),
    (
        lambda stream, array: array.copy_from(np.zeros(4, np.float32), stream.handle),
        "expected pinned host memory in a capture, got pageable",
    ),
    (
        lambda stream, array: array.numpy(stream.handle),
        "expected pinned host memory in a capture, got pageable",
    ),
    (
        lambda stream, array: ops.DeviceArray.empty((3,), "float32", 0, stream.handle),
        "expected all of it before the capture begins, got an allocation",
    ),
    (
        lambda stream, array: ops.all_finite(array, stream=ops.Stream(0).handle),
        "got a capture of one of the two",
    ),
]


@pytest.mark.parametrize(("act", "message"), REFUSED)
def test_what_cannot_be_recorded_is_an_error_and_harms_nothing(stream, act, message):
    small = SmallFrame(stream)
    small.fill(0)
    expected = small.eager()
    array = ops.DeviceArray.from_numpy(np.ones(4, np.float32), 0, stream.handle)
    capture = _C.Capture(0)
    capture.begin(stream.handle)
    with pytest.raises(CaptureError, match=message):
        act(stream, array)
    capture.cancel()
    assert not capture.is_recording
    assert_equal(small.eager(), expected)
    recorded = small.recorded()
    recorded.launch(stream.handle)
    assert_equal(small.results(), expected)
    np.testing.assert_array_equal(array.numpy(stream.handle), np.ones(4, np.float32))


def test_arrays_collected_meanwhile_are_freed_afterwards(stream):
    counts = counts_reader()
    gc.collect()  # what other tests left behind counts too
    small = SmallFrame(stream)
    small.fill(0)
    expected = small.eager()
    array = ops.DeviceArray.from_numpy(np.ones(4, np.float32), 0, stream.handle)
    pinned = _C.PinnedArray((300 << 20,), np.uint8)  # more than is kept
    old = small.recorded()
    capture = _C.Capture(0)
    capture.begin(stream.handle)
    small.enqueue()
    before = counts()
    del array, pinned, old
    gc.collect()
    assert counts() == before
    capture.end()
    after = counts()
    assert after["frees"] - before["frees"] == 1
    assert after["pinned_frees"] - before["pinned_frees"] == 1
    capture.launch(stream.handle)
    assert_equal(small.results(), expected)


def test_other_threads_go_on_during_a_capture(stream):
    small = SmallFrame(stream)
    small.fill(0)
    expected = small.eager()
    values, done = [], threading.Event()

    def work():
        own = ops.Stream(0)
        for value in range(5):
            array = ops.DeviceArray.from_numpy(np.full(3, value), 0, own.handle)
            values.append(array.numpy(own.handle)[0])
        done.set()

    capture = _C.Capture(0)
    capture.begin(stream.handle)
    thread = threading.Thread(target=work)
    thread.start()
    assert done.wait(60)
    small.enqueue()
    capture.end()
    thread.join(60)
    assert values == list(range(5))
    capture.launch(stream.handle)
    assert_equal(small.results(), expected)


def test_pinned_memory_lives_as_long_as_its_views():
    view = _C.PinnedArray((3, 4), np.float32).host[1:]
    gc.collect()
    view[...] = 5
    other = _C.PinnedArray((3, 4), np.float32)
    other.host[...] = 1
    assert (view == 5).all()
    assert other.shape == (3, 4)
    assert other.dtype == np.float32
    mapped = other.mapped()
    del other
    gc.collect()
    third = _C.PinnedArray((3, 4), np.float32)
    third.host[...] = 2
    assert int(ops.all_finite(mapped).numpy()[0]) == 1
    assert (view == 5).all()


def test_a_copy_without_waiting_needs_pinned_memory(stream):
    array = ops.DeviceArray.from_numpy(np.ones(3, np.float32), 0, stream.handle)
    with refused(DeviceError, "out", "wait"):
        array.copy_to(np.zeros(3, np.float32), stream.handle, wait=False)
    pinned = _C.PinnedArray((3,), np.float32)
    pinned.host[...] = 0
    array.copy_to(pinned.host, stream.handle, wait=False)
    stream.synchronize()
    assert pinned.host.tolist() == [1, 1, 1]
