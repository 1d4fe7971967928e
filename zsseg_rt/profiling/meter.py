"""Time calls: their wall time, their CPU time, and how long the calling thread waited for a CPU.

This file needs nothing but Python's own library, because it also runs in other interpreters and
beside other versions of this package (see ``worker.py``).
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

_PROC = Path("/proc")
_SETTLING_SECONDS = 0.05
_LATE = 1.0  # periods after which a frame is late: the next one has fallen due by then


@dataclass(frozen=True)
class Sample:
    """One call."""

    wall_ms: float  # from call to return
    cpu_ms: float  # of all threads of the process meanwhile
    wait_ms: float | None = None  # the calling thread had no CPU; None: the system does not tell
    device_ms: float | None = None  # between CUDA events around the work; None on the CPU
    stages: Mapping[str, float] = field(default_factory=dict)  # as the result told them


@dataclass(frozen=True)
class Turn:
    """What one candidate did in one round: a call after a pause, and those that followed."""

    cold: Sample | None
    warm: tuple[Sample, ...]


@dataclass(frozen=True)
class TurnPlan:
    """What a turn consists of."""

    pause_ms: float = 5.0  # sleep before the first call
    cold: bool = True  # whether that call is reported on its own
    warming_ms: float = 0.0  # calls for so long that are not reported
    measuring_ms: float = 10.0  # calls for so long, at least one, that are
    most_calls: int = 16


@dataclass(frozen=True)
class Paced:
    """One frame of those that fall due by a clock."""

    latency_ms: float  # from the moment it fell due until it was done
    service_ms: float  # from its call to its return
    late: bool  # whether it was done only after the next one had fallen due


@dataclass(frozen=True)
class ThreadTimes:
    """How long threads ran, and waited for a CPU, since they began: nanoseconds by thread."""

    ran: Mapping[str, int]
    waited: Mapping[str, int]


class DeviceTimer(Protocol):
    """Marks the begin and end of work on a device."""

    def begin(self) -> None:
        """Mark the begin."""

    def end_ms(self) -> float:
        """Mark the end, wait for it, and return the milliseconds between the marks."""


class Meter:
    """Times calls in the thread that made it."""

    def __init__(
        self,
        *,
        device_timer: DeviceTimer | None = None,
        stages_of: Callable[[Any], Mapping[str, float]] | None = None,
        device_stage: str | None = None,
    ) -> None:
        self._device_timer, self._stages_of = device_timer, stages_of
        self._device_stage = device_stage
        try:
            self._schedstat = os.open(_PROC / "thread-self" / "schedstat", os.O_RDONLY)
        except OSError:
            self._schedstat = -1

    def measure(self, call: Callable[[], Any]) -> Sample:
        """Make one call."""
        timer = self._device_timer
        waited, used = self._waited(), _cpu_seconds()
        begin = time.perf_counter()
        if timer is not None:
            timer.begin()
        result = call()
        device_ms = None if timer is None else timer.end_ms()
        wall = time.perf_counter() - begin
        used, waited_after = _cpu_seconds() - used, self._waited()
        stages = {} if self._stages_of is None else dict(self._stages_of(result))
        if self._device_stage is not None:
            device_ms = stages.get(self._device_stage)
        wait_ms = None if waited is None or waited_after is None else (waited_after - waited) / 1e6
        return Sample(wall * 1e3, max(used, 0.0) * 1e3, wait_ms, device_ms, stages)

    def turn(self, call: Callable[[], Any], plan: TurnPlan) -> Turn:
        """Take one turn; see :class:`TurnPlan`."""
        time.sleep(plan.pause_ms / 1e3)
        cold = self.measure(call) if plan.cold else None
        begin = time.perf_counter()
        while (time.perf_counter() - begin) * 1e3 < plan.warming_ms:
            self.measure(call)  # a call that only enqueues would leave its work to the next one
        warm, begin = [self.measure(call)], time.perf_counter()
        left = plan.measuring_ms - warm[0].wall_ms
        while len(warm) < plan.most_calls and (time.perf_counter() - begin) * 1e3 < left:
            warm.append(self.measure(call))
        return Turn(cold, tuple(warm))

    def pace(self, call: Callable[[], Any], *, rate: float, seconds: float) -> list[Paced]:
        """Make calls that fall due by a clock; one that waits for another is not dropped."""
        frames, start = [], time.perf_counter()
        for index in range(max(1, round(rate * seconds))):
            due = start + index / rate
            time.sleep(max(0.0, due - time.perf_counter()))
            begin = time.perf_counter()
            call()
            done = time.perf_counter()
            late = (done - due) * rate > _LATE
            frames.append(Paced((done - due) * 1e3, (done - begin) * 1e3, late))
        return frames

    def stretch(self, call: Callable[[], Any], seconds: float) -> int:
        """Make calls one after the other for so long; return how many."""
        end, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            call()
            count += 1
        return count

    def close(self) -> None:
        """Close the file of the system's counters."""
        if self._schedstat >= 0:
            os.close(self._schedstat)
            self._schedstat = -1

    def _waited(self) -> int | None:
        if self._schedstat < 0:
            return None
        return int(os.pread(self._schedstat, 64, 0).split()[1])


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self._begin


def read_thread_times(process: int | str = "self") -> ThreadTimes:
    """Run and waiting time of every thread of a process; empty if the system does not tell.

    It takes about 0.3 ms, so it is for the two ends of a measurement.
    """
    ran, waited = {}, {}
    for name, content in _of_threads(process, "schedstat"):
        fields = content.split()
        ran[name], waited[name] = int(fields[0]), int(fields[1])
    return ThreadTimes(ran, waited)


def waiting_share(before: ThreadTimes, after: ThreadTimes) -> float | None:
    """Share of the time in which threads could have run that they waited for a CPU, in [0, 1].

    Threads that ended meanwhile are not known. None if no thread ran.
    """
    ran = sum(value - before.ran.get(name, 0) for name, value in after.ran.items())
    waited = sum(value - before.waited.get(name, 0) for name, value in after.waited.items())
    return waited / (ran + waited) if ran + waited > 0 else None


def settle_threads(process: int | str = "self", seconds: float = _SETTLING_SECONDS) -> bool:
    """Wait until a process's threads sleep, the calling one apart; whether they sleep now."""
    own = str(threading.get_native_id()) if process == "self" else ""
    end = time.perf_counter() + seconds  # thread pools spin for a while
    while any(
        name != own and content.rpartition(")")[2].split()[0] == "R"
        for name, content in _of_threads(process, "stat")
    ):
        if time.perf_counter() >= end:
            return False
        time.sleep(0.0005)
    return True


def read_memory_mb(process: int | str = "self") -> tuple[float, float] | None:
    """Resident memory of a process now and at its peak, in MB; None if the system does not tell.

    The peak is that of this program; ``getrusage`` may tell its parent's.
    """
    try:
        lines = (_PROC / str(process) / "status").read_text().splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    if "VmRSS" not in found or "VmHWM" not in found:
        return None
    return int(found["VmRSS"]) * 1024 / 1e6, int(found["VmHWM"]) * 1024 / 1e6


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _of_threads(process: int | str, file: str) -> Iterator[tuple[str, str]]:
    try:
        threads = sorted(os.listdir(_PROC / str(process) / "task"))  # noqa: PTH208 - names suffice
    except OSError:
        return
    for name in threads:
        try:
            yield name, (_PROC / str(process) / "task" / name / file).read_text()
        except OSError:
            continue  # it ended meanwhile
