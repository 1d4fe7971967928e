"""torch: the reference backend, and CUDA without TensorRT.

The ONNX graph is run node by node, as it is written; on CUDA one kernel computes an attention that
a scope names. Integers (shapes, axes) stay on the host, so a run there enqueues without waiting for
the device.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsseg_rt.backends.base import (
    BackendOptions,
    Bounds,
    Choice,
    CompiledGraph,
    NodeTime,
    Recorder,
    Session,
    check_feed,
    check_host_feed,
    check_names,
    check_tokens,
    opened,
    pick_choice,
)
from zsseg_rt.common.arrays import Array, TensorSpec, gpu_index, typestr_of, widened
from zsseg_rt.common.extras import install_command, package_of, unavailable
from zsseg_rt.errors import (
    CheckpointError,
    DeviceError,
    DTypeError,
    PrecisionNotApplied,
    ShapeError,
)
from zsseg_rt.onnx.check import Flow, check_graph
from zsseg_rt.onnx.half import to_half
from zsseg_rt.ops import core

if TYPE_CHECKING:
    from torch import Tensor

    from zsseg_rt.backends._torch_program import Program

_LOWERED = ("float16", "bfloat16")


class TorchBackend:
    """Runs graphs in eager torch, on the CPU or on CUDA."""

    name = "torch"

    def choose(
        self, variants: Collection[str], asked: str, *, device: str, allowed: Sequence[str]
    ) -> Choice:
        """Choose; on CUDA ``"auto"`` takes a float16 graph, or bfloat16 if the GPU has it."""
        return pick_choice(_offers(variants, device), asked, allowed, where=f"torch on {device}")

    def load(
        self, graph_path: Path, *, device: str, precision: str, options: BackendOptions
    ) -> CompiledGraph:
        """Load one ONNX file, lowered from float32 to another precision if that is asked for.

        Then weights and activations are cast; LayerNorm, softmax and norms compute in float32.
        ``num_threads`` is a torch setting for the whole process: the last one given counts.
        """
        torch = _import_torch()
        target = check_device(torch, device)
        header = check_graph(graph_path)
        from zsseg_rt.backends._torch_program import Program, stored_precision

        network, stored = header.network, stored_precision(header.network)
        applied = _choose_precision(precision, stored)
        if applied != stored:
            try:
                network = to_half(network, applied)
            except CheckpointError as exc:
                raise PrecisionNotApplied(
                    f"precision: expected weights that {applied} holds, got larger ones in "
                    f"{graph_path}. Use precision='float32' or 'bfloat16'."
                ) from exc
        program = Program(network, str(graph_path))
        with torch.inference_mode():
            fused = 0 if device == "cpu" else program.fuse_attention()
            program.place(target)
        if options.num_threads and device == "cpu":
            torch.set_num_threads(options.num_threads)
        return _TorchGraph(program, header, device, applied, options.dynamic_axes, fused)


class _TorchGraph(CompiledGraph):
    """A program with its weights placed; running it changes nothing in it."""

    def __init__(
        self,
        program: Program,
        header: Flow,
        device: str,
        precision: str,
        ranges: Mapping[str, Bounds] | None,
        fused_attention: int,
    ) -> None:
        self._program: Program | None = program
        self.report = {"fused_attention": fused_attention}
        self.inputs, self.outputs = header.inputs, header.outputs
        if device == "cpu":
            self.inputs, self.outputs = widened(header.inputs), widened(header.outputs)
        self.device, self.precision, self.ranges = device, precision, ranges
        self.token_rows = header.token_rows

    def session(self) -> Session:
        return _TorchSession(self, opened("graph", self._program))

    def close(self) -> None:
        self._program = None


class _TorchSession(Session):
    """One request; torch allocates and frees its activations itself."""

    def __init__(self, graph: _TorchGraph, program: Program) -> None:
        super().__init__(graph)
        self._graph = graph
        self._program: Program | None = program
        self._captured = self.device != "cpu" and _pools_are_of_threads()

    def run(self, feeds: Mapping[str, Array], *, stream: int = 0) -> dict[str, Array]:
        import torch

        program = opened("session", self._program)
        check_names(feeds, self.inputs)
        if self.device == "cpu":  # on a GPU, Gather takes a number modulo the rows
            check_tokens(feeds, self._graph.token_rows)
        with torch.inference_mode(), self._on_stream(stream):
            results = program.run({s.name: self._read(s, feeds[s.name]) for s in self.inputs})
            ready = {name: tensor.contiguous() for name, tensor in results.items()}
            if self.device == "cpu":
                wide = {n: t.float() if t.is_floating_point() else t for n, t in ready.items()}
                return {name: tensor.numpy() for name, tensor in wide.items()}
            return {name: DeviceResult(tensor, stream) for name, tensor in ready.items()}

    def profile(
        self, feeds: Mapping[str, Array], *, stream: int = 0, runs: int = 10
    ) -> tuple[NodeTime, ...]:
        import torch

        self.run(feeds, stream=stream)
        program, on_gpu = opened("session", self._program), self.device != "cpu"
        totals, marks = [0.0] * len(program.nodes), list[Any]()

        def mark() -> None:
            """End a node, and begin the next one."""
            if on_gpu:
                event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                event.record()
                marks.append(event)
            else:
                marks.append(time.perf_counter())

        with torch.inference_mode(), self._on_stream(stream):
            tensors = {s.name: self._read(s, feeds[s.name]) for s in self.inputs}
            for _ in range(runs):
                marks.clear()
                mark()
                program.run(tensors, mark)
                if on_gpu:
                    marks[-1].synchronize()
                for place, (begin, end) in enumerate(itertools.pairwise(marks)):
                    totals[place] += begin.elapsed_time(end) if on_gpu else (end - begin) * 1e3
        return tuple(
            NodeTime(name=node.name, type=node.kind, ms=total / runs)
            for node, total in zip(program.nodes, totals, strict=True)
        )

    def recorder(self) -> Recorder | None:
        return None if self.device == "cpu" else TorchRecorder(self.device)

    def capture_state(self) -> Hashable | None:
        return () if self._captured else None  # a capture's memory is its own

    def close(self) -> None:
        self._program = None

    @contextlib.contextmanager
    def _on_stream(self, stream: int) -> Iterator[None]:
        """Enqueue on the caller's stream; in float32 graphs, float32 means float32 (no TF32)."""
        import torch

        if self.device == "cpu":
            yield
            return
        from zsseg_rt.backends._torch_program import exact_float32, no_cudnn_attention

        own: Any = torch.cuda.default_stream(self.device)
        if stream:
            own = torch.cuda.ExternalStream(stream, self.device)  # type: ignore[no-untyped-call]
        exact = exact_float32() if self.precision == "float32" else contextlib.nullcontext()
        with torch.cuda.device(self.device), torch.cuda.stream(own), exact, no_cudnn_attention():
            yield

    def _read(self, spec: TensorSpec, array: Array) -> Tensor:
        if self.device == "cpu":
            import torch

            check_host_feed(spec, array, self._graph.ranges)
            # torch refuses to borrow read-only memory without a warning; such a feed is copied
            return torch.from_numpy(array if array.flags.writeable else array.copy())
        return read_device(spec, array, self.device, self._graph.ranges)


