"""Energy: where the system tells it, and what a stretch of work used, read 20 times a second.

Jetson boards: hwmon files of ``ina3221`` (millivolts and milliamperes by channel) and ``ina238``
(microwatts). GPUs in desktops: NVML. Both measure a board or a chip, not a process.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from zsseg_rt.profiling.conditions import Reading, open_gpu, read_text

T = TypeVar("T")
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
    """Sensors of this machine: rails whose sum is reported, and what it stands for."""

    total: tuple[Rail, ...] = ()
    note: str = ""
    absent: tuple[Reading, ...] = ()  # sources that cannot be read, with reason and command


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """The energy of some work."""

    seconds: float
    joules: float | None  # None where a sensor was stuck or failed
    watts: tuple[tuple[float, float], ...]  # seconds since the start, and watts


def find_energy_sources(root: Path = _ROOT, nvml: Any = None, *, gpu: int = 0) -> EnergySources:
    """Find what tells energy here: a board's rails, else a GPU's counter."""
    rails = tuple(_hwmon_rails(root))
    if rails:
        totals = tuple(rail for rail in rails if rail.name in _TOTALS)
        if totals:
            return EnergySources(total=totals, note=f"rail {totals[0].name}")
        names = ", ".join(rail.name for rail in rails)
        return EnergySources(total=rails, note=f"sum of the module's rails ({names})")
    board = Reading(name="board rails", unit="W", reason="no ina3221 or ina238 sensor",
                    command="cat /sys/class/hwmon/hwmon*/name")  # fmt: skip
    counter = _nvml_counter(gpu, nvml)
    if isinstance(counter, Rail):
        return EnergySources(total=(counter,), note="GPU alone, by NVML", absent=(board,))
    gpu_energy = Reading(name="GPU energy", unit="J", reason=counter,
                         command="nvidia-smi --query-gpu=power.draw --format=csv")  # fmt: skip
    return EnergySources(absent=(board, gpu_energy))


class EnergyMeter:
    """Reads rails in a thread while some work is done."""

    def __init__(
        self,
        rails: Sequence[Rail],
        *,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rails, self._interval, self._clock = rails, interval, clock
        self._times: list[float] = []
        self._values: list[list[float]] = []

    def during(self, work: Callable[[], T]) -> tuple[T, Stretch]:
        """Do the work; return its result and the energy that was measured meanwhile."""
        self._times, self._values, stop = [], [], threading.Event()
        self.read()
        thread = threading.Thread(
            target=self._read_until, args=(stop,), name="zsseg-energy", daemon=True
        )
        thread.start()
        try:
            result = work()
        finally:
            stop.set()
            thread.join()
        return result, self.stretch()

    def _read_until(self, stop: threading.Event) -> None:
        while not stop.wait(self._interval):
            self.read()
        self.read()

    def read(self) -> None:
        """Take one reading of every rail; what cannot be read is NaN."""
        self._times.append(self._clock())
        self._values.append([_read(rail) for rail in self._rails])

    def stretch(self) -> Stretch:
        """Add up readings: counters by their differences, power by trapezoids.

        A sensor that failed, counted backwards or never changed gives no energy at all.
        """
        times, values = np.array(self._times), np.array(self._values)
        seconds, steps = float(times[-1] - times[0]), np.diff(times)
        counts = np.array([rail.counts for rail in self._rails], bool)
        changes, means = np.diff(values, axis=0), (values[1:] + values[:-1]) / 2.0
        used = np.where(counts, changes, means * steps[:, None])
        stuck = len(values) >= _STUCK and not changes.any(axis=0).all()
        if stuck or not used.size or np.isnan(used).any() or (changes[:, counts] < 0.0).any():
            return Stretch(seconds=seconds, joules=None, watts=())
        joules = used.sum(axis=1)
        watts = joules / np.maximum(steps, 1e-9)
        samples = zip((times[1:] - times[0]).tolist(), watts.tolist(), strict=True)
        return Stretch(seconds=seconds, joules=float(joules.sum()), watts=tuple(samples))


def _read(rail: Rail) -> float:
    try:
        return rail.read()
    except (OSError, ValueError):
        return math.nan


def _hwmon_rails(root: Path) -> Iterator[Rail]:
    for folder in sorted(root.glob("sys/class/hwmon/hwmon*")):
        chip = read_text(folder / "name")
        if chip == "ina238" and (folder / "power1_input").exists():
            name = read_text(folder / "label") or read_text(folder / "in1_label") or folder.name
            yield Rail(name=name, read=partial(_product, folder / "power1_input"))
        for channel in (1, 2, 3) if chip == "ina3221" else ():
            label = read_text(folder / f"in{channel}_label")
            volts, current = folder / f"in{channel}_input", folder / f"curr{channel}_input"
            if label and label.lower() not in _SKIPPED and current.exists():
                yield Rail(name=label, read=partial(_product, volts, current))


def _product(*files: Path) -> float:
    """Of millivolts and milliamperes, or of microwatts alone."""
    return math.prod(float(file.read_text()) for file in files) / 1e6


def _nvml_counter(index: int, nvml: Any) -> Rail | str:
    """A GPU's energy counter, or why there is none."""
    gpu = open_gpu(index, nvml)
    if isinstance(gpu, str):
        return gpu

    def read() -> float:
        try:
            return float(gpu.nvml.nvmlDeviceGetTotalEnergyConsumption(gpu.handle)) / 1e3
        except gpu.nvml.NVMLError as exc:
            raise OSError(str(exc)) from exc

    try:
        read()
    except OSError as exc:  # on Jetson boards it starts, then answers NotSupported
        return f"NVML: {exc}"
    return Rail(name="GPU", read=read, counts=True)
