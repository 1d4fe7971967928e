"""What can be timed: a function in this process, or a process of its own (``children.py``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from zsseg_rt.errors import ZssegError
from zsseg_rt.profiling.meter import (
    DeviceTimer,
    Meter,
    Paced,
    ThreadTimes,
    Turn,
    TurnPlan,
    read_thread_times,
    settle_threads,
)


class CandidateError(ZssegError):
    """A candidate failed while it was opened or timed; the others go on."""


class Candidate(Protocol):
    """Something that takes turns."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def on_gpu(self) -> bool:
        """Whether its work runs on a GPU."""

    def turn(self, plan: TurnPlan) -> Turn:
        """Take one turn.

        Raises:
            CandidateError: It failed, or its process ended.
        """

    def pace(self, rate: float, seconds: float) -> list[Paced]:
        """Label frames that fall due by a clock; see :meth:`Meter.pace`.

        Raises:
            CandidateError: It failed, or its process ended.
        """

    def settle(self) -> None:
        """Wait until its threads sleep, so that they do not disturb the next candidate."""

    def thread_times(self) -> ThreadTimes:
        """Run and waiting time of its process's threads."""

    def close(self) -> None:
        """Free it. Calling it twice is harmless."""


class LocalCandidate:
    """A function of this process."""

    def __init__(
        self,
        name: str,
        call: Callable[[], Any],
        *,
        device_timer: DeviceTimer | None = None,
        stages_of: Callable[[Any], Mapping[str, float]] | None = None,
    ) -> None:
        self.name, self.on_gpu = name, device_timer is not None
        self._call = call
        self._meter = Meter(device_timer=device_timer, stages_of=stages_of)

    def turn(self, plan: TurnPlan) -> Turn:
        """See :class:`Candidate`; what the function raises passes through."""
        return self._meter.turn(self._call, plan)

    def pace(self, rate: float, seconds: float) -> list[Paced]:
        """See :class:`Candidate`; what the function raises passes through."""
        return self._meter.pace(self._call, rate=rate, seconds=seconds)

    def settle(self) -> None:
        """See :class:`Candidate`."""
        settle_threads()

    def thread_times(self) -> ThreadTimes:
        """See :class:`Candidate`."""
        return read_thread_times()

    def close(self) -> None:
        """See :class:`Candidate`."""
        self._meter.close()
