"""Run a TensorRT plan on one GPU, on the caller's stream, into buffers that are reused."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Hashable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from zsseg_rt.backends import _tensorrt_device as gpu_device
from zsseg_rt.backends._tensorrt_api import DTYPES, TensorRT, require, start_logging
from zsseg_rt.backends._tensorrt_device import DeviceFeed, Gpu, on_device, order_after, read_feed
from zsseg_rt.backends.base import (
    GoldenVerdict,
    GraphSession,
    LayerInfo,
    NodeTime,
    Recorder,
    Session,
    check_feed,
    check_names,
    opened,
)
from zsseg_rt.backends.plan_cache import Plan, keep_golden, kernels_path
from zsseg_rt.common.arrays import Array, TensorSpec
from zsseg_rt.common.files import Cache
from zsseg_rt.errors import BackendError, ShapeError

_MAX_BYTES = 1 << 30
_log = logging.getLogger(__name__)


class RuntimeSettings:
    """The settings that all execution contexts of one RTX plan share."""

    def __init__(
        self, api: TensorRT, engine: Any, plan_path: Path | None, *, captures: bool, logger: Any
    ) -> None:
        self._engine, self._logger, self.captures = engine, logger, captures
        self._trt = api.module
        self._path = None if plan_path is None else kernels_path(plan_path)
        self._entries = Cache(Path() if plan_path is None else plan_path.parent, "kernels")
        runtime_config = self._new_config()
        cache = runtime_config.create_runtime_cache()
        self._kernels = require(cache, "create_runtime_cache", logger)
        self._saved = self._load()

    def config(self, *, captures: bool) -> Any:
        """A configuration for one more execution context; it shares the kernels."""
        runtime_config = self._new_config()
        placed = runtime_config.set_runtime_cache(self._kernels)
        require(placed, "set_runtime_cache", self._logger)
        trt = self._trt
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
        if self._path is None:
            return b""
        entry = self._entries.read(self._path.name, max_bytes=_MAX_BYTES)
        if entry is not None and self._kernels.deserialize(entry.data):
            return entry.data
        if entry is not None:
            _log.info("tensorrt: %s is for another GPU or driver: compiling again", self._path)
        return b""


# The inspector's names of element types -> NumPy's; longer names first.
_FORMAT_NAMES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float32": "float32",
    "fp16": "float16",
    "half": "float16",
    "float16": "float16",
    "fp8": "fp8",
    "float": "float32",
    "int8": "int8",
    "int32": "int32",
    "int64": "int64",
    "bool": "bool",
}
# Every version's fused attention, such as _gemm_mha_v2 and fmha_v2, but no name of ours: "/".
_FUSED = re.compile(r"(?<![a-z/])f?mha(?![a-z])", re.IGNORECASE)
_NAMED = ("Name", "LayerType", "TacticName")


def layer_info(entry: Any) -> LayerInfo:
    """A layer as the inspector reports it: only its name if the plan keeps no more."""
    if isinstance(entry, str):
        return LayerInfo(name=entry, type="", precision="")
    outputs = entry.get("Outputs") or [{}]
    format_name = str(outputs[0].get("Format/Datatype", "")).lower()
    precision = next((name for name in _FORMAT_NAMES if name in format_name), "")
    return LayerInfo(
        name=str(entry.get("Name", "")),
        type=str(entry.get("LayerType", "")),
        precision=_FORMAT_NAMES.get(precision, ""),
    )


def is_fused_attention(entry: Any) -> bool:
    """Whether a layer, as the inspector reports it, is one fused attention."""
    if isinstance(entry, str):
        return _FUSED.search(entry) is not None
    return any(_FUSED.search(str(entry.get(key, ""))) for key in _NAMED)


def read_verdict(stored: Mapping[str, Any] | None, sample: str) -> GoldenVerdict | None:
    """A stored verdict, if it is one and of this golden sample."""
    if stored is None or stored.get("sample") != sample:
        return None
    try:
        return GoldenVerdict(
            sample=sample,
            passed=stored["passed"] is True,
            stage=str(stored["stage"]),
            error=float(stored["error"]),
            tolerance=float(stored["tolerance"]),
        )
    except (KeyError, TypeError, ValueError):
        return None


_log = logging.getLogger(__name__)


class PlanRefused(BackendError):  # noqa: N818 - says what happened to the plan
    """TensorRT does not accept this plan; a new build may work."""


class TensorRTGraph:
    """A deserialised plan: the weights on one GPU, shared by an execution context per session."""

    def __init__(self, api: TensorRT, gpu: Gpu, plan: Plan) -> None:
        self.gpu, self.logger = gpu, start_logging(api)
        self._profiler_base: Any = getattr(api.module, "IProfiler", None)
        # The bytes are TensorRT's from here on.
        self._plan = replace(plan, data=b"")
        self.report: Mapping[str, Any] = plan.report
        self.device, self.precision = f"cuda:{gpu.index}", str(plan.report["precision"])
        self.inputs = tuple(_spec(row) for row in plan.report["inputs"])
        self.outputs = tuple(_spec(row) for row in plan.report["outputs"])
        self._json = api.module.LayerInformationFormat.JSON
        with on_device(gpu.index):
            self._runtime = _make_runtime(api, self.logger)
            self._engine = self._runtime.deserialize_cuda_engine(plan.data)
            if self._engine is None:
                raise PlanRefused(
                    f"plan: expected {api.label} on {gpu.name} to read it, got: "
                    f"{self.logger.last_messages()}"
                )
            self._check_tensors(api)
            self._settings: RuntimeSettings | None = None
            if api.is_rtx:
                captures = os.environ.get("ZSSEG_CUDA_GRAPHS") != "0"
                self._settings = RuntimeSettings(
                    api, self._engine, plan.path, captures=captures, logger=self.logger
                )
        self.report = {**plan.report, "fused_layers": self._count_fused_layers()}

    @property
    def captures_itself(self) -> bool:
        """Whether TensorRT records its launches as CUDA graphs, so that nobody else may."""
        return self._settings is not None and self._settings.captures

    def session(self) -> Session:
        """Open an execution context."""
        return self._open_session(captures=self.captures_itself)

    def profiled_session(self) -> TensorRTSession:
        """As :meth:`session`, launching layer by layer, so that each has its time."""
        return self._open_session(captures=False)

    def _open_session(self, *, captures: bool) -> TensorRTSession:
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

    def layers(self) -> list[LayerInfo]:
        """Describe the built engine's layers as TensorRT reports them."""
        opened("graph", self._engine)
        return [layer_info(entry) for entry in self._inspected()]

    @property
    def plan_name(self) -> str:
        named = self._plan.path
        return str(named) if named is not None else str(self.report.get("graph", "a plan"))

    def golden_verdict(self, sample: str) -> GoldenVerdict | None:
        return read_verdict(self._plan.golden, sample)

    def keep_golden_verdict(self, verdict: GoldenVerdict) -> None:
        keep_golden(self._plan, asdict(verdict))

    def _inspected(self) -> list[Any]:
        inspector = require(self._engine.create_engine_inspector(), "inspection", self.logger)
        try:
            return list(json.loads(inspector.get_engine_information(self._json))["Layers"])
        except (ValueError, KeyError, TypeError) as exc:
            raise BackendError(f"tensorrt: expected a list of layers as JSON, got {exc}") from exc

    def _count_fused_layers(self) -> int | None:
        """Layers that are fused attention; None, with a warning, if TensorRT does not say."""
        try:
            fused = sum(map(is_fused_attention, self._inspected()))
        except BackendError as exc:
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
        """Free engine and runtime. Calling it twice is harmless."""
        # in this order: the engine needs the runtime alive
        self._settings = None
        self._engine = None
        self._runtime = None

    def collector(self) -> Any:
        """A profiler that adds up the milliseconds of layers by name, in ``totals``."""
        if self._profiler_base is None:
            raise BackendError("tensorrt: expected IProfiler, got a version without it.")

        base: Any = self._profiler_base

        class Collector(base):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.totals: dict[str, float] = {}

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                self.totals[layer_name] = self.totals.get(layer_name, 0.0) + ms

        return Collector()

    def _check_tensors(self, api: TensorRT) -> None:
        """Compare the engine's named tensors with the report that came with the plan."""
        trt, engine = api.module, self._engine
        tensors = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            tensors[name] = (is_input, DTYPES.get(engine.get_tensor_dtype(name).name))
        wanted = {spec.name: (True, spec.dtype) for spec in self.inputs}
        wanted |= {spec.name: (False, spec.dtype) for spec in self.outputs}
        if tensors != wanted:
            raise PlanRefused(f"plan: expected the tensors {wanted}, got {tensors}")


