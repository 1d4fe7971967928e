"""A candidate in a process of its own: own threads, own peak memory, any interpreter."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zsseg_rt.common.child_process import ChildError, ChildProcess
from zsseg_rt.profiling.candidates import CandidateError
from zsseg_rt.profiling.meter import (
    Paced,
    Sample,
    ThreadTimes,
    Turn,
    TurnPlan,
    read_thread_times,
    settle_threads,
)

_WORKER = Path(__file__).with_name("worker.py")
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class Started(dict[str, float]):
    """Seconds of the parts of a cold start, by name."""


class ChildCandidate:
    """A child process that takes turns when asked.

    Attributes:
        process: The child's number.
        started: Seconds of the parts of its cold start.
        described: What runs in it, as plain data.
        memory: Resident MB after the first call and at the peak until then, or None.
    """

    def __init__(self, name: str, spec: Mapping[str, Any], *, python: str | None = None) -> None:
        self.name = name
        try:
            self._child = ChildProcess(
                [python or sys.executable, str(_WORKER)], env=_environment(python)
            )
        except OSError as exc:
            raise CandidateError(
                f"{name}: cannot run {python}: {exc.strerror}. Check the interpreter's path."
            ) from exc
        self.process = self._child.number
        try:
            answer = self.request("open", spec=dict(spec))
        except BaseException:
            self.close()
            raise
        self.started = Started(answer["started"])
        self.described: dict[str, Any] = answer["described"]
        self.on_gpu = bool(answer["on_gpu"])
        self.memory: list[float] | None = answer["memory"]

    def request(self, action: str, **values: Any) -> Any:
        """Ask the child to do something and return its answer."""
        try:
            return self._child.request(action, **values)
        except ChildError as error:
            kind = f"{error.kind}: " if error.kind else ""
            raise CandidateError(f"{self.name}: {kind}{error}") from error

    def turn(self, plan: TurnPlan) -> Turn:
        """See :class:`zsseg_rt.profiling.candidates.Candidate`."""
        answer = self.request("turn", plan=vars(plan))
        cold = None if answer["cold"] is None else Sample(**answer["cold"])
        return Turn(cold, tuple(Sample(**sample) for sample in answer["warm"]))

    def pace(self, rate: float, seconds: float) -> list[Paced]:
        """See :class:`zsseg_rt.profiling.candidates.Candidate`."""
        return [Paced(**frame) for frame in self.request("pace", rate=rate, seconds=seconds)]

    def warm_up(self) -> float:
        """Make calls until caches and threads are warm; return the fastest one's milliseconds."""
        return float(self.request("warm"))

    def select(self, **values: Any) -> float:
        """Change what the calls of a function's candidate work on; seconds until a first result."""
        return float(self.request("select", values=values))

    def save_labels(self, file: Path, index: int = 0) -> None:
        """Save labels of a frame as ``.npy``; nothing is written for candidates without any."""
        self.request("labels", out=str(file), index=index)

    def self_check(self) -> str:
        """The first stage that left the golden sample, with its error; empty if none did."""
        return str(self.request("check"))

    def peak_memory_mb(self) -> float | None:
        """The largest resident memory of the child so far."""
        memory = self.request("memory")
        return None if memory is None else float(memory[1])

    def settle(self) -> None:
        """See :class:`zsseg_rt.profiling.candidates.Candidate`."""
        settle_threads(self.process)

    def thread_times(self) -> ThreadTimes:
        """See :class:`zsseg_rt.profiling.candidates.Candidate`."""
        return read_thread_times(self.process)

    def close(self) -> None:
        """End the child: by itself if it answers, else by force."""
        self._child.close()

    def kill(self) -> None:
        """End the child at once, in the middle of whatever it does."""
        self._child.kill()


def _environment(python: str | None) -> dict[str, str]:
    """This interpreter finds what this process finds; another one only its own packages."""
    if python is None:
        path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
        return {**os.environ, "PYTHONPATH": path}
    return {name: value for name, value in os.environ.items() if name not in _FOREIGN}
