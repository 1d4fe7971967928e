"""torch: the reference backend, and CUDA without TensorRT.

On the CPU the ONNX graph is run node by node, as it is written. On CUDA it is first rewritten into
fewer and larger operations. Integers (shapes, axes) stay on the host, so a run there enqueues
without waiting for the device.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from zsseg_rt.backends._torch_graph.arrays import (
    DeviceResult,
    read_device,
    read_host,
    wide,
)
from zsseg_rt.backends._torch_graph.attention import pinned_attention
from zsseg_rt.backends._torch_graph.exact_float32 import exact_float32
from zsseg_rt.backends._torch_graph.graph import Node
from zsseg_rt.backends._torch_graph.program import Program
from zsseg_rt.backends._torch_graph.recorder import TorchRecorder
from zsseg_rt.backends.base import (
    BackendOptions,
    Bounds,
    Choice,
    CompiledGraph,
    LayerInfo,
    NodeTime,
    Recorder,
    Session,
    pick_choice,
)
from zsseg_rt.backends.feeds import check_names, check_tokens
from zsseg_rt.backends.graph_check.check import GraphHeader, check_graph
from zsseg_rt.common.arrays import Array, TensorSpec, widened
from zsseg_rt.common.extras import install_command, package_of, unavailable
from zsseg_rt.errors import (
    BackendError,
    DeviceError,
    PrecisionNotApplied,
)
from zsseg_rt.ops import core

if TYPE_CHECKING:
    from torch import Tensor

_LOWERED = ("float16", "bfloat16")


class TorchBackend:
    """Runs graphs in eager torch, on the CPU or on CUDA."""

    @property
    def name(self) -> str:
        """``"torch"``."""
        return "torch"

    def choose(
        self, held: Collection[str], asked: str, *, device: str, allowed: Sequence[str]
    ) -> Choice:
        """See :class:`zsseg_rt.backends.base.Backend`.

        On CUDA ``"auto"`` takes a float16 graph, or bfloat16 if the GPU computes in it.
        """
        return pick_choice(_offers(held, device), asked, allowed, where=f"torch on {device}")

    def load(
        self, graph_path: Path, *, device: str, precision: str, options: BackendOptions
    ) -> CompiledGraph:
        """Load one ONNX file; see :class:`zsseg_rt.backends.base.Backend`.

        ``precision="auto"`` is the graph's own. A float32 graph can be lowered to bfloat16 or
        float16: weights and activations are cast, LayerNorm, softmax and norms compute in float32.
        ``num_threads`` is a torch setting for the whole process: the last one given counts.
        """
        torch = _import_torch()
        target = _check_device(torch, device)
        header = check_graph(graph_path)
        program = Program.read(graph_path)
        applied = _choose_precision(precision, program.precision)
        lowered = applied if applied != program.precision else None
        with torch.inference_mode():
            report = {} if device == "cpu" else program.rewrite()
            program.place(target, getattr(torch, lowered) if lowered else None)
        if options.num_threads and device == "cpu":
            torch.set_num_threads(options.num_threads)
        return _TorchGraph(program, header, device, applied, options.dynamic_axes, report)


class _TorchGraph:
    """A program with its weights placed; running it changes nothing in it."""

    def __init__(
        self,
        program: Program,
        header: GraphHeader,
        device: str,
        precision: str,
        ranges: Mapping[str, Bounds] | None,
        report: Mapping[str, int],
    ) -> None:
        """``report``: what was rewritten, by kind; ``fused_attention`` counts blocks of it."""
        self._program: Program | None = program
        self._rewritten = dict(report)
        self.inputs, self.outputs = header.inputs, header.outputs
        if device == "cpu":
            self.inputs, self.outputs = widened(header.inputs), widened(header.outputs)
        self.device, self.precision, self.ranges = device, precision, ranges
        self.token_rows = header.token_rows

    @property
    def report(self) -> Mapping[str, int]:
        """What was rewritten, by kind; after a run on a GPU also its attentions, by kernel."""
        taken = (node.attributes.get("taken") for node in self._open().nodes)
        kinds = Counter(f"attention_{kind}" for kind in taken if kind is not None)
        return MappingProxyType(self._rewritten | kinds)

    def session(self) -> Session:
        return _TorchSession(self, self._open())

    def layers(self) -> list[LayerInfo]:
        return [
            LayerInfo(
                name=node.name or node.outputs[0], type=node.op_type, precision=self.precision
            )
            for node in self._open().nodes
        ]

    def close(self) -> None:
        self._program = None

    def _open(self) -> Program:
        if self._program is None:
            raise BackendError("graph: expected an open one, got a closed one. Load it again.")
        return self._program


class _TorchSession:
    """One request; torch allocates and frees its activations itself."""

    def __init__(self, graph: _TorchGraph, program: Program) -> None:
        self._graph = graph
        self._program: Program | None = program
        self._kept: dict[Hashable, Tensor] = {}  # memory that runs share

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._graph.outputs

    @property
    def device(self) -> str:
        return self._graph.device

    @property
    def precision(self) -> str:
        return self._graph.precision

    def run(self, feeds: Mapping[str, Array], *, stream: int = 0) -> dict[str, Array]:
        import torch

        if self._program is None:
            raise BackendError("session: expected an open one, got a closed one. Load it again.")
        check_names(feeds, self.inputs)
        if self.device == "cpu":  # on a GPU, Gather takes a number modulo the rows
            check_tokens(feeds, self._graph.token_rows)
        with torch.inference_mode(), self._on_stream(stream):
            tensors = {
                spec.name: self._read(spec, feeds[spec.name], stream) for spec in self.inputs
            }
            results = self._program.run(tensors, kept=self._kept)
            ready = {name: tensor.contiguous() for name, tensor in results.items()}
            if self.device == "cpu":
                return {name: wide(tensor).numpy() for name, tensor in ready.items()}
            return {name: DeviceResult(tensor, stream) for name, tensor in ready.items()}

    def profile(
        self, feeds: Mapping[str, Array], *, stream: int = 0, runs: int = 10
    ) -> tuple[NodeTime, ...]:
        import torch

        self.run(feeds, stream=stream)
        assert self._program is not None
        nodes, program = self._program.nodes, self._program
        totals = [0.0] * len(nodes)
        with torch.inference_mode(), self._on_stream(stream):
            tensors = {s.name: self._read(s, feeds[s.name], stream) for s in self.inputs}
            for _ in range(runs):
                marks = _NodeMarks(self.device)
                program.run(tensors, marks.mark, kept=self._kept)
                totals = [sum(pair) for pair in zip(totals, marks.between_ms(), strict=True)]
        return tuple(
            NodeTime(name=node.name, type=_type_of(node), ms=total / runs)
            for node, total in zip(nodes, totals, strict=True)
        )

    def recorder(self) -> Recorder | None:
        return None if self.device == "cpu" else TorchRecorder(self.device)

    def capture_state(self) -> Hashable | None:
        """What a capture of a run depends on besides its feeds: nothing, as its memory is its own.

        None on the CPU, where there are no captures.
        """
        return None if self.device == "cpu" else ()

    def close(self) -> None:
        self._program = None
        self._kept.clear()

    @contextlib.contextmanager
    def _on_stream(self, stream: int) -> Iterator[None]:
        """Enqueue on the caller's stream; in float32 graphs, float32 means float32 (no TF32)."""
        import torch

        if self.device == "cpu":
            yield
            return
        own: Any = torch.cuda.default_stream(self.device)
        if stream:
            own = torch.cuda.ExternalStream(stream, self.device)  # type: ignore[no-untyped-call]
        exact = exact_float32() if self.precision == "float32" else contextlib.nullcontext()
        with torch.cuda.device(self.device), torch.cuda.stream(own), exact, pinned_attention():
            yield

    def _read(self, spec: TensorSpec, array: Array, stream: int) -> Tensor:
        if self.device == "cpu":
            return read_host(spec, array, self._graph.ranges)
        return read_device(spec, array, self.device, self._graph.ranges)


