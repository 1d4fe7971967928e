"""TensorRT, full or RTX: plans are built from the bundle's ONNX and cached.

Needs ``tensorrt`` 10.3 to 11.x or ``tensorrt_rtx`` 1.7; ``$ZSSEG_TENSORRT`` chooses between them.
RTX builds without a GPU, for any GPU it supports; full TensorRT builds on the GPU it runs on.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zsseg_rt.backends._tensorrt_api import (
    DTYPES,
    TensorRT,
    load_tensorrt,
    require,
    start,
    start_logging,
)
from zsseg_rt.backends._tensorrt_session import (
    Gpu,
    PlanRefused,
    TensorRTGraph,
    on_device,
    open_gpu,
)
from zsseg_rt.backends.base import BackendOptions, Choice, CompiledGraph, pick_choice
from zsseg_rt.backends.plan_cache import Plan, PlanCache
from zsseg_rt.bundles.specs import NARROW
from zsseg_rt.common.files import sha256_of
from zsseg_rt.errors import BackendError, PrecisionNotApplied
from zsseg_rt.onnx.check import check_graph
from zsseg_rt.onnx.reader import map_file, quantised_layers

_PREFERRED = ("float16", "bfloat16", "float32", "int8", "fp8")

_WORKSPACE_PART = 4  # of the GPU's memory

_log = logging.getLogger(__name__)


class TensorRTBackend:
    """Runs graphs with TensorRT on an NVIDIA GPU."""

    name = "tensorrt"

    def choose(
        self, variants: Collection[str], asked: str, *, device: str, allowed: Sequence[str]
    ) -> Choice:
        """Choose; the precision is the graph's own."""
        offers = [Choice(variant=name, precision=name) for name in _PREFERRED if name in variants]
        return pick_choice(offers, asked, allowed, where="TensorRT", narrow=NARROW)

    def load(
        self, graph_path: Path, *, device: str, precision: str, options: BackendOptions
    ) -> CompiledGraph:
        """Load a graph from a cached plan or a fresh build; a refused plan is built again once."""
        gpu = open_gpu(device)
        require_capability(precision, gpu.compute_capability)
        api = load_tensorrt()
        if options.compute_capability is None and api.is_rtx:
            options = replace(options, compute_capability=gpu.compute_capability)
        with on_device(gpu.index):
            plan = _obtain(api, graph_path, precision, options, gpu)
            try:
                return TensorRTGraph(api, gpu, plan)
            except PlanRefused as exc:
                if plan.path is None:
                    raise
                plan = _obtain(api, graph_path, precision, options, gpu, refused=str(exc))
                return TensorRTGraph(api, gpu, plan)

    def build_plan(
        self, graph_path: Path, *, precision: str = "auto", options: BackendOptions | None = None
    ) -> Plan:
        """Build a plan, or take it from the cache, without running it.

        With RTX this needs no GPU; without ``options.compute_capability`` it is for every GPU that
        RTX supports by default. Full TensorRT builds for ``cuda:0``.
        """
        api = load_tensorrt()
        options = options or BackendOptions()
        if options.compute_capability is not None:
            capability_member(api, options.compute_capability)
        if api.is_rtx:
            return _obtain(api, graph_path, precision, options, None)
        gpu = open_gpu("cuda:0")
        with on_device(gpu.index):
            return _obtain(api, graph_path, precision, options, gpu)


def _obtain(
    api: TensorRT,
    graph_path: Path,
    precision: str,
    options: BackendOptions,
    gpu: Gpu | None,
    *,
    refused: str = "",
) -> Plan:
    """A plan from the cache, unless the runtime refused it for a reason, or a new one."""
    try:
        digest = sha256_of(graph_path)
    except OSError as exc:
        raise BackendError(f"graph: expected a readable ONNX file, got {exc}") from exc
    target = _target(api, options.compute_capability, gpu)
    key = {
        "graph_name": graph_path.stem, "graph_sha256": digest, "runtime": api.label,
        "target": target, "precision": precision, "shapes": options.dynamic_axes or {},
    }  # fmt: skip
    plans = PlanCache(options.cache_dir, key)
    if refused:
        plans.discard(refused)

    def new_plan() -> Plan:
        _log.info("tensorrt: building %s with %s for %s", graph_path.name, api.label, target)
        header = check_graph(graph_path)
        if header.token_rows:
            raise BackendError(
                f"{graph_path}: expected a graph of images, got one that looks up tokens "
                f"({', '.join(header.token_rows)}). Run text encoders with openvino or torch."
            )
        # TensorRT's own limit is all memory, which a board's CPU needs as well.
        part = None if gpu is None else gpu.total_memory // _WORKSPACE_PART
        workspace = part if options.workspace is None else options.workspace
        return build(api, graph_path, precision, replace(options, workspace=workspace))

    return plans.get_or_build(new_plan)


