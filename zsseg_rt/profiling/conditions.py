"""Conditions of the machine: waiting for CPUs, pressure, steal, clocks, temperatures, energy.

They are read from files of the system, and of a GPU from NVML: between turns, because a GPU lowers
its clocks within moments of its work's end. What cannot be read is reported as absent, with the
reason and the command that shows it, and never as zero.

Energy is read 20 times a second. Jetson boards: hwmon files of ``ina3221`` (millivolts and
milliamperes by channel) and ``ina238`` (microwatts). GPUs in desktops: NVML. Both measure a board
or a chip, not a process.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

import numpy as np

from zsseg_rt.profiling.worker import Stopwatch

T = TypeVar("T")
_CLOCK_CHANGE = 0.1
_STEAL_LIMIT = 0.02
_ROOT = Path("/")
INTERVAL = 0.05  # seconds
_TOTALS = ("VDD_IN", "VIN", "POM_5V_IN")  # what feeds the whole module; VIN_SYS_5V0 is not one
_SKIPPED = ("nc", "sum of shunt voltages")  # a channel that is not connected; a sum
_STUCK = 20  # equal readings in a row, a second of them, are no measurement
_INTERVAL = 0.5  # seconds
_NVML_COMMAND = "nvidia-smi -q -d CLOCK,TEMPERATURE,PERFORMANCE"
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


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One figure of the machine."""

    name: str
    unit: str = ""  # of the value; empty for shares and words
    value: float | str | None = None  # None: it could not be read
    before: float | None = None  # at the begin, where ``value`` is at the end
    reason: str = ""  # why there is none
    command: str = ""  # shows it on a machine that has it


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The machine between two moments: every figure, and what may have disturbed a measurement."""

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
    readings = [
        _reading("waiting for a CPU", waiting, "the kernel keeps no schedstat",
                 "cat /proc/self/schedstat"),
        _reading("CPU pressure", _pressure_share(before, after),
                 "the kernel keeps no pressure figures", "cat /proc/pressure/cpu"),
        _reading("CPUs in use", in_use, why, "head -1 /proc/stat"),
        _reading("steal", stolen, why, "head -1 /proc/stat"),
        _reading("CPU clock", after.clock_mhz, "the system does not tell",
                 "grep MHz /proc/cpuinfo", unit="MHz", before=before.clock_mhz),
        _reading("governor", after.governor, "no cpufreq driver, as in virtual machines",
                 "cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"),
        *(_reading(name, after.temperatures.get(name), "no sensor, as in virtual machines",
                   command, unit="°C", before=before.temperatures.get(name))
          for name in sorted(after.temperatures) or ["temperature"]),
    ]  # fmt: skip
    return Conditions(readings=tuple(readings), notes=tuple(_notes(before, after, stolen)))


def _reading(
    name: str,
    value: float | str | None,
    reason: str,
    command: str,
    *,
    unit: str = "",
    before: float | None = None,
) -> Reading:
    if value is None:
        return Reading(name=name, unit=unit, reason=reason, command=command)
    return Reading(name=name, unit=unit, value=value, before=before, command=command)


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
    """The numbers in files, without those that hold none."""
    numbers = {}
    for file in files:
        with contextlib.suppress(ValueError):
            numbers[file] = float(_text(file))
    return numbers


def _find(file: Path, line: str) -> list[str]:
    """The matches in a file's lines of that form."""
    return re.findall(f"^{line}", _text(file), re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class NvmlGpu:
    """A GPU that NVML knows."""

    nvml: Any  # the module ``pynvml``
    handle: Any
    name: str  # index and name


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
    """Reads a GPU now and then, and says what it saw."""

    def __init__(self, gpu: NvmlGpu | str, *, interval: float = _INTERVAL) -> None:
        self._gpu, self._interval = gpu, interval
        self._watch: Stopwatch | None = None
        self._values: dict[str, list[float]] = defaultdict(list)
        self._reasons: dict[str, str] = {}
        self._lowered: Counter[str] = Counter()
        self._clocks_at_work: list[float] = []

    def read(self) -> None:
        """Take a reading, if the last one is long enough ago."""
        gpu = self._gpu
        if isinstance(gpu, str) or (self._watch and self._watch.seconds < self._interval):
            return
        self._watch = Stopwatch()
        nvml, handle = gpu.nvml, gpu.handle
        self._note("memory clock", nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, 2))
        self._note("temperature", nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, 0))
        clock = self._note("clock", nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, 1))
        mask = int(self._note("throttling", nvml, lambda: _event_reasons(nvml, handle)) or 0)
        self._lowered.update(word for bit, word in _LOWERED.items() if mask & bit)
        if clock is not None and not mask & _IDLE:
            self._clocks_at_work.append(clock)

    def conditions(self) -> Conditions:
        """Every figure, also those that could not be read, and what may have disturbed."""
        if isinstance(self._gpu, str):
            absent = Reading(name="GPU", reason=self._gpu, command=_NVML_COMMAND)
            return Conditions(readings=(absent,))
        lowered = ", ".join(self._lowered) or "nothing"
        readings = (
            Reading(name="GPU", value=self._gpu.name, command=_NVML_COMMAND),
            self._reading("GPU clock, lowest", "clock", min, "MHz"),
            self._reading("GPU clock, highest", "clock", max, "MHz"),
            self._reading("GPU memory clock", "memory clock", median, "MHz"),
            self._reading("GPU temperature, highest", "temperature", max, "°C"),
            self._reading("GPU throttled by", "throttling", lambda _: lowered, ""),
        )
        return Conditions(readings=readings, notes=tuple(self._notes()))

    def _notes(self) -> Iterator[str]:
        count = len(self._values["throttling"])
        for word, times in self._lowered.items():
            yield f"the GPU's clock was lowered by {word}, in {times} of {count} readings"
        low, high = min(self._clocks_at_work, default=0), max(self._clocks_at_work, default=0)
        if high > low * (1.0 + _CLOCK_CHANGE):
            yield f"the GPU's clock changed between {low:.0f} and {high:.0f} MHz"

    def _note(self, name: str, nvml: Any, read: Callable[[], Any]) -> float | None:
        """Keep a value, or why there is none; a sensor that gives 0 gives nothing."""
        try:
            value = float(read())
        except nvml.NVMLError as exc:
            self._reasons[name] = f"NVML: {exc}"
            return None
        if value == 0.0 and name != "throttling":
            self._reasons[name] = "the sensor gives 0"
            return None
        self._values[name].append(value)
        return value

    def _reading(
        self, title: str, name: str, choose: Callable[[list[float]], float | str], unit: str
    ) -> Reading:
        values = self._values[name]
        reason = self._reasons.get(name, "no reading was taken")
        return _reading(title, choose(values) if values else None, reason, _NVML_COMMAND, unit=unit)


def _event_reasons(nvml: Any, handle: Any) -> int:
    """Why clocks are as they are, as bits; older packages and drivers call it throttling."""
    older = nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    try:
        return int(getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", older)(handle))
    except nvml.NVMLError:
        return int(older(handle))


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
