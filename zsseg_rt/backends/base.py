"""Backends: each compiles an ONNX graph for a device and runs it there.

A :class:`Backend` chooses and compiles, a :class:`CompiledGraph` holds the weights once, a
:class:`Session` is one request with its activations. Feeds and results are arrays on the session's
device: NumPy on the CPU, ``DeviceArray`` or another library's (DLPack) on CUDA.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from zsseg_rt.common.arrays import Array, TensorSpec, dtype_name
from zsseg_rt.errors import ArgumentError, BackendError, DTypeError, PrecisionNotApplied, ShapeError

Bounds = tuple[int, int, int]
"""Smallest, usual and largest size of a dynamic axis."""

AxisRanges = Mapping[str, Bounds]


def check_names(feeds: Mapping[str, Array], specs: Sequence[TensorSpec]) -> None:
    """Refuse missing and unknown inputs."""
    names = [spec.name for spec in specs]
    missing = [name for name in names if name not in feeds]
    unknown = [name for name in feeds if name not in names]
    if missing or unknown:
        problem = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
        raise ShapeError(f"feeds: expected {', '.join(names)}, got {problem}. Feed every input.")


def check_feed(
    spec: TensorSpec, dtype: str, shape: tuple[int, ...], ranges: AxisRanges | None
) -> None:
    """Refuse a feed of the wrong dtype or shape."""
    if dtype != spec.dtype:
        raise DTypeError(f"{spec.name}: expected {spec.dtype}, got {dtype}. Convert it first.")
    if len(shape) != len(spec.shape) or not all(
        _fits(axis, size, ranges) for axis, size in zip(spec.shape, shape, strict=True)
    ):
        raise ShapeError(
            f"{spec.name}: expected shape ({_describe(spec, ranges)}), got {shape}. "
            "Named axes take any size in their range."
        )


def check_tokens(feeds: Mapping[str, Array], token_rows: Mapping[str, int]) -> None:
    """Refuse integers that point beyond the table that they choose rows of."""
    for name, rows in token_rows.items():
        numbers = np.asarray(feeds[name])
        low, high = int(numbers.min(initial=0)), int(numbers.max(initial=0))
        if low < 0 or high >= rows:
            raise ArgumentError(
                f"{name}: expected integers from 0 to {rows - 1}, got {low if low < 0 else high}. "
                "Use the tokenizer that was exported with the graph."
            )


def _fits(axis: int | str, size: int, ranges: AxisRanges | None) -> bool:
    if isinstance(axis, int):
        return size == axis
    low, _, high = (ranges or {}).get(axis, (1, 1, size))
    return low <= size <= high


def _describe(spec: TensorSpec, ranges: AxisRanges | None) -> str:
    parts = []
    for axis in spec.shape:
        bounds = (ranges or {}).get(axis) if isinstance(axis, str) else None
        parts.append(f"{axis} in {bounds[0]}..{bounds[2]}" if bounds else str(axis))
    return ", ".join(parts)


def check_host_feed(spec: TensorSpec, array: Array, ranges: AxisRanges | None) -> None:
    """Refuse a feed of the wrong kind, dtype, shape or layout on the CPU."""
    if not isinstance(array, np.ndarray):
        raise DTypeError(
            f"{spec.name}: expected a NumPy array on device 'cpu', got {type(array).__name__}. "
            "Feed arrays of the session's device."
        )
    check_feed(spec, dtype_name(array.dtype), array.shape, ranges)
    if not array.flags.c_contiguous:
        raise ShapeError(
            f"{spec.name}: expected a C-contiguous array, got strides {array.strides}. "
            "Call numpy.ascontiguousarray first."
        )


def opened(what: str, content: Any) -> Any:
    """Return what an open graph or session holds."""
    if content is None:
        raise BackendError(f"{what}: expected an open one, got a closed one. Load it again.")
    return content


ANY_PRECISION = ("float16", "bfloat16", "float32")
"""The choices of ``precision="auto"`` where rounding changes labels only at their borders."""


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """Settings that a caller may give to any backend, which uses those that apply to it."""

    num_threads: int = 0  # CPU threads; 0 lets the backend choose
    num_sessions: int = 1  # Sessions that will run at the same time
    cache_dir: Path | None = None  # Folder for compiled models and plans; None disables caching
    # ``{axis name: (min, opt, max)}`` for every named dynamic axis
    dynamic_axes: Mapping[str, Bounds] | None = None
    # Target GPU such as ``"8.9"`` if a backend builds for another machine
    compute_capability: str | None = None
    # Most bytes that the layers of a built plan take to work in; None lets the backend choose
    workspace: int | None = None
    # Called with (step name, fraction in [0, 1]) during long builds
    progress: Callable[[str, float], None] | None = None
    # Let sessions report the times of their nodes, which costs a little time
    node_times: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which file is used, and how it is computed."""

    variant: str  # The precision that the bundle's graph is written in
    precision: str  # The precision that the backend computes it in


