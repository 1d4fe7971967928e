"""A profile as plain data, which is written and read as JSON; the kinds of nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar

from zsseg_rt.backends.base import OUTSIDE_NODES
from zsseg_rt.common import schema
from zsseg_rt.errors import ConfigError
from zsseg_rt.profiling.conditions import Conditions
from zsseg_rt.profiling.estimates import Difference, percentile, percentile_interval

KIND: Literal["zsseg_rt profile"] = "zsseg_rt profile"
FORMAT = 2
K = TypeVar("K")
OUTSIDE = OUTSIDE_NODES
"""Name and kind of what a run takes beyond its nodes."""
_KINDS = {
    "attention": ("attention", "sdpa", "mha"),
    "linear": ("fullyconnected", "matmul", "gemm", "conv", "linear"),
    "norm": ("norm", "mvn", "rms"),
}
_LAYOUT = (
    "reorder", "transpose", "reshape", "concat", "split", "slice", "gather", "pad", "expand",
    "broadcast", "squeeze", "convert", "cast", "permute", "shuffle", "copy", "tile",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """Milliseconds. A percentile with fewer than three samples above it is None."""

    count: int
    mean: float
    p50: float | None
    p50_low: float | None  # ends of the median's 95 % interval
    p50_high: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    max: float  # nothing is clipped

    @property
    def p50_ends(self) -> tuple[float, float] | None:
        """The ends of the median's interval, where it has one."""
        low, high = self.p50_low, self.p50_high
        return None if low is None or high is None else (low, high)


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """A fresh process's way to its first result, in seconds."""

    cached: bool  # whether compiled models and text embeddings could come from the cache
    import_s: float
    load_s: float
    classes_s: float
    first_frame_s: float
    peak_mb: float | None  # largest resident memory until then; None: the system does not tell


@dataclass(frozen=True, kw_only=True)
class PacedTimes:
    """Frames that fell due by a clock."""

    rate: float  # frames per second
    frames: int
    late: int  # done only after the next one had fallen due
    latency: Percentiles  # from when they fell due
    service: Percentiles  # from when their turn came


@dataclass(frozen=True, kw_only=True)
class EnergyUse:
    """The energy that frames took of a board or a chip, not of a process."""

    source: str
    frames: int  # labelled one right after another
    seconds: float
    mj: float  # millijoules a frame, all in all
    mj_above_idle: float | None  # without what the machine takes when it waits
    watts: float
    idle_watts: float | None


@dataclass(frozen=True, kw_only=True)
class NodeRow:
    """One node of a graph, or, by the name ``OUTSIDE``, the time of its runs beyond its nodes."""

    graph: str
    name: str  # empty if the backend invented it
    type: str  # the backend's name for what it computes
    kind: str  # linear, attention, norm, layout, other or OUTSIDE
    ms: float  # a frame


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Every call that was timed, in order; milliseconds."""

    rounds: tuple[int, ...] = ()  # in which each warm call was
    wall_ms: tuple[float, ...] = ()
    cpu_ms: tuple[float, ...] = ()
    device_ms: tuple[float, ...] = ()  # empty on the CPU
    cold_ms: tuple[float, ...] = ()
    stages: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(kw_only=True)
class VariantReport:
    """One bundle with its settings; filled in while it is measured."""

    name: str  # in tables
    bundle: str
    size_mb: float
    settings: dict[str, str]  # of the engine, that differ from the defaults
    described: dict[str, str]  # backend, device, precision, versions: what really ran
    classes: int
    frame: str  # sizes, such as ``640x480``
    streams: int  # frames labelled at the same time
    failure: str = ""  # why it is missing or incomplete
    wall: Percentiles | None = None  # from call to return
    cpu: Percentiles | None = None
    device: Percentiles | None = None  # between CUDA events
    cold: Percentiles | None = None  # first call after a pause
    stages: dict[str, Percentiles] = field(default_factory=dict)
    frames_per_second: float | None = None  # one after the other without a pause
    waiting: float | None = None  # share of their runnable time that threads waited for a CPU
    peak_mb: float | None = None  # largest resident memory of its process
    cold_starts: tuple[ColdStart, ...] = ()
    paced: PacedTimes | None = None
    agreement: float | None = None  # share of pixels with the same label as float32 gives
    miou: float | None = None  # on the data set, in per cent
    energy: EnergyUse | None = None
    nodes: tuple[NodeRow, ...] = ()  # timed in a process of their own
    samples: Samples = field(default_factory=Samples)

    @property
    def load_s(self) -> float | None:
        """Seconds in which it loads with the cache; None if that was not timed."""
        return next((start.load_s for start in self.cold_starts if start.cached), None)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much longer a variant takes than the first one."""

    base: str
    other: str
    difference: Difference


@dataclass(frozen=True, kw_only=True)
class Report:
    """A profile."""

    kind: Literal["zsseg_rt profile"] = KIND
    format: int = FORMAT
    version: str  # of zsseg_rt
    command: str  # repeats the profile
    machine: dict[str, str]
    source: str  # of the frames
    threshold: float  # changes up to this share count as equal
    rounds: int  # that were begun
    seconds: float
    interrupted: bool
    variants: tuple[VariantReport, ...]  # the first is what the others are compared with
    comparisons: tuple[Comparison, ...]  # of variants that do the same work
    conditions: Conditions
    notes: tuple[str, ...]  # what the reader must know


def summarise(samples: Sequence[float]) -> Percentiles | None:
    """Percentiles of samples; None without any."""
    if not samples:
        return None
    low, high = percentile_interval(samples, 0.5) or (None, None)
    return Percentiles(
        count=len(samples),
        mean=fmean(samples),
        p50=percentile(samples, 0.5),
        p50_low=low,
        p50_high=high,
        p90=percentile(samples, 0.9),
        p95=percentile(samples, 0.95),
        p99=percentile(samples, 0.99),
        max=max(samples),
    )


def read_report(path: Path) -> Report:
    """Read a profile's JSON."""
    wrote = "Give a file that zsseg-rt profile --json wrote."
    try:
        raw: Any = schema.parse_json(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}. Check the path.") from exc
    except ValueError as exc:
        raise ConfigError(
            f"{path}: expected a profile's JSON, got other text: {exc}. {wrote}"
        ) from exc
    kind = raw.get("kind") if isinstance(raw, Mapping) else type(raw).__name__
    if kind != KIND:
        raise ConfigError(f"{path}: expected kind {KIND!r}, got {kind or 'none'!s}. {wrote}")
    if raw.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: expected format {FORMAT}, got {raw.get('format')!r}. "
            "It was written by another version; measure again."
        )
    return schema.decode(Report, raw, str(path), ConfigError)


def kind_of(name: str, kind: str) -> str:
    """The kind of work (see :class:`NodeRow`), by the names that graph and backend give a node."""
    if name == OUTSIDE:
        return OUTSIDE
    module, _, operation = name.lower().rpartition("/")
    if "attention" in module:
        return "attention"
    kind = kind.lower()
    for group, words in _KINDS.items():
        if any(word in f"{kind} {operation}" for word in words):
            return group
    return "layout" if any(word in (kind or operation) for word in _LAYOUT) else "other"


def sum_by(rows: Iterable[NodeRow], key: Callable[[NodeRow], K]) -> dict[K, float]:
    """Milliseconds of nodes by what a function says of them, in the order they came."""
    totals: dict[K, float] = defaultdict(float)
    for row in rows:
        totals[key(row)] += row.ms
    return dict(totals)
