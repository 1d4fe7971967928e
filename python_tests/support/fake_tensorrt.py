"""The part of TensorRT's API that the backend uses, in Python, strict about order and arguments.

A graph is a JSON file; a plan is its bytes after ``PLAN``. Nothing is computed: the calls are kept,
in order, in ``journal``. TensorRT-RTX, where it differs, compiles kernels for a context and for
each new shape, unless they are in its runtime cache: ``compile WHAT`` in the journal.
"""

import importlib.util
import json
import sys
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from zsseg_rt.backends import _tensorrt, _tensorrt_session


class ILogger:
    Severity = IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO"], start=0)

    def __init__(self):
        self.is_initialised = True


class FakeTensorRT:
    """Stands for the imported module; each instance has its own journal and faults.

    ``faults`` names what must fail: "parse", "build", "deserialize" (once each time it is listed),
    "context", "set_input_shape", "set_tensor_address", "execute", "runtime_config",
    "set_runtime_cache". ``environment`` is what kept kernels must fit.
    """

    LayerInformationFormat = Enum("LayerInformationFormat", ["ONELINE", "JSON"])
    ProfilingVerbosity = Enum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "DETAILED"])
    MemoryPoolType = Enum("MemoryPoolType", ["WORKSPACE"])
    BuilderFlag = Enum("BuilderFlag", ["FP16", "TF32"])
    # at a bit that no real version has: a literal would show
    NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 5})
    CudaGraphStrategy = Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
    ComputeCapability = Enum("ComputeCapability", ["NONE", "SM86", "SM87", "SM89"])
    ILogger = ILogger
    IProgressMonitor, IProfiler = type("IProgressMonitor", (), {}), type("IProfiler", (), {})

    def __init__(self, version="10.3.0"):
        self.__version__ = version
        self.journal, self.loggers, self.faults, self.contexts = [], [], [], []
        self.plan_prefix, self.environment = b"PLAN", "Orin, driver 580"

    def fails(self, what):
        if what in self.faults:
            self.faults.remove(what)
            return True
        return False

    def keep_first(self, logger):
        """As TensorRT does: the first logger of a process stays, every other causes a warning."""
        assert logger.is_initialised
        if self.loggers and logger is not self.loggers[0]:
            self.loggers[0].log(ILogger.Severity.WARNING, "logger differs from the one registered")
        self.loggers.append(logger)

    def Builder(self, logger):  # noqa: N802 - TensorRT's name
        self.keep_first(logger)
        self.journal.append("Builder")
        return Builder(self, logger)

    def OnnxParser(self, network, logger):  # noqa: N802 - TensorRT's name
        return self.parser(self, network)

    def Runtime(self, logger):  # noqa: N802 - TensorRT's name
        self.keep_first(logger)
        self.journal.append("Runtime")
        return Runtime(self, logger)


class Builder:
    def __init__(self, trt, logger):
        self.trt, self.logger = trt, logger

    def create_network(self, flags):
        assert flags == 1 << self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return Network()

    def create_builder_config(self):
        return Config(self.trt)

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        flags = sorted(flag.name for flag in config.flags)
        self.trt.journal += ["build", f"flags {flags}"]
        for spec in network.graph["inputs"]:
            assert -1 not in spec["shape"] or spec["name"] in config.profile.shapes
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Timing", "Building", 2)
        going_on = monitor.step_complete("Timing", 0)
        monitor.phase_finish("Timing")
        monitor.step_complete("Timing", 1)  # late
        monitor.step_complete("Building", 0)
        monitor.phase_finish("Building")
        if not going_on or self.trt.fails("build"):
            self.logger.log(ILogger.Severity.ERROR, "no implementation for node /blocks.0/mlp")
            return None
        return self.trt.plan_prefix + json.dumps(network.graph).encode()


class Config:
    def __init__(self, trt):
        self._trt = trt
        self.flags = {trt.BuilderFlag.TF32}  # as in every version

    def set_compute_capability(self, member, place):
        assert place < self.num_compute_capabilities
        return True

    def set_memory_pool_limit(self, pool, size):
        self._trt.journal.append(f"limit {pool.name} {size}")

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def add_optimization_profile(self, profile):
        self.profile = profile
        return 0


class Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, low, middle, high):
        self.shapes[name] = (low, middle, high)


