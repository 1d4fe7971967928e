"""OpenVINO on the CPU: the default if there is no GPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsseg_rt.backends.base import (
    OUTSIDE_NODES,
    BackendOptions,
    Bounds,
    Choice,
    CompiledGraph,
    NodeTime,
    Session,
    check_host_feed,
    check_names,
    check_tokens,
    opened,
    pick_choice,
)
from zsseg_rt.common.arrays import HALF_PRECISIONS, Array, widened
from zsseg_rt.common.extras import unavailable
from zsseg_rt.common.files import Cache, ensure_home, locked, remove_entry, sha256_of
from zsseg_rt.common.process import free_memory
from zsseg_rt.errors import BackendError, DeviceError, PrecisionNotApplied
from zsseg_rt.onnx.check import Flow, check_graph
from zsseg_rt.onnx.reader import map_file, quantised_layers, read_interface

_log = logging.getLogger(__name__)
_MADV_PAGEOUT = 21  # Linux 5.4 and later, madvise(2)


def page_out(folder: Path) -> None:
    """Drop from memory the mapped files under ``folder``, where Linux can."""
    if sys.platform != "linux":
        return
    prefix = str(folder.resolve()) + os.sep
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        # address range, permissions, offset, device, inode, path
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or not fields[5].startswith(prefix):
            continue
        start, end = (int(address, 16) for address in fields[0].split("-"))
        libc.madvise(start, end - start, _MADV_PAGEOUT)


_MULTIPLY = ("FullyConnected", "MatMul", "Convolution", "GroupConvolution")


@dataclass
class PastRuns:
    """The runs of a compiled model so far."""

    count: int = 0  # How many there were
    ms: float = 0.0  # Their milliseconds, from call to return


def _rt_info(operation: Any, key: str) -> str:
    rt_info = operation.get_rt_info()
    return str(rt_info[key].value) if key in rt_info else ""


def narrow_layers(compiled: Any) -> int:
    """How many layers of a compiled model multiply in 8 bits."""
    return sum(
        _rt_info(operation, "runtimePrecision") in ("i8", "u8")
        for operation in compiled.get_runtime_model().get_ordered_ops()
        if _rt_info(operation, "layerType") in _MULTIPLY
    )


def require_int8(compiled: Any, graph_path: Path) -> str:
    """``"int8"`` if every layer that a graph holds in INT8 really runs in it."""
    promised, num_narrow = quantised_layers(map_file(graph_path)), narrow_layers(compiled)
    if num_narrow < promised:
        raise PrecisionNotApplied(
            f"precision: expected {promised} layers of {graph_path.name} in 'int8', but OpenVINO "
            f"compiled {num_narrow} of them for it on this CPU. Use precision='auto'."
        )
    return "int8"


def node_times(
    compiled: Any, request: Any, run: Callable[[], object], runs: int, past: PastRuns
) -> tuple[NodeTime, ...]:
    """Time every node of a compiled model, and what the same runs took beyond them.

    Counters are means since the model was compiled, cut to whole microseconds, as is every run. If
    there were few runs before, such as the slow first one, their share is taken out.
    """
    if str(compiled.get_property("PERF_COUNT")).upper() not in ("YES", "TRUE"):
        raise BackendError(
            "session: expected a graph that counts times, got one that does not. Load it with "
            "BackendOptions(node_times=True)."
        )
    earlier, done, done_ms = dict(_counters(request)), past.count, past.ms
    if done > runs:  # cutting would cost more than the first runs' share
        earlier, done, done_ms = {}, 0, 0.0
    for _ in range(runs):
        run()
    counted = past.count - done
    named, nodes = _names(compiled), []
    for name, (kind, mean_ms) in _counters(request):
        ms = mean_ms
        if name in earlier:
            ms = max(0.0, (mean_ms * past.count - earlier[name][1] * done) / counted)
        nodes.append(NodeTime(name=named.get(name, ""), type=kind, ms=ms))
    rest = (past.ms - done_ms) / counted - sum(node.ms for node in nodes)
    return (*nodes, NodeTime(name=OUTSIDE_NODES, type="", ms=max(0.0, rest)))


def _counters(request: Any) -> Iterator[tuple[str, tuple[str, float]]]:
    """Name, type and mean milliseconds of the nodes that ran."""
    for info in request.get_profiling_info():
        if str(info.status).endswith("EXECUTED"):
            yield info.node_name, (info.node_type, info.real_time.total_seconds() * 1e3)


def _names(compiled: Any) -> dict[str, str]:
    """The ONNX name of each node that has one; what OpenVINO invents is called by its own type."""
    names = {}
    for operation in compiled.get_runtime_model().get_ordered_ops():
        originals = _rt_info(operation, "originalLayersNames").split(",")
        named = [each for each in originals if "/" in each or each[:5] == "node_"]
        attention = [name for name in named if "attention/" in name]
        if named:
            names[operation.get_friendly_name()] = (attention or named)[-1]
    return names


# --- the process's core, and the precisions of this CPU ---

# What its binding turns C++ exceptions into. A message that quotes bytes of a damaged graph becomes
# UnicodeDecodeError, a ValueError.
RAISED = (RuntimeError, ValueError, IndexError, OverflowError, MemoryError)
# Lines of OpenVINO's messages that name its own source code, not the problem.
_BOILERPLATE = ("Exception from", "Check '", "FrontEnd API failed", "Model wasn't", "Summary:")

# Dot products of 8-bit numbers; ARM's is called asimddp.
_INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
_FLAG_LINES = ("flags", "features")
_CPU_INFO = Path("/proc/cpuinfo")
# Public name -> (the capability that the CPU must have, OpenVINO's name).
_PRECISIONS = {"float32": ("FP32", "f32"), "bfloat16": ("BF16", "bf16"), "float16": ("FP16", "f16")}

_lock = threading.Lock()
_core: Any = None


def process_core() -> Any:
    """The ``openvino.Core`` that every session shares; it lives as long as the process."""
    # The CPU plugin gives the thread that makes a core an alternate signal stack and unmaps it with
    # the core. Two cores that do not end in reverse order leave the thread with an unmapped one,
    # and the next signal that has a handler ends the process (seen with OpenVINO 2026.4).
    global _core
    ensure_home()
    try:
        import openvino
    except ImportError as exc:
        expected = "backend: expected the package openvino"
        raise unavailable(exc, "openvino", expected, "pip install openvino") from exc
    with _lock:
        if _core is None:
            _core = openvino.Core()
        return _core


def widened_model(core: Any, path: Path) -> Any:
    """A graph as OpenVINO compiles it: its path, or a model, if it has to be changed first.

    Inputs and outputs of half precision become float32. The conversions are part of the model, and
    compiled for float32 they vanish.
    """
    inputs, outputs = read_interface(map_file(path))
    if all(spec.dtype not in HALF_PRECISIONS for spec in (*inputs, *outputs)):
        return str(path)
    from openvino import Type
    from openvino.preprocess import PrePostProcessor

    model = core.read_model(str(path))
    halves, edges = (Type.f16, Type.bf16), PrePostProcessor(model)
    for index, value in enumerate(model.inputs):
        if value.get_element_type() in halves:
            edges.input(index).tensor().set_element_type(Type.f32)
    for index, value in enumerate(model.outputs):
        if value.get_element_type() in halves:
            edges.output(index).tensor().set_element_type(Type.f32)
    return edges.build()


def problem(exc: Exception) -> str:
    """The line of OpenVINO's message that names the problem."""
    text = str(exc)
    if isinstance(exc, UnicodeDecodeError):
        text = exc.object.decode("utf-8", "backslashreplace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    informative = [line for line in lines if not line.startswith(_BOILERPLATE)]
    return (informative or lines or [type(exc).__name__])[0]


def plugin_settings(
    precision: str, capabilities: list[str], options: BackendOptions
) -> dict[str, Any]:
    """OpenVINO's settings; what is not INT8 in an INT8 graph is the plugin's own choice."""
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": options.num_sessions}
    if options.node_times:
        settings["PERF_COUNT"] = True
    if options.num_threads:
        settings["INFERENCE_NUM_THREADS"] = options.num_threads
    if precision in ("auto", "int8"):
        # With BF16 the plugin's own choice stands: it knows whether the CPU only emulates it.
        if "BF16" not in capabilities:
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        return settings
    needed, hint = _PRECISIONS.get(precision, ("", ""))
    if needed not in capabilities:
        offered = [name for name, (flag, _) in _PRECISIONS.items() if flag in capabilities]
        raise PrecisionNotApplied(
            f"precision: expected one this CPU computes in ({', '.join(offered)}; OpenVINO reports "
            f"{', '.join(capabilities)}), got {precision!r}. Use precision='auto'."
        )
    settings["INFERENCE_PRECISION_HINT"] = hint
    return settings


def offers(variants: Collection[str], core: Any) -> list[Choice]:
    """This CPU's choices among a bundle's variants of a graph, its own first."""
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    computed = [name for name, (flag, _) in _PRECISIONS.items() if flag in capabilities]
    own = _own_precision(core)
    computed.sort(key=lambda name: name != own)
    narrow = [Choice(variant="int8", precision="int8")] if "int8" in variants and has_vnni() else []
    # A bfloat16 graph is slower than the float32 one lowered, and never wholly in float32.
    if "float32" in variants:
        halves = {"float16"} & set(variants)
        return narrow + [
            Choice(variant=name if name in halves else "float32", precision=name)
            for name in computed
        ]
    return narrow + [
        Choice(variant=variant, precision=name)
        for variant, names in (("float16", ("float32", "float16")), ("bfloat16", ("bfloat16",)))
        if variant in variants
        for name in names
        if name in computed
    ]


def _own_precision(core: Any) -> str:
    """The plugin's own choice: it knows whether the CPU only emulates bfloat16."""
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "float32"
    return _public_name(core.get_property("CPU", "INFERENCE_PRECISION_HINT"))


def applied_precision(compiled: Any) -> str:
    """The precision the compiled model reports, by its public name."""
    return _public_name(compiled.get_property("INFERENCE_PRECISION_HINT"))


def _public_name(kind: Any) -> str:
    hints = {hint: name for name, (_, hint) in _PRECISIONS.items()}
    applied = str(kind.get_type_name())
    return hints.get(applied, applied)


@functools.cache
def has_vnni() -> bool:
    """Whether the CPU multiplies 8-bit numbers faster than floats; OpenVINO says so of each."""
    return _CPU_INFO.is_file() and multiplies_bytes(_CPU_INFO.read_text(errors="replace"))


def multiplies_bytes(cpu_info: str) -> bool:
    """Whether a ``/proc/cpuinfo`` lists instructions for dot products of 8-bit numbers."""
    lines = (line for line in cpu_info.splitlines() if line.lower().startswith(_FLAG_LINES))
    return any(_INT8_FLAGS & set(line.split()) for line in lines)


def require_vnni() -> None:
    """Refuse INT8 on a CPU that gains nothing from it."""
    if not has_vnni():
        raise PrecisionNotApplied(
            "precision: expected a CPU with VNNI, AMX or ARM's dot product for 'int8', got one "
            "without, where INT8 is not faster. Use precision='auto'."
        )


# --- the backend ---

_RECORD = "checksums.json"
_HEADROOM = 1.2  # a compiled model is about as large as its graph


class OpenVinoBackend:
    """Compiles graphs with OpenVINO's CPU plugin."""

    name = "openvino"

    def choose(
        self, variants: Collection[str], asked: str, *, device: str, allowed: Sequence[str]
    ) -> Choice:
        """Choose; ``"auto"`` is what the CPU does natively."""
        _require_cpu(device)
        if asked == "int8" and asked in variants:
            require_vnni()
        possible = offers(variants, process_core())
        return pick_choice(possible, asked, allowed, where="this CPU", narrow=("int8",))

    def load(
        self, graph_path: Path, *, device: str, precision: str, options: BackendOptions
    ) -> CompiledGraph:
        """Compile one ONNX file; ``"int8"`` must reach every layer that the graph holds in INT8."""
        _require_cpu(device)
        core = process_core()
        header = check_graph(graph_path)
        capabilities = list(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        settings = plugin_settings(precision, capabilities, options)
        compiled = _compile(core, graph_path, settings, options)
        applied = applied_precision(compiled)
        if precision == "int8":
            applied = require_int8(compiled, graph_path)
        if precision not in ("auto", applied):
            raise PrecisionNotApplied(
                f"precision: expected {precision!r}, but OpenVINO compiled {graph_path.name} for "
                f"{applied!r} on this CPU ({', '.join(capabilities)}). Use precision='auto'."
            )
        if precision == "auto":
            _log.info("%s: precision auto is %s on this CPU", graph_path.name, applied)
        return _OpenVinoGraph(compiled, header, applied, options.dynamic_axes)


class _OpenVinoGraph(CompiledGraph):
    """A compiled model; OpenVINO serves as many of its requests at once as it has streams."""

    device = "cpu"

    def __init__(
        self,
        compiled: Any,
        header: Flow,
        precision: str,
        ranges: Mapping[str, Bounds] | None,
    ) -> None:
        self._compiled: Any = compiled
        self.inputs, self.outputs = widened(header.inputs), widened(header.outputs)
        self.precision, self.ranges = precision, ranges
        self.token_rows, self.failed = header.token_rows, False
        axes = [axis for spec in header.inputs for axis in spec.shape]
        self.is_dynamic = not all(isinstance(axis, int) for axis in axes)
        self.past = PastRuns()

    def session(self) -> Session:
        return _OpenVinoSession(self, self.open_model().create_infer_request())

    def close(self) -> None:
        self._compiled = None

    def open_model(self) -> Any:
        return opened("graph", self._compiled)


class _OpenVinoSession(Session):
    """One infer request."""

    def __init__(self, graph: _OpenVinoGraph, request: Any) -> None:
        from openvino import Tensor

        super().__init__(graph)
        self._tensor = Tensor
        self._graph, self._request = graph, request

    def run(self, feeds: Mapping[str, Array], *, stream: int = 0) -> dict[str, Array]:
        opened("session", self._request)
        if self._graph.failed:
            raise BackendError(
                "session: expected a graph that never failed, got one that still computes with the "
                "sizes of a failed run. Load it again."
            )
        begin = time.perf_counter()
        check_names(feeds, self.inputs)
        for spec in self.inputs:
            check_host_feed(spec, feeds[spec.name], self._graph.ranges)
        check_tokens(feeds, self._graph.token_rows)
        try:
            for spec in self.inputs:
                feed = feeds[spec.name]  # OpenVINO refuses to borrow read-only memory
                self._request.set_tensor(spec.name, self._tensor(feed, feed.flags.writeable))
            # infer() would be 10 us faster, but with one thread, or on one CPU, it drops what a
            # node throws and returns memory that nobody wrote.
            self._request.start_async()
            self._request.wait()
        except RAISED as exc:
            self._graph.failed = self._graph.is_dynamic
            raise BackendError(f"OpenVINO failed while running: {problem(exc)}") from exc
        results = {spec.name: self._request.get_tensor(spec.name).data for spec in self.outputs}
        self._graph.past.count += 1
        self._graph.past.ms += (time.perf_counter() - begin) * 1e3
        return results

    def profile(
        self, feeds: Mapping[str, Array], *, stream: int = 0, runs: int = 10
    ) -> tuple[NodeTime, ...]:
        self.run(feeds)  # what only a first run does is not a node's
        model, past = self._graph.open_model(), self._graph.past
        return node_times(model, self._request, lambda: self.run(feeds), runs, past)

    def close(self) -> None:
        self._request = None


def _require_cpu(device: str) -> None:
    if device != "cpu":
        raise DeviceError(
            f"device: expected 'cpu' for backend 'openvino', got {device!r}. "
            "Use backend='tensorrt' or 'torch' on a GPU."
        )


def _compile(core: Any, graph_path: Path, settings: dict[str, Any], options: BackendOptions) -> Any:
    if options.cache_dir is None:
        return _compile_once(core, graph_path, settings)
    try:
        folder = _cache_folder(core, graph_path, settings, options.cache_dir)
        with locked(folder.with_suffix(".lock")):
            _drop_damaged(folder)
            try:
                return _compile_cached(core, graph_path, settings, folder)
            except BackendError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    except (BackendError, OSError) as exc:
        _log.warning("%s: compiled models are not cached: %s", options.cache_dir, exc)
    return _compile_once(core, graph_path, settings)


def _compile_cached(core: Any, graph_path: Path, settings: dict[str, Any], folder: Path) -> Any:
    """Return a model from the cache, put there first if necessary."""
    settings = {**settings, "CACHE_DIR": str(folder)}
    compiled = _compile_once(core, graph_path, settings)
    if not (folder / _RECORD).exists():
        _record(folder).keep(_RECORD, b"", else_="The cached model will not be used.")
    # A freshly compiled model keeps the graph's weights beside its own; one from the cache the
    # mapped file instead, whose pages are given back once they have been read.
    if not compiled.get_property("LOADED_FROM_CACHE"):
        del compiled
        compiled = _compile_once(core, graph_path, settings)
    page_out(folder)
    return compiled


def _compile_once(core: Any, graph_path: Path, settings: dict[str, Any]) -> Any:
    free_memory()
    try:
        model = widened_model(core, graph_path)
        if isinstance(model, str) and "CACHE_DIR" not in settings:
            model = core.read_model(model)
        if not isinstance(model, str):
            free_memory()  # the parsed file, before the weights are packed
        return core.compile_model(model, "CPU", settings)
    except RAISED as exc:
        raise BackendError(
            f"{graph_path}: OpenVINO cannot compile the graph: {problem(exc)}"
        ) from exc


def _cache_folder(core: Any, graph_path: Path, settings: dict[str, Any], cache_dir: Path) -> Path:
    """The folder for this graph and these settings; raises OSError where nothing can be cached."""
    status = graph_path.stat()
    version = core.get_versions("CPU")["CPU"].build_number
    parts = [str(graph_path.resolve()), status.st_size, status.st_mtime_ns, version, settings]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir / "openvino" / key
    if os.path.lexists(folder) and not folder.is_dir():
        _log.warning("%s: expected a folder, got something else; it is replaced", folder)
        remove_entry(folder)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if not any(folder.glob("*.blob")) and free < status.st_size * _HEADROOM:
        raise OSError(f"{free / 1e6:.0f} MB free, too little for a compiled model")
    return folder


def _record(folder: Path) -> Cache:
    """The record of what was written: OpenVINO itself computes with damaged weights."""
    blobs = folder.glob("*.blob")
    return Cache(folder, {blob.name: sha256_of(blob) if blob.is_file() else "" for blob in blobs})


def _drop_damaged(folder: Path) -> None:
    entries = list(folder.iterdir())
    try:
        if not entries or _record(folder).read(_RECORD, max_bytes=0):
            return  # otherwise the record says why
    except OSError as exc:
        _log.warning("%s: the cached model cannot be read (%s); compiling again", folder, exc)
    for entry in entries:
        remove_entry(entry)


BACKEND = OpenVinoBackend()
