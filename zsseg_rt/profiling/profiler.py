"""Profile variants of an engine: check, open, take turns, and put the report together."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from zsseg_rt import __version__
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.common.process import usable_cpus
from zsseg_rt.errors import ConfigError, ZssegError
from zsseg_rt.evaluation.provenance import describe_machine
from zsseg_rt.profiling.conditions import (
    Conditions,
    GpuWatch,
    Reading,
    compare_snapshots,
    find_energy_meter,
    measure_energy,
    take_snapshot,
)
from zsseg_rt.profiling.estimates import WAITING_LIMIT
from zsseg_rt.profiling.report import (
    ColdStart,
    Comparison,
    EnergyUse,
    NodeRow,
    PacedTimes,
    Report,
    Samples,
    VariantReport,
    kind_of,
    sum_by,
    summarise,
)
from zsseg_rt.profiling.turns import (
    CandidateError,
    ChildCandidate,
    Rounds,
    StopRule,
    pace_in_turns,
    take_turns,
)
from zsseg_rt.profiling.worker import TurnPlan
from zsseg_rt.profiling.workload import Variant, Workload

AROUND = "(around)"
"""The time of a call outside the engine's clock; with it, stages sum to the wall time."""
LONG_FRAME_MS = 100.0
_ENOUGH_FRAMES = 1000
_NODE_RUNS = (20, 200)
_NODE_MS = 1000.0  # frames for so long between these numbers of runs
_NODES_AS_STAGE = 0.05
_ENERGY_SECONDS = 2.0
_MOST_COMPARED = 4  # frames whose labels are compared with float32's


class SelfCheckError(ZssegError):
    """A bundle does not reproduce its golden sample, so timing it would say nothing."""


