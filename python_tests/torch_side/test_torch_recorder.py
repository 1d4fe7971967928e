"""What a capture of torch's launches needs, with a torch whose CUDA is made up."""

import contextlib
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.errors import refused

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from zsseg_rt.backends._torch import BACKEND, TorchRecorder  # noqa: E402
from zsseg_rt.backends.base import BackendOptions  # noqa: E402
from zsseg_rt.backends.recording import RecordingSession  # noqa: E402
from zsseg_rt.errors import BackendError, CaptureError  # noqa: E402
from zsseg_rt.runtime.captures import FrameCaptures  # noqa: E402

GRAPH = Path(__file__).parents[1] / "bundles/v1/descriptor.zsseg/decoder.float32.onnx"


class Pools:
    """torch's memory pools: an allocation goes to the pool that is in use, as torch does it."""

    def __init__(self):
        self.alive, self.used, self.devices = weakref.WeakSet(), [], []
        pools = self

        class MemPool:
            def __init__(self):
                assert pools.devices, "a pool belongs to the device that is current"
                pools.alive.add(self)

        self.MemPool = MemPool

    def allocate(self):
        """The pool that a new tensor comes from; None: the one that all share."""
        return self.used[0] if self.used else None

    @contextlib.contextmanager
    def use_mem_pool(self, pool, device=None):
        self.used.append(pool)
        try:
            yield
        finally:
            self.used.remove(pool)

    @contextlib.contextmanager
    def device(self, device):
        self.devices.append(device)
        try:
            yield
        finally:
            self.devices.pop()


@pytest.fixture
def pools(monkeypatch):
    made = Pools()
    for name in ("MemPool", "use_mem_pool", "device"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    return made


def test_what_is_allocated_in_a_capture_comes_from_a_pool_of_its_own(pools):
    recorder, taken = TorchRecorder("cuda:1"), []
    assert pools.allocate() is None
    with recorder.recording():
        assert pools.devices == ["cuda:1"]
        taken.append(pools.allocate())
    assert taken[0] is not None
    assert pools.allocate() is None
    with recorder.recording():  # a second try of the same capture
        assert pools.allocate() is taken[0]


def test_the_pool_lives_until_the_recorder_is_closed(pools):
    recorder = TorchRecorder("cuda:0")
    with recorder.recording():
        pass
    recorders = [TorchRecorder("cuda:0") for _ in range(2)]
    with recorders[0].recording(), recorders[1].recording():
        assert len(pools.alive) == 3
    recorder.close()
    recorder.close()
    assert len(pools.alive) == 2
    with refused(BackendError, "recorder"), recorder.recording():
        pass


def test_an_error_in_a_capture_ends_the_use_of_the_pool(pools):
    recorder = TorchRecorder("cuda:0")
    with pytest.raises(KeyError), recorder.recording():
        raise KeyError
    assert pools.allocate() is None
    assert pools.devices == []


def test_a_session_on_the_cpu_needs_no_recorder():
    graph = BACKEND.load(GRAPH, device="cpu", precision="auto", options=BackendOptions())
    session = graph.session()
    assert session.recorder() is None
    assert session.capture_state() is None
    assert RecordingSession(session).recorder() is None


def test_a_session_on_a_gpu_makes_a_recorder_for_each_capture(monkeypatch):
    from zsseg_rt.backends import _torch

    monkeypatch.setattr(_torch, "check_device", lambda torch, device: torch.device("meta"))
    graph = BACKEND.load(GRAPH, device="cuda:0", precision="auto", options=BackendOptions())
    session = graph.session()
    first, second = session.recorder(), session.recorder()
    assert isinstance(first, TorchRecorder)
    assert first is not second
    assert session.capture_state() is not None  # and it is the same at every frame
    assert session.capture_state() == session.capture_state()


def test_older_torch_takes_other_threads_tensors(monkeypatch):
    name = "_cuda_beginAllocateCurrentThreadToPool"
    recorder = TorchRecorder("cuda:0")
    monkeypatch.setattr(torch.cuda.memory, name, print, raising=False)
    assert not recorder.takes_other_threads
    monkeypatch.delattr(torch.cuda.memory, name)
    assert recorder.takes_other_threads


@pytest.mark.parametrize(("num_lanes", "is_refused"), [(1, False), (2, True)])
def test_such_a_torch_records_for_one_lane_alone(num_lanes, is_refused):
    recorder = SimpleNamespace(takes_other_threads=True)
    session = SimpleNamespace(recorder=lambda: recorder)
    workspace = SimpleNamespace(device="cuda:0")
    captures = FrameCaptures({"graph": session}, workspace, None, wanted=True, num_lanes=num_lanes)
    if is_refused:
        with refused(CaptureError, "num_lanes"):
            captures._recorders()
    else:
        assert captures._recorders() == [recorder]
