"""Run a TensorRT plan on one GPU, on the caller's stream, into buffers that are reused.

One of TensorRT's runtimes crashes on a computer without a driver, so the device is always checked
with this package's own CUDA runtime before any TensorRT object is constructed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt.backends._tensorrt_api import TensorRT, require, start, start_logging
from zsseg_rt.backends.base import (
    CompiledGraph,
    NodeTime,
    Session,
    check_feed,
    check_names,
    opened,
)
from zsseg_rt.backends.plan_cache import Plan, keep_golden, kernels_path
from zsseg_rt.common.arrays import Array, TensorSpec, typestr_of
from zsseg_rt.common.files import Cache
from zsseg_rt.errors import BackendError, DeviceError, ShapeError
from zsseg_rt.ops import core

_ALIGNMENT = 256  # bytes, of every address given to TensorRT
_MAX_BYTES = 1 << 30
# Every version's fused attention, such as _gemm_mha_v2 and fmha_v2, but no name of ours: "/".
_FUSED = re.compile(r"(?<![a-z/])f?mha(?![a-z])", re.IGNORECASE)
_NAMED = ("Name", "LayerType", "TacticName")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One visible GPU."""

    index: int  # N of "cuda:N"
    name: str  # The driver's name for it
    compute_capability: str  # Such as "8.9"
    multiprocessors: int  # How many it has; GPUs of one name may differ in it
    total_memory: int  # Bytes
    driver: int  # Newest CUDA that the driver serves, such as 13000
    runtime: str  # CUDA runtime of this package's build, such as "13.0"


def open_gpu(device: str) -> Gpu:
    """Check that a device name refers to a visible GPU."""
    kind, _, index = device.partition(":")
    count = core.cuda_device_count()
    if kind != "cuda" or not index.isdigit() or int(index) >= count:
        found = (
            f"{device!r}. Check CUDA_VISIBLE_DEVICES."
            if count
            else f"no NVIDIA GPU for {device!r}: there is none, no driver, a driver too old for "
            "this build's CUDA, or a build without CUDA. Run nvidia-smi and zsseg-rt doctor, check "
            "CUDA_VISIBLE_DEVICES, or use device='cpu'."
        )
        raise DeviceError(
            f"device: expected 'cuda:0' to 'cuda:{max(count - 1, 0)}' for backend 'tensorrt', got "
            f"{found}"
        )
    properties = core.cuda_device_properties(int(index))
    names = ("name", "compute_capability", "multiprocessors", "total_memory", "driver")
    return Gpu(
        index=int(index),
        runtime=str(core.cuda_runtime_version()),
        **{name: properties[name] for name in names},
    )


@contextmanager
def on_device(index: int) -> Iterator[None]:
    """Make a GPU the calling thread's current one, which TensorRT uses.

    It stays so where the caller's was never used: to restore that one would make a context there.
    """
    previous = core.cuda_set_device(index)
    try:
        yield
    finally:
        core.cuda_set_device(previous, only_active=True)


def read_feed(spec: TensorSpec, array: Any) -> tuple[int, str, tuple[int, ...], int | None]:
    """Address, dtype, shape, and the stream that writes it, of an array on the GPU."""
    name, interface = spec.name, getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        raise DeviceError(
            f"{name}: expected an array on the GPU (DeviceArray or __cuda_array_interface__), got "
            f"{type(array).__name__}. Copy it with DeviceArray.from_numpy."
        )
    kind, shape = interface["typestr"], tuple(interface["shape"])
    address, strides = int(interface["data"][0]), interface.get("strides")
    if strides is not None and strides != _packed_strides(shape, np.dtype(kind).itemsize):
        raise ShapeError(f"{name}: expected a C-contiguous array, got other strides. Copy it.")
    if address % _ALIGNMENT:
        raise ShapeError(
            f"{name}: expected an address aligned to {_ALIGNMENT} bytes, got a slice of a larger "
            "array. Copy it to an array of its own."
        )
    dtype = spec.dtype if kind == typestr_of(spec.dtype) else kind
    return address, dtype, shape, interface.get("stream")


def _packed_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class RuntimeSettings:
    """The settings that all execution contexts of one RTX plan share."""

    def __init__(self, api: TensorRT, engine: Any, plan_path: Path | None, logger: Any) -> None:
        self._engine, self._logger, self._trt = engine, logger, api.module
        self._path = None if plan_path is None else kernels_path(plan_path)
        self._entries = Cache(Path() if plan_path is None else plan_path.parent, "kernels")
        runtime_config = self._new_config()
        cache = runtime_config.create_runtime_cache()
        self._kernels = require(cache, "create_runtime_cache", logger)
        self._saved = self._load()

    def config(self, *, captures: bool) -> Any:
        """A configuration for one more execution context; it shares the kernels."""
        runtime_config, trt = self._new_config(), self._trt
        placed = runtime_config.set_runtime_cache(self._kernels)
        require(placed, "set_runtime_cache", self._logger)
        on, off = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE, trt.CudaGraphStrategy.DISABLED
        runtime_config.cuda_graph_strategy = on if captures else off
        return runtime_config

    def save(self) -> None:
        """Write the kernels if there are new ones; where that fails, there is a warning."""
        serialized = None if self._path is None else self._kernels.serialize()
        if self._path is None or serialized is None:
            return
        data = bytes(serialized)
        if data != self._saved:
            self._entries.keep(self._path.name, data, else_="Starts stay slow until that is fixed.")
            self._saved = data

    def _new_config(self) -> Any:
        config = self._engine.create_runtime_config()
        return require(config, "create_runtime_config", self._logger)

    def _load(self) -> bytes:
        """Take over what an earlier process compiled, and return it."""
        entry = self._path and self._entries.read(self._path.name, max_bytes=_MAX_BYTES)
        if not entry:
            return b""
        if self._kernels.deserialize(entry.data):
            return entry.data
        _log.info("tensorrt: %s is for another GPU or driver: compiling again", self._path)
        return b""