OUTSIDE_NODES = "(outside nodes)"
"""The time of a run beyond its nodes, as the last :class:`NodeTime`; with it, they sum to the run.

Only backends that count nodes one by one have it; those that mark the end of each leave no gaps.
"""


@dataclass(frozen=True, kw_only=True)
class NodeTime:
    """The time of one node of a graph."""

    # The node's name in the ONNX file; ``""`` for one that the backend invented;
    # :data:`OUTSIDE_NODES` for the rest of a run
    name: str
    type: str  # The backend's name for what it computes
    ms: float  # Milliseconds a run, the mean of several


class Recorder(Protocol):
    """A holder of what a session's launches in one capture need, while it records and replays.

    The session has run before on the same stream: what it loads and allocates once does not belong
    into a capture.
    """

    def recording(self) -> AbstractContextManager[None]:
        """Enter this before the capture begins, and leave it after the capture has ended."""

    def close(self) -> None:
        """Free what replays need, after the capture is destroyed. Calling it twice is harmless."""


class Described:
    """The description that graphs and their sessions give of themselves."""

    # Inputs and results of a run, in graph order, of the dtypes that the graph's file states. On
    # the CPU half precision is float32, widened within the graph: NumPy has no bfloat16
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    device: str  # Where feeds and results live: "cpu" or "cuda:N"
    precision: str  # The public name of the precision that the graph actually runs at


class Session(Described, ABC):
    """One request: a graph's activations. One thread at a time may use it."""

    def __init__(self, graph: Described) -> None:
        self.inputs, self.outputs = graph.inputs, graph.outputs
        self.device, self.precision = graph.device, graph.precision

    @abstractmethod
    def run(self, feeds: Mapping[str, Array], *, stream: int = 0) -> dict[str, Array]:
        """Run the graph once.

        Args:
            feeds: One C-contiguous array per graph input, of the spec's dtype and shape.
            stream: CUDA stream handle to enqueue on; ignored on the CPU.

        Returns:
            One array per graph output, valid until the next ``run`` or ``close``.

        Raises:
            ShapeError: A feed is missing, unknown, or has the wrong shape.
            DTypeError: A feed has the wrong dtype.
            BackendError: The backend failed.
        """

    @abstractmethod
    def profile(
        self, feeds: Mapping[str, Array], *, stream: int = 0, runs: int = 10
    ) -> tuple[NodeTime, ...]:
        """Time every node over several runs, in their order, and what lay beyond the nodes.

        Raises:
            BackendError: The graph was loaded without ``BackendOptions(node_times=True)``, or the
                backend does not tell.
        """

    def capture_state(self) -> Hashable | None:
        """The state that a capture of :meth:`run` depends on besides the feeds' addresses.

        Such as shapes, and the addresses of buffers that may grow: a capture is launched only while
        this is as it was. None: runs cannot be captured, on the CPU for example.
        """
        return None

    def recorder(self) -> Recorder | None:
        """Make what a capture of :meth:`run` needs; None where it needs nothing."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Free the activations. Calling it twice is harmless; ``run`` then raises BackendError."""


