"""Recorded CUDA graphs, and the pinned memory that goes with them."""

import gc
import itertools

import numpy as np
import pytest

from conftest import require_cuda
from support.cuda_counts import counts_reader
from support.errors import refused
from zsseg_rt import _C, ops
from zsseg_rt.errors import CaptureError, DeviceError

pytestmark = pytest.mark.needs_cuda
ARRAYS = {
    "frame": ((37, 53, 3), np.uint8), "logits": ((1, 9, 5, 7), np.float32),
    "labels": ((1, 37, 53), np.uint8), "pixels": ((3, 16, 16), np.float32),
}  # fmt: skip
UNIT = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


@pytest.fixture(autouse=True)
def stream():
    require_cuda()
    return ops.Stream(0)


class SmallFrame:
    """A frame and logits in pinned memory become labels and a flag there, on its own buffers."""

    def __init__(self, stream):
        self.stream, empty = stream, _C.DeviceArray.empty
        self.pinned = {name: _C.PinnedArray(*each) for name, each in ARRAYS.items()}
        self.host = {name: pinned.host for name, pinned in self.pinned.items()}
        self.gpu = {n: empty(*each, stream=stream.handle) for n, each in ARRAYS.items()}
        self.finite = _C.PinnedArray((1,), np.uint8)
        self.flag = self.finite.mapped(stream.handle)
        self.began, self.ended = ops.Event(0), ops.Event(0, blocking=True)
        self.fill(0)

    def fill(self, seed):
        rng = np.random.default_rng(seed)
        self.host["frame"][...] = rng.integers(0, 256, ARRAYS["frame"][0], np.uint8)
        self.host["logits"][...] = rng.standard_normal(ARRAYS["logits"][0])

    def enqueue(self):
        handle, gpu = self.stream.handle, self.gpu
        self.began.record(handle)
        for name in ("frame", "logits"):
            gpu[name].copy_from(self.host[name], handle)
        pixels, labels = gpu["pixels"], gpu["labels"]
        ops.preprocess(gpu["frame"], size_hw=(16, 16), **UNIT, out=pixels, stream=handle)
        ops.all_finite(gpu["logits"], out=self.flag, stream=handle)
        ops.upsample_argmax(gpu["logits"], (37, 53), out=labels, stream=handle)
        for name in ("labels", "pixels"):
            gpu[name].copy_to(self.host[name], handle, wait=False)
        self.ended.record(handle)

    def results(self):
        self.ended.synchronize()
        return [*(self.host[name].copy() for name in ("labels", "pixels")), self.finite.host.copy()]

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
        small.eager()
        small.host["labels"][...] = 255
        captures.append(small.recorded())
        stream.synchronize()
        assert (small.host["labels"] == 255).all()
        assert not captures[-1].is_recording
        assert captures[-1].nodes >= 8  # 4 copies, 4 kernels or more, 2 events
    for seed, (small, capture) in itertools.product((1, 2, 3), zip(both, captures, strict=True)):
        small.fill(seed)
        expected = small.eager()
        small.host["labels"][...], small.finite.host[...] = 255, 7
        small.host["pixels"][...] = np.nan
        capture.launch(stream.handle)
        assert_equal(small.results(), expected)
        assert small.began.elapsed_ms(small.ended) >= 0.0
        assert expected[-1] == 1
    small.host["logits"][0, 0, 1, 2] = np.nan
    capture.launch(stream.handle)
    assert small.results()[-1] == 0


def wait_for_an_event(stream, array):
    event = ops.Event(0, timing=False)
    event.record(stream.handle)
    event.synchronize()


UNPINNED = "expected pinned host memory in a capture, got pageable"
REFUSED = [
    (lambda stream, _: stream.synchronize(), "cudaErrorStreamCaptureUnsupported.*Wait, allocate"),
    (wait_for_an_event, "cudaErrorCapturedEvent.*before the capture begins"),
    (lambda stream, array: array.copy_from(np.zeros(4, "f4"), stream.handle), UNPINNED),
    (lambda stream, array: array.numpy(stream.handle), UNPINNED),
    (lambda stream, _: _C.DeviceArray.empty((3,), "f4", 0, stream.handle), "got an allocation"),
    (lambda _, array: ops.all_finite(array, stream=ops.Stream(0).handle), "capture of one of the"),
]


@pytest.mark.parametrize(("act", "message"), REFUSED)
def test_what_cannot_be_recorded_is_an_error_and_harms_nothing(stream, act, message):
    small = SmallFrame(stream)
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
