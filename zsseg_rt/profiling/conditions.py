"""What the machine did meanwhile: waiting for CPUs, pressure, steal, clocks, temperatures.

All of it is read from files of the system. What cannot be read is reported as absent, with the
reason and the command that shows it, and never as zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_CLOCK_CHANGE = 0.1
_STEAL_LIMIT = 0.02
_ROOT = Path("/")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One figure of the machine.

    Attributes:
        name: What it is.
        unit: Of the value; ``""`` for shares and words.
        value: A number or a word; None if it could not be read.
        before: The value at the begin, where ``value`` is the one at the end.
        reason: Why there is none.
        command: Shows it on a machine that has it.
    """

    name: str
    unit: str = ""
    value: float | str | None = None
    before: float | None = None
    reason: str = ""
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The machine between two moments.

    Attributes:
        readings: Every figure, also those that could not be read.
        notes: What may have disturbed the measurement: a changed clock, throttling, steal.
    """

    readings: tuple[Reading, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Counters and sensors at one moment.

    Attributes:
        cpu_ticks: The fields of the first line of ``/proc/stat``; empty if unreadable.
        pressure_us: Microseconds in which some task waited for a CPU; None if not told.
        clocks_mhz: Clock of each CPU; empty if not told.
        governors: Distinct governors.
        throttle_events: Sum of the CPUs' counters; None if not told.
        temperatures: Degrees Celsius by sensor.
        uptime_s: Seconds since the system began.
    """

    cpu_ticks: tuple[int, ...]
    pressure_us: int | None
    clocks_mhz: tuple[float, ...]
    governors: tuple[str, ...]
    throttle_events: int | None
    temperatures: Mapping[str, float]
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
    readings = (
        Reading(
            name="waiting for a CPU",
            value=waiting,
            reason="" if waiting is not None else "the kernel keeps no schedstat",
            command="cat /proc/self/schedstat",
        ),
        _pressure_reading(before, after),
        *_tick_readings(before, after),
        *_clock_readings(before, after),
        *_temperature_readings(before, after),
    )
    return Conditions(readings=readings, notes=tuple(_notes(before, after)))


def _pressure_reading(before: Snapshot, after: Snapshot) -> Reading:
    share, reason = None, "the kernel keeps no pressure figures"
    if (
        before.pressure_us is not None
        and after.pressure_us is not None
        and before.uptime_s is not None
        and after.uptime_s is not None
        and after.uptime_s > before.uptime_s
    ):
        microseconds = after.pressure_us - before.pressure_us
        share, reason = microseconds / 1e6 / (after.uptime_s - before.uptime_s), ""
    return Reading(
        name="CPU pressure", value=share, reason=reason, command="cat /proc/pressure/cpu"
    )


def _tick_readings(before: Snapshot, after: Snapshot) -> Iterator[Reading]:
    command = "head -1 /proc/stat"
    ticks = [b - a for a, b in zip(before.cpu_ticks, after.cpu_ticks, strict=False)]
    total = sum(ticks[:8])
    if len(ticks) < 8 or total <= 0:
        reason = "/proc/stat cannot be read" if not ticks else "too little time between readings"
        yield Reading(name="CPUs in use", reason=reason, command=command)
        yield Reading(name="steal", reason=reason, command=command)
        return
    yield Reading(name="CPUs in use", value=1.0 - (ticks[3] + ticks[4]) / total, command=command)
    yield Reading(name="steal", value=ticks[7] / total, command=command)


def _clock_readings(before: Snapshot, after: Snapshot) -> Iterator[Reading]:
    command = "grep MHz /proc/cpuinfo"
    if before.clocks_mhz and after.clocks_mhz:
        yield Reading(
            name="CPU clock",
            unit="MHz",
            value=_mean(after.clocks_mhz),
            before=_mean(before.clocks_mhz),
            command=command,
        )
    else:
        yield Reading(
            name="CPU clock", unit="MHz", reason="the system does not tell", command=command
        )
    governor = "cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
    if after.governors:
        yield Reading(name="governor", value=", ".join(after.governors), command=governor)
    else:
        reason = "no cpufreq driver, as in virtual machines"
        yield Reading(name="governor", reason=reason, command=governor)


def _temperature_readings(before: Snapshot, after: Snapshot) -> Iterator[Reading]:
    command = "cat /sys/class/thermal/thermal_zone*/temp"
    for name, value in sorted(after.temperatures.items()):
        earlier = before.temperatures.get(name)
        yield Reading(name=name, unit="°C", value=value, before=earlier, command=command)
    if not after.temperatures:
        reason = "no sensor, as in virtual machines"
        yield Reading(name="temperature", unit="°C", reason=reason, command=command)


def _notes(before: Snapshot, after: Snapshot) -> Iterator[str]:
    if before.clocks_mhz and after.clocks_mhz:
        first, last = _mean(before.clocks_mhz), _mean(after.clocks_mhz)
        if first > 0.0 and abs(last / first - 1.0) > _CLOCK_CHANGE:
            yield f"the CPUs' clock changed from {first:.0f} to {last:.0f} MHz"
    if before.throttle_events is not None and after.throttle_events is not None:
        events = after.throttle_events - before.throttle_events
        if events > 0:
            yield f"the CPUs were throttled {events} times: too hot"
    if before.governors != after.governors:
        first_words, last_words = (", ".join(one.governors) or "none" for one in (before, after))
        yield f"the governor changed from {first_words} to {last_words}"
    for reading in _tick_readings(before, after):
        stolen = reading.value if reading.name == "steal" else None
        if isinstance(stolen, float) and stolen > _STEAL_LIMIT:
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


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
