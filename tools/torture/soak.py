"""Stream for a long time from a camera that fails again and again, and see what that costs.

    python -m tools.torture.soak [--minutes 30] [--reconnects 50] [--json FILE]

The demo bundle labels a network camera (GStreamer's RTSP server, in a process of its own) and
``test://``, and both are recorded as overlay videos. Meanwhile the camera is killed and started
again; in long runs every fourth time it is frozen until it counts as lost, then goes on. Each of
its pictures shows when it was made, so the ages are true ones, from capture to labels.

Printed, and written with --json:
- growth of the resident memory per hour: the Theil-Sen slope over the medians of half minutes after
  the warm-up, which is the first fifth of the run. The limit, 1 MB per hour, is raised by noise:
  twice the spread of the medians around their line, 0.25 MB at least, over the time. Runs below ten
  minutes tell no rate: their memory may grow by 4 MB, which is the rest of the warm-up;
- memory in use: what the C library has given out, without what it keeps free for later, once a
  minute, and its growth per hour. Resident memory that grows while this stands still is no leak but
  room that the allocator keeps. Only the resident memory is judged;
- threads and descriptors while all is well, between one failure and the next;
- seconds from the camera's return to its first labels; ages; damaged, repeated and lost pictures.

Exit codes: 0 within the limits, 1 a limit is exceeded (they are below), 4 a part is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python_tests"))

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402

from support.rtsp_camera import RtspCamera, shown_time, what_is_missing  # noqa: E402
from zsseg_rt import Engine, EngineConfig  # noqa: E402
from zsseg_rt.demo import demo_bundle, demo_classes  # noqa: E402
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine  # noqa: E402
from zsseg_rt.results.segmentation import Segmentation  # noqa: E402
from zsseg_rt.stream.runner import Stream  # noqa: E402

GROWTH = 1.0  # MB per hour
STEP = 0.25  # MB by which an allocator's memory may move at any time
RATES_FROM, WARMING = 10.0, 4.0  # minutes from which the growth is judged; MB before that
CALM = 3.0  # seconds at least between one failure and the next
BACK_WITHIN = 60.0  # seconds until a camera that does not come back is a failure
FREEZES_FROM = 20.0  # seconds between failures that a freeze needs: it counts as lost after 10
OTHER = "test://?size=320x240&rate=10"


class Troubles(threading.Thread):
    """Makes the camera fail at even intervals, and notes how long it takes to come back."""

    def __init__(self, camera: RtspCamera, seconds: float, count: int) -> None:
        super().__init__(daemon=True)
        self.back_after: list[float] = []
        self.error: str | None = None
        self.is_calm, self.is_done = threading.Event(), threading.Event()
        self.rounds = 0  # failures that are over
        self._camera, self._count = camera, count
        self._interval = seconds / (count + 1)
        self._healed_at = float("inf")
        self._is_back = threading.Event()

    def run(self) -> None:
        """Let it fail so many times."""
        start = time.monotonic()
        for number in range(self._count):
            self._rest(start + (number + 1) * self._interval)
            self._fail(freezes=number % 4 == 3 and self._interval >= FREEZES_FROM)
            if not self._is_back.wait(BACK_WITHIN):
                self.error = f"the camera was not back {BACK_WITHIN:.0f} s after failure {number}"
                break
            self.rounds += 1
        self._rest(0.0)
        self.is_done.set()
        threading.Event().wait()  # the camera ends with the thread that started it

    def _rest(self, until: float) -> None:
        """Leave it alone until a time, some seconds at least."""
        self.is_calm.set()
        time.sleep(max(until - time.monotonic(), CALM))
        self.is_calm.clear()

    def see(self, made_at: float) -> None:
        """Labels of a picture are there that was made at that time."""
        if made_at >= self._healed_at:
            self.back_after.append(time.monotonic() - self._healed_at)
            self._healed_at = float("inf")
            self._is_back.set()

    def _fail(self, *, freezes: bool) -> None:
        self._is_back.clear()
        if freezes:
            self._camera.freeze()
            time.sleep(12.0)
            self._healed_at = time.monotonic()
            self._camera.thaw()
            return
        self._camera.kill()
        time.sleep(min(1.0, self._interval / 4))
        self._camera.start()
        self._healed_at = time.monotonic()


class Table:
    """Rows of numbers in memory that is taken at once: this program must not grow by itself."""

    def __init__(self, rows: int, columns: int) -> None:
        self._numbers = np.full((rows, columns), np.nan)
        self._count = 0

    def add(self, *row: float) -> None:
        """Append a row; those that do not fit are left out."""
        if self._count < len(self._numbers):
            self._numbers[self._count] = row
            self._count += 1

    @property
    def columns(self) -> npt.NDArray[np.float64]:
        """What was added, column by column."""
        return self._numbers[: self._count].T


def use_now() -> tuple[float, int, int]:
    """Resident megabytes, threads and descriptors of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    threads, descriptors = (len([*Path(f"/proc/self/{kind}").iterdir()]) for kind in ("task", "fd"))
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, threads, descriptors


class MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 tells of all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def given_out() -> float:
    """Megabytes that the C library has given out; NaN where it does not tell."""
    tell = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if tell is None:  # glibc before 2.33
        return float("nan")
    tell.restype = MallInfo
    told = tell()
    return (told.uordblks + told.hblkhd) / 1e6


def fewest(rounds: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]) -> dict[str, int]:
    """The fewest threads or descriptors in each quiet time."""
    found = [int(counts[rounds == number].min()) for number in np.unique(rounds)]
    return {"first": found[0], "last": found[-1], "most": max(found)}


def growth(
    at: npt.NDArray[np.float64], values: npt.NDArray[np.float64], bucket: float
) -> tuple[float, float, list[float]]:
    """Slope per hour, the noise it may have, and the medians of buckets of so many seconds."""
    numbers = ((at - at[0]) // bucket).astype(int)
    found = np.unique(numbers)
    if len(found) < 3:
        raise SystemExit("soak: expected a longer run, three samples at least are needed")
    hours = found * bucket / 3600.0
    medians = np.array([np.median(values[numbers == number]) for number in found])
    pairs = itertools.combinations(range(len(hours)), 2)
    slope = float(np.median([(medians[j] - medians[i]) / (hours[j] - hours[i]) for i, j in pairs]))
    rest = medians - slope * hours
    spread = 1.4826 * float(np.median(np.abs(rest - np.median(rest))))
    noise = max(2.0 * spread, STEP) / float(hours[-1] - hours[0])
    return slope, noise, [round(float(median), 2) for median in medians]


class Watcher:
    """Looks at every result."""

    def __init__(self, name: str, troubles: Troubles, seconds: float, warm_after: float) -> None:
        self.ages = {source: Table(round(40 * seconds), 1) for source in (name, OTHER)}
        self.use = Table(round(seconds) + 1, 5)  # at, failures before, and use_now()
        self.given_out = Table(round(seconds / 60) + 1, 2)
        self.damaged = self.repeated = 0
        self._name, self._troubles, self._warm_after = name, troubles, warm_after
        self._last_shown, self._next_sample, self._next_look = 0.0, 0.0, 0.0
        self._calm_since: float | None = None
        self._start = time.monotonic()

    def see(self, seg: Segmentation, *, all_run: bool) -> None:
        """Note a result's age, and sample what the process uses."""
        frame, now = seg.frame, time.monotonic()
        assert frame is not None
        made_at: float | None = frame.captured_at
        if frame.source == self._name:
            made_at = shown_time(frame.image)
            self._judge(made_at)
        if made_at is not None:
            self.ages[frame.source].add(now - made_at)
        is_calm = all_run and self._troubles.is_calm.is_set()
        self._calm_since = (self._calm_since or now) if is_calm else None
        # A thread that was given up in a freeze ends within moments.
        quiet = self._calm_since is not None and now - self._calm_since > 1.0
        if quiet and now - self._start > self._warm_after and now > self._next_sample:
            self._next_sample = now + 1.0
            self.use.add(now - self._start, self._troubles.rounds, *use_now())
            if now > self._next_look:
                self._next_look = now + 60.0
                self.given_out.add(now - self._start, given_out())

    def _judge(self, made_at: float | None) -> None:
        if made_at is None:
            self.damaged += 1
            return
        self.repeated += made_at <= self._last_shown
        self._last_shown = made_at
        self._troubles.see(made_at)


def soak(stream: Stream, watcher: Watcher, seconds: float, troubles: Troubles) -> None:
    """Label until the time is over, and the last failure too."""
    troubles.start()
    ends_at, look_at, all_run = time.monotonic() + seconds, 0.0, False
    for seg in stream:
        now = time.monotonic()
        if now >= look_at:
            look_at = now + 0.2
            all_run = all(s.state == "running" for s in stream.stats().values())
        watcher.see(seg, all_run=all_run)
        if now >= ends_at and troubles.is_done.is_set():
            return


def judge(report: dict[str, Any]) -> list[str]:
    """Which limits are exceeded."""
    memory, found = report["rss_mb"], []
    if report["minutes"] < RATES_FROM:
        if memory["last"] - memory["first"] > WARMING:
            found.append(f"memory grew from {memory['first']} to {memory['last']} MB")
    elif memory["growth_per_hour"] > GROWTH + memory["noise_per_hour"]:
        found.append(f"memory grows by {memory['growth_per_hour']:.1f} MB per hour")
    found += [
        f"{what} went from {report[what]['first']} to {report[what]['most']}"
        for what in ("threads", "descriptors")
        if report[what]["most"] > report[what]["first"]
    ]
    found += [
        f"{report['pictures'][what]} pictures were {what}"
        for what in ("damaged", "repeated")
        if report["pictures"][what]
    ]
    if report["reconnects"] < report["failures_asked_for"]:
        found.append(f"{report['reconnects']} of {report['failures_asked_for']} reconnections")
    return found + report["errors"]


def describe(values: npt.ArrayLike) -> dict[str, float]:
    """Percentiles in milliseconds."""
    points = np.percentile(np.array(values) * 1000.0, (50, 95, 99, 100))
    return {name: round(float(p), 1) for name, p in zip(("p50", "p95", "p99", "most"), points,
                                                        strict=True)}  # fmt: skip


def given_out_report(columns: npt.NDArray[np.float64]) -> dict[str, Any]:
    """First and last megabytes, and their growth per hour in runs of some minutes."""
    at, values = columns
    if np.isnan(values).any():
        return {}
    report = {"first": round(float(values[0]), 2), "last": round(float(values[-1]), 2)}
    if len(at) >= 3:
        slope, noise, _ = growth(at, values, 60.0)
        report |= {"growth_per_hour": round(slope, 2), "noise_per_hour": round(noise, 2)}
    return report


def report_of(
    watcher: Watcher, stream: Stream, troubles: Troubles, seconds: float, count: int
) -> dict[str, Any]:
    """Everything that was measured."""
    at, rounds, memory, threads, descriptors = watcher.use.columns
    slope, noise, medians = growth(at, memory, min(30.0, seconds / 20))
    stats, sinks = stream.stats(), stream.sink_stats()
    errors = [error for error in (*(sink.error for sink in sinks), troubles.error) if error]
    return {
        "machine": describe_machine(),
        "commit": describe_commit(ROOT),
        "minutes": round(seconds / 60, 2),
        "failures_asked_for": count,
        "reconnects": max(s.reconnects for s in stats.values()),
        "rss_mb": {
            "first": round(memory[0], 1),
            "last": round(memory[-1], 1),
            "growth_per_hour": round(slope, 2),
            "noise_per_hour": round(noise, 2),
            "medians": medians,
        },
        "given_out_mb": given_out_report(watcher.given_out.columns),
        "threads": fewest(rounds, threads),
        "descriptors": fewest(rounds, descriptors),
        "back_after_ms": describe(troubles.back_after),
        "age_ms": {name: describe(ages.columns[0]) for name, ages in watcher.ages.items()},
        "pictures": {
            "labelled": {name: s.labelled for name, s in stats.items()},
            "dropped": {name: s.dropped for name, s in stats.items()},
            "damaged": watcher.damaged,
            "repeated": watcher.repeated,
        },
        "recorded": [sink.written for sink in sinks],
        "errors": errors,
    }


def run(seconds: float, count: int) -> dict[str, Any]:
    """Soak, and report."""
    with (
        tempfile.TemporaryDirectory() as folder,
        RtspCamera(rate=15) as camera,
        Engine(demo_bundle("scenes"), EngineConfig(device="cpu", num_threads=1)) as engine,
    ):
        engine.set_classes(demo_classes("scenes"))
        troubles = Troubles(camera, seconds, count)
        watcher = Watcher(camera.url, troubles, seconds, warm_after=seconds / 5)
        sink = Path(folder) / "out.mp4"
        with engine.stream([camera.url, OTHER], sinks=[sink]) as stream:
            soak(stream, watcher, seconds, troubles)
        return report_of(watcher, stream, troubles, seconds, count)


def main() -> int:
    """Run it and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    logging.basicConfig(format="%(asctime)s %(message)s")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--reconnects", type=int, help="default: 50 in 30 minutes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    missing = what_is_missing()
    if missing:
        print(f"soak: {missing}", file=sys.stderr)
        return 4
    count = options.reconnects or max(round(options.minutes * 5 / 3), 3)
    report = run(options.minutes * 60, count)
    report["exceeded"] = judge(report)
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 1 if report["exceeded"] else 0


if __name__ == "__main__":
    sys.exit(main())
