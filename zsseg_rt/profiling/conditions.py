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
from functools import partial
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
POWER_COMMAND = "nvidia-smi --query-gpu=power.draw --format=csv"
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
    why = "too little time between readings" if after.cpu_ticks else "no /proc/stat"
    command = "cat /sys/class/thermal/thermal_zone*/temp"
    clock = "grep MHz /proc/cpuinfo"
    governor = "cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
    schedstat, pressure = "cat /proc/self/schedstat", "cat /proc/pressure/cpu"
    rows: list[tuple[Any, ...]] = [
        ("waiting for a CPU", waiting, "", "the kernel keeps no schedstat", schedstat),
        ("CPU pressure", _pressure_share(before, after), "",
         "the kernel keeps no pressure figures", pressure),
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


def _pressure_share(before: Snapshot, after: Snapshot) -> float | None:
    seconds = after.uptime_s - before.uptime_s
    if before.pressure_us is None or after.pressure_us is None or seconds <= 0.0:
        return None
    return (after.pressure_us - before.pressure_us) / 1e6 / seconds


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


@dataclass(frozen=True, kw_only=True)
class NvmlGpu:
    """A GPU that NVML knows."""

    nvml: Any  # the module ``pynvml``
    handle: Any
    name: str


def open_gpu(index: int = 0, nvml: Any = None) -> NvmlGpu | str:
    """Find a GPU, as CUDA counts them, or say why it cannot be found."""
    try:
        nvml = nvml or importlib.import_module("pynvml")
    except ImportError:
        return _NOT_INSTALLED
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    number = visible[index] if visible[0] and index < len(visible) else str(index)
    try:
        nvml.nvmlInit()
        if number.isdecimal():
            handle = nvml.nvmlDeviceGetHandleByIndex(int(number))
        else:
            handle = nvml.nvmlDeviceGetHandleByUUID(number)
        name = nvml.nvmlDeviceGetName(handle)
    except nvml.NVMLError as exc:
        return f"NVML: {exc}"
    name = name.decode() if isinstance(name, bytes) else name
    return NvmlGpu(nvml=nvml, handle=handle, name=f"{number}: {name}")


class GpuWatch:
    """Clocks of a GPU and what lowers them, read between turns: it clocks down when it is idle."""

    def __init__(self, gpu: NvmlGpu | str, *, interval: float = _GPU_INTERVAL) -> None:
        self._gpu, self._interval = gpu, interval
        self._watch: Stopwatch | None = None
        self._problem, self._count = "no reading was taken", 0
        self._lowered: Counter[str] = Counter()
        self._clocks: list[float] = []  # MHz, of moments in which it worked

    def read(self) -> None:
        """Take a reading, if the last one is long enough ago."""
        gpu = self._gpu
        if isinstance(gpu, str) or (self._watch and self._watch.seconds < self._interval):
            return
        self._watch = Stopwatch()
        try:
            mask = int(gpu.nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu.handle))
            clock = float(gpu.nvml.nvmlDeviceGetClockInfo(gpu.handle, 1))
        except gpu.nvml.NVMLError as exc:
            self._problem = f"NVML: {exc}"
            return
        self._count += 1
        self._lowered.update(word for bit, word in _LOWERED.items() if mask & bit)
        if clock and not mask & _IDLE:
            self._clocks.append(clock)

    def conditions(self) -> Conditions:
        """Every figure, also those that could not be read, and what may have disturbed."""
        if isinstance(self._gpu, str):
            return Conditions(readings=(Reading("GPU", None, "", self._gpu, _NVML_COMMAND),))
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


def find_energy_sources(root: Path = _ROOT, nvml: Any = None, *, gpu: int = 0) -> EnergySources:
    """Find what tells energy here: a board's rails, else a GPU's counter."""
    rails = tuple(_hwmon_rails(root))
    if rails:
        totals = tuple(rail for rail in rails if rail.name in _TOTALS)
        if totals:
            return EnergySources(total=totals, note=f"rail {totals[0].name}")
        names = ", ".join(rail.name for rail in rails)
        return EnergySources(total=rails, note=f"sum of the module's rails ({names})")
    hwmon = "cat /sys/class/hwmon/hwmon*/name"
    board = Reading("board rails", None, "W", "no ina3221 or ina238 sensor", hwmon)
    counter = _nvml_counter(gpu, nvml)
    if isinstance(counter, Rail):
        return EnergySources(total=(counter,), note="GPU alone, by NVML", absent=(board,))
    return EnergySources(absent=(board, Reading("GPU energy", None, "J", counter, POWER_COMMAND)))


def measure_energy(
    rails: Sequence[Rail], work: Callable[[], T], *, interval: float = _ENERGY_INTERVAL
) -> tuple[T, float, float | None]:
    """Read rails in a thread while work is done; its result, seconds, and joules or None."""
    times: list[float] = []
    values: list[list[float]] = []
    stop = threading.Event()

    def read() -> None:
        times.append(time.monotonic())
        values.append([_read(rail) for rail in rails])

    def read_until_stopped() -> None:
        while not stop.wait(interval):
            read()
        read()

    read()
    thread = threading.Thread(target=read_until_stopped, name="zsseg-energy", daemon=True)
    thread.start()
    try:
        result = work()
    finally:
        stop.set()
        thread.join()
    return result, times[-1] - times[0], joules_of(rails, times, values)


def joules_of(
    rails: Sequence[Rail], times: Sequence[float], values: Sequence[Sequence[float]]
) -> float | None:
    """Joules of readings [times, rails]; None where a sensor failed, ran back or is stuck."""
    readings, steps = np.array(values), np.diff(times)
    counts = np.array([rail.counts for rail in rails], bool)
    changes, means = np.diff(readings, axis=0), (readings[1:] + readings[:-1]) / 2.0
    used = np.where(counts, changes, means * steps[:, None])
    stuck = len(readings) >= _STUCK and not changes.any(axis=0).all()
    if stuck or not used.size or np.isnan(used).any() or (changes[:, counts] < 0.0).any():
        return None
    return float(used.sum())


def _read(rail: Rail) -> float:
    try:
        return rail.read()
    except (OSError, ValueError):
        return math.nan


def _hwmon_rails(root: Path) -> Iterator[Rail]:
    for folder in sorted(root.glob("sys/class/hwmon/hwmon*")):
        chip = _text(folder / "name")
        if chip == "ina238" and (folder / "power1_input").exists():
            name = _text(folder / "label") or _text(folder / "in1_label") or folder.name
            yield Rail(name=name, read=partial(_product, folder / "power1_input"))
        for channel in (1, 2, 3) if chip == "ina3221" else ():
            label = _text(folder / f"in{channel}_label")
            volts, current = folder / f"in{channel}_input", folder / f"curr{channel}_input"
            if label and label.lower() not in _SKIPPED and current.exists():
                yield Rail(name=label, read=partial(_product, volts, current))


def _product(*files: Path) -> float:
    """Of millivolts and milliamperes, or of microwatts alone."""
    return math.prod(float(file.read_text()) for file in files) / 1e6


def _nvml_counter(index: int, nvml: Any) -> Rail | str:
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
