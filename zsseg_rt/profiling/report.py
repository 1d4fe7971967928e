"""What a profile holds, as plain data: written and read as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from zsseg_rt.common import schema
from zsseg_rt.errors import ConfigError
from zsseg_rt.profiling.conditions import Conditions
from zsseg_rt.profiling.estimates import Basis, Difference, percentile, percentile_interval

KIND: Literal["zsseg_rt profile"] = "zsseg_rt profile"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """Milliseconds. A percentile with fewer than three samples above it is None.

    Attributes:
        count: Samples.
        mean: Their mean.
        p50: Median.
        p50_low: Lower end of its 95 % interval.
        p50_high: Upper end.
        p90: 90 % take at most this.
        p95: 95 % do.
        p99: 99 % do.
        max: The slowest; nothing is clipped.
    """

    count: int
    mean: float
    p50: float | None
    p50_low: float | None
    p50_high: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    max: float


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """A fresh process's way to its first result, in seconds.

    Attributes:
        cached: Whether compiled models and text embeddings could come from the cache.
        import_s: ``import zsseg_rt``.
        load_s: Loading the bundle.
        classes_s: Naming the classes.
        first_frame_s: The first frame.
        peak_mb: Largest resident memory until then; None if the system does not tell.
    """

    cached: bool
    import_s: float
    load_s: float
    classes_s: float
    first_frame_s: float
    peak_mb: float | None


@dataclass(frozen=True, kw_only=True)
class PacedTimes:
    """Frames that fell due by a clock.

    Attributes:
        rate: Frames per second.
        frames: How many fell due.
        late: How many were done only after the next one had fallen due.
        latency: From when they fell due.
        service: From when their turn came.
    """

    rate: float
    frames: int
    late: int
    latency: Percentiles
    service: Percentiles


@dataclass(frozen=True, kw_only=True)
class EnergyUse:
    """What frames took of a board or a chip, not of a process.

    Attributes:
        source: What was read.
        frames: Frames that were labelled one right after another.
        seconds: How long that took.
        mj: Millijoules a frame, all in all.
        mj_above_idle: The same without what the machine takes when it waits; None if that was not
            measured.
        watts: Mean power meanwhile.
        idle_watts: Mean power while nothing was labelled.
        samples: Seconds since the begin, and watts.
    """

    source: str
    frames: int
    seconds: float
    mj: float
    mj_above_idle: float | None
    watts: float
    idle_watts: float | None
    samples: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class NodeRow:
    """One node of a graph.

    Attributes:
        graph: Name of the graph.
        name: Its name in the graph; empty if the backend invented it.
        type: The backend's name for what it computes.
        block: The block of the network that it is part of; empty if unknown.
        kind: ``linear``, ``attention``, ``norm``, ``layout`` or ``other``; or, like the name and
            the block, ``(outside nodes)``: what the counted runs took beyond their nodes.
        ms: Milliseconds a frame.
    """

    graph: str
    name: str
    type: str
    block: str
    kind: str
    ms: float


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Every call that was timed, in order; milliseconds.

    Attributes:
        rounds: In which round each warm call was.
        wall_ms: From call to return.
        cpu_ms: CPU time of the process meanwhile.
        device_ms: Time between CUDA events; empty on the CPU.
        cold_ms: First calls after a pause.
        stages: By stage, one number a warm call.
    """

    rounds: tuple[int, ...] = ()
    wall_ms: tuple[float, ...] = ()
    cpu_ms: tuple[float, ...] = ()
    device_ms: tuple[float, ...] = ()
    cold_ms: tuple[float, ...] = ()
    stages: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class VariantReport:
    """One bundle with its settings.

    Attributes:
        name: What tables call it.
        bundle: Name of the bundle.
        size_mb: Size of its files.
        settings: Engine settings that differ from the defaults, as text.
        described: Backend, device, precision, versions: what really ran.
        classes: Number of classes.
        frame: Sizes of the frames, such as ``640x480``.
        streams: Frames that were labelled at the same time.
        failure: Why it is missing or incomplete; empty if it is not.
        wall: From call to return.
        cpu: CPU time.
        device: Time between CUDA events: trtexec's "GPU compute" with our kernels.
        cold: First call after a pause.
        stages: By stage; ``(around)`` is what lies outside the engine's clock.
        frames_per_second: Frames a second, one after the other without a pause.
        waiting: Share of their runnable time that threads waited for a CPU.
        peak_mb: Largest resident memory of its process.
        cold_starts: Fresh processes.
        paced: Frames that fell due by a clock.
        agreement: Share of pixels with the same label as float32 gives.
        miou: Mean IoU on the data set, in per cent.
        energy: What a frame takes; None if no sensor tells.
        nodes: The nodes of its graphs, timed in a process of their own.
        samples: All of them.
    """

    name: str
    bundle: str
    size_mb: float
    settings: dict[str, str]
    described: dict[str, str]
    classes: int
    frame: str
    streams: int
    failure: str = ""
    wall: Percentiles | None = None
    cpu: Percentiles | None = None
    device: Percentiles | None = None
    cold: Percentiles | None = None
    stages: dict[str, Percentiles] = field(default_factory=dict)
    frames_per_second: float | None = None
    waiting: float | None = None
    peak_mb: float | None = None
    cold_starts: tuple[ColdStart, ...] = ()
    paced: PacedTimes | None = None
    agreement: float | None = None
    miou: float | None = None
    energy: EnergyUse | None = None
    nodes: tuple[NodeRow, ...] = ()
    samples: Samples = field(default_factory=Samples)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A variant against the first one.

    Attributes:
        base: Name of the first.
        other: Name of the variant.
        difference: How much longer it takes.
    """

    base: str
    other: str
    difference: Difference


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Milliseconds as a line a + b n, fitted to the medians of a sweep.

    Attributes:
        key: What was swept.
        unit: Of n.
        basis: The time that was fitted.
        points: n and the median of each variant.
        fixed_ms: a.
        per_unit_ms: b.
        worst_error: Largest distance of a median from the line, as a share of the median.
    """

    key: str
    unit: str
    basis: Basis
    points: tuple[tuple[float, float], ...]
    fixed_ms: float
    per_unit_ms: float
    worst_error: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """A profile.

    Attributes:
        kind: Tells this file from others.
        format: Of this file; 1.
        version: Of zsseg_rt.
        command: Repeats the profile.
        machine: Processor, system and versions.
        source: Where the frames came from.
        threshold: Changes up to this share count as equal.
        rounds: Rounds that were begun.
        seconds: How long they took.
        interrupted: Whether Ctrl-C ended them.
        variants: The first one is what the others are compared with.
        comparisons: Of variants that do the same work.
        growths: Of sweeps over numbers.
        conditions: What the machine did meanwhile.
        notes: What the reader must know.
    """

    kind: Literal["zsseg_rt profile"] = KIND
    format: int = FORMAT
    version: str
    command: str
    machine: dict[str, str]
    source: str
    threshold: float
    rounds: int
    seconds: float
    interrupted: bool
    variants: tuple[VariantReport, ...]
    comparisons: tuple[Comparison, ...]
    growths: tuple[Growth, ...]
    conditions: Conditions
    notes: tuple[str, ...]


