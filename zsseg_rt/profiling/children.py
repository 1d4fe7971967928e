"""A candidate in a process of its own: own threads, own peak memory, any interpreter."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
_CLOSING_SECONDS = 10.0
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
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - read when the child has ended
        reading, writing = os.pipe()
        try:
            self._child = subprocess.Popen(
                [python or sys.executable, str(_WORKER), str(writing)],
                stdin=subprocess.PIPE,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=(writing,),
                env=_environment(python),
                start_new_session=True,  # Ctrl-C is for the parent, which ends its children itself
            )
        except OSError as exc:
            os.close(reading)
            raise CandidateError(
                f"{name}: cannot run {python}: {exc.strerror}. Check the interpreter's path."
            ) from exc
        finally:
            os.close(writing)
        self._replies = os.fdopen(reading, encoding="utf-8")
        self.process = self._child.pid
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
        line = json.dumps({"do": action, **values}) + "\n"
        try:
            assert self._child.stdin is not None
            self._child.stdin.write(line.encode())
            self._child.stdin.flush()
            reply = self._replies.readline()
        except (OSError, ValueError) as exc:
            raise CandidateError(f"{self.name}: {self._how_it_ended()}") from exc
        if not reply:
            raise CandidateError(f"{self.name}: {self._how_it_ended()}")
        parsed = json.loads(reply)
        if "error" in parsed:
            raise CandidateError(f"{self.name}: {parsed['kind']}: {parsed['error']}")
        return parsed["answer"]

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
        if self._replies.closed:
            return
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):
            self._child.stdin.close()
        try:
            self._child.wait(_CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._replies.close()
        self._errors.close()

    def kill(self) -> None:
        """End the child at once, in the middle of whatever it does."""
        self._child.kill()
        self.close()

    def _how_it_ended(self) -> str:
        try:
            code = self._child.wait(_CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            return "its process does not answer. It is ended."
        last = self._last_line()
        said = f" Its last words: {last}" if last else ""
        if code >= 0:
            return f"its process ended with exit status {code}.{said}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = " The system does so when memory runs out." if name == "SIGKILL" else ""
        return f"its process was killed by {name}.{hint}{said}"

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:200] if lines else ""


def _environment(python: str | None) -> dict[str, str]:
    """This interpreter finds what this process finds; another one only its own packages."""
    if python is None:
        path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
        return {**os.environ, "PYTHONPATH": path}
    return {name: value for name, value in os.environ.items() if name not in _FOREIGN}
