"""Energy: where the system tells it, and what a stretch of work used, read 20 times a second.

Jetson boards: hwmon files of ``ina3221`` (millivolts and milliamperes by channel) and ``ina238``
(microwatts). GPUs in desktops: NVML. Both measure a board or a chip, not a process.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from zsseg_rt.profiling.conditions import Reading, open_gpu

INTERVAL = 0.05  # seconds
_ROOT = Path("/")
_TOTALS = ("VDD_IN", "VIN", "POM_5V_IN")  # what feeds the whole module; VIN_SYS_5V0 is not one
_SKIPPED = ("nc", "sum of shunt voltages")  # a channel that is not connected; a sum
_STUCK = 20  # equal readings in a row, a second of them, are no measurement


@dataclass(frozen=True, kw_only=True)
class Rail:
    """Something whose power can be read, in watts, or its energy so far, in joules."""

    name: str  # as the board calls it
    read: Callable[[], float]
    counts: bool = False  # whether it returns joules so far


@dataclass(frozen=True, kw_only=True)
class EnergySources:
    """What can be read on this machine: rails whose sum is reported, and what it stands for."""

    total: tuple[Rail, ...] = ()
    note: str = ""
    absent: tuple[Reading, ...] = ()  # sources that cannot be read, with reason and command


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """What was measured from a meter's start to its stop."""

    seconds: float
    joules: float | None  # None where a sensor was stuck or failed
    watts: tuple[tuple[float, float], ...]  # seconds since the start, and watts


def find_energy_sources(
    root: Path = _ROOT, nvml: Any | None = None, *, gpu: int = 0
) -> EnergySources:
    """Find what tells energy here: a board's rails, else a GPU's counter."""
    rails = tuple(_hwmon_rails(root))
    if rails:
        totals = tuple(rail for rail in rails if rail.name in _TOTALS)
        if totals:
            return EnergySources(total=totals, note=f"rail {totals[0].name}")
        names = ", ".join(rail.name for rail in rails)
        return EnergySources(total=rails, note=f"sum of the module's rails ({names})")
    absent = [Reading(name="board rails", unit="W", reason="no ina3221 or ina238 sensor",
                      command="cat /sys/class/hwmon/hwmon*/name")]  # fmt: skip
    counter, reason = _nvml_rails(gpu, nvml)
    if counter:
        return EnergySources(total=counter, note="GPU alone, by NVML", absent=tuple(absent))
    absent.append(Reading(name="GPU energy", unit="J", reason=reason,
                          command="nvidia-smi --query-gpu=power.draw --format=csv"))  # fmt: skip
    return EnergySources(total=(), absent=tuple(absent))


class EnergyMeter:
    """Reads rails in a thread, between :meth:`start` and :meth:`stop`."""

    def __init__(
        self,
        sources: EnergySources,
        *,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rails, self._interval, self._clock = sources.total, interval, clock
        self._times: list[float] = []
        self._values: list[list[float | None]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread()

    def start(self) -> None:
        """Begin a stretch."""
        self._times, self._values = [], []
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="zsseg-energy", daemon=True)
        self._thread.start()

    def stop(self) -> Stretch:
        """End the stretch and return what was measured."""
        self._stop.set()
        self._thread.join()
        return self.stretch()

    def read(self) -> None:
        """Take one reading of every rail; what cannot be read is None."""
        self._times.append(self._clock())
        self._values.append([_read(rail) for rail in self._rails])

    def stretch(self) -> Stretch:
        """Add up readings: counters by their differences, power by trapezoids."""
        times = self._times
        seconds = times[-1] - times[0]
        steps = [b - a for a, b in pairwise(times)]
        used = [
            _joules(rail, list(values), steps)
            for rail, values in zip(self._rails, zip(*self._values, strict=True), strict=True)
        ]
        if not used or not steps or any(rail is None for rail in used):
            return Stretch(seconds=seconds, joules=None, watts=())
        each = [sum(rail) for rail in zip(*(rail for rail in used if rail), strict=True)]
        watts = tuple(
            (end - times[0], joules / step if step > 0.0 else 0.0)
            for end, joules, step in zip(times[1:], each, steps, strict=True)
        )
        return Stretch(seconds=seconds, joules=sum(each), watts=watts)

    def _run(self) -> None:
        self.read()
        while not self._stop.wait(self._interval):
            self.read()
        self.read()


def _joules(rail: Rail, values: list[float | None], steps: list[float]) -> list[float] | None:
    """Joules of a rail in each step; None if it failed, was stuck, or counted backwards."""
    known = [value for value in values if value is not None]
    stuck = len(known) >= _STUCK and len(set(known)) == 1
    if len(known) < len(values) or stuck:
        return None
    if not rail.counts:
        return [(a + b) / 2.0 * step for (a, b), step in zip(pairwise(known), steps, strict=True)]
    used = [b - a for a, b in pairwise(known)]
    return None if any(joules < 0.0 for joules in used) else used


def _read(rail: Rail) -> float | None:
    try:
        return rail.read()
    except (OSError, ValueError):
        return None


def _hwmon_rails(root: Path) -> Iterator[Rail]:
    for folder in sorted(root.glob("sys/class/hwmon/hwmon*")):
        chip = _text(folder / "name")
        if chip == "ina3221":
            yield from _ina3221_rails(folder)
        elif chip == "ina238" and (folder / "power1_input").exists():
            name = _text(folder / "label") or _text(folder / "in1_label") or folder.name
            yield Rail(name=name, read=partial(_product, folder / "power1_input"))


def _ina3221_rails(folder: Path) -> Iterator[Rail]:
    for channel in (1, 2, 3):
        label = _text(folder / f"in{channel}_label")
        volts, current = folder / f"in{channel}_input", folder / f"curr{channel}_input"
        if label and label.lower() not in _SKIPPED and current.exists():
            yield Rail(name=label, read=partial(_product, volts, current))


def _product(*files: Path) -> float:
    """Of millivolts and milliamperes, or of microwatts alone."""
    return math.prod(float(file.read_text()) for file in files) / 1e6


def _nvml_rails(index: int, nvml: Any | None) -> tuple[tuple[Rail, ...], str]:
    gpu = open_gpu(index, nvml)
    if isinstance(gpu, str):
        return (), gpu
    module, handle = gpu.nvml, gpu.handle

    def read() -> float:
        try:
            return float(module.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        except module.NVMLError as exc:
            raise OSError(str(exc)) from exc

    try:
        read()
    except OSError as exc:  # on Jetson boards it starts, then answers NotSupported
        return (), f"NVML: {exc}"
    return (Rail(name="GPU", read=read, counts=True),), ""


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
