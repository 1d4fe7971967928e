"""A stand-in for full TensorRT that builds bundles' own graphs; a session of the CPU computes.

Its order is as strict as ``fake_tensorrt``'s; what ``execute_async_v3`` enqueues reads the input
addresses and writes the output addresses. A folder on the path with :data:`MODULE` as
``tensorrt/__init__.py`` makes it importable. ``$STAND_IN_WRONG`` names a graph whose plans compute
something else.
"""

import json
import os
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from support.fake_tensorrt import CudaEngine, ExecutionContext, FakeTensorRT, OnnxParser
from zsseg_rt import ops
from zsseg_rt.backends import registry
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.onnx.check import check_graph

KINDS = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}
MODULE = """
import sys
sys.path.append({tests!r})
from support.computing_tensorrt import OnnxTensorRT
sys.modules[__name__] = OnnxTensorRT()
"""


class HeaderParser(OnnxParser):
    """Takes a graph's inputs and outputs, and one product of its precision, from its file."""

    def parse_from_file(self, path: str) -> bool:
        header = check_graph(Path(path))
        self.network.graph = {
            "inputs": [_row(spec) for spec in header.inputs],
            "outputs": [_row(spec) for spec in header.outputs],
            "layers": [["MATRIX_MULTIPLY", "HALF" if ".float16." in path else "FLOAT"]],
            "path": path,
        }
        return True


def _row(spec: Any) -> dict[str, Any]:
    sizes = [size if isinstance(size, int) else -1 for size in spec.shape]
    axes = {str(axis): size for axis, size in enumerate(spec.shape) if not isinstance(size, int)}
    return {"name": spec.name, "dtype": KINDS[spec.dtype], "shape": sizes, "axes": axes}


class ComputingEngine(CudaEngine):
    """Its one attention is fused."""

    def create_engine_inspector(self) -> Any:
        text = json.dumps({"Layers": [{"Name": "_gemm_mha_v2_0x1", "LayerType": "kgen"}]})
        return SimpleNamespace(get_engine_information=lambda layout: text)


def run_on_host(session: Any, header: Any, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a session of the CPU on feeds, and give results, of the dtypes that a graph states."""
    for spec in header.inputs:
        assert feeds[spec.name].dtype == spec.dtype, spec.name
    inputs = {spec.name: feeds[spec.name].astype(spec.dtype) for spec in session.inputs}
    results = session.run(inputs)
    return {spec.name: np.array(results[spec.name], spec.dtype) for spec in header.outputs}


class ComputingContext(ExecutionContext):
    def __init__(self, engine: CudaEngine) -> None:
        super().__init__(engine)
        path, host = Path(engine.graph["path"]), registry.get_backend(engine.trt.host)
        precision = "float32" if host.name == "openvino" else "auto"
        graph = host.load(path, device="cpu", precision=precision, options=BackendOptions())
        self.session, self.header = graph.session(), check_graph(path)
        self.is_wrong = path.name.split(".")[0] == os.environ.get("STAND_IN_WRONG")

    def execute_async_v3(self, stream: int) -> bool:
        assert super().execute_async_v3(stream)
        feeds = {}
        for spec in self.header.inputs:
            shape = self.shapes[spec.name]
            memory = _memory(self.addresses[spec.name], shape, spec.dtype, stream)
            feeds[spec.name] = ops.DeviceArray.from_numpy(memory, 0, stream).numpy(stream)
        for name, result in run_on_host(self.session, self.header, feeds).items():
            self._write(name, result / 2 if self.is_wrong else result, stream)
        return True

    def _write(self, name: str, result: np.ndarray, stream: int) -> None:
        """Unblended, past logits are the copy to a foreign address that the operations offer."""
        words = np.ascontiguousarray(result).reshape(1, 1, 1, -1).view(np.float32)  # of any dtype
        for begin in range(0, words.shape[-1], 16384):
            some = words[..., begin : begin + 16384]
            shape = some.shape
            arrays = (some, some, np.zeros((1, 1, shape[3], 2)), np.zeros((1, 1, shape[3])))
            placed = [
                ops.DeviceArray.from_numpy(np.ascontiguousarray(array, np.float32), 0, stream)
                for array in arrays
            ]
            out = _memory(self.addresses[name] + 4 * begin, shape, "float32", stream)
            ops.warp_blend(*placed, out=out, stream=stream)


def _memory(address: int, shape: tuple[int, ...], dtype: str, stream: int) -> Any:
    """Memory of the device that only its address is known of."""
    interface = {
        "shape": shape, "typestr": np.dtype(dtype).str, "data": (address, False), "version": 3,
        "stream": stream or 1,
    }  # fmt: skip
    return SimpleNamespace(__cuda_array_interface__=interface)


class OnnxTensorRT(FakeTensorRT):
    """The module; ``host`` is the backend that computes."""

    __spec__ = ModuleSpec("tensorrt", None)
    parser, engine, context = HeaderParser, ComputingEngine, ComputingContext

    def __init__(self, host: str = "openvino") -> None:
        super().__init__()
        self.host = host
