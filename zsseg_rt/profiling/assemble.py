"""What was measured, and the report of it, finished or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from zsseg_rt import __version__
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.common.process import usable_cpus
from zsseg_rt.evaluation.provenance import describe_machine
from zsseg_rt.profiling.conditions import Conditions, GpuWatch, Reading, Snapshot, compare_snapshots
from zsseg_rt.profiling.estimates import WAITING_LIMIT, Basis
from zsseg_rt.profiling.nodes import sum_by
from zsseg_rt.profiling.report import (
    Comparison,
    Growth,
    PacedTimes,
    Report,
    Samples,
    VariantReport,
    summarise,
)
from zsseg_rt.profiling.turns import ChildCandidate, Rounds
from zsseg_rt.profiling.worker import Paced
from zsseg_rt.profiling.workload import SWEEP_UNITS, Variant, Workload

AROUND = "(around)"
"""What a call takes outside the engine's clock; with it, stages sum to the wall time."""

_NODES_AS_STAGE = 0.05


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to profile, and how."""

    variants: tuple[Variant, ...]  # the first is what the others are compared with
    workload: Workload
    source: str  # of the frames, without passwords
    command: str  # repeats the profile
    threshold: float = 0.02  # changes up to this share count as equal
    max_seconds: float = 30.0  # no round begins later
    rate: float | None = None  # frames per second that fall due by a clock
    cold_starts: bool = True
    agreement: bool = False  # whether to compare labels with float32's
    nodes: bool = False  # whether to time the nodes of the first variant's graphs
    evaluate: Callable[[Variant], float | None] | None = None  # mean IoU in per cent
    on_progress: Callable[[str], None] = lambda _: None


@dataclass(kw_only=True)
class Measured:
    """What is known so far; ``gpu`` is the first variant's, None on a CPU."""

    request: Request
    children: dict[str, ChildCandidate] = field(default_factory=dict)  # by variant
    rounds: Rounds = field(default_factory=lambda: Rounds(turns={}))
    absent: tuple[Reading, ...] = ()  # energy sensors that cannot be read
    gpu: GpuWatch | None = None
    before: Snapshot | None = None
    after: Snapshot | None = None
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.reports = {
            one.name: _empty(one, self.request.workload) for one in self.request.variants
        }

    @property
    def failed(self) -> set[str]:
        """Variants that are missing or incomplete."""
        return {name for name, report in self.reports.items() if report.failure}


def _empty(variant: Variant, workload: Workload) -> VariantReport:
    bundle = Bundle.load(variant.bundle)
    return VariantReport(
        name=variant.name,
        bundle=bundle.name,
        size_mb=sum(entry.bytes for entry in bundle.files()) / 1e6,
        settings={key: str(value) for key, value in variant.config.items()},
        described={},
        classes=workload.num_classes(variant),
        frame=workload.frame_sizes(variant),
        streams=variant.streams,
    )


def assemble_report(measured: Measured) -> Report:
    """The report of a measurement, finished or not."""
    request, rounds = measured.request, measured.rounds
    conditions = _conditions(measured)
    variants = tuple(_with_times(report, rounds) for report in measured.reports.values())
    notes = [*_not_to_be_quoted(variants), *measured.notes, *conditions.notes]
    notes += [note for variant in variants for note in _other_node_runs(variant)]
    comparisons = tuple(_comparisons(measured))
    notes += _threads_by_cpu_time(request.variants, comparisons)
    if measured.interrupted:
        notes.append("interrupted: this is what was measured until then")
    return Report(
        version=__version__,
        command=request.command,
        machine=describe_machine(),
        source=request.source,
        threshold=request.threshold,
        rounds=rounds.count,
        seconds=rounds.seconds,
        interrupted=measured.interrupted,
        variants=variants,
        comparisons=comparisons,
        growths=tuple(_growths(request.variants, variants, rounds)),
        conditions=conditions,
        notes=tuple(notes),
    )


def _conditions(measured: Measured) -> Conditions:
    readings: tuple[Reading, ...] = ()
    notes: tuple[str, ...] = ()
    if measured.gpu is not None:
        readings, notes = tuple(measured.gpu.readings()), tuple(measured.gpu.notes())
    if measured.before is None or measured.after is None:
        return Conditions(readings=readings, notes=notes)
    shares = [share for share in measured.rounds.waiting.values() if share is not None]
    waiting = max(shares) if shares else None
    found = compare_snapshots(measured.before, measured.after, waiting=waiting)
    return Conditions(
        readings=(*found.readings, *readings, *measured.absent), notes=(*found.notes, *notes)
    )


def _with_times(report: VariantReport, rounds: Rounds) -> VariantReport:
    """The report with everything that follows from the calls that were timed."""
    samples = _samples(rounds, report.name)
    walls = samples.wall_ms
    stages = {stage: summarise(times) for stage, times in samples.stages.items()}
    return replace(
        report,
        samples=samples,
        wall=summarise(walls),
        cpu=summarise(samples.cpu_ms),
        device=summarise(samples.device_ms),
        cold=summarise(samples.cold_ms),
        stages={stage: times for stage, times in stages.items() if times is not None},
        frames_per_second=1e3 * report.streams * len(walls) / sum(walls) if walls else None,
        waiting=rounds.waiting.get(report.name),
    )


