"""The part of TensorRT's API that the backend uses, in Python, strict about order and arguments.

A graph is a JSON file; a plan is its bytes after ``PLAN``. Nothing is computed: the calls are kept,
in order, in ``journal``.
"""

import importlib.util
import json
import sys
from enum import Enum, IntEnum
from types import SimpleNamespace

import numpy as np

from zsseg_rt.backends import _tensorrt, _tensorrt_session

DataType = Enum("DataType", ["FLOAT", "HALF", "INT8", "INT64"])
LayerType = Enum("LayerType", ["MATRIX_MULTIPLY", "DEQUANTIZE", "SOFTMAX"])
LayerInformationFormat = Enum("LayerInformationFormat", ["ONELINE", "JSON"])
ProfilingVerbosity = Enum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "DETAILED"])
MemoryPoolType = Enum("MemoryPoolType", ["WORKSPACE"])
STRONGLY_TYPED_BIT = 5  # as no real version has it: a literal would show


class BuilderFlag(IntEnum):
    FP16 = 0
    TF32 = 7


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = STRONGLY_TYPED_BIT


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3

    def __init__(self):
        self.is_initialised = True


class IProfiler:
    def __init__(self):
        pass


class IProgressMonitor:
    def __init__(self):
        self.is_initialised = True


class FakeTensorRT:
    """Stands for the imported module; each instance has its own journal and faults.

    ``faults`` names what must fail: "parse", "build", "deserialize" (once each time it is listed),
    "context", "set_input_shape", "set_tensor_address", "execute".
    """

    DataType, LayerType = DataType, LayerType
    LayerInformationFormat = LayerInformationFormat
    ProfilingVerbosity, BuilderFlag = ProfilingVerbosity, BuilderFlag
    NetworkDefinitionCreationFlag, MemoryPoolType = NetworkDefinitionCreationFlag, MemoryPoolType
    ILogger, IProgressMonitor, IProfiler = ILogger, IProgressMonitor, IProfiler

    def __init__(self, version="10.3.0"):
        self.__version__ = version
        self.journal = []
        self.loggers = []
        self.faults = []
        self.plan_prefix = b"PLAN"

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
        return OnnxParser(self, network)

    def Runtime(self, logger):  # noqa: N802 - TensorRT's name
        self.keep_first(logger)
        self.journal.append("Runtime")
        return Runtime(self, logger)


class Builder:
    def __init__(self, trt, logger):
        self.trt, self.logger = trt, logger

    def create_network(self, flags):
        assert flags == 1 << STRONGLY_TYPED_BIT
        return Network()

    def create_builder_config(self):
        return Config(self.trt)

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        self.trt.journal.append("build")
        self.trt.journal.append(f"flags {sorted(flag.name for flag in config.flags)}")
        for spec in network.graph["inputs"]:
            dynamic = any(size == -1 for size in spec["shape"])
            assert not dynamic or spec["name"] in config.profiles[0].shapes
        config.progress_monitor.phase_start("Building", None, 2)
        config.progress_monitor.phase_start("Timing", "Building", 2)
        going_on = config.progress_monitor.step_complete("Timing", 0)
        config.progress_monitor.phase_finish("Timing")
        config.progress_monitor.step_complete("Timing", 1)  # late
        config.progress_monitor.step_complete("Building", 0)
        config.progress_monitor.phase_finish("Building")
        if not going_on or self.trt.fails("build"):
            self.logger.log(ILogger.Severity.ERROR, "no implementation for node /blocks.0/mlp")
            return None
        return self.trt.plan_prefix + json.dumps(network.graph).encode()


class Config:
    def __init__(self, trt):
        self.trt, self.profiles = trt, []
        self.flags = {BuilderFlag.TF32}  # as in every version

    def set_compute_capability(self, member, place):
        assert place < self.num_compute_capabilities
        return True

    def set_memory_pool_limit(self, pool, size):
        self.trt.journal.append(f"limit {pool.name} {size}")

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return len(self.profiles) - 1


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
        kind, dtype = self.graph["layers"][index]
        tensor = SimpleNamespace(name=str(index), dtype=DataType[dtype])
        return SimpleNamespace(
            type=LayerType[kind],
            num_inputs=1,
            num_outputs=1,
            get_input=lambda place: tensor,
            get_output=lambda place: tensor,
        )

    def get_input(self, index):
        return Network._tensor(self.graph["inputs"][index])

    def get_output(self, index):
        return Network._tensor(self.graph["outputs"][index])

    @staticmethod
    def _tensor(spec):
        return SimpleNamespace(
            name=spec["name"],
            dtype=DataType[spec["dtype"]],
            shape=spec["shape"],
            get_dimension_name=lambda axis: spec.get("axes", {}).get(str(axis)),
        )