class PlanRefused(BackendError):  # noqa: N818 - says what happened to the plan
    """TensorRT does not accept this plan; a new build may work."""


class TensorRTGraph(CompiledGraph):
    """A deserialised plan: the weights on one GPU, shared by an execution context per session."""

    def __init__(self, api: TensorRT, gpu: Gpu, plan: Plan) -> None:
        self.gpu, self.logger = gpu, start_logging(api)
        self._profiler_base: Any = api.module.IProfiler
        # The bytes are TensorRT's from here on.
        self._plan = replace(plan, data=b"")
        self.report: Mapping[str, Any] = plan.report
        self.plan_name = str(plan.path or plan.report.get("graph", "a plan"))
        self.device, self.precision = f"cuda:{gpu.index}", str(plan.report["precision"])
        self.inputs = tuple(_spec(row) for row in plan.report["inputs"])
        self.outputs = tuple(_spec(row) for row in plan.report["outputs"])
        self._json = api.module.LayerInformationFormat.JSON
        with on_device(gpu.index):
            self._runtime = start(api, api.module.Runtime, self.logger)
            self._engine = self._runtime.deserialize_cuda_engine(plan.data)
            if self._engine is None:
                raise PlanRefused(
                    f"plan: expected {api.label} on {gpu.name} to read it, got: "
                    f"{self.logger.last_messages()}"
                )
            self._settings: RuntimeSettings | None = None
            if api.is_rtx:
                self._settings = RuntimeSettings(api, self._engine, plan.path, self.logger)
        # Whether TensorRT records its launches as CUDA graphs, so that nobody else may
        self.captures_itself = api.is_rtx and os.environ.get("ZSSEG_CUDA_GRAPHS") != "0"
        self.report = {**plan.report, "fused_layers": self._count_fused_layers()}

    def session(self) -> Session:
        return self.open_session(captures=self.captures_itself)

    def open_session(self, *, captures: bool) -> TensorRTSession:
        opened("graph", self._engine)
        settings = self._settings
        with on_device(self.gpu.index):
            arguments = () if settings is None else (settings.config(captures=captures),)
            context = self._engine.create_execution_context(*arguments)
            context = require(context, "create_execution_context", self.logger)
            self.keep_kernels()
        return TensorRTSession(self, context)

    def keep_kernels(self) -> None:
        """Write what was compiled for this GPU beside the plan, if there is more of it."""
        if self._settings is not None:
            self._settings.save()

    def golden_verdict(self, sample: str) -> str | None:
        stored = self._plan.golden or {}
        return stored.get("problem") if stored.get("sample") == sample else None

    def keep_golden_verdict(self, sample: str, problem: str) -> None:
        keep_golden(self._plan, {"sample": sample, "problem": problem})

    def _count_fused_layers(self) -> int | None:
        """Layers that are fused attention; None, with a warning, if TensorRT does not say."""
        try:
            inspector = require(self._engine.create_engine_inspector(), "inspection", self.logger)
            layers = json.loads(inspector.get_engine_information(self._json))["Layers"]
            fused = sum(map(is_fused_attention, layers))
        except (BackendError, ValueError, KeyError, TypeError) as exc:
            _log.warning("%s: fused attention was not counted: %s", self.plan_name, exc)
            return None
        rows = self.report.get("layers", ())
        attends = any(row["type"] in ("SOFTMAX", "ATTENTION_INPUT") for row in rows)
        if attends and not fused and self.precision in ("float16", "bfloat16"):
            _log.warning(
                "%s: TensorRT fused none of its attention, which makes it slower. Try "
                "another version of TensorRT.",
                self.plan_name,
            )
        return fused

    def close(self) -> None:
        # in this order: the engine needs the runtime alive
        self._settings = None
        self._engine = None
        self._runtime = None

    def collector(self) -> Any:
        """A profiler that adds up the milliseconds of layers by name, in ``totals``."""
        base: Any = self._profiler_base

        class Collector(base):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.totals: dict[str, float] = {}

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                self.totals[layer_name] = self.totals.get(layer_name, 0.0) + ms

        return Collector()


