"""What to profile, and what is known so far while it is profiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from zsseg_rt.profiling.children import ChildCandidate
from zsseg_rt.profiling.conditions import Reading, Snapshot
from zsseg_rt.profiling.gpu import GpuWatch
from zsseg_rt.profiling.meter import Paced
from zsseg_rt.profiling.report import ColdStart, EnergyUse
from zsseg_rt.profiling.turns import Rounds
from zsseg_rt.profiling.variants import Variant
from zsseg_rt.profiling.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to profile, and how.

    Attributes:
        variants: The first one is what the others are compared with.
        workload: Frames and classes.
        source: Where the frames came from, without passwords.
        command: Repeats the profile.
        threshold: Changes up to this share count as equal.
        max_seconds: No round begins later.
        rate: Frames per second that fall due by a clock; None: none do.
        cold_starts: Whether to time fresh processes too.
        agreement: Whether to compare labels with float32's.
        nodes: Whether to time the nodes of the first variant's graphs.
        evaluate: Returns a variant's mean IoU in per cent, or None.
        on_progress: Called with what is being done.
    """

    variants: tuple[Variant, ...]
    workload: Workload
    source: str
    command: str
    threshold: float = 0.02
    max_seconds: float = 30.0
    rate: float | None = None
    cold_starts: bool = True
    agreement: bool = False
    nodes: bool = False
    evaluate: Callable[[Variant], float | None] | None = None
    on_progress: Callable[[str], None] = lambda _: None


@dataclass(kw_only=True)
class Measured:
    """What is known so far.

    Attributes:
        request: What was asked for.
        children: Open candidates by variant name.
        failures: Why variants are missing or incomplete.
        described: What really ran.
        cold_starts: Fresh processes.
        peaks: Largest resident memory.
        rounds: What was timed.
        paced: Frames that fell due by a clock.
        agreement: Share of labels as float32 gives them.
        miou: Mean IoU in per cent.
        nodes: Name, type and milliseconds of nodes, by variant and graph.
        energy: What a frame takes, by variant.
        absent: Energy sensors that cannot be read.
        gpu: What the first variant's GPU did meanwhile; None on a CPU.
        before: The machine before.
        after: The machine after.
        notes: What the reader must know.
        interrupted: Whether Ctrl-C ended it.
    """

    request: Request
    children: dict[str, ChildCandidate] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    described: dict[str, dict[str, str]] = field(default_factory=dict)
    cold_starts: dict[str, list[ColdStart]] = field(default_factory=dict)
    peaks: dict[str, float | None] = field(default_factory=dict)
    rounds: Rounds = field(default_factory=lambda: Rounds(turns={}))
    paced: dict[str, list[Paced]] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    miou: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, dict[str, list[list[Any]]]] = field(default_factory=dict)
    energy: dict[str, EnergyUse] = field(default_factory=dict)
    absent: tuple[Reading, ...] = ()
    gpu: GpuWatch | None = None
    before: Snapshot | None = None
    after: Snapshot | None = None
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