def summarise(samples: Sequence[float]) -> Percentiles | None:
    """Percentiles of samples; None without any."""
    if not samples:
        return None
    ends = percentile_interval(samples, 0.5)
    return Percentiles(
        count=len(samples),
        mean=fmean(samples),
        p50=percentile(samples, 0.5),
        p50_low=None if ends is None else ends[0],
        p50_high=None if ends is None else ends[1],
        p90=percentile(samples, 0.9),
        p95=percentile(samples, 0.95),
        p99=percentile(samples, 0.99),
        max=max(samples),
    )


def read_report(path: Path) -> Report:
    """Read a profile's JSON."""
    try:
        raw: Any = schema.parse_json(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}. Check the path.") from exc
    except ValueError as exc:
        raise ConfigError(f"{path}: expected a profile's JSON, got other text: {exc}. "
                          "Give a file that zsseg-rt profile --json wrote.") from exc  # fmt: skip
    if not isinstance(raw, Mapping) or raw.get("kind") != KIND:
        kind = raw.get("kind") if isinstance(raw, Mapping) else type(raw).__name__
        shown = "none" if kind is None else repr(kind)
        raise ConfigError(f"{path}: expected kind {KIND!r}, got {shown}. "
                          "Give a file that zsseg-rt profile --json wrote.")  # fmt: skip
    if raw.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: expected format {FORMAT}, got {raw.get('format')!r}. "
            "It was written by another version; measure again."
        )
    return schema.decode(Report, raw, str(path), ConfigError)
