"""What a GPU did meanwhile, as NVML tells it: clocks, temperature, and why clocks were lowered.

A GPU lowers its clocks within moments of its work's end, so it is read between turns while frames
are timed, and not at the two ends.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from zsseg_rt.profiling.conditions import Reading
from zsseg_rt.profiling.meter import Stopwatch

_INTERVAL = 0.5  # seconds
_CLOCK_CHANGE = 0.1
_COMMAND = "nvidia-smi -q -d CLOCK,TEMPERATURE,PERFORMANCE"
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
            yield Reading(name="GPU", reason=self._gpu, command=_COMMAND)
            return
        yield Reading(name="GPU", value=self._gpu.name, command=_COMMAND)
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
        return Reading(name=title, unit=unit, value=value, reason=reason, command=_COMMAND)


def _event_reasons(nvml: Any, handle: Any) -> int:
    """Why clocks are as they are, as bits; older packages and drivers call it throttling."""
    older = nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    try:
        return int(getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", older)(handle))
    except nvml.NVMLError:
        return int(older(handle))
