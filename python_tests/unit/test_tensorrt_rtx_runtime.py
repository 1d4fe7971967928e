"""TensorRT-RTX keeps the kernels it compiled, and records its own CUDA graphs; with a stand-in."""

import json
from enum import Enum

import numpy as np
import pytest

from support.errors import refused
from support.fake_tensorrt import (
    CudaEngine,
    ExecutionContext,
    FakeNative,
    FakeTensorRT,
    GpuArray,
    ILogger,
    Runtime,
    install,
    write_graph,
)
from zsseg_rt.backends._tensorrt import BACKEND
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.errors import BackendError

CudaGraphStrategy = Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
ComputeCapability = Enum("ComputeCapability", ["NONE", "SM86", "SM87", "SM89"])


class FakeTensorRTX(FakeTensorRT):
    """What differs from full TensorRT.

    Kernels are compiled for a context and for each new shape, unless they are in its runtime cache:
    ``compile WHAT`` in the journal. ``environment`` is what a kept cache must fit.
    """

    CudaGraphStrategy, ComputeCapability = CudaGraphStrategy, ComputeCapability

    def __init__(self, version="1.7.1.116"):
        super().__init__(version)
        self.environment = "Orin, driver 580"
        self.contexts = []

    def Runtime(self, logger):  # noqa: N802 - TensorRT's name
        self.keep_first(logger)
        return RtxRuntime(self, logger)


class RtxRuntime(Runtime):
    def deserialize_cuda_engine(self, data):
        engine = super().deserialize_cuda_engine(data)
        return None if engine is None else RtxEngine(engine.trt, engine.graph)


class RtxEngine(CudaEngine):
    def create_runtime_config(self):
        return None if self.trt.fails("runtime_config") else RuntimeConfig(self.trt)

    def create_execution_context(self, runtime_config):
        assert isinstance(runtime_config.cuda_graph_strategy, CudaGraphStrategy)
        if self.trt.fails("context"):
            return None
        context = RtxContext(self, runtime_config)
        self.trt.contexts.append(context)
        return context


class RuntimeConfig:
    def __init__(self, trt):
        self.trt, self.cache = trt, None
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def create_runtime_cache(self):
        return RuntimeCache(self.trt)

    def set_runtime_cache(self, cache):
        assert isinstance(cache, RuntimeCache)
        if self.trt.fails("set_runtime_cache"):
            self.trt.loggers[0].log(ILogger.Severity.ERROR, "the cache is in use")
            return False
        self.cache = cache
        return True


class RuntimeCache:
    def __init__(self, trt):
        self.trt, self.kernels = trt, []

    def compile(self, what):
        if what not in self.kernels:
            self.trt.journal.append(f"compile {what}")
            self.kernels.append(what)

    def serialize(self):
        return json.dumps([self.trt.environment, self.kernels]).encode()

    def deserialize(self, blob):
        environment, kernels = json.loads(bytes(blob))
        if environment != self.trt.environment:
            return False
        self.kernels = kernels
        return True


class RtxContext(ExecutionContext):
    def __init__(self, engine, runtime_config):
        super().__init__(engine)
        self.runtime_config = runtime_config
        runtime_config.cache.compile("context")

    def is_stream_capturable(self, stream):
        return False  # it allocates while it runs

    def execute_async_v3(self, stream):
        self.runtime_config.cache.compile(f"for {sorted(self.shapes.values())}")
        if self.profiler is not None:
            assert self.runtime_config.cuda_graph_strategy is CudaGraphStrategy.DISABLED
        return super().execute_async_v3(stream)


@pytest.fixture
def rtx(monkeypatch):
    fake = install(monkeypatch, FakeTensorRTX(), FakeNative(), "tensorrt_rtx")
    monkeypatch.setenv("ZSSEG_TENSORRT", "tensorrt_rtx")
    monkeypatch.delenv("ZSSEG_CUDA_GRAPHS", raising=False)
    return fake


@pytest.fixture
def graph_path(tmp_path):
    return write_graph(tmp_path)


def load(path, **options):
    options = BackendOptions(**options)
    return BACKEND.load(path, device="cuda:0", precision="auto", options=options)


def run(session, classes=3):
    session.run({"x": GpuArray(np.zeros((1, classes, 8), np.float32), 1024)}, stream=7)


def compiled(rtx):
    """What was compiled since the last question."""
    found = [entry for entry in rtx.journal if entry.startswith("compile")]
    rtx.journal.clear()
    return found


def kept(cache_dir):
    return list((cache_dir / "engines").glob("*.kernels"))


def test_kernels_are_compiled_once(rtx, graph_path, tmp_path):
    graph = load(graph_path, cache_dir=tmp_path)
    session = graph.session()
    assert compiled(rtx) == ["compile context"]
    assert len(kept(tmp_path)) == 1  # at once: a process may end without a word
    run(session)
    session.close()
    graph.close()
    assert compiled(rtx) == ["compile for [(1, 3, 8)]"]
    later = load(graph_path, cache_dir=tmp_path).session()
    run(later)
    assert compiled(rtx) == []
    run(later, classes=9)
    assert compiled(rtx) == ["compile for [(1, 9, 8)]"]


@pytest.mark.parametrize("change", ["driver", "altered"])
def test_what_does_not_fit_is_compiled_anew(rtx, graph_path, tmp_path, change, caplog):
    load(graph_path, cache_dir=tmp_path).session()
    compiled(rtx)
    (file,) = kept(tmp_path)
    if change == "driver":
        rtx.environment = "Orin, driver 590"
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    load(graph_path, cache_dir=tmp_path).session()
    assert compiled(rtx) == ["compile context"]
    assert (file.name in caplog.text) == (change != "driver")  # a new driver is no fault
    load(graph_path, cache_dir=tmp_path).session()
    assert compiled(rtx) == []


@pytest.mark.parametrize(
    ("setting", "strategy"),
    [
        (None, CudaGraphStrategy.WHOLE_GRAPH_CAPTURE),
        ("1", CudaGraphStrategy.WHOLE_GRAPH_CAPTURE),
        ("0", CudaGraphStrategy.DISABLED),
    ],
)
def test_it_records_its_own_graphs(rtx, graph_path, monkeypatch, setting, strategy):
    if setting is not None:
        monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", setting)
    graph = load(graph_path)
    session = graph.session()
    assert rtx.contexts[0].runtime_config.cuda_graph_strategy is strategy
    assert graph.captures_itself == (setting != "0")
    run(session)
    assert session.capture_state() is None  # nobody may record a capture around it


def test_layers_are_timed_one_by_one(rtx, graph_path):
    session = load(graph_path).session()
    feed = GpuArray(np.zeros((1, 3, 8), np.float32), 1024)
    assert session.profile({"x": feed}, stream=7)
    strategies = [context.runtime_config.cuda_graph_strategy.name for context in rtx.contexts]
    assert strategies == ["WHOLE_GRAPH_CAPTURE", "DISABLED"]


@pytest.mark.parametrize("fault", ["runtime_config", "set_runtime_cache"])
def test_a_refusal_is_an_error(rtx, graph_path, fault):
    rtx.faults = [fault]
    with refused(BackendError, "tensorrt"):
        load(graph_path).session()