@dataclass(kw_only=True)
class Profiler:
    """Measures variants, one thing after another; what is known so far can always be reported."""

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

    rounds: Rounds = field(default_factory=lambda: Rounds(turns={}))
    conditions: list[Conditions] = field(default_factory=list)  # of the machine, the GPU, sensors
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ConfigError(f"variants: expected distinct ones, got {', '.join(names)}")
        self.children: dict[str, ChildCandidate] = {}
        self.reports = {one.name: self._empty_report(one) for one in self.variants}

    def run(self) -> Report:
        """Profile; after Ctrl-C, or where variants fail, the report has what was measured."""
        try:
            self._open_all()
            try:
                self._time_frames()
                if not self.interrupted:
                    self._after_timing()
            except KeyboardInterrupt:
                self.interrupted = True
        finally:
            for child in self.children.values():
                child.close(at_once=self.interrupted)
        return self.report()

    def _empty_report(self, variant: Variant) -> VariantReport:
        bundle = Bundle.load(variant.bundle)
        return VariantReport(
            name=variant.name,
            bundle=bundle.name,
            size_mb=sum(entry.bytes for entry in bundle.files()) / 1e6,
            settings={key: str(value) for key, value in variant.config.items()},
            described={},
            classes=self.workload.num_classes(variant),
            frame=self.workload.frame_sizes(variant),
            streams=variant.streams,
        )

    def _open_all(self) -> None:
        self.workload.check_class_counts(self.variants)
        for variant in self.variants:
            try:
                if self.cold_starts and not variant.swept:
                    self.on_progress(f"{variant.name}: a fresh process without the cache")
                    self._note_cold_start(variant, cached=False)
                self.on_progress(f"{variant.name}: opening and checking")
                child = self._open(variant)
            except CandidateError as exc:
                if variant is self.variants[0]:
                    raise
                self.reports[variant.name].failure = str(exc)
                continue
            self.children[variant.name] = child
            self.reports[variant.name].described = _describe(child, variant)
            if difference := child.request("check"):
                raise SelfCheckError(
                    f"{variant.name}: expected the golden sample's results, got {difference}. It "
                    f"is not timed. Run: zsseg-rt info {variant.bundle} --check"
                )

    def _open(self, variant: Variant, **config: object) -> ChildCandidate:
        spec = self.workload.spec(variant)
        spec["config"] = {**spec["config"], **config}
        return ChildCandidate(variant.name, spec, python=variant.python)

    def _note_cold_start(self, variant: Variant, *, cached: bool) -> None:
        """Time a fresh process; building a TensorRT plan takes minutes, so that is left out."""
        if not cached and variant.config.get("backend") == "tensorrt":
            self.notes.append(f"{variant.name}: no start without cache, which builds the plans")
            return
        child = self._open(variant, **({} if cached else {"use_cache": False}))
        child.close()
        peak_mb = None if child.memory is None else child.memory[1]
        start = ColdStart(cached=cached, peak_mb=peak_mb, **child.started)
        self.reports[variant.name].cold_starts += (start,)

    def _time_frames(self) -> None:
        children = list(self.children.values())
        self.on_progress("warming up")
        fastest = [child.warm_up() for child in children]
        # One plan for all: whoever is timed right after a pause must not meet one who is not.
        plan = TurnPlan(cold=min(fastest) < LONG_FRAME_MS)
        number = _gpu_number(children[0])
        gpu = None if number is None else GpuWatch(number)

        def between_rounds(rounds: Rounds) -> None:
            self.on_progress(f"round {rounds.count}")
            if gpu is not None:
                gpu.read()

        rule = StopRule(max_seconds=self.max_seconds, half_width=self.threshold / 2)
        if len(children) == 1:
            frames_a_turn = min(16.0, max(1.0, 10.0 / fastest[0]))
            enough = max(10, round(_ENOUGH_FRAMES / frames_a_turn))
            rule = replace(rule, max_rounds=enough, half_width=None)
        before = take_snapshot()
        self.rounds = take_turns(children, plan, rule, on_round=between_rounds)
        self.interrupted = self.rounds.interrupted
        shares = [share for share in self.rounds.waiting.values() if share is not None]
        waiting = max(shares, default=None)
        self.conditions.append(compare_snapshots(before, take_snapshot(), waiting=waiting))
        if gpu is not None:
            self.conditions.append(gpu.conditions())
        for child in children:
            report = self.reports[child.name]
            report.failure = self.rounds.failures.get(child.name, "")
            report.peak_mb = child.peak_memory_mb()

    def _after_timing(self) -> None:
        alive = [c for name, c in self.children.items() if not self.reports[name].failure]
        if self.rate is not None:
            self.on_progress(f"frames that fall due {self.rate:g} times a second")
            seconds = max(self.max_seconds / 3, 3.0 / self.rate)
            for name, frames in pace_in_turns(alive, rate=self.rate, seconds=seconds).items():
                latency, service = map(summarise, zip(*frames, strict=True))
                if latency is not None and service is not None:
                    late = sum(ms * self.rate > 1e3 for ms, _ in frames)
                    self.reports[name].paced = PacedTimes(
                        rate=self.rate, frames=len(frames), late=late, latency=latency,
                        service=service,
                    )  # fmt: skip
        self._measure_energy(alive)
        if self.agreement:
            self.on_progress("comparing labels with float32's")
            self._compare_labels(alive)
        if self.nodes:
            self._time_nodes(self.variants[0])
        for variant in self.variants:
            report = self.reports[variant.name]
            if self.cold_starts and not report.failure:
                self.on_progress(f"{variant.name}: a fresh process with the cache")
                try:
                    self._note_cold_start(variant, cached=True)
                except CandidateError as exc:
                    report.failure = str(exc)
            if self.evaluate is not None and variant.python is None and not report.failure:
                self.on_progress(f"{variant.name}: labelling the data set")
                report.miou = self.evaluate(variant)

    def _measure_energy(self, alive: Sequence[ChildCandidate]) -> None:
        """Idle first, then each variant for a while: sensors are too slow to tell turns apart."""
        if not alive:
            return
        meter, absent = find_energy_meter(gpu=_gpu_number(alive[0]) or 0)
        self.conditions.append(Conditions(readings=absent))
        if meter is None:
            return
        self.on_progress("energy")
        _, rest_s, rest_j = measure_energy(meter, lambda: time.sleep(_ENERGY_SECONDS))
        idle = None if rest_j is None else rest_j / rest_s
        for child in alive:
            work = partial(child.request, "stretch", seconds=_ENERGY_SECONDS)
            frames, seconds, joules = measure_energy(meter, work)
            if joules is None:
                reason = "a sensor failed, or did not change for a second"
                failed = Reading(meter.source, None, "J", reason, meter.command)
                self.conditions.append(Conditions(readings=(failed,)))
                return
            self.reports[child.name].energy = EnergyUse(
                source=meter.source,
                frames=frames,
                seconds=seconds,
                mj=1e3 * joules / frames,
                mj_above_idle=None if idle is None else 1e3 * (joules - idle * seconds) / frames,
                watts=joules / seconds,
                idle_watts=idle,
            )
            child.settle()

    @contextmanager
    def _noting_failure(self, what: str) -> Iterator[None]:
        try:
            yield
        except CandidateError as exc:
            self.notes.append(f"{what}: {exc}")

    def _time_nodes(self, variant: Variant) -> None:
        """In a process of its own, because counting times costs time."""
        self.on_progress(f"{variant.name}: timing the nodes of its graphs")
        # Many runs of short frames, which a single wait for a CPU would distort.
        walls = [frame.wall_ms for frame in self.rounds.warm(variant.name)] or [_NODE_MS]
        runs = min(max(_NODE_RUNS[0], round(_NODE_MS / fmean(walls))), _NODE_RUNS[1])
        with self._noting_failure("nodes were not timed"):
            with closing(self._open(variant, with_node_times=True)) as child:
                graphs = child.request("nodes", runs=runs)
            self.reports[variant.name].nodes = tuple(
                NodeRow(graph=graph, name=name, type=kind, kind=kind_of(name, kind), ms=ms)
                for graph, nodes in graphs.items()
                for name, kind, ms in nodes
            )

    def _compare_labels(self, alive: Sequence[ChildCandidate]) -> None:
        base, variants = self.variants[0], {one.name: one for one in self.variants}
        exact = replace(base, name="float32", config={**base.config, "precision": "float32"})
        failing = self._noting_failure("labels were not compared with float32's")
        with failing, closing(self._open(exact)) as reference:
            count = min(_MOST_COMPARED, self.workload.num_frames)
            expected = _labels(reference, count)
            for child in alive:
                variant = variants[child.name]
                if (variant.classes, variant.frame_hw) == (base.classes, base.frame_hw):
                    same = expected == _labels(child, count)
                    self.reports[child.name].agreement = float(same.mean())

    def report(self) -> Report:
        """The report of what was measured, finished or not."""
        variants = tuple(_with_times(report, self.rounds) for report in self.reports.values())
        comparisons = tuple(self._comparisons())
        conditions = Conditions(
            readings=tuple(reading for part in self.conditions for reading in part.readings),
            notes=tuple(note for part in self.conditions for note in part.notes),
        )
        notes = [*_not_to_be_quoted(variants), *self.notes, *conditions.notes]
        notes += [note for variant in variants for note in _other_node_runs(variant)]
        notes += self._threads_by_cpu_time(comparisons)
        if self.interrupted:
            notes.append("interrupted: this is what was measured until then")
        return Report(
            version=__version__,
            command=self.command,
            machine=describe_machine(),
            source=self.source,
            threshold=self.threshold,
            rounds=self.rounds.count,
            seconds=self.rounds.seconds,
            interrupted=self.interrupted,
            variants=variants,
            comparisons=comparisons,
            conditions=conditions,
            notes=tuple(notes),
        )

    def _comparisons(self) -> Iterator[Comparison]:
        base, *others = self.variants
        for other in others:
            if other.name in self.rounds.turns and base.work == other.work:
                difference = self.rounds.difference(base.name, other.name, self.threshold)
                if difference is not None:
                    yield Comparison(base=base.name, other=other.name, difference=difference)

    def _threads_by_cpu_time(self, comparisons: Sequence[Comparison]) -> Iterator[str]:
        """Warn where CPU time was compared of other numbers of threads: it adds up over them."""
        threads = {one.name: one.config.get("num_threads", 0) for one in self.variants}
        for one in comparisons:
            if one.difference.basis == "cpu" and threads[one.other] != threads[one.base]:
                yield (
                    f"{one.other}: the machine was busy, so CPU time was compared, which adds up "
                    "over threads. What other numbers of threads gain shows on a quiet machine"
                )


