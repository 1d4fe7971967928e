"""TensorRT-RTX beside the stand-in for TensorRT: it compiles kernels on the GPU, and keeps them."""

import json
from enum import Enum

from support.fake_tensorrt import CudaEngine, ExecutionContext, FakeTensorRT, ILogger, Runtime

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
