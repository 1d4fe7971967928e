"""Conditions of the machine: waiting for CPUs, pressure, steal, clocks, temperatures, energy.

What cannot be read is reported as absent, with a reason and a command that shows it, never as zero.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np

from zsseg_rt.profiling.worker import Stopwatch

T = TypeVar("T")
_CLOCK_CHANGE = 0.1
_STEAL_LIMIT = 0.02
_ROOT = Path("/")
_ENERGY_INTERVAL = 0.05  # seconds
_TOTALS = ("VDD_IN", "VIN", "POM_5V_IN")  # what feeds the whole module; VIN_SYS_5V0 is not one
_SKIPPED = ("nc", "sum of shunt voltages")  # a channel that is not connected; a sum
_STUCK = 20  # equal readings in a row, a second of them, are no measurement
_GPU_INTERVAL = 0.5  # seconds between two looks at a GPU
_NVML_COMMAND = "nvidia-smi -q -d CLOCK,PERFORMANCE"
_POWER_COMMAND = "nvidia-smi --query-gpu=power.draw --format=csv"
_NOT_INSTALLED = "nvidia-ml-py is not installed (pip install nvidia-ml-py)"
_IDLE = 0x1
# NVML's bits; the others say that someone set the clocks, or that the GPU waits.
_LOWERED = {
    0x4: "its power limit",
    0x8: "hardware: too hot, or too little power",
    0x10: "another GPU that it is coupled with",
    0x20: "its temperature, by the driver",
    0x40: "its temperature, by hardware",
    0x80: "its power supply, by hardware",
}


@dataclass(frozen=True)
class Reading:
    """One figure of the machine."""

    name: str
    value: float | str | None = None  # None: it could not be read
    unit: str = ""  # of the value; empty for shares and words
    reason: str = ""  # why there is none, where there is none
    command: str = ""  # shows it on a machine that has it
    before: float | None = None  # at the begin, where ``value`` is at the end


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Every figure of the machine, and notes on what may have disturbed a measurement."""

    readings: tuple[Reading, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Counters and sensors at one moment; None or empty where the system does not tell."""

    cpu_ticks: tuple[int, ...]  # of the first line of /proc/stat
    pressure_us: int | None  # microseconds in which some task waited for a CPU
    clock_mhz: float | None  # mean of the CPUs
    governor: str | None  # all that CPUs have
    throttle_events: int  # sum of the CPUs' counters
    temperatures: Mapping[str, float]  # degrees Celsius by sensor
    uptime_s: float


def take_snapshot(root: Path = _ROOT) -> Snapshot:
    """Read counters and sensors."""
    cpu, zones = root / "sys/devices/system/cpu", root / "sys/class/thermal"
    kilohertz = _numbers(cpu.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    clocks = [value / 1e3 for value in kilohertz.values()]
    clocks = clocks or [float(mhz) for mhz in _find(root / "proc/cpuinfo", r"cpu MHz\s*:\s*(\S+)")]
    governors = {_text(file) for file in cpu.glob("cpu[0-9]*/cpufreq/scaling_governor")}
    pressure = _find(root / "proc/pressure/cpu", r"some .*total=([0-9]+)")
    throttled = _numbers(cpu.glob("cpu*/thermal_throttle/*_throttle_count"))
    # Sensors of parts that are switched off give an error, or the lowest number they have.
    temperatures = {
        _text(file.with_name("type")) or file.parent.name: value / 1e3
        for file, value in _numbers(sorted(zones.glob("thermal_zone*/temp"))).items()
        if value > -40e3
    }
    return Snapshot(
        cpu_ticks=tuple(
            int(n) for line in _find(root / "proc/stat", "cpu (.*)") for n in line.split()
        ),
        pressure_us=int(pressure[0]) if pressure else None,
        clock_mhz=fmean(clocks) if clocks else None,
        governor=", ".join(sorted(governors - {""})) or None,
        throttle_events=int(sum(throttled.values())),
        temperatures=temperatures,
        uptime_s=float((_text(root / "proc/uptime") or "0").split()[0]),
    )


def compare_snapshots(
    before: Snapshot, after: Snapshot, *, waiting: float | None = None
) -> Conditions:
    """Describe what happened between two snapshots."""
    in_use, stolen = _ticks(before, after)
    seconds, pressure = after.uptime_s - before.uptime_s, None
    if before.pressure_us is not None and after.pressure_us is not None and seconds > 0.0:
        pressure = (after.pressure_us - before.pressure_us) / 1e6 / seconds
    why = "too little time between readings" if after.cpu_ticks else "no /proc/stat"
    command = "cat /sys/class/thermal/thermal_zone*/temp"
    clock = "grep MHz /proc/cpuinfo"
    governor = "cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
    rows: list[tuple[Any, ...]] = [
        ("waiting for a CPU", waiting, "", "the kernel keeps no schedstat",
         "cat /proc/self/schedstat"),
        ("CPU pressure", pressure, "", "the kernel keeps no pressure figures",
         "cat /proc/pressure/cpu"),
        ("CPUs in use", in_use, "", why, "head -1 /proc/stat"),
        ("steal", stolen, "", why, "head -1 /proc/stat"),
        ("CPU clock", after.clock_mhz, "MHz", "the system does not tell", clock, before.clock_mhz),
        ("governor", after.governor, "", "no cpufreq driver, as in virtual machines", governor),
        *((name, after.temperatures.get(name), "°C", "no sensor, as in virtual machines", command,
           before.temperatures.get(name))
          for name in sorted(after.temperatures) or ["temperature"]),
    ]  # fmt: skip
    readings = tuple(Reading(*row) for row in rows)
    return Conditions(readings=readings, notes=tuple(_notes(before, after, stolen)))


def _ticks(before: Snapshot, after: Snapshot) -> tuple[float | None, float | None]:
    """Shares of the CPUs' time in use and stolen."""
    ticks = [b - a for a, b in zip(before.cpu_ticks, after.cpu_ticks, strict=False)]
    total = sum(ticks[:8])
    if len(ticks) < 8 or total <= 0:
        return None, None
    return 1.0 - (ticks[3] + ticks[4]) / total, ticks[7] / total


def _notes(before: Snapshot, after: Snapshot, stolen: float | None) -> Iterator[str]:
    first, last = before.clock_mhz, after.clock_mhz
    if first and last is not None and abs(last / first - 1.0) > _CLOCK_CHANGE:
        yield f"the CPUs' clock changed from {first:.0f} to {last:.0f} MHz"
    if (events := after.throttle_events - before.throttle_events) > 0:
        yield f"the CPUs were throttled {events} times: too hot"
    if before.governor != after.governor:
        yield f"the governor changed from {before.governor or 'none'} to {after.governor or 'none'}"
    if stolen is not None and stolen > _STEAL_LIMIT:
        yield f"{stolen:.0%} of the CPUs' time went to other virtual machines"


def _text(file: Path) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _numbers(files: Iterable[Path]) -> dict[Path, float]:
    numbers = {}
    for file in files:
        with contextlib.suppress(ValueError):
            numbers[file] = float(_text(file))
    return numbers


def _find(file: Path, line: str) -> list[str]:
    return re.findall(f"^{line}", _text(file), re.MULTILINE)


class NvmlGpu:
    """A GPU by its number as CUDA counts; what NVML does not tell is an OSError that says why."""

    def __init__(self, index: int = 0, nvml: Any = None) -> None:
        try:
            self._nvml = nvml or importlib.import_module("pynvml")
        except ImportError as exc:
            raise OSError(_NOT_INSTALLED) from exc
        visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
        number = visible[index] if visible[0] and index < len(visible) else str(index)
        kind, key = ("Index", int(number)) if number.isdecimal() else ("UUID", number)
        self._ask("nvmlInit")
        self._handle = self._ask(f"nvmlDeviceGetHandleBy{kind}", key)
        name = self.get("Name")
        self.name = f"{number}: {name.decode() if isinstance(name, bytes) else name}"

    def get(self, what: str, *arguments: Any) -> Any:
        """The result of ``nvmlDeviceGet...``."""
        return self._ask(f"nvmlDeviceGet{what}", self._handle, *arguments)

    def _ask(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError as exc:
            raise OSError(f"NVML: {exc}") from exc


class GpuWatch:
    """Clocks of a GPU and what lowers them, read between turns: it clocks down when it is idle."""

    def __init__(
        self, index: int = 0, nvml: Any = None, *, interval: float = _GPU_INTERVAL
    ) -> None:
        self._interval = interval
        self._gpu: NvmlGpu | None = None
        self._watch: Stopwatch | None = None
        self._problem, self._count = "no reading was taken", 0
        self._lowered: Counter[str] = Counter()
        self._clocks: list[float] = []  # MHz, of moments in which it worked
        try:
            self._gpu = NvmlGpu(index, nvml)
        except OSError as exc:
            self._problem = str(exc)

    def read(self) -> None:
        """Take a reading, if the last one is long enough ago."""
        if self._gpu is None or (self._watch and self._watch.seconds < self._interval):
            return
        self._watch = Stopwatch()
        try:
            mask = int(self._gpu.get("CurrentClocksThrottleReasons"))
            clock = float(self._gpu.get("ClockInfo", 1))
        except OSError as exc:
            self._problem = str(exc)
            return
        self._count += 1
        self._lowered.update(word for bit, word in _LOWERED.items() if mask & bit)
        if clock and not mask & _IDLE:
            self._clocks.append(clock)

    def conditions(self) -> Conditions:
        """Every figure, also those that could not be read, and what may have disturbed."""
        if self._gpu is None:
            return Conditions(readings=(Reading("GPU", None, "", self._problem, _NVML_COMMAND),))
        low, high = min(self._clocks, default=None), max(self._clocks, default=None)
        lowered = (", ".join(self._lowered) or "nothing") if self._count else None
        rows = [("GPU", self._gpu.name, ""), ("GPU clock, lowest", low, "MHz"),
                ("GPU clock, highest", high, "MHz"), ("GPU throttled by", lowered, "")]  # fmt: skip
        notes = [
            f"the GPU's clock was lowered by {word}, in {times} of {self._count} readings"
            for word, times in self._lowered.items()
        ]
        if low and high and high > low * (1.0 + _CLOCK_CHANGE):
            notes.append(f"the GPU's clock changed between {low:.0f} and {high:.0f} MHz")
        readings = tuple(Reading(*row, self._problem, _NVML_COMMAND) for row in rows)
        return Conditions(readings=readings, notes=tuple(notes))


@dataclass(frozen=True)
class EnergyMeter:
    """Sensors of a board or a chip."""

    source: str  # what they stand for
    read: Callable[[], list[float]]  # watts of each, or the joules so far
    counts: bool = False  # whether it returns joules so far
    command: str = "cat /sys/class/hwmon/hwmon*/*_input"  # shows them


def find_energy_meter(
    root: Path = _ROOT, nvml: Any = None, *, gpu: int = 0
) -> tuple[EnergyMeter | None, tuple[Reading, ...]]:
    """Find what tells energy here, a board's rails, else a GPU's counter; and what is absent."""
    rails = list(_hwmon_rails(root))
    if rails:
        totals = [rail for rail in rails if rail[0] in _TOTALS][:1]
        names = ", ".join(name for name, _ in totals or rails)
        source = f"rail {names}" if totals else f"sum of the module's rails ({names})"
        files = [files for _, files in totals or rails]
        return EnergyMeter(source, lambda: list(map(_watts, files))), ()
    hwmon = "cat /sys/class/hwmon/hwmon*/name"
    board = Reading("board rails", None, "W", "no ina3221 or ina238 sensor", hwmon)
    try:
        device = NvmlGpu(gpu, nvml)
        device.get("TotalEnergyConsumption")  # on Jetson boards NVML starts, but has none
    except OSError as exc:
        return None, (board, Reading("GPU energy", None, "J", str(exc), _POWER_COMMAND))

    def read() -> list[float]:
        return [float(device.get("TotalEnergyConsumption")) / 1e3]

    return EnergyMeter("GPU alone, by NVML", read, counts=True, command=_POWER_COMMAND), (board,)


def measure_energy(
    meter: EnergyMeter, work: Callable[[], T], *, interval: float = _ENERGY_INTERVAL
) -> tuple[T, float, float | None]:
    """Read a meter in a thread while work is done; its result, seconds, and joules or None."""
    readings: list[tuple[float, list[float]]] = []
    stop = threading.Event()

    def read() -> None:
        try:
            value = meter.read()
        except (OSError, ValueError):
            value = [math.nan]
        readings.append((time.monotonic(), value))

    def read_until_stopped() -> None:
        while not stop.wait(interval):
            read()

    read()
    thread = threading.Thread(target=read_until_stopped, name="zsseg-energy", daemon=True)
    thread.start()
    try:
        result = work()
    finally:
        stop.set()
        thread.join()
    read()
    times, values = zip(*readings, strict=True)
    return result, times[-1] - times[0], joules_of(times, values, counts=meter.counts)


def joules_of(
    times: Sequence[float], values: Sequence[Sequence[float]], *, counts: bool
) -> float | None:
    """Joules of watts or joules [times, sensors]; None where one failed, ran back or is stuck."""
    if np.isnan(np.concatenate(values)).any():
        return None
    changes, readings = np.diff(values, axis=0), np.sum(values, axis=1)
    stuck = len(values) >= _STUCK and not changes.any(axis=0).all()
    if stuck or (counts and (changes < 0.0).any()):
        return None
    means = (readings[1:] + readings[:-1]) / 2.0
    return float(changes.sum() if counts else (means * np.diff(times)).sum())


def _hwmon_rails(root: Path) -> Iterator[tuple[str, list[Path]]]:
    """Names of rails, with files of microwatts, or of millivolts and of milliamperes."""
    for folder in sorted(root.glob("sys/class/hwmon/hwmon*")):
        chip = _text(folder / "name")
        if chip == "ina238" and (folder / "power1_input").exists():
            name = _text(folder / "label") or _text(folder / "in1_label") or folder.name
            yield name, [folder / "power1_input"]
        for channel in (1, 2, 3) if chip == "ina3221" else ():
            label = _text(folder / f"in{channel}_label")
            volts, current = folder / f"in{channel}_input", folder / f"curr{channel}_input"
            if label and label.lower() not in _SKIPPED and current.exists():
                yield label, [volts, current]


def _watts(files: Sequence[Path]) -> float:
    return math.prod(float(file.read_text()) for file in files) / 1e6