def _target(api: TensorRT, capability: str | None, gpu: Gpu | None) -> str:
    """A plan's target: of RTX a compute capability, of full TensorRT the exact GPU."""
    if api.is_rtx or gpu is None:
        return f"sm{capability.replace('.', '')}" if capability else "default"
    size = f"{gpu.multiprocessors}sm-{round(gpu.total_memory / 2**30)}gb"
    versions = f"driver{gpu.driver}-cuda{gpu.runtime}"
    return f"sm{gpu.compute_capability.replace('.', '')}-{gpu.name}-{size}-{versions}"


# --- building: strongly typed, no plugins, dynamic axes by name ---

SMALLEST_RISE = 0.005  # of the fraction; TensorRT reports every graph node


def _share_done(phases: Mapping[str, tuple[str | None, int, int]], above: str | None) -> float:
    """The part that is done of the phases of a parent."""
    shares = [
        min((done + _share_done(phases, name)) / steps, 1.0)
        for name, (parent, steps, done) in phases.items()
        if parent == above
    ]
    return max(shares, default=0.0)


def make_monitor(trt: Any, callback: Callable[[str, float], None] | None) -> Any:
    """The object that TensorRT reports to, from any thread; its fraction never falls.

    An exception that the callback raises cancels the build; it is kept as ``raised``.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int, int]] = {}  # parent, steps, steps done
            self.reported = -1.0
            self.raised: BaseException | None = None
            self.lock = threading.RLock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.note(phase_name, (parent_phase, max(num_steps, 1), 0))

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                phase = self.phases.get(phase_name)
                if phase is not None:
                    self.note(phase_name, (*phase[:2], step + 1))
                return self.raised is None

        def phase_finish(self, phase_name: str) -> None:
            self.note(phase_name, None)

        def note(self, name: str, phase: tuple[str | None, int, int] | None) -> None:
            with self.lock:
                self.phases.pop(name, None)
                if phase is not None:
                    self.phases[name] = phase
                fraction = _share_done(self.phases, None) if self.phases else 1.0
                is_news = fraction >= min(self.reported + SMALLEST_RISE, 1.0) > self.reported
                if callback is None or self.raised is not None or not is_news:
                    return
                self.reported = fraction
                try:
                    callback(name, fraction)
                except BaseException as exc:  # noqa: BLE001 - must not cross TensorRT's C++
                    self.raised = exc

    return Monitor()


DEFAULT_AXES = {"classes": (1, 32, 1024)}

_SINCE = {"fp8": (8, 9), "bfloat16": (8, 0)}  # compute capabilities
# Layers that carry the arithmetic, and so the precision, of a network.
COMPUTE_LAYERS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "EINSUM", "ATTENTION_INPUT")


def build(api: TensorRT, graph_path: Path, precision: str, options: BackendOptions) -> Plan:
    """Build one plan."""
    capability = options.compute_capability
    trt, logger = api.module, start_logging(api)
    builder = start(api, trt.Builder, logger)
    # The bit's position differs between versions
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = require(builder.create_network(flags), "create_network", logger)
    _parse(trt, network, graph_path, logger)
    report = _describe(network) | {"runtime": api.label, "capability": capability or "default"}
    report["graph"] = graph_path.name
    _check_precision(graph_path, precision, report)
    axes = profile_axes(report["inputs"], options.dynamic_axes)
    config = require(builder.create_builder_config(), "create_builder_config", logger)
    _configure(api, config, capability, report)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    _add_profile(builder, config, report["inputs"], axes, logger)
    config.progress_monitor = monitor = make_monitor(trt, options.progress)
    serialized = builder.build_serialized_network(network, config)
    if monitor.raised is not None:
        raise monitor.raised
    data = bytes(require(serialized, f"the build of {graph_path.name}", logger))
    return Plan(data=data, report=report | {"axes": {n: list(b) for n, b in axes.items()}})


def capability_member(api: TensorRT, capability: str) -> Any:
    """Return RTX's own name for a compute capability such as ``"8.9"``."""
    if not api.is_rtx:
        raise BackendError(
            f"compute_capability: expected None for {api.label}, which builds only for the GPU it "
            f"runs on, got {capability!r}. Build on the target, or use ZSSEG_TENSORRT=tensorrt_rtx."
        )
    members = api.module.ComputeCapability.__members__
    targets = {f"{name[2:-1]}.{name[-1]}": member for name, member in members.items() if name[2:]}
    targets = {name: member for name, member in targets.items() if name[0].isdigit()}
    if capability not in targets:
        raise BackendError(
            f"compute_capability: expected one of {', '.join(targets)} for {api.label}, got "
            f"{capability!r}. Use the full tensorrt package on the target itself for other GPUs."
        )
    return targets[capability]


