"""A stand-in for TensorRT that computes: on the device's memory and streams, by a CPU session.

Its engines and contexts are those of ``fake_tensorrt``, strict about order; what
``execute_async_v3`` enqueues reads the input addresses and writes the output addresses.
"""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np

from support.fake_tensorrt import CudaEngine, ExecutionContext, FakeTensorRT
from zsseg_rt import ops
from zsseg_rt.backends._tensorrt_device import open_gpu
from zsseg_rt.backends._tensorrt_session import TensorRTGraph, TensorRTSession
from zsseg_rt.backends.plan_cache import Plan

KINDS = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}


class DeviceMemory:
    """Memory of the device that only its address is known of."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str, stream: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": np.dtype(dtype).str,
            "data": (address, False),
            "version": 3,
            "stream": stream or 1,
        }


class ComputingContext(ExecutionContext):
    def __init__(self, engine: CudaEngine, session: Any) -> None:
        super().__init__(engine)
        self.session = session

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self.inferred, "get_tensor_shape before infer_shapes"
        axes = {
            axis: size
            for spec in self.session.inputs
            for axis, size in zip(spec.shape, self.shapes[spec.name], strict=True)
        }
        wanted = next(spec for spec in self.session.outputs if spec.name == name)
        return tuple(axes.get(axis, axis) for axis in wanted.shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert super().execute_async_v3(stream)
        feeds = {spec.name: self._read(spec, stream) for spec in self.session.inputs}
        for name, result in self.session.run(feeds).items():
            self._write(name, np.array(result), stream)
        return True

    def _read(self, spec: Any, stream: int) -> np.ndarray:
        memory = DeviceMemory(self.addresses[spec.name], self.shapes[spec.name], spec.dtype, stream)
        return ops.DeviceArray.from_numpy(memory, 0, stream).numpy(stream)

    def _write(self, name: str, result: np.ndarray, stream: int) -> None:
        """Products with one are the copy to a foreign address that the operations offer."""
        rows = ops.DeviceArray.from_numpy(result.reshape(-1, 1), 0, stream)
        one = ops.DeviceArray.from_numpy(np.ones((1, 1, 1), np.float32), 0, stream)
        out = DeviceMemory(self.addresses[name], (1, result.size, 1), "float32", stream)
        ops.patch_text_similarity(one, rows, normalize=False, out=out, stream=stream)


def tensorrt_session(session: Any) -> TensorRTSession:
    """The product's TensorRT session around an engine that computes what ``session`` does."""
    rows = [
        [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in specs]
        for specs in (session.inputs, session.outputs)
    ]
    named = [[row | {"dtype": KINDS[row["dtype"]]} for row in side] for side in rows]
    axes = {size for side in rows for row in side for size in row["shape"] if isinstance(size, str)}
    report = {
        "inputs": rows[0],
        "outputs": rows[1],
        "axes": dict.fromkeys(axes, (1, 8, 1024)),
        "precision": session.precision,
    }
    module = FakeTensorRT()
    graph = {"inputs": named[0], "outputs": named[1]}
    engine = CudaEngine(module, graph)
    engine.create_execution_context = lambda: ComputingContext(engine, session)
    module.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: engine)
    api = SimpleNamespace(module=module, flavour="stand-in", label="stand-in", is_rtx=False)
    plan = Plan(data=json.dumps(graph).encode(), report=report, path=None)
    return TensorRTGraph(api, open_gpu("cuda:0"), plan).session()