def _gpu_number(child: ChildCandidate) -> int | None:
    number = str(child.described.get("device", "")).partition(":")[2]
    return int(number) if child.on_gpu and number.isdecimal() else None


def _describe(child: ChildCandidate, variant: Variant) -> dict[str, str]:
    threads = variant.config.get("num_threads") or usable_cpus()
    height, width = Bundle.load(variant.bundle).preprocess.size_hw
    described = {key: str(value) for key, value in child.described.items()}
    return {**described, "threads": str(threads), "input": f"{width}x{height}"}


def _labels(child: ChildCandidate, count: int) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{index}.npy" for index in range(count)]
        for index, file in enumerate(files):
            child.save_labels(file, index)
        return np.concatenate([np.load(file).ravel() for file in files])


def _with_times(report: VariantReport, rounds: Rounds) -> VariantReport:
    """The report with everything that follows from the calls that were timed."""
    turns = [(index, turn) for index, turn in enumerate(rounds.turns.get(report.name, ())) if turn]
    warm = [sample for _, turn in turns for sample in turn.warm]
    names = dict.fromkeys(stage for sample in warm for stage in sample.stages if stage != "total")
    stages = {stage: [sample.stages.get(stage, 0.0) for sample in warm] for stage in names}
    if names:
        stages[AROUND] = [max(0.0, s.wall_ms - s.stages.get("total", 0.0)) for s in warm]
    samples = Samples(
        rounds=tuple(index for index, turn in turns for _ in turn.warm),
        wall_ms=_short(sample.wall_ms for sample in warm),
        cpu_ms=_short(sample.cpu_ms for sample in warm),
        device_ms=_short(sample.device_ms for sample in warm),
        cold_ms=_short(turn.cold.wall_ms for _, turn in turns if turn.cold),
        stages={stage: _short(times) for stage, times in stages.items()},
    )
    walls = samples.wall_ms
    summaries = {stage: summarise(times) for stage, times in samples.stages.items()}
    return replace(
        report,
        samples=samples,
        wall=summarise(walls),
        cpu=summarise(samples.cpu_ms),
        device=summarise(samples.device_ms),
        cold=summarise(samples.cold_ms),
        stages={stage: times for stage, times in summaries.items() if times is not None},
        frames_per_second=1e3 * report.streams * len(walls) / sum(walls) if walls else None,
        waiting=rounds.waiting.get(report.name),
    )


def _short(times: Iterable[float | None]) -> tuple[float, ...]:
    """Nanoseconds are enough."""
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