def _samples(rounds: Rounds, name: str) -> Samples:
    """Every call; what lies around the engine's clock is a stage too. Nanoseconds are enough."""
    turns = list(enumerate(rounds.turns.get(name, [])))
    calls = [(index, sample) for index, turn in turns if turn is not None for sample in turn.warm]
    warm = [sample for _, sample in calls]
    names = dict.fromkeys(stage for sample in warm for stage in sample.stages if stage != "total")
    stages = {stage: [sample.stages.get(stage, 0.0) for sample in warm] for stage in names}
    if names:
        stages[AROUND] = [max(0.0, s.wall_ms - s.stages.get("total", 0.0)) for s in warm]
    return Samples(
        rounds=tuple(index for index, _ in calls),
        wall_ms=_short(sample.wall_ms for sample in warm),
        cpu_ms=_short(sample.cpu_ms for sample in warm),
        device_ms=_short(sample.device_ms for sample in warm),
        cold_ms=_short(sample.wall_ms for sample in (rounds.cold(name) if turns else ())),
        stages={stage: _short(times) for stage, times in stages.items()},
    )


def _short(times: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(round(ms, 6) for ms in times if ms is not None)


def _not_to_be_quoted(variants: Sequence[VariantReport]) -> Iterator[str]:
    """Warn of times that say more of the neighbours than of the engine."""
    most = max((one.waiting or 0.0 for one in variants), default=0.0)
    if most > WAITING_LIMIT:
        yield (
            f"do not quote these times: the engine's threads waited for a CPU for {most:.0%} of "
            f"the time in which they could have run (above {WAITING_LIMIT:.0%}). Other processes "
            "took the CPUs; measure again on a quiet machine"
        )


def _other_node_runs(variant: VariantReport) -> Iterator[str]:
    """Say where the runs that counted nodes took another time than the frames did."""
    for graph, ms in sum_by(variant.nodes, lambda node: node.graph).items():
        stage = variant.stages.get(graph)
        if stage is not None and abs(ms / stage.mean - 1.0) > _NODES_AS_STAGE:
            yield (
                f"{variant.name}: {graph} took {ms:.3g} ms in the runs that counted nodes, "
                f"{stage.mean:.3g} ms in the timed frames (means)"
            )


def _threads_by_cpu_time(
    variants: Sequence[Variant], comparisons: Sequence[Comparison]
) -> Iterator[str]:
    """Warn where CPU time was compared, which adds up over threads, and their numbers differ."""
    threads = {one.name: one.config.get("num_threads", 0) for one in variants}
    for one in comparisons:
        if one.difference.basis == "cpu" and threads[one.other] != threads[one.base]:
            yield (
                f"{one.other}: the machine was busy, so CPU time was compared, which adds up over "
                "threads. What other numbers of threads gain shows on a quiet machine"
            )


def describe(told: Mapping[str, Any], variant: Variant) -> dict[str, str]:
    """What a process told of itself, with threads and the size that graphs take."""
    threads = variant.config.get("num_threads") or usable_cpus()
    height, width = Bundle.load(variant.bundle).preprocess.size_hw
    said = {key: str(value) for key, value in told.items()}
    return {**said, "threads": str(threads), "input": f"{width}x{height}"}


def paced_times(frames: Sequence[Paced], rate: float) -> PacedTimes | None:
    """How late frames were that fell due by a clock; None without any."""
    latency = summarise([frame.latency_ms for frame in frames])
    service = summarise([frame.service_ms for frame in frames])
    if latency is None or service is None:
        return None
    late = sum(frame.late for frame in frames)
    return PacedTimes(rate=rate, frames=len(frames), late=late, latency=latency, service=service)


def _comparisons(measured: Measured) -> Iterator[Comparison]:
    base, *others = measured.request.variants
    for other in others:
        if other.name not in measured.rounds.turns or base.work != other.work:
            continue
        found = measured.rounds.difference(base.name, other.name, measured.request.threshold)
        if found is not None:
            yield Comparison(base=base.name, other=other.name, difference=found)


def _growths(
    variants: Sequence[Variant], reports: Sequence[VariantReport], rounds: Rounds
) -> Iterator[Growth]:
    """Lines through the medians of sweeps over numbers."""
    base = variants[0]
    for key, unit in SWEEP_UNITS.items():
        pairs = zip(variants, reports, strict=True)
        swept = [(v, r) for v, r in pairs if v.swept == key and r.wall is not None]
        bases = {rounds.basis(base.name, variant.name) for variant, _ in swept}
        # Streams share the CPUs, so their CPU time says nothing of what they gain.
        on_clock = not bases or key == "streams"
        basis: Basis = "wall" if on_clock else max(bases - {"wall"} or bases)
        points = []
        for variant, report in swept:
            times = {"wall": report.wall, "cpu": report.cpu, "device": report.device}[basis]
            if times is not None and variant.value is not None:
                points.append((variant.value, times.mean if times.p50 is None else times.p50))
        if len(points) >= 2:
            yield _line(key, unit, basis, points)


def _line(key: str, unit: str, basis: Basis, points: list[tuple[float, float]]) -> Growth:
    counts, times = np.array(points).T
    slope, start = np.polyfit(counts, times, 1)
    worst = float(np.max(np.abs(start + slope * counts - times) / times))
    return Growth(
        key=key,
        unit=unit,
        basis=basis,
        points=tuple(points),
        fixed_ms=float(start),
        per_unit_ms=float(slope),
        worst_error=worst,
    )