class _NodeMarks:
    """Times by the host's clock, or by events on the current CUDA stream."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device != "cpu"
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """End a node, and begin the next one."""
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        import torch

        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def between_ms(self) -> list[float]:
        """Milliseconds between neighbouring marks; waits for the GPU."""
        pairs = itertools.pairwise(self._marks)
        if not self._on_gpu:
            return [(after - before) * 1e3 for before, after in pairs]
        self._marks[-1].synchronize()
        return [float(before.elapsed_time(after)) for before, after in pairs]


def _type_of(node: Node) -> str:
    """The operator; of an attention that has run on a GPU, also torch's kernel."""
    taken = node.attributes.get("taken")
    return node.op_type if taken is None else f"{node.op_type} ({taken})"


def _import_torch() -> Any:
    try:
        import onnx  # noqa: F401
        import torch
    except ImportError as exc:
        expected = "backend: expected the packages torch and onnx"
        raise unavailable(exc, package_of(exc), expected, install_command("torch")) from exc
    return torch


def _check_device(torch: Any, device: str) -> Any:
    kind, _, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or not index.isdigit()):
        raise DeviceError(f"device: expected 'cpu' or 'cuda:N', got {device!r}")
    if kind == "cuda" and int(index) >= torch.cuda.device_count():
        raise DeviceError(
            f"device: expected one of {torch.cuda.device_count()} CUDA device(s) that torch sees, "
            f"got {device!r}. Use device='cpu', or install a CUDA build of torch and the driver."
        )
    return torch.device(device)


def _offers(held: Collection[str], device: str) -> list[Choice]:
    """What can be done with the graphs that the bundle holds, the best first."""
    own = [Choice(variant=name, precision=name) for name in _LOWERED if name in held]
    if "float32" not in held:
        return own
    lowered = [Choice(variant="float32", precision=name) for name in _LOWERED if name not in held]
    plain = [Choice(variant="float32", precision="float32")]
    if device == "cpu":
        return plain + own + lowered
    fast = [choice for choice in lowered if choice.precision == "bfloat16"]
    fast = fast if _computes_bfloat16(device) else []
    return own + fast + plain + lowered


def _computes_bfloat16(device: str) -> bool:
    """Whether a GPU has bfloat16 in hardware: Ampere and newer."""
    properties = core.cuda_device_properties(int(device.partition(":")[2]))
    return float(properties["compute_capability"]) >= 8.0


def _choose_precision(asked: str, graph: str) -> str:
    if asked in ("auto", graph):
        return graph
    if graph == "float32" and asked in _LOWERED:
        return asked
    offered = (graph, *_LOWERED) if graph == "float32" else (graph,)
    raise PrecisionNotApplied(
        f"precision: expected one of {', '.join(offered)} for this graph on backend 'torch', "
        f"got {asked!r}. Use precision='auto'."
    )


BACKEND = TorchBackend()
