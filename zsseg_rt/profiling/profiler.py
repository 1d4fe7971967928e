"""Profile variants of an engine: check, open, take turns, and put the report together."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np

from zsseg_rt.errors import ConfigError, ZssegError
from zsseg_rt.profiling.assemble import (
    Measured,
    Request,
    assemble_report,
    describe,
    paced_times,
)
from zsseg_rt.profiling.conditions import GpuWatch, Reading, open_gpu, take_snapshot
from zsseg_rt.profiling.energy import EnergyMeter, EnergySources, find_energy_sources
from zsseg_rt.profiling.nodes import assign_nodes
from zsseg_rt.profiling.report import ColdStart, EnergyUse, Report
from zsseg_rt.profiling.turns import (
    CandidateError,
    ChildCandidate,
    Rounds,
    StopRule,
    pace_in_turns,
    take_turns,
)
from zsseg_rt.profiling.worker import Sample, TurnPlan
from zsseg_rt.profiling.workload import Variant

LONG_FRAME_MS = 100.0
_ENOUGH_FRAMES = 1000
_NODE_RUNS = (20, 200)
_NODE_MS = 1000.0  # frames for so long between these numbers of runs
_ENERGY_SECONDS = 2.0
_MOST_COMPARED = 4  # frames whose labels are compared with float32's


class SelfCheckError(ZssegError):
    """A bundle does not reproduce its golden sample, so timing it would say nothing."""


def profile(request: Request) -> Report:
    """Profile variants; after Ctrl-C, or where some fail, the report has what was measured."""
    names = [variant.name for variant in request.variants]
    if len(set(names)) < len(names):
        raise ConfigError(f"variants: expected distinct ones, got {', '.join(names)}")
    measured = Measured(request=request)
    try:
        _open_all(measured)
        _measure(measured)
    finally:
        for child in measured.children.values():
            if measured.interrupted:
                child.kill()
            else:
                child.close()
    return assemble_report(measured)


def _open_all(measured: Measured) -> None:
    request = measured.request
    request.workload.check_class_counts(request.variants)
    for variant in request.variants:
        try:
            if request.cold_starts and variant.swept is None:
                request.on_progress(f"{variant.name}: a fresh process without the cache")
                _note_cold_start(measured, variant, cached=False)
            request.on_progress(f"{variant.name}: opening and checking")
            child = _open(request, variant)
        except CandidateError as exc:
            if variant is request.variants[0]:
                raise
            measured.reports[variant.name].failure = str(exc)
            continue
        measured.children[variant.name] = child
        measured.reports[variant.name].described = describe(child.described, variant)
        if difference := child.self_check():
            raise SelfCheckError(
                f"{variant.name}: expected the golden sample's results, got {difference}. It is "
                f"not timed. Run: zsseg-rt info {variant.bundle} --check"
            )


def _open(request: Request, variant: Variant, **config: object) -> ChildCandidate:
    spec = request.workload.spec(variant)
    spec["config"] = {**spec["config"], **config}
    return ChildCandidate(variant.name, spec, python=variant.python)


def _note_cold_start(measured: Measured, variant: Variant, *, cached: bool) -> None:
    """Time a fresh process; building a TensorRT plan takes minutes, so that is left out."""
    if not cached and variant.config.get("backend") == "tensorrt":
        measured.notes.append(f"{variant.name}: no start without cache, which builds the plans")
        return
    child = _open(measured.request, variant, **({} if cached else {"use_cache": False}))
    child.close()
    peak_mb = None if child.memory is None else child.memory[1]
    start = ColdStart(cached=cached, peak_mb=peak_mb, **child.started)
    measured.reports[variant.name].cold_starts += (start,)


def _measure(measured: Measured) -> None:
    """Everything after the children are open; Ctrl-C ends it and keeps what there is."""
    measured.before = take_snapshot()
    try:
        _time_frames(measured)
        measured.after = take_snapshot()
        if not measured.interrupted:
            _after_timing(measured)
    except KeyboardInterrupt:
        measured.interrupted = True
    measured.after = measured.after or take_snapshot()


def _time_frames(measured: Measured) -> None:
    request, children = measured.request, list(measured.children.values())
    request.on_progress("warming up")
    fastest = {child.name: child.warm_up() for child in children}
    # One plan for all: whoever is timed right after a pause must not meet one who is not.
    plan = TurnPlan(cold=min(fastest.values()) < LONG_FRAME_MS)

    index = _gpu_index(children[0])
    measured.gpu = None if index is None else GpuWatch(open_gpu(index))

    def between_rounds(rounds: Rounds) -> None:
        request.on_progress(f"round {rounds.count}")
        if measured.gpu is not None:
            measured.gpu.read()

    rule = StopRule(max_seconds=request.max_seconds, half_width=request.threshold / 2)
    if len(children) == 1:
        frames_a_turn = min(16.0, max(1.0, 10.0 / fastest[children[0].name]))
        enough = max(10, round(_ENOUGH_FRAMES / frames_a_turn))
        rule = replace(rule, max_rounds=enough, half_width=None)
    measured.rounds = take_turns(children, plan, rule, on_round=between_rounds)
    for name, failure in measured.rounds.failures.items():
        measured.reports[name].failure = failure
    measured.interrupted = measured.rounds.interrupted
    for child in children:
        measured.reports[child.name].peak_mb = child.peak_memory_mb()


def _gpu_index(child: ChildCandidate) -> int | None:
    """Which GPU a candidate runs on, as CUDA counts them."""
    number = str(child.described.get("device", "")).partition(":")[2]
    return int(number) if child.on_gpu and number.isdecimal() else None


def _after_timing(measured: Measured) -> None:
    request = measured.request
    alive = [c for name, c in measured.children.items() if name not in measured.failed]
    if request.rate is not None:
        request.on_progress(f"frames that fall due {request.rate:g} times a second")
        seconds = max(request.max_seconds / 3, 3.0 / request.rate)
        paced = pace_in_turns(alive, rate=request.rate, seconds=seconds)
        for name, frames in paced.items():
            measured.reports[name].paced = paced_times(frames, request.rate)
    _measure_energy(measured, alive)
    if request.agreement:
        request.on_progress("comparing labels with float32's")
        _compare_labels(measured, alive)
    if request.nodes:
        _time_nodes(measured, request.variants[0])
    for variant in request.variants:
        report = measured.reports[variant.name]
        if report.failure:
            continue
        if request.cold_starts:
            request.on_progress(f"{variant.name}: a fresh process with the cache")
            try:
                _note_cold_start(measured, variant, cached=True)
            except CandidateError as exc:
                report.failure = str(exc)
        if request.evaluate is not None and variant.python is None:
            request.on_progress(f"{variant.name}: labelling the data set")
            report.miou = request.evaluate(variant)


def _measure_energy(measured: Measured, alive: Sequence[ChildCandidate]) -> None:
    """Idle first, then each variant for a while: sensors are too slow to tell turns apart."""
    sources = find_energy_sources(gpu=_gpu_index(alive[0]) or 0) if alive else EnergySources()
    measured.absent = sources.absent
    if not sources.total:
        return
    measured.request.on_progress("energy")
    meter = EnergyMeter(sources)
    meter.start()
    time.sleep(_ENERGY_SECONDS)
    rest = meter.stop()
    idle = None if rest.joules is None else rest.joules / rest.seconds
    for child in alive:
        meter.start()
        try:
            frames = int(child.request("stretch", seconds=_ENERGY_SECONDS))
        finally:
            stretch = meter.stop()
        if stretch.joules is None:
            measured.absent += (_failed_sensor(sources.note),)
            return
        above = None if idle is None else stretch.joules - idle * stretch.seconds
        measured.reports[child.name].energy = EnergyUse(
            source=sources.note,
            frames=frames,
            seconds=stretch.seconds,
            mj=1e3 * stretch.joules / frames,
            mj_above_idle=None if above is None else 1e3 * above / frames,
            watts=stretch.joules / stretch.seconds,
            idle_watts=idle,
            samples=stretch.watts,
        )
        child.settle()


def _failed_sensor(name: str) -> Reading:
    reason = "a sensor failed, or did not change for a second"
    command = "cat /sys/class/hwmon/hwmon*/*_input"
    if "NVML" in name:
        command = "nvidia-smi --query-gpu=power.draw --format=csv"
    return Reading(name=name, unit="J", reason=reason, command=command)


def _time_nodes(measured: Measured, variant: Variant) -> None:
    """In a process of its own, because counting times costs time."""
    measured.request.on_progress(f"{variant.name}: timing the nodes of its graphs")
    try:
        child = _open(measured.request, variant, with_node_times=True)
        try:
            runs = _node_runs(measured.rounds.warm(variant.name))
            nodes = child.request("nodes", runs=runs)
        finally:
            child.close()
    except CandidateError as exc:
        measured.notes.append(f"nodes were not timed: {exc}")
        return
    rows = (row for graph, some in nodes.items() for row in assign_nodes(graph, some))
    measured.reports[variant.name].nodes = tuple(rows)


def _node_runs(frames: Sequence[Sample]) -> int:
    """Many runs of short frames, which a single wait for a CPU would distort."""
    least, most = _NODE_RUNS
    mean = fmean(frame.wall_ms for frame in frames) if frames else _NODE_MS
    return max(least, min(most, round(_NODE_MS / mean)))


def _compare_labels(measured: Measured, alive: Sequence[ChildCandidate]) -> None:
    base = measured.request.variants[0]
    variants = {variant.name: variant for variant in measured.request.variants}
    exact = replace(base, name="float32", config={**base.config, "precision": "float32"})
    try:
        reference = _open(measured.request, exact)
    except CandidateError as exc:
        measured.notes.append(f"no agreement with float32: {exc}")
        return
    count = min(_MOST_COMPARED, measured.request.workload.num_frames)
    try:
        expected = _labels(reference, count)
        for child in alive:
            variant = variants[child.name]
            if (variant.classes, variant.frame_hw) == (base.classes, base.frame_hw):
                same = np.concatenate([
                    (one == other).ravel()
                    for one, other in zip(expected, _labels(child, count), strict=True)
                ])  # fmt: skip
                measured.reports[child.name].agreement = float(same.mean())
    except CandidateError as exc:
        measured.notes.append(f"labels were not compared: {exc}")
    finally:
        reference.close()


def _labels(child: ChildCandidate, count: int) -> list[np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{index}.npy" for index in range(count)]
        for index, file in enumerate(files):
            child.save_labels(file, index)
        return [np.load(file) for file in files]