class TensorRTSession(GraphSession):
    """One execution context. Not thread-safe; the next :meth:`run` may overwrite results."""

    def __init__(self, graph: TensorRTGraph, context: Any) -> None:
        super().__init__(graph)
        self._graph, self._context = graph, context
        self._gpu, self._logger = graph.gpu, graph.logger
        self._buffers: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}  # of inputs and outputs, as they are set
        self._addresses: dict[str, int] = {}
        self._stream = 0

    def run(self, feeds: Mapping[str, Array], *, stream: int = 0) -> dict[str, Array]:
        """Enqueue the graph on a stream; see :meth:`zsseg_rt.backends.base.Session.run`."""
        opened("session", self._context)
        check_names(feeds, self.inputs)
        with on_device(self._gpu.index):
            read = self._read_feeds(feeds, stream)
            self._set_shapes({name: feed.shape for name, feed in read.items()})
            for name, feed in read.items():
                self._set_address(name, feed.address)
            results = {spec.name: self._place_output(spec, stream) for spec in self.outputs}
            enqueued = self._context.execute_async_v3(stream)
            require(enqueued, "execute_async_v3", self._logger)
        self._stream = stream
        return results

    def capture_state(self) -> Hashable | None:
        """The shapes and addresses that were set; see :class:`zsseg_rt.backends.base.Session`.

        None where TensorRT records its launches itself.

        TensorRT keeps data of its own on the GPU for the shapes that were set last, so a capture is
        of no use once others have been set.
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

        See :meth:`zsseg_rt.backends.base.Session.profile`.
        """
        opened("session", self._context)
        other = self._graph.profiled_session()
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

    def recorder(self) -> Recorder | None:
        """None: TensorRT allocates nothing while it runs."""
        return None

    def close(self) -> None:
        """Free context and buffers. Calling it twice is harmless."""
        if self._context is not None:
            with on_device(self._gpu.index):
                self._graph.keep_kernels()  # also those of shapes that were new
        self._context = None
        self._buffers.clear()

    def _read_feeds(self, feeds: Mapping[str, Array], stream: int) -> dict[str, DeviceFeed]:
        read = {}
        for spec in self.inputs:
            feed = read[spec.name] = read_feed(spec.name, feeds[spec.name])
            check_feed(spec, feed.dtype, feed.shape, self._graph.report["axes"])
            order_after(feed.stream, stream, self._gpu.index)
        return read

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
        outputs = {spec.name: self._output_shape(spec.name) for spec in self.outputs}
        self._shapes.update(shapes | outputs)

    def _output_shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise BackendError(f"{name}: expected a known shape, got {shape}")
        return shape

    def _place_output(self, spec: TensorSpec, stream: int) -> Array:
        shape = self._shapes[spec.name]
        size = max(math.prod(shape), 1)
        buffer = self._buffers.get(spec.name)
        if buffer is None or math.prod(buffer.shape) < size:
            buffer = gpu_device.native().DeviceArray.empty(
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


def _make_runtime(api: TensorRT, logger: Any) -> Any:
    try:
        return require(api.module.Runtime(logger), "trt.Runtime", logger)
    except TypeError as exc:  # pybind11's "factory function returned nullptr"
        raise BackendError(
            f"tensorrt: expected {api.label} to start, got: {logger.last_messages()}. Check the "
            "driver with nvidia-smi."
        ) from exc


def _spec(row: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(name=row["name"], dtype=row["dtype"], shape=tuple(row["shape"]))
