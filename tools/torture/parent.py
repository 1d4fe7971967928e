"""Watches the processes that try cases, outlives them, and goes on behind what ended one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.torture.child import STATE_BYTES, Counts
from tools.torture.target import ROOT, TARGETS, extension_of

STARTS_WITHIN = 120.0  # seconds until a process that prepares a target counts as hung
MOST_RESIDENT = 6 << 30  # bytes, above which a process is ended before the machine suffers
MOST_DEATHS = 20  # of one group in a row of cases, after which a target's other cases are left out
GRACE = 5.0  # seconds after the last one for the case under way, which then counts for nothing
MOST_PATIENCE = 10  # times the limit of a case, after which it is ended however busy the machine is
_POLL = 0.2


@dataclass
class Failure:
    """One case that was neither accepted nor refused."""

    target: str
    seed: int
    case: int
    kind: str
    message: str
    trace: str = ""

    def __str__(self) -> str:
        return f"{self.target} {self.seed} {self.case}: {self.kind}: {self.message}"


@dataclass
class Run:
    """The cases of a target, and their outcomes.

    Attributes:
        seconds: For all targets together, starts of processes included.
        cases: The most of each target.
        hangs_after: Seconds for one case, without those in which it waited for a free CPU.
    """

    folder: Path
    seed: int
    seconds: float
    cases: int
    hangs_after: float = 30.0
    say: Callable[[str], None] = print
    counts: dict[str, Counts] = field(default_factory=dict)
    untried: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    end: float = math.inf
    starts_in: float = 2.0  # seconds: the longest start of a process so far

    def try_all(self, names: Sequence[str]) -> None:
        """Try the targets, those of one group in one process."""
        self.end = time.monotonic() + self.seconds
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(TARGETS[name].group, []).append(name)
        weights = {g: sum(TARGETS[name].weight for name in groups[g]) for g in groups}
        for group, members in groups.items():
            left = self.end - time.monotonic() - self.starts_in * len(weights)
            share = max(left, 0.0) * weights[group] / sum(weights.values())
            del weights[group]
            self._try_group(group, members, time.monotonic() + self.starts_in + share)
        for name in names:
            if not sum(asdict(self.counts.get(name, Counts())).values()):
                self.untried.append(name)
                self.say(f"{name}: not tried: no time was left")

    def _try_group(self, group: str, names: list[str], until: float) -> None:
        first, deaths = 0, 0
        while names and time.monotonic() < self.end:
            child = _Child(self, group, names, until, first)
            death = child.watch()
            self.starts_in = max(self.starts_in, child.started_in)
            self._take(child)
            if death is None:
                return
            name, case = child.position() or (names[0], -1)
            self._fail(Failure(name, self.seed, case, *death))
            names, first = names[names.index(name) :], case + 1
            deaths = deaths + 1 if case >= 0 else MOST_DEATHS
            if deaths >= MOST_DEATHS:
                self.say(f"{name}: its other cases are left out")
                names, first, deaths = names[1:], 0, 0

    def _take(self, child: _Child) -> None:
        for line in child.finished():
            counts = self.counts.setdefault(line["target"], Counts())
            for key in asdict(counts):
                setattr(counts, key, getattr(counts, key) + line[key])
        for raw in child.failures():
            self._note(Failure(**raw))

    def _fail(self, failure: Failure) -> None:
        self.counts.setdefault(failure.target, Counts()).failed += 1
        self._note(failure)

    def _note(self, failure: Failure) -> None:
        self.failures.append(failure)
        self.say(str(failure))


class CpuQueue:
    """How long a process has waited for a CPU since a moment: the thread that waited most."""

    def __init__(self, tasks: Path, since: float) -> None:
        """Begin to count; ``tasks`` is the process's /proc/PID/task."""
        self.since = since
        self._tasks = tasks
        self._before = self._waits()

    def seconds(self) -> float:
        """Since this was made; 0 where Linux does not tell."""
        waits = self._waits()
        return max((ns - self._before.get(task, 0) for task, ns in waits.items()), default=0) / 1e9

    def _waits(self) -> dict[str, int]:
        waits = {}
        with contextlib.suppress(OSError):
            for task in self._tasks.iterdir():
                with contextlib.suppress(OSError, IndexError):
                    waits[task.name] = int((task / "schedstat").read_text().split()[1])
        return waits