class Network:
    def __init__(self):
        self.graph = {"inputs": [], "outputs": [], "layers": []}

    num_layers = property(lambda self: len(self.graph["layers"]))
    num_inputs = property(lambda self: len(self.graph["inputs"]))
    num_outputs = property(lambda self: len(self.graph["outputs"]))

    def get_layer(self, index):
        kind, dtype = (SimpleNamespace(name=name) for name in self.graph["layers"][index])
        tensor = SimpleNamespace(name=str(index), dtype=dtype)
        tensors = dict.fromkeys(("get_input", "get_output"), lambda place: tensor)
        return SimpleNamespace(type=kind, num_inputs=1, num_outputs=1, **tensors)

    def get_input(self, index):
        return Network._tensor(self.graph["inputs"][index])

    def get_output(self, index):
        return Network._tensor(self.graph["outputs"][index])

    @staticmethod
    def _tensor(spec):
        dtype, axes = SimpleNamespace(name=spec["dtype"]), spec.get("axes", {})
        return SimpleNamespace(
            **spec | {"dtype": dtype}, get_dimension_name=lambda axis: axes.get(str(axis))
        )


class OnnxParser:
    def __init__(self, trt, network):
        self.trt, self.network, self.num_errors = trt, network, 0

    def parse_from_file(self, path):
        self.num_errors = int(self.trt.fails("parse"))
        self.network.graph = json.loads(Path(path).read_text(encoding="utf-8"))
        return not self.num_errors

    def get_error(self, index):
        assert 0 <= index < self.num_errors
        texts = {"node_name": "/blocks.3/attn", "node_operator": "Einsum9", "desc": "No\nimporter"}
        return SimpleNamespace(**{name: lambda text=text: text for name, text in texts.items()})


class Runtime:
    def __init__(self, trt, logger):
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, data):
        self.trt.journal.append("deserialize")
        if not data.startswith(self.trt.plan_prefix) or self.trt.fails("deserialize"):
            self.logger.log(ILogger.Severity.ERROR, "built for another compute capability")
            return None
        return self.trt.engine(self.trt, json.loads(data[len(self.trt.plan_prefix) :]))


class CudaEngine:
    def __init__(self, trt, graph):
        self.trt, self.graph = trt, graph

    def create_runtime_config(self):
        return None if self.trt.fails("runtime_config") else RuntimeConfig(self.trt)

    def create_execution_context(self, *runtime_config):
        if self.trt.fails("context"):
            return None
        self.trt.contexts.append(self.trt.context(self, *runtime_config))
        return self.trt.contexts[-1]

    def create_engine_inspector(self):
        text = json.dumps({"Layers": [{"Name": "mlp", "LayerType": "gemm"}]})
        return SimpleNamespace(get_engine_information=lambda layout: text)


class RuntimeConfig:
    def __init__(self, trt):
        self._trt, self.cuda_graph_strategy = trt, trt.CudaGraphStrategy.DISABLED

    def create_runtime_cache(self):
        return RuntimeCache(self._trt)

    def set_runtime_cache(self, cache):
        self.cache = cache
        return not self._trt.fails("set_runtime_cache")


class RuntimeCache:
    def __init__(self, trt):
        self._trt, self._kernels = trt, []

    def _compile(self, what):
        if what not in self._kernels:
            self._trt.journal.append(f"compile {what}")
            self._kernels.append(what)

    def serialize(self):
        return json.dumps([self._trt.environment, self._kernels]).encode()

    def deserialize(self, blob):
        environment, kernels = json.loads(bytes(blob))
        fits = environment == self._trt.environment
        self._kernels = kernels if fits else []
        return fits


