"""The process that tries cases and may die of one; what it is about to try is always on disk.

    python -m tools.torture.child --state FILE --failures FILE --folder DIR --seed S --until T
                                  --cases N --first K TARGET...

Started by the parent. ``state`` holds one JSON object: the target and the case under way, since
when, and the target's counts so far. T is a moment of ``time.monotonic``, which
processes share; each target is tried once at least.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import logging
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tools.torture.target import TARGETS, Attempt, Target, case_of, test_support
from zsseg_rt.errors import ZssegError

STATE_BYTES = 512
MOST_MEMORY = 1 << 30  # bytes that one case may add
_LONGEST = 4000  # characters of a failure's traceback that are kept


@dataclass
class Counts:
    """The outcomes of a target's cases."""

    accepted: int = 0
    refused: int = 0
    failed: int = 0


@dataclass
class Log:
    """The record that the parent reads, also after this process has died."""

    state: int
    failures: Path
    seed: int
    counts: Counts = field(default_factory=Counts)

    def note(self, target: str, case: int) -> None:
        """Say what is about to be tried."""
        entry = {"target": target, "case": case, "since": time.monotonic(), **asdict(self.counts)}
        os.pwrite(self.state, json.dumps(entry).ljust(STATE_BYTES).encode(), 0)

    def fail(self, target: str, case: int, kind: str, message: str, trace: str = "") -> None:
        """Write a failure down."""
        self.counts.failed += 1
        entry = {
            "target": target, "seed": self.seed, "case": case, "kind": kind,
            "message": message[:500], "trace": trace[-_LONGEST:],
        }  # fmt: skip
        with self.failures.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")


class PeakMemory:
    """The most resident memory since :meth:`reset`, in bytes."""

    def reset(self) -> int | None:
        """Start anew; returns what is resident now, or None where Linux does not tell."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        return self._read("VmRSS")

    def since(self) -> int:
        """The peak since then."""
        return self._read("VmHWM")

    @staticmethod
    def _read(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) << 10
        return 0


def main() -> None:
    """Try the cases of the targets one after the other."""
    arguments = _parse()
    _prepare_process(arguments.folder)
    state = os.open(arguments.state, os.O_RDWR | os.O_CREAT)
    log = Log(state, arguments.failures, arguments.seed)
    weights = sum(TARGETS[name].weight for name in arguments.targets)
    first = arguments.first
    for name in arguments.targets:
        log.counts = Counts()
        seconds = (arguments.until - time.monotonic()) * TARGETS[name].weight / weights
        weights -= TARGETS[name].weight
        _try_target(TARGETS[name], first, seconds, arguments, log)
        first = 0
    os._exit(0)  # threads that a case left behind must not keep the parent waiting


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("state", "failures", "folder"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, kind in (("seed", int), ("until", float), ("cases", int), ("first", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("targets", nargs="+", choices=list(TARGETS))
    return parser.parse_args()


def _prepare_process(folder: Path) -> None:
    stacks = (folder / "stacks.txt").open("a")
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 32, 1 << 32))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.chdir(folder)


def _try_target(
    target: Target, first: int, seconds: float, arguments: argparse.Namespace, log: Log
) -> None:
    end = time.monotonic() + seconds
    log.note(target.name, -1)
    folder = arguments.folder / target.name
    folder.mkdir(exist_ok=True)
    attempt = target.prepare(folder)
    memory, case = PeakMemory(), first
    while case < arguments.cases and (case == first or time.monotonic() < end):
        log.note(target.name, case)
        try_case(target.name, case, attempt, log, memory)
        case += 1
        if case % 100 == 0:
            gc.collect()
    log.note(target.name, case)
    print(json.dumps({"target": target.name, **asdict(log.counts)}), flush=True)


def try_case(name: str, case: int, attempt: Attempt, log: Log, memory: PeakMemory) -> None:
    """Try one case and count what became of it."""
    before = memory.reset()
    try:
        attempt(case_of(log.seed, name, case))
    except ZssegError as exc:
        log.counts.refused += 1
        if not str(exc).strip():
            log.fail(name, case, "untyped", f"{type(exc).__name__} without a message")
    except (Exception, SystemExit, KeyboardInterrupt) as exc:  # noqa: BLE001 - all are findings
        log.fail(name, case, "untyped", f"{type(exc).__name__}: {exc}", traceback.format_exc())
        return
    else:
        log.counts.accepted += 1
    if before is not None and (grown := memory.since() - before) > MOST_MEMORY:
        log.fail(name, case, "memory", f"{grown >> 20} MB more for this case")


if __name__ == "__main__":
    if extension := os.environ.get("ZSSEG_EXTENSION"):
        test_support("extension").use_extension(extension)
    import tools.torture.targets  # noqa: F401 - registers them

    sys.exit(main())