_one_at_a_time = threading.RLock()  # torch fails where threads use several pools at once


def _pools_are_of_threads() -> bool:
    """Whether a memory pool takes its own thread's tensors alone; pytorch/pytorch#153356."""
    import torch.cuda.memory

    return hasattr(torch.cuda.memory, "_cuda_beginAllocateCurrentThreadToPool")


class TorchRecorder:
    """A memory pool of torch for one capture.

    torch launches on the stream that it is given, so the caller's capture holds torch's launches
    and ours alike. What ``torch.cuda.CUDAGraph`` does beyond that is done here: what torch
    allocates meanwhile comes from a pool of its own. From the usual pool, memory would be given to
    others once the captured tensors are gone, and replays would write over it.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._pool: Any = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        import torch

        with _one_at_a_time, torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.MemPool()
            # Before the capture: once one is under way, torch looks for a graph of its own.
            with torch.cuda.use_mem_pool(self._pool, self._device):
                yield

    def close(self) -> None:
        self._pool = None


class DeviceResult:
    """A tensor on a GPU as this package's kernels take it: they use it where it was made, at once.

    torch's own ``__dlpack__`` asks which device and stream are current when it is called: after a
    run each use would wait for the legacy default stream, and be refused on GPUs but the first.
    """

    def __init__(self, tensor: Tensor, stream: int) -> None:
        self.tensor, self._stream = tensor, stream
        self.shape = tuple(tensor.shape)
        self.__cuda_array_interface__ = {
            "shape": self.shape,
            "typestr": typestr_of(str(tensor.dtype).removeprefix("torch.")),
            "data": (tensor.data_ptr(), False),
            "strides": None,
            "version": 3,
            "stream": stream or 1,  # 1 is its name for the legacy default stream
        }

    def view(self, shape: tuple[int, ...]) -> DeviceResult:
        """The leading elements with another shape, no copy."""
        leading = self.tensor.reshape(-1)[: math.prod(shape)]
        return DeviceResult(leading.view(shape), self._stream)


def read_device(spec: TensorSpec, array: Array, device: str, ranges: Any) -> Tensor:
    """Borrow a feed on a GPU."""
    import torch

    if isinstance(array, DeviceResult) and array.tensor.device == torch.device(device):
        check_feed(spec, str(array.tensor.dtype).removeprefix("torch."), array.shape, ranges)
        return array.tensor
    if not hasattr(array, "__dlpack__"):
        raise DTypeError(
            f"{spec.name}: expected an array on {device} with __dlpack__, got "
            f"{type(array).__name__}."
        )
    try:
        borrowed = torch.utils.dlpack.from_dlpack(array)
    except (RuntimeError, BufferError, TypeError, ValueError) as exc:
        raise DeviceError(f"{spec.name}: expected an array on {device}, got {exc}") from exc
    if borrowed.device != torch.device(device):
        raise DeviceError(f"{spec.name}: expected an array on {device}, got {borrowed.device}.")
    check_feed(spec, str(borrowed.dtype).removeprefix("torch."), tuple(borrowed.shape), ranges)
    if not borrowed.is_contiguous():
        raise ShapeError(f"{spec.name}: expected a C-contiguous array, got {borrowed.stride()}")
    return borrowed


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as exc:
        expected = "backend: expected the package torch"
        raise unavailable(exc, package_of(exc), expected, install_command("torch")) from exc
    return torch


def check_device(torch: Any, device: str) -> Any:
    kind, _, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or not index.isdigit()):
        raise DeviceError(f"device: expected 'cpu' or 'cuda:N', got {device!r}")
    if kind == "cuda" and int(index) >= torch.cuda.device_count():
        raise DeviceError(
            f"device: expected one of {torch.cuda.device_count()} CUDA device(s) that torch sees, "
            f"got {device!r}. Use device='cpu', or install a CUDA build of torch and the driver."
        )
    return torch.device(device)


def _offers(variants: Collection[str], device: str) -> list[Choice]:
    """The choices among a bundle's variants of a graph, the best first."""
    own = [Choice(variant=name, precision=name) for name in _LOWERED if name in variants]
    if "float32" not in variants:
        return own
    lowered = [Choice(variant="float32", precision=p) for p in _LOWERED if p not in variants]
    plain = [Choice(variant="float32", precision="float32")]
    if device == "cpu":
        return plain + own + lowered
    fast = [choice for choice in lowered if choice.precision == "bfloat16"]
    fast = fast if _computes_bfloat16(device) else []
    return own + fast + plain + lowered


def _computes_bfloat16(device: str) -> bool:
    """Whether a GPU has bfloat16 in hardware: Ampere and newer."""
    properties = core.cuda_device_properties(gpu_index(device))
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
