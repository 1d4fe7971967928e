"""Energy: where the system tells it, and what a stretch of work used, read 20 times a second.

Jetson boards: hwmon files of ``ina3221`` (millivolts and milliamperes by channel) and ``ina238``
(microwatts). GPUs in desktops: NVML. Both measure a board or a chip, not a process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zsseg_rt.profiling.conditions import Reading
from zsseg_rt.profiling.gpu import open_gpu

INTERVAL = 0.05  # seconds
_ROOT = Path("/")
_TOTALS = ("VDD_IN", "VIN", "POM_5V_IN")  # what feeds the whole module; VIN_SYS_5V0 is not one
_SKIPPED = ("nc", "sum of shunt voltages")  # a channel that is not connected; a sum
_STUCK = 20  # equal readings in a row, a second of them, are no measurement


@dataclass(frozen=True, kw_only=True)
class Rail:
    """Something whose power or energy can be read.

    Attributes:
        name: As the board calls it.
        read: Returns watts, or joules so far.
        counts: Whether it returns joules so far.
    """

    name: str
    read: Callable[[], float]
    counts: bool = False


@dataclass(frozen=True, kw_only=True)
class EnergySources:
    """What can be read on this machine.

    Attributes:
        total: The rails whose sum is reported.
        others: Further ones, which are parts of it.
        note: What the sum stands for.
        absent: Sources that cannot be read, with reason and command.
    """

    total: tuple[Rail, ...] = ()
    others: tuple[Rail, ...] = ()
    note: str = ""
    absent: tuple[Reading, ...] = ()


@dataclass(kw_only=True)
class Stretch:
    """What was measured from a meter's start to its stop.

    Attributes:
        seconds: How long.
        joules: By rail; None where its sensor was stuck or failed.
        watts: Seconds since the start, and watts of the total.
    """

    seconds: float
    joules: dict[str, float | None]
    watts: list[tuple[float, float]] = field(default_factory=list)


def find_energy_sources(
    root: Path = _ROOT, nvml: Any | None = None, *, gpu: int = 0
) -> EnergySources:
    """Find what tells energy here: a board's rails, else a GPU's counter."""
    rails = tuple(_hwmon_rails(root))
    if rails:
        totals = tuple(rail for rail in rails if rail.name in _TOTALS)
        if totals:
            others = tuple(rail for rail in rails if rail not in totals)
            return EnergySources(total=totals, others=others, note=f"rail {totals[0].name}")
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
        self._sources, self._interval, self._clock = sources, interval, clock
        self._rails = (*sources.total, *sources.others)
        self._readings: list[tuple[float, list[float | None]]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin a stretch."""
        self._readings.clear()
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="zsseg-energy", daemon=True)
        self._thread.start()

    def stop(self) -> Stretch:
        """End the stretch and return what was measured."""
        assert self._thread is not None
        self._stop.set()
        self._thread.join()
        return self.summarise(self._readings)

    def read(self) -> None:
        """Take one reading of every rail; what cannot be read is None."""
        self._readings.append((self._clock(), [_read(rail) for rail in self._rails]))

    def summarise(self, readings: list[tuple[float, list[float | None]]]) -> Stretch:
        """Add up readings: counters by their differences, power by trapezoids."""
        times = [moment for moment, _ in readings]
        joules: dict[str, float | None] = {}
        powers: list[list[tuple[float, float]]] = []
        for index, rail in enumerate(self._rails):
            values = [row[index] for _, row in readings]
            joules[rail.name], power = _integrate(rail, times, values)
            if index < len(self._sources.total) and power:
                powers.append(power)
        seconds = times[-1] - times[0] if times else 0.0
        count = min(map(len, powers), default=0)
        watts = [
            (powers[0][step][0] - times[0], sum(power[step][1] for power in powers))
            for step in range(count)
        ]
        return Stretch(seconds=seconds, joules=joules, watts=watts)

    def total_joules(self, stretch: Stretch) -> float | None:
        """Joules of the total; None if one of its rails could not be read."""
        found = [stretch.joules.get(rail.name) for rail in self._sources.total]
        known = [value for value in found if value is not None]
        return sum(known) if found and len(known) == len(found) else None

    def _run(self) -> None:
        self.read()
        while not self._stop.wait(self._interval):
            self.read()
        self.read()


def _integrate(
    rail: Rail, times: list[float], values: list[float | None]
) -> tuple[float | None, list[tuple[float, float]]]:
    """Joules of a rail, None if it failed or was stuck, and its watts over time."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or len(known) < 2 or _is_stuck(known):
        return None, []
    steps = list(zip(times, times[1:], known, known[1:], strict=False))
    total, watts = 0.0, []
    for begin, end, before, after in steps:
        if rail.counts:
            used = after - before
            if used < 0.0:
                return None, []
        else:
            used = (before + after) / 2.0 * (end - begin)
        total += used
        watts.append((end, used / (end - begin) if end > begin else 0.0))
    return total, watts


def _is_stuck(values: list[float]) -> bool:
    return len(values) >= _STUCK and len(set(values)) == 1


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
            yield Rail(name=name, read=_microwatts(folder / "power1_input"))


def _ina3221_rails(folder: Path) -> Iterator[Rail]:
    for channel in (1, 2, 3):
        label = _text(folder / f"in{channel}_label")
        current = folder / f"curr{channel}_input"
        if not label or label.lower() in _SKIPPED or not current.exists():
            continue
        yield Rail(name=label, read=_milliwatts(folder / f"in{channel}_input", current))


def _milliwatts(millivolts: Path, milliamperes: Path) -> Callable[[], float]:
    return lambda: float(millivolts.read_text()) * float(milliamperes.read_text()) / 1e6


def _microwatts(file: Path) -> Callable[[], float]:
    return lambda: float(file.read_text()) / 1e6


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