def profile_axes(
    inputs: list[dict[str, Any]], dynamic_axes: Mapping[str, tuple[int, int, int]] | None
) -> dict[str, tuple[int, int, int]]:
    """Find (min, opt, max) of every dynamic axis."""
    spans = {**DEFAULT_AXES, **(dynamic_axes or {})}
    axes: dict[str, tuple[int, int, int]] = {}
    for spec in inputs:
        for axis, size in enumerate(spec["shape"]):
            if isinstance(size, int) and size >= 0:
                continue
            if size not in spans:
                raise BackendError(
                    f"dynamic_axes: expected a range for axis {axis} ({size!r}) of input "
                    f"{spec['name']!r}, got {sorted(spans)}. Pass dynamic_axes={{name: (min, opt, "
                    "max)}, and name the axis when exporting."
                )
            axes[size] = spans[size]
    return axes


def _parse(trt: Any, network: Any, graph_path: Path, logger: Any) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(graph_path)) and network.num_outputs > 0:
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    problems = [
        f"node {error.node_name()!r} ({error.node_operator()}) {' '.join(error.desc().split())}"
        for error in errors
    ]
    raise BackendError(
        f"graph: expected {graph_path} to be an ONNX graph TensorRT reads, got: "
        f"{'; '.join(problems) or 'a graph without outputs'}. Export it again at opset 20."
    )


def _describe(network: Any) -> dict[str, Any]:
    """Inputs, outputs, layers by type and dtype, and the precision of a parsed network."""
    layers: Counter[tuple[str, str]] = Counter()
    quantized: set[str] = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind, dtype = layer.type.name, _layer_dtype(layer)
        layers[kind, dtype] += 1
        if kind == "DEQUANTIZE":
            quantized.add(_dtype_name(layer.get_input(0)))
    inputs = [_describe_tensor(network.get_input(i)) for i in range(network.num_inputs)]
    names = {size for spec in inputs for size in spec["shape"] if isinstance(size, str)}
    outputs = [_describe_tensor(network.get_output(i)) for i in range(network.num_outputs)]
    for spec in outputs:  # the parser leaves their dynamic axes without names
        for axis, size in enumerate(spec["shape"]):
            if size is None:
                spec["shape"][axis] = next(iter(names)) if len(names) == 1 else f"axis{axis}"
    return {
        "inputs": inputs,
        "outputs": outputs,
        "layers": [
            {"type": kind, "dtype": dtype, "count": count}
            for (kind, dtype), count in sorted(layers.items())
        ],
        "precision": _precision(layers, quantized),
        "narrow_layers": _narrow_layers(network) if quantized else 0,
    }


def _narrow_layers(network: Any) -> int:
    """How many layers multiply two tensors that were stored in 8 bits."""
    producers = {}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for layer in layers:
        for index in range(layer.num_outputs):
            producers[layer.get_output(index).name] = layer

    def is_narrow(layer: Any, index: int) -> bool:
        above = producers.get(layer.get_input(index).name)
        while above is not None and above.type.name == "SHUFFLE":  # a new shape of the same numbers
            above = producers.get(above.get_input(0).name)
        return above is not None and above.type.name == "DEQUANTIZE"

    computing = [layer for layer in layers if layer.type.name in COMPUTE_LAYERS]
    # a convolution whose weight is a constant in full precision has one input
    return sum(
        layer.num_inputs > 1 and is_narrow(layer, 0) and is_narrow(layer, 1) for layer in computing
    )


def _layer_dtype(layer: Any) -> str:
    """The dtype that a compute layer multiplies, or that another layer puts out."""
    of_inputs = layer.type.name in COMPUTE_LAYERS and layer.num_inputs > 0
    if not of_inputs and layer.num_outputs == 0:
        return "none"
    tensor = layer.get_input(0) if of_inputs else layer.get_output(0)
    return _dtype_name(tensor)