class ExecutionContext:
    """Refuses addresses before shapes and running before addresses, as a CUDA program would."""

    def __init__(self, engine, runtime_config=None):
        self.engine, self.trt, self.runtime_config = engine, engine.trt, runtime_config
        self.shapes, self.addresses, self.inferred = {}, {}, False
        self.profiler = None
        if runtime_config is not None:
            self.is_stream_capturable = lambda stream: False  # it allocates while it runs
            runtime_config.cache._compile("context")

    def set_input_shape(self, name, shape):
        if self.trt.fails("set_input_shape"):
            return False
        self.trt.journal.append(f"shape {name} {tuple(shape)}")
        self.shapes[name], self.inferred = tuple(shape), False
        return True

    def infer_shapes(self):
        self.inferred = True
        return [s["name"] for s in self.engine.graph["inputs"] if s["name"] not in self.shapes]

    def get_tensor_shape(self, name):
        assert self.inferred, "get_tensor_shape before infer_shapes"
        sizes = {
            axis: self.shapes[spec["name"]][int(place)]
            for spec in self.engine.graph["inputs"]
            for place, axis in spec["axes"].items()
        }
        spec = next(spec for spec in self.engine.graph["outputs"] if spec["name"] == name)
        (axes, shape), only = (spec.get("axes", {}), spec["shape"]), next(iter(sizes.values()), 0)
        return tuple(
            sizes.get(axes.get(str(place)), only) if size == -1 else size
            for place, size in enumerate(shape)
        )

    def set_tensor_address(self, name, address):
        assert self.inferred, "an address before the shapes"
        if self.trt.fails("set_tensor_address"):
            return False
        self.trt.journal.append(f"address {name}")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        tensors = self.engine.graph["inputs"] + self.engine.graph["outputs"]
        assert set(self.addresses) == {spec["name"] for spec in tensors}
        self.trt.journal.append(f"execute on {stream}")
        if self.runtime_config is not None:
            self.runtime_config.cache._compile(f"for {sorted(self.shapes.values())}")
        if self.profiler is not None:
            assert self.runtime_config is None or (
                self.runtime_config.cuda_graph_strategy is self.trt.CudaGraphStrategy.DISABLED
            )
            for layer in ("blocks.0/MatMul + blocks.0/Add", "softmax"):
                self.profiler.report_layer_time(layer, 0.25)
        return not self.trt.fails("execute")


FakeTensorRT.parser, FakeTensorRT.engine = OnnxParser, CudaEngine
FakeTensorRT.context = ExecutionContext


class FakeNative:
    """Stands for the compiled module on a computer with ``count`` GPUs."""

    def __init__(self):
        self.count, self.capability, self.cuda = 1, "8.7", "13.0"
        self.size = {"multiprocessors": 16, "total_memory": 64 << 30, "driver": 13000}
        self.device, self.allocated, self.waits = 0, [], []
        self.DeviceArray = SimpleNamespace(empty=self._allocate)

    def _allocate(self, shape, dtype, *, device, stream):
        self.allocated.append((shape, dtype, device, stream))
        return GpuArray(np.empty(shape, dtype), 4096 * len(self.allocated))

    def Event(self, device, *, timing):  # noqa: N802 - a class of ours
        assert not timing, "an event with timing orders nothing within a capture"
        streams = []
        return SimpleNamespace(
            record=streams.append, wait=lambda stream: self.waits.append((*streams, stream))
        )

    def cuda_device_count(self):
        return self.count

    def cuda_device_properties(self, device):
        return {"name": "Orin", "compute_capability": self.capability} | self.size

    def cuda_runtime_version(self):
        return self.cuda

    def cuda_set_device(self, device, *, only_active=False):
        previous, self.device = self.device, device
        return previous


class GpuArray:
    """An array that says it is on the GPU, at an address of our choosing."""

    def __init__(self, host, address, stream=None, strides=None):
        self.host, self.address, self.shape = host, address, host.shape
        self.__cuda_array_interface__ = {
            "shape": host.shape, "typestr": host.dtype.str, "data": (address, False),
            "strides": strides, "stream": stream, "version": 3,
        }  # fmt: skip

    def view(self, shape):
        return GpuArray(np.resize(self.host, shape), self.address)


def install(monkeypatch, fake, native, flavour="tensorrt"):
    """Let a stand-in be the one TensorRT; the check of ONNX is left out, as graphs are JSON."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(_tensorrt, "check_graph", lambda path: SimpleNamespace(token_rows={}))
    monkeypatch.setattr(_tensorrt, "map_file", lambda path: None)
    monkeypatch.setattr(_tensorrt, "quantised_layers", lambda content: 0)
    monkeypatch.setattr(_tensorrt_session, "core", native)
    monkeypatch.setitem(sys.modules, flavour, fake)
    monkeypatch.delenv("ZSSEG_TENSORRT", raising=False)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: fake if name == flavour else find_spec(name)
    )
    return fake


def write_graph(folder, **changes):
    """The graph of a decoder, ``x`` to ``y``."""
    path = folder / "decoder.onnx"
    path.write_text(json.dumps(GRAPH | changes))
    return path


GRAPH = {
    "inputs": [{"name": "x", "dtype": "FLOAT", "shape": [1, -1, 8], "axes": {"1": "classes"}}],
    "outputs": [{"name": "y", "dtype": "FLOAT", "shape": [1, -1, 4]}],
    "layers": [["MATRIX_MULTIPLY", "HALF"], ["MATRIX_MULTIPLY", "HALF"], ["SOFTMAX", "FLOAT"]],
}
