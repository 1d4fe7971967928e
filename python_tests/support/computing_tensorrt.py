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
from zsseg_rt.backends._tensorrt_session import TensorRTGraph, TensorRTSession, open_gpu
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


def run_on_host(session: Any, header: Any, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a session of the CPU on feeds, and give results, of the dtypes that a graph states."""
    for spec in header.inputs:
        assert feeds[spec.name].dtype == spec.dtype, spec.name
    inputs = {spec.name: feeds[spec.name].astype(spec.dtype) for spec in session.inputs}
    results = session.run(inputs)
    return {spec.name: np.array(results[spec.name], spec.dtype) for spec in header.outputs}


class ComputingContext(ExecutionContext):
    def __init__(self, engine: CudaEngine, session: Any, header: Any) -> None:
        super().__init__(engine)
        self.session, self.header = session, header

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self.inferred, "get_tensor_shape before infer_shapes"
        axes = {
            axis: size
            for spec in self.header.inputs
            for axis, size in zip(spec.shape, self.shapes[spec.name], strict=True)
        }
        wanted = next(spec for spec in self.header.outputs if spec.name == name)
        return tuple(axes.get(axis, axis) for axis in wanted.shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert super().execute_async_v3(stream)
        feeds = {spec.name: self._read(spec, stream) for spec in self.header.inputs}
        for name, result in run_on_host(self.session, self.header, feeds).items():
            self._write(name, result, stream)
        return True

    def _read(self, spec: Any, stream: int) -> np.ndarray:
        memory = DeviceMemory(self.addresses[spec.name], self.shapes[spec.name], spec.dtype, stream)
        return ops.DeviceArray.from_numpy(memory, 0, stream).numpy(stream)

    def _write(self, name: str, result: np.ndarray, stream: int) -> None:
        """Unblended, past logits are the copy to a foreign address that the operations offer."""
        words = result.reshape(1, 1, 1, -1).view(np.float32)  # of any dtype: bits are copied
        for begin in range(0, words.shape[-1], 16384):
            some = words[..., begin : begin + 16384]
            shape = some.shape
            arrays = (some, some, np.zeros((1, 1, shape[3], 2)), np.zeros((1, 1, shape[3])))
            placed = [
                ops.DeviceArray.from_numpy(np.ascontiguousarray(array, np.float32), 0, stream)
                for array in arrays
            ]
            out = DeviceMemory(self.addresses[name] + 4 * begin, shape, "float32", stream)
            ops.warp_blend(*placed, out=out, stream=stream)


def tensorrt_session(session: Any, header: Any) -> TensorRTSession:
    """The product's TensorRT session around an engine that computes what ``session`` does.

    Its inputs and outputs have the dtypes of ``header``, which is what the graph's file states.
    """
    rows = [
        [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in specs]
        for specs in (header.inputs, header.outputs)
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
    engine.create_execution_context = lambda: ComputingContext(engine, session, header)
    module.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: engine)
    api = SimpleNamespace(module=module, flavour="stand-in", label="stand-in", is_rtx=False)
    plan = Plan(data=json.dumps(graph).encode(), report=report, path=None)
    return TensorRTGraph(api, open_gpu("cuda:0"), plan).session()