def is_fused_attention(entry: Any) -> bool:
    """Whether a layer, as the inspector reports it, is one fused attention."""
    names = [entry] if isinstance(entry, str) else [str(entry.get(key, "")) for key in _NAMED]
    return any(map(_FUSED.search, names))


class TensorRTSession(Session):
    """One execution context."""

    def __init__(self, graph: TensorRTGraph, context: Any) -> None:
        super().__init__(graph)
        self._graph, self._context = graph, context
        self._gpu, self._logger = graph.gpu, graph.logger
        self._buffers: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}  # of inputs and outputs, as they are set
        self._addresses: dict[str, int] = {}
        self._stream = 0

    def run(self, feeds: Mapping[str, Array], *, stream: int = 0) -> dict[str, Array]:
        opened("session", self._context)
        check_names(feeds, self.inputs)
        with on_device(self._gpu.index):
            addresses, shapes = self._read_feeds(feeds, stream)
            self._set_shapes(shapes)
            for name, address in addresses.items():
                self._set_address(name, address)
            results = {spec.name: self._place_output(spec, stream) for spec in self.outputs}
            enqueued = self._context.execute_async_v3(stream)
            require(enqueued, "execute_async_v3", self._logger)
        self._stream = stream
        return results

    def capture_state(self) -> Hashable | None:
        """The shapes and addresses that were set; None where TensorRT records by itself.

        It keeps data of its own on the GPU for the shapes that were set last, so a capture is of no
        use once others have been set.
        """
        if self._graph.captures_itself:
            return None
        capturable = getattr(self._context, "is_stream_capturable", None)  # of TensorRT-RTX
        if capturable is not None and not capturable(self._stream):
            return None
        return tuple(self._shapes.items()), tuple(self._addresses.items())

    def profile(
        self, feeds: Mapping[str, Array], *, stream: int = 0, runs: int = 10
    ) -> tuple[NodeTime, ...]:
        """Time every layer in a context of its own, which it would slow down for good.

        That one launches layer by layer, so that each has its time.
        """
        opened("session", self._context)
        other = self._graph.open_session(captures=False)
        try:
            other.run(feeds, stream=stream)
            collector = self._graph.collector()
            other._context.profiler = collector
            for _ in range(runs):
                other.run(feeds, stream=stream)
            return tuple(
                NodeTime(name=name, type="", ms=total / runs)
                for name, total in collector.totals.items()
            )
        finally:
            other.close()

    def close(self) -> None:
        if self._context is not None:
            with on_device(self._gpu.index):
                self._graph.keep_kernels()  # also those of shapes that were new
        self._context = None
        self._buffers.clear()

    def _read_feeds(
        self, feeds: Mapping[str, Array], stream: int
    ) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
        """Addresses and shapes, once the stream waits for what the feeds' own still write."""
        addresses, shapes = {}, {}
        for spec in self.inputs:
            address, dtype, shape, feed_stream = read_feed(spec, feeds[spec.name])
            check_feed(spec, dtype, shape, self._graph.report["axes"])
            if feed_stream is not None and feed_stream != (stream or 1):
                event = core.Event(self._gpu.index, timing=False)  # orders streams within a capture
                event.record(feed_stream)
                event.wait(stream)
            addresses[spec.name], shapes[spec.name] = address, shape
        return addresses, shapes

    def _set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Tell TensorRT the shapes of the inputs, if one is new, and ask for those of outputs."""
        if all(self._shapes.get(name) == shape for name, shape in shapes.items()):
            return
        self._shapes.clear()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise ShapeError(
                    f"{name}: expected a shape the plan takes, got {shape}: "
                    f"{self._logger.last_messages()}"
                )
        unknown = self._context.infer_shapes()
        if unknown:
            raise BackendError(f"tensorrt: expected all shapes to be known, missing {unknown}")
        outputs = {
            spec.name: tuple(map(int, self._context.get_tensor_shape(spec.name)))
            for spec in self.outputs
        }
        if any(size < 0 for shape in outputs.values() for size in shape):
            raise BackendError(f"tensorrt: expected all shapes to be known, got {outputs}")
        self._shapes.update(shapes | outputs)

    def _place_output(self, spec: TensorSpec, stream: int) -> Array:
        shape = self._shapes[spec.name]
        size = max(math.prod(shape), 1)
        buffer = self._buffers.get(spec.name)
        if buffer is None or math.prod(buffer.shape) < size:
            buffer = core.DeviceArray.empty(
                (size,), spec.dtype, device=self._gpu.index, stream=stream
            )
            self._buffers[spec.name] = buffer
        self._set_address(spec.name, int(buffer.__cuda_array_interface__["data"][0]))
        return buffer.view(shape)

    def _set_address(self, name: str, address: int) -> None:
        if self._addresses.get(name) == address:
            return
        self._addresses.pop(name, None)
        placed = self._context.set_tensor_address(name, address)
        require(placed, f"set_tensor_address of {name}", self._logger)
        self._addresses[name] = address


def _spec(row: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(name=row["name"], dtype=row["dtype"], shape=tuple(row["shape"]))
