"""A stand-in for full TensorRT that builds bundles' own graphs, and OpenVINO runs them.

A folder on the path with :data:`MODULE` as ``tensorrt/__init__.py`` makes it importable.
``$STAND_IN_WRONG`` names a graph whose plans compute something else.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.computing_tensorrt import KINDS, ComputingContext
from support.fake_tensorrt import CudaEngine, FakeTensorRT, OnnxParser, Runtime
from zsseg_rt.backends import registry
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.onnx.check import check_graph

MODULE = """
import sys
sys.path.append({tests!r})
from support.onnx_tensorrt import OnnxTensorRT
made = OnnxTensorRT()
made.__spec__ = __spec__
sys.modules[__name__] = made
"""


class OnnxTensorRT(FakeTensorRT):
    """The module."""

    def OnnxParser(self, network: Any, logger: Any) -> Any:  # noqa: N802 - TensorRT's name
        return HeaderParser(self, network)

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 - TensorRT's name
        return ComputingRuntime(self, logger)


class HeaderParser(OnnxParser):
    """Takes a graph's inputs and outputs, and one product of its precision, from its file."""

    def parse_from_file(self, path: str) -> bool:
        header = check_graph(Path(path))
        kind = "HALF" if ".float16." in path else "FLOAT"
        self.network.graph = {
            "inputs": [_row(spec) for spec in header.inputs],
            "outputs": [_row(spec) for spec in header.outputs],
            "layers": [["MATRIX_MULTIPLY", kind]],
            "path": path,
        }
        return True


def _row(spec: Any) -> dict[str, Any]:
    sizes = [size if isinstance(size, int) else -1 for size in spec.shape]
    axes = {str(axis): size for axis, size in enumerate(spec.shape) if not isinstance(size, int)}
    return {"name": spec.name, "dtype": KINDS[spec.dtype], "shape": sizes, "axes": axes}


class ComputingRuntime(Runtime):
    """Deserialises plans whose contexts compute."""

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        engine = super().deserialize_cuda_engine(data)
        return None if engine is None else ComputingEngine(engine.trt, engine.graph)


class ComputingEngine(CudaEngine):
    """Its one attention is fused."""

    def create_execution_context(self) -> Any:
        path = Path(self.graph["path"])
        host = registry.get_backend("openvino").load(
            path, device="cpu", precision="float32", options=BackendOptions()
        )
        session = host.session()
        if path.name.split(".")[0] == os.environ.get("STAND_IN_WRONG"):
            session = WrongSession(session)
        return ComputingContext(self, session, check_graph(path))

    def create_engine_inspector(self) -> Any:
        text = json.dumps({"Layers": [{"Name": "_gemm_mha_v2_0x1", "LayerType": "kgen"}]})
        return SimpleNamespace(get_engine_information=lambda layout: text)


class WrongSession:
    """Gives half of what it must."""

    def __init__(self, inner: Any) -> None:
        self.inputs, self._inner = inner.inputs, inner

    def run(self, feeds: Any) -> dict[str, Any]:
        return {name: result / 2 for name, result in self._inner.run(feeds).items()}
