"""What the machine did meanwhile: waiting for CPUs, pressure, steal, clocks, temperatures.

It is read from files of the system, and of a GPU from NVML: between turns, because a GPU lowers its
clocks within moments of its work's end. What cannot be read is reported as absent, with the reason
and the command that shows it, and never as zero.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from zsseg_rt.profiling.worker import Stopwatch

_CLOCK_CHANGE = 0.1
_STEAL_LIMIT = 0.02
_ROOT = Path("/")
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
    """Counters and sensors at one moment; empty or None where the system does not tell."""

    cpu_ticks: tuple[int, ...]  # of the first line of /proc/stat
    pressure_us: int | None  # microseconds in which some task waited for a CPU
    clocks_mhz: tuple[float, ...]  # of each CPU
    governors: tuple[str, ...]  # distinct ones
    throttle_events: int | None  # sum of the CPUs' counters
    temperatures: Mapping[str, float]  # degrees Celsius by sensor
    uptime_s: float | None


def take_snapshot(root: Path = _ROOT) -> Snapshot:
    """Read counters and sensors."""
    stat = (_text(root / "proc/stat") or "").splitlines()
    cpu = root / "sys/devices/system/cpu"
    throttled = [_number(f) for f in cpu.glob("cpu*/thermal_throttle/*_throttle_count")]
    events = [int(count) for count in throttled if count is not None]
    uptime = (_text(root / "proc/uptime") or "").split()
    governors = {_text(file) for file in cpu.glob("cpu[0-9]*/cpufreq/scaling_governor")}
    return Snapshot(
        cpu_ticks=tuple(int(field) for field in stat[0].split()[1:]) if stat else (),
        pressure_us=_pressure(root / "proc/pressure/cpu"),
        clocks_mhz=tuple(_clocks(root)),
        governors=tuple(sorted(governor for governor in governors if governor)),
        throttle_events=sum(events) if events else None,
        temperatures=dict(_temperatures(root)),
        uptime_s=float(uptime[0]) if uptime else None,
    )


def compare_snapshots(
    before: Snapshot, after: Snapshot, *, waiting: float | None = None
) -> Conditions:
    """Describe what happened between two snapshots."""
    in_use, stolen, why = _ticks(before, after)
    clock = _mean(after.clocks_mhz)
    readings = [
        _reading("waiting for a CPU", waiting, "the kernel keeps no schedstat",
                 "cat /proc/self/schedstat"),
        _reading("CPU pressure", _pressure_share(before, after),
                 "the kernel keeps no pressure figures", "cat /proc/pressure/cpu"),
        _reading("CPUs in use", in_use, why, "head -1 /proc/stat"),
        _reading("steal", stolen, why, "head -1 /proc/stat"),
        _reading("CPU clock", clock, "the system does not tell", "grep MHz /proc/cpuinfo",
                 unit="MHz", before=_mean(before.clocks_mhz)),
        _reading("governor", ", ".join(after.governors) or None,
                 "no cpufreq driver, as in virtual machines",
                 "cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"),
    ]  # fmt: skip
    sensors: dict[str, float | None] = {**after.temperatures} or {"temperature": None}
    for name, value in sorted(sensors.items()):
        earlier = before.temperatures.get(name)
        told = "no sensor, as in virtual machines"
        command = "cat /sys/class/thermal/thermal_zone*/temp"
        readings.append(_reading(name, value, told, command, unit="°C", before=earlier))
    notes = tuple(_notes(before, after, stolen))
    return Conditions(readings=tuple(readings), notes=notes)


def _reading(
    name: str, value: float | str | None, reason: str, command: str, **more: Any
) -> Reading:
    if value is None:
        more.pop("before", None)
    told = "" if value is not None else reason
    return Reading(name=name, value=value, reason=told, command=command, **more)


def _pressure_share(before: Snapshot, after: Snapshot) -> float | None:
    first, last = before.pressure_us, after.pressure_us
    seconds = (after.uptime_s or 0.0) - (before.uptime_s or 0.0)
    if first is None or last is None or seconds <= 0.0:
        return None
    return (last - first) / 1e6 / seconds


def _ticks(before: Snapshot, after: Snapshot) -> tuple[float | None, float | None, str]:
    """Shares of the CPUs' time in use and stolen, or why there are none."""
    ticks = [b - a for a, b in zip(before.cpu_ticks, after.cpu_ticks, strict=False)]
    total = sum(ticks[:8])
    if len(ticks) < 8 or total <= 0:
        return None, None, "too little time between readings" if ticks else "no /proc/stat"
    return 1.0 - (ticks[3] + ticks[4]) / total, ticks[7] / total, ""