def _dtype_name(tensor: Any) -> str:
    name = str(tensor.dtype.name)
    return DTYPES.get(name, name.lower())


def _describe_tensor(tensor: Any) -> dict[str, Any]:
    sizes = [
        int(size) if size >= 0 else (tensor.get_dimension_name(axis) or None)
        for axis, size in enumerate(tensor.shape)
    ]
    dtype = _dtype_name(tensor)
    return {"name": tensor.name, "dtype": dtype, "shape": sizes}


def _precision(layers: Mapping[tuple[str, str], int], quantized: set[str]) -> str:
    for dtype in ("fp8", "int8"):
        if dtype in quantized:
            return dtype
    computed: Counter[str] = Counter()
    for (kind, dtype), count in layers.items():
        if kind in COMPUTE_LAYERS:
            computed[dtype] += count
    return computed.most_common(1)[0][0] if computed else "float32"


def _check_precision(graph_path: Path, precision: str, report: Mapping[str, Any]) -> None:
    """Raise unless every compute layer of the graph has the precision asked for."""
    require_capability(report["precision"], str(report["capability"]))
    if report["precision"] in ("int8", "fp8"):
        promised = quantised_layers(map_file(graph_path))
        if report["narrow_layers"] < promised:
            raise PrecisionNotApplied(
                f"precision: expected {promised} layers of {graph_path.name} in "
                f"{report['precision']!r}, but TensorRT read {report['narrow_layers']} of them so. "
                "Use precision='float16'."
            )
    if precision == "auto":
        return
    # TensorRT has no transposed convolution in bfloat16: it stays float32.
    judged = set(COMPUTE_LAYERS) - ({"DECONVOLUTION"} if precision == "bfloat16" else set())
    dtypes = {row["dtype"] for row in report["layers"] if row["type"] in judged}
    quantized = precision in ("int8", "fp8")
    if report["precision"] == precision and (quantized or dtypes <= {precision}):
        return
    layers = ", ".join(
        f"{row['count']} {row['type']} in {row['dtype']}"
        for row in report["layers"]
        if row["type"] in (*COMPUTE_LAYERS, "QUANTIZE", "DEQUANTIZE")
    )
    remedy = (
        "Export a graph with QuantizeLinear/DequantizeLinear nodes"
        if quantized
        else f"Export the graph in {precision}"
    )
    raise PrecisionNotApplied(
        f"precision: expected a graph in {precision}, got {graph_path.name} with "
        f"{layers or 'no layer that has a precision'}. {remedy}, or use precision='auto'."
    )


def require_capability(kind: str, capability: str) -> None:
    """Refuse GPUs that do not compute in a precision."""
    major, _, minor = capability.partition(".")
    since = _SINCE.get(kind)
    if since is not None and minor.isdigit() and (int(major), int(minor)) < since:
        raise PrecisionNotApplied(
            f"precision: expected a GPU of compute capability {since[0]}.{since[1]} or newer for "
            f"{kind!r}, got {capability}. Use 'float16'."
        )


def _configure(
    api: TensorRT, config: Any, capability: str | None, report: Mapping[str, Any]
) -> None:
    trt = api.module
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers keep names and dtypes
    config.clear_flag(trt.BuilderFlag.TF32)  # set by default: float32 would be computed in TF32
    if capability is None:
        if api.is_rtx and report["precision"] == "fp8":
            raise BackendError(
                "compute_capability: expected '8.9' or newer for an fp8 graph with tensorrt_rtx, "
                "got none. Its default targets have no fp8."
            )
        return
    member = capability_member(api, capability)
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(member, 0):
        raise BackendError(f"compute_capability: {api.label} refused {capability!r}.")


def _add_profile(
    builder: Any,
    config: Any,
    inputs: list[dict[str, Any]],
    axes: Mapping[str, tuple[int, int, int]],
    logger: Any,
) -> None:
    if not axes:
        return
    profile = require(builder.create_optimization_profile(), "create_optimization_profile", logger)
    for spec in inputs:
        low, middle, high = (
            tuple(axes[size][which] if isinstance(size, str) else size for size in spec["shape"])
            for which in range(3)
        )
        profile.set_shape(spec["name"], low, middle, high)
    if config.add_optimization_profile(profile) < 0:
        raise BackendError(
            f"dynamic_axes: expected a profile TensorRT accepts, got {dict(axes)}: "
            f"{logger.last_messages()}"
        )


BACKEND = TensorRTBackend()