class RecordingSession(Session):
    """Runs another session and keeps its feeds, on the CPU as copies, to time its nodes on them."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._session = session
        self.feeds: list[Mapping[str, Array]] = []

    def run(self, feeds: Mapping[str, Array], *, stream: int = 0) -> dict[str, Array]:
        """Run the graph once."""
        copies = {n: np.array(a) if isinstance(a, np.ndarray) else a for n, a in feeds.items()}
        self.feeds.append(copies)
        return self._session.run(feeds, stream=stream)

    def profile(
        self, feeds: Mapping[str, Array], *, stream: int = 0, runs: int = 10
    ) -> tuple[NodeTime, ...]:
        """Time the nodes on other feeds."""
        return self._session.profile(feeds, stream=stream, runs=runs)

    def profile_recorded(self, *, stream: int = 0, runs: int = 10) -> tuple[NodeTime, ...]:
        """Time the nodes on everything that was fed; a node that ran often counts as often."""
        totals: dict[tuple[float, str, str], float] = defaultdict(float)
        for feeds in self.feeds:
            for place, node in enumerate(self.profile(feeds, stream=stream, runs=runs)):
                last = node.name == OUTSIDE_NODES
                totals[math.inf if last else place, node.name, node.type] += node.ms
        return tuple(NodeTime(name=n, type=t, ms=ms) for (_, n, t), ms in sorted(totals.items()))

    def close(self) -> None:
        """Nothing: the session stays open."""


class CompiledGraph(Described, ABC):
    """A graph's weights on a device, shared by all its sessions. Any thread may use it.

    Builders choose kernels by the GPU and their version, and have made wrong ones of right graphs:
    what one built is compared with its bundle's golden sample once.
    """

    plan_name = ""  # The file of a build, or the graph's name; empty where nothing was built

    def golden_verdict(self, sample: str) -> str | None:
        """The fault on the golden sample of this hash, maybe ""; None if it has not run."""
        return ""

    def keep_golden_verdict(self, sample: str, problem: str) -> None:
        """Keep a verdict beside the build, for later processes, as far as it is kept itself."""

    @abstractmethod
    def session(self) -> Session:
        """Open one more request; a BackendError where the graph is closed or there is no room."""

    @abstractmethod
    def close(self) -> None:
        """Free the weights, once every session is closed. Calling it twice is harmless."""


class Backend(Protocol):
    """A way to run ONNX graphs."""

    @property
    def name(self) -> str:
        """The public name: ``"openvino"``, ``"tensorrt"`` or ``"torch"``."""

    def choose(
        self, variants: Collection[str], asked: str, *, device: str, allowed: Sequence[str]
    ) -> Choice:
        """Choose the variant of a graph and the precision to compute it in; opens no file.

        Args:
            variants: Precisions in which the bundle holds the graph.
            asked: A public precision name or ``"auto"``.
            device: ``"cpu"`` or ``"cuda:N"``.
            allowed: Precisions that ``"auto"`` may take.

        Raises:
            PrecisionNotApplied: ``asked`` cannot be given; the message names only what can.
        """

    def load(
        self, graph_path: Path, *, device: str, precision: str, options: BackendOptions
    ) -> CompiledGraph:
        """Compile one ONNX file.

        Args:
            graph_path: The ``.onnx`` file.
            device: ``"cpu"`` or ``"cuda:N"``.
            precision: What :meth:`choose` returned, or ``"auto"``: the backend's own choice.
            options: Threads, sessions, caches, shapes.

        Raises:
            DeviceError: The device is absent or not one this backend serves.
            PrecisionNotApplied: This backend cannot give the precision on this device.
            BackendError: The graph cannot be read or compiled, or the package is missing.
        """


def pick_choice(
    offers: Sequence[Choice],
    asked: str,
    allowed: Sequence[str],
    *,
    where: str,
    narrow: Sequence[str] = (),
) -> Choice:
    """Take the first offer in the requested precision; for ``"auto"``, an allowed one.

    ``narrow`` has the precisions of 8 bits that a bundle may have graphs for here.
    """
    wanted = allowed if asked == "auto" else (asked,)
    for offer in offers:
        if offer.precision in wanted:
            return offer
    names = list(dict.fromkeys(offer.precision for offer in offers))
    if not names:
        raise PrecisionNotApplied(
            f"precision: expected a graph that {where} can compute, got a bundle without one. "
            "Use another backend, or export the bundle with --precision float32."
        )
    if asked == "auto" or not any(name in allowed for name in names):
        remedy = f"Use precision='{names[0]}'."
    else:
        remedy = "Use precision='auto'."
    if asked in narrow:
        command = f"zsseg-rt quantize BUNDLE --photos FOLDER --precision {asked} --out NEW.zsseg"
        remedy += f" Or make a bundle with such graphs: {command}"
    raise PrecisionNotApplied(
        f"precision: expected one that {where} can give for this bundle ({', '.join(names)}), got "
        f"{asked!r}. {remedy}"
    )