def _notes(before: Snapshot, after: Snapshot, stolen: float | None) -> Iterator[str]:
    first, last = _mean(before.clocks_mhz), _mean(after.clocks_mhz)
    if first and last is not None and abs(last / first - 1.0) > _CLOCK_CHANGE:
        yield f"the CPUs' clock changed from {first:.0f} to {last:.0f} MHz"
    if (events := (after.throttle_events or 0) - (before.throttle_events or 0)) > 0:
        yield f"the CPUs were throttled {events} times: too hot"
    if before.governors != after.governors:
        first_words, last_words = (", ".join(one.governors) or "none" for one in (before, after))
        yield f"the governor changed from {first_words} to {last_words}"
    if stolen is not None and stolen > _STEAL_LIMIT:
        yield f"{stolen:.0%} of the CPUs' time went to other virtual machines"


def _clocks(root: Path) -> Iterator[float]:
    files = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
    kilohertz = [_number(file) for file in files]
    if any(value is not None for value in kilohertz):
        yield from (value / 1e3 for value in kilohertz if value is not None)
        return
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "cpu MHz":
            yield float(value)


def _temperatures(root: Path) -> Iterator[tuple[str, float]]:
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        value = _number(zone / "temp")
        # Sensors of parts that are switched off give an error, or the lowest number they have.
        if value is not None and value > -40e3:
            yield _text(zone / "type") or zone.name, value / 1e3


def _pressure(file: Path) -> int | None:
    for line in (_text(file) or "").splitlines():
        kind, *fields = line.split()
        found = [field.partition("=")[2] for field in fields if field.startswith("total=")]
        if kind == "some" and found:
            return int(found[0])
    return None


def _number(file: Path) -> float | None:
    try:
        return float(_text(file) or "")
    except ValueError:
        return None


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _mean(values: tuple[float, ...]) -> float | None:
    return sum(values) / len(values) if values else None


@dataclass(frozen=True, kw_only=True)
class NvmlGpu:
    """A GPU that NVML knows."""

    nvml: Any  # the module ``pynvml``
    handle: Any
    name: str  # index and name


def open_gpu(index: int = 0, nvml: Any | None = None) -> NvmlGpu | str:
    """Find a GPU, or say why it cannot be found."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return _NOT_INSTALLED
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    chosen = visible[index] if visible[0] and index < len(visible) else str(index)
    module: Any = nvml
    try:
        module.nvmlInit()
        if chosen.isdecimal():
            handle = module.nvmlDeviceGetHandleByIndex(int(chosen))
        else:
            handle = module.nvmlDeviceGetHandleByUUID(chosen)
        told = module.nvmlDeviceGetName(handle)
    except module.NVMLError as exc:
        return f"NVML: {exc}"
    name = told.decode() if isinstance(told, bytes) else str(told)
    return NvmlGpu(nvml=module, handle=handle, name=f"{chosen}: {name}")


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
        clock = self._note("clock", lambda: nvml.nvmlDeviceGetClockInfo(handle, 1), nvml)
        self._note("memory clock", lambda: nvml.nvmlDeviceGetClockInfo(handle, 2), nvml)
        self._note("temperature", lambda: nvml.nvmlDeviceGetTemperature(handle, 0), nvml)
        mask = int(self._note("throttling", lambda: _event_reasons(nvml, handle), nvml) or 0)
        self._lowered.update(word for bit, word in _LOWERED.items() if mask & bit)
        if clock is not None and not mask & _IDLE:
            self._clocks_at_work.append(clock)

    def readings(self) -> Iterator[Reading]:
        """Every figure, also those that could not be read."""
        if isinstance(self._gpu, str):
            yield Reading(name="GPU", reason=self._gpu, command=_NVML_COMMAND)
            return
        yield Reading(name="GPU", value=self._gpu.name, command=_NVML_COMMAND)
        yield self._reading("GPU clock, lowest", "clock", min, "MHz")
        yield self._reading("GPU clock, highest", "clock", max, "MHz")
        yield self._reading("GPU memory clock", "memory clock", median, "MHz")
        yield self._reading("GPU temperature, highest", "temperature", max, "°C")
        lowered = ", ".join(self._lowered) or "nothing"
        yield self._reading("GPU throttled by", "throttling", lambda _: lowered)

    def notes(self) -> Iterator[str]:
        """What may have disturbed the measurement."""
        count = len(self._values["throttling"])
        for word, times in self._lowered.items():
            yield f"the GPU's clock was lowered by {word}, in {times} of {count} readings"
        low, high = min(self._clocks_at_work, default=0), max(self._clocks_at_work, default=0)
        if high > low * (1.0 + _CLOCK_CHANGE):
            yield f"the GPU's clock changed between {low:.0f} and {high:.0f} MHz"

    def _note(self, name: str, read: Callable[[], Any], nvml: Any) -> float | None:
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
        self, title: str, name: str, choose: Callable[[list[float]], float | str], unit: str = ""
    ) -> Reading:
        values = self._values[name]
        reason = "" if values else self._reasons.get(name, "no reading was taken")
        value = choose(values) if values else None
        return Reading(name=title, unit=unit, value=value, reason=reason, command=_NVML_COMMAND)


def _event_reasons(nvml: Any, handle: Any) -> int:
    """Why clocks are as they are, as bits; older packages and drivers call it throttling."""
    older = nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    try:
        return int(getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", older)(handle))
    except nvml.NVMLError:
        return int(older(handle))