class OnnxParser:
    def __init__(self, trt, network):
        self.trt, self.network = trt, network
        self.num_errors = 0

    def parse_from_file(self, path):
        if self.trt.fails("parse"):
            self.num_errors = 1
            return False
        with open(path, encoding="utf-8") as file:
            self.network.graph = json.load(file)
        return True

    def get_error(self, index):
        assert 0 <= index < self.num_errors
        return SimpleNamespace(
            node_name=lambda: "/blocks.3/attn",
            node_operator=lambda: "Einsum9",
            desc=lambda: "No importer\nregistered",
        )


class Runtime:
    def __init__(self, trt, logger):
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, data):
        self.trt.journal.append("deserialize")
        if not data.startswith(self.trt.plan_prefix) or self.trt.fails("deserialize"):
            self.logger.log(ILogger.Severity.ERROR, "built for another compute capability")
            return None
        return CudaEngine(self.trt, json.loads(data[len(self.trt.plan_prefix) :]))


class CudaEngine:
    def __init__(self, trt, graph):
        self.trt, self.graph = trt, graph
        self.tensors = graph["inputs"] + graph["outputs"]

    def create_execution_context(self):
        return None if self.trt.fails("context") else ExecutionContext(self)

    def create_engine_inspector(self):
        text = json.dumps({"Layers": [{"Name": "mlp", "LayerType": "gemm"}]})
        return SimpleNamespace(get_engine_information=lambda layout: text)


class ExecutionContext:
    """Refuses addresses before shapes and running before addresses, as a CUDA program would."""

    def __init__(self, engine):
        self.engine, self.trt = engine, engine.trt
        self.shapes, self.addresses, self.inferred = {}, {}, False
        self.profiler = None

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
        spec = next(spec for spec in self.engine.graph["outputs"] if spec["name"] == name)
        dynamic = next(iter(self.shapes.values()))
        return tuple(dynamic[i] if size == -1 else size for i, size in enumerate(spec["shape"]))

    def set_tensor_address(self, name, address):
        assert self.inferred, "an address before the shapes"
        if self.trt.fails("set_tensor_address"):
            return False
        self.trt.journal.append(f"address {name}")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert set(self.addresses) == {spec["name"] for spec in self.engine.tensors}
        self.trt.journal.append(f"execute on {stream}")
        if self.profiler is not None:
            for layer in ("blocks.0/MatMul + blocks.0/Add", "softmax"):
                self.profiler.report_layer_time(layer, 0.25)
        return not self.trt.fails("execute")


class FakeNative:
    """Stands for the compiled module on a computer with ``count`` GPUs."""

    def __init__(self, count=1, capability="8.7"):
        self.count, self.capability = count, capability
        self.size = {"multiprocessors": 16, "total_memory": 64 << 30, "driver": 13000}
        self.device, self.allocated, self.waits = 0, [], []
        native = self

        class DeviceArray:
            @staticmethod
            def empty(shape, dtype, *, device, stream):
                native.allocated.append((shape, dtype, device, stream))
                return GpuArray(np.empty(shape, dtype), 4096 * len(native.allocated))

        class Event:
            def __init__(self, device, *, timing):
                assert not timing, "an event with timing orders nothing within a capture"
                self.recorded = None

            def record(self, stream):
                self.recorded = stream

            def wait(self, stream):
                native.waits.append((self.recorded, stream))

        self.DeviceArray, self.Event = DeviceArray, Event

    def cuda_device_count(self):
        return self.count

    def cuda_device_properties(self, device):
        return {"name": "Orin", "compute_capability": self.capability} | self.size

    def cuda_runtime_version(self):
        return "13.0"

    def cuda_set_device(self, device, *, only_active=False):
        previous, self.device = self.device, device
        return previous


class GpuArray:
    """An array that says it is on the GPU, at an address of our choosing."""

    def __init__(self, host, address, stream=None, strides=None):
        self.host, self.address, self.shape = host, address, host.shape
        self.__cuda_array_interface__ = {
            "shape": host.shape,
            "typestr": host.dtype.str,
            "data": (address, False),
            "strides": strides,
            "stream": stream,
            "version": 3,
        }

    def view(self, shape):
        size = int(np.prod(shape))
        return GpuArray(self.host.reshape(-1)[:size].reshape(shape), self.address)


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