class _Child:
    def __init__(self, run: Run, group: str, names: list[str], until: float, first: int) -> None:
        folder = run.folder / group
        folder.mkdir(parents=True, exist_ok=True)
        self._state, self._failures = folder / "state.json", folder / "failures.jsonl"
        self._stacks, self._said = folder / "stacks.txt", folder / "said.jsonl"
        self._errors = folder / "stderr.txt"
        for path in (self._state, self._failures, self._stacks):
            path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tools.torture.child", *names]
        settings = {"state": self._state, "failures": self._failures, "folder": folder,
                    "seed": run.seed, "until": until, "cases": run.cases,
                    "first": first}  # fmt: skip
        for name, value in settings.items():
            command += [f"--{name}", str(value)]
        environment = {**os.environ, "TMPDIR": str(folder), "ZSSEG_HOME": str(folder / "home")}
        environment |= extension_of(group)
        self._begin, self._hangs_after = time.monotonic(), run.hangs_after
        self._last_moment = run.end + GRACE
        self._queue: CpuQueue | None = None
        with self._said.open("wb") as said, self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=errors,
                env=environment, start_new_session=True,
            )  # fmt: skip
        self.started_in = 0.0

    def watch(self) -> tuple[str, str, str] | None:
        """Wait for its end; None if it or the run's time is up, else kind, message and trace."""
        death = None
        try:
            while self._process.poll() is None and death is None:
                time.sleep(_POLL)
                if time.monotonic() > self._last_moment:
                    return None
                death = self._why_to_end()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.wait()
        if death is not None or code == 0:
            return death
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return "crash", name, self._last_words()

    def position(self) -> tuple[str, int] | None:
        """The target and the case that were under way; -1 while the target was being prepared."""
        entry = self._entry()
        return None if entry is None else (str(entry["target"]), int(entry["case"]))

    def finished(self) -> list[dict[str, Any]]:
        """Counts of the targets, also of the one that was under way when it died."""
        lines = [
            json.loads(line) for line in self._said.read_text().splitlines() if line[:1] == "{"
        ]
        entry = self._entry()
        if entry and not any(line["target"] == entry["target"] for line in lines):
            lines.append(entry)
        return lines

    def failures(self) -> list[dict[str, Any]]:
        """The record that it wrote."""
        if not self._failures.exists():
            return []
        return [json.loads(line) for line in self._failures.read_text().splitlines()]

    def _entry(self) -> dict[str, Any] | None:
        try:
            entry: dict[str, Any] = json.loads(self._state.read_bytes()[:STATE_BYTES])
        except (OSError, ValueError):
            return None
        return entry

    def _why_to_end(self) -> tuple[str, str, str] | None:
        entry, now = self._entry(), time.monotonic()
        since = entry["since"] if entry else self._begin
        self.started_in = self.started_in or since - self._begin
        is_trying = entry is not None and entry["case"] >= 0
        patience = self._hangs_after if is_trying else STARTS_WITHIN
        if self._queue is None or self._queue.since != since:
            self._queue = CpuQueue(Path(f"/proc/{self._process.pid}/task"), since)
        lasted = now - since
        if lasted > MOST_PATIENCE * patience or lasted - self._queue.seconds() > patience:
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(1.0)
            return "hang", f"over {patience:.0f} s", self._last_words()
        if self._resident() > MOST_RESIDENT:
            return "memory", f"over {MOST_RESIDENT >> 30} GB resident", ""
        return None

    def _resident(self) -> int:
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0
        return pages * os.sysconf("SC_PAGESIZE")

    def _last_words(self) -> str:
        stacks = self._stacks.read_text() if self._stacks.exists() else ""
        return (stacks[-3000:] + "\n" + self._errors.read_text(errors="replace")[-1000:]).strip()
