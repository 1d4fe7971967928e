"""What NVML tells of a GPU, with a module that stands in for its package."""

import sys
from types import SimpleNamespace

import pytest

from zsseg_rt.demo import demo_bundle
from zsseg_rt.profiling.assemble import Measured, Request, assemble_report
from zsseg_rt.profiling.conditions import GpuWatch, open_gpu
from zsseg_rt.profiling.energy import find_energy_sources
from zsseg_rt.profiling.profiler import _gpu_index
from zsseg_rt.profiling.workload import Variant


class Nvml:
    """Stands for the module pynvml; a figure that is an exception's text is refused with it."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, clocks=(1800,), memory=5000, temperature=61, reasons=(0,), start=""):
        self._clocks, self._memory, self._temperature = list(clocks), memory, temperature
        self._reasons, self._start = list(reasons), start
        self.opened = []

    def _give(self, value):
        if isinstance(value, str):
            raise self.NVMLError(value)
        return value

    def nvmlInit(self):  # noqa: N802 - NVML's names
        if self._start:
            raise self.NVMLError(self._start)

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        self.opened.append(index)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        self.opened.append(uuid)
        return uuid

    def nvmlDeviceGetName(self, handle):  # noqa: N802
        return b"RTX 9999"

    def nvmlDeviceGetClockInfo(self, handle, kind):  # noqa: N802
        if kind == 2:
            return self._give(self._memory)
        assert kind == 1
        return self._give(self._clocks.pop(0) if len(self._clocks) > 1 else self._clocks[0])

    def nvmlDeviceGetTemperature(self, handle, sensor):  # noqa: N802
        assert sensor == 0
        return self._give(self._temperature)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):  # noqa: N802
        return self._give(self._reasons.pop(0) if len(self._reasons) > 1 else self._reasons[0])


class NewerNvml(Nvml):
    """A package of today; its driver may be an older one."""

    def __init__(self, *args, driver_knows=True, **kwargs):
        super().__init__(*args, **kwargs)
        self._driver_knows = driver_knows

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):  # noqa: N802
        if not self._driver_knows:
            raise self.NVMLError("Function Not Found")
        return self.nvmlDeviceGetCurrentClocksThrottleReasons(handle)


@pytest.fixture(autouse=True)
def visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def watch(nvml, readings=3):
    found = GpuWatch(open_gpu(0, nvml), interval=0.0)
    for _ in range(readings):
        found.read()
    return {reading.name: reading for reading in found.readings()}, " ".join(found.notes())


def test_clocks_and_temperature_are_those_between_turns():
    readings, notes = watch(Nvml(clocks=(1800, 1790, 1795)))
    values = {name: (reading.value, reading.unit) for name, reading in readings.items()}
    assert values == {
        "GPU": ("0: RTX 9999", ""),
        "GPU clock, lowest": (1790.0, "MHz"),
        "GPU clock, highest": (1800.0, "MHz"),
        "GPU memory clock": (5000.0, "MHz"),
        "GPU temperature, highest": (61.0, "°C"),
        "GPU throttled by": ("nothing", ""),
    }
    assert notes == ""


@pytest.mark.parametrize(
    "make", [Nvml, NewerNvml, lambda **kw: NewerNvml(driver_knows=False, **kw)]
)
def test_throttling_is_noted_with_its_reason(make):
    readings, notes = watch(make(clocks=(1800, 1700, 1200), reasons=(0, 0x4, 0x4 | 0x40)))
    assert readings["GPU throttled by"].value == "its power limit, its temperature, by hardware"
    assert "lowered by its power limit, in 2 of 3 readings" in notes
    assert "lowered by its temperature, by hardware, in 1 of 3" in notes
    assert "changed between 1200 and 1800 MHz" in notes


def test_clocks_of_an_idle_gpu_and_clocks_that_someone_set_are_no_throttling():
    _, notes = watch(Nvml(clocks=(1800, 300, 1800), reasons=(0x2, 0x1, 0x100)))
    assert notes == ""


@pytest.mark.parametrize(
    ("figure", "name"),
    [("clocks", "GPU clock, lowest"), ("memory", "GPU memory clock"),
     ("temperature", "GPU temperature, highest"), ("reasons", "GPU throttled by")],
)  # fmt: skip
@pytest.mark.parametrize("refusal", ["Not Supported", "Insufficient Permissions"])
def test_a_figure_that_is_refused_is_absent_with_the_reason(figure, name, refusal):
    given = (refusal,) if figure in ("clocks", "reasons") else refusal
    readings, _ = watch(Nvml(**{figure: given}))
    assert readings[name].value is None
    assert readings[name].reason == f"NVML: {refusal}"
    assert "nvidia-smi" in readings[name].command
    others = [one for other, one in readings.items() if not other.startswith(name[:9])]
    assert all(one.value is not None for one in others)


def test_a_sensor_that_gives_zero_is_absent():
    readings, notes = watch(Nvml(clocks=(0,), temperature=0, memory=0))
    for name in ("GPU clock, lowest", "GPU clock, highest", "GPU memory clock"):
        assert (readings[name].value, readings[name].reason) == (None, "the sensor gives 0")
    assert readings["GPU temperature, highest"].value is None
    assert notes == ""


def test_nothing_read_is_nothing_told():
    readings, notes = watch(Nvml(), readings=0)
    assert [reading.value for reading in readings.values()] == ["0: RTX 9999", *[None] * 5]
    assert all(reading.reason for name, reading in readings.items() if name != "GPU")
    assert notes == ""


def test_a_library_that_does_not_start_is_one_absent_row():
    readings, _ = watch(Nvml(start="Driver Not Loaded"))
    assert list(readings) == ["GPU"]
    assert (readings["GPU"].value, readings["GPU"].reason) == (None, "NVML: Driver Not Loaded")


def test_an_absent_package_is_said_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    readings, _ = watch(None)
    assert "pip install nvidia-ml-py" in readings["GPU"].reason
    reasons = [reading.reason for reading in find_energy_sources(tmp_path).absent]
    assert any("pip install nvidia-ml-py" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("visible", "index", "opened"),
    [(None, 1, 1), ("", 1, 1), ("3,2", 1, 2), ("GPU-aa,GPU-bb", 0, "GPU-aa"), ("0", 4, 4)],
)
def test_the_gpu_is_the_one_that_cuda_counts(monkeypatch, visible, index, opened):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = Nvml()
    assert not isinstance(open_gpu(index, nvml), str)
    assert nvml.opened == [opened]


@pytest.mark.parametrize(
    ("device", "on_gpu", "index"), [("cuda:1", True, 1), ("cpu", False, None), ("", True, None)]
)
def test_only_a_candidate_on_a_gpu_has_one(device, on_gpu, index):
    child = SimpleNamespace(described={"device": device}, on_gpu=on_gpu)
    assert _gpu_index(child) == index


def test_readings_are_taken_at_intervals():
    found = GpuWatch(open_gpu(0, Nvml(clocks=(1800, 1))), interval=3600.0)
    for _ in range(5):
        found.read()
    values = {reading.name: reading.value for reading in found.readings()}
    assert values["GPU clock, lowest"] == 1800.0


def test_a_report_tells_what_the_gpu_did_also_after_ctrl_c():
    work = SimpleNamespace(num_classes=lambda _: 1, frame_sizes=lambda _: "1x1")
    variants = (Variant(name="demo", bundle=demo_bundle("scenes")),)
    request = Request(variants=variants, workload=work, source="", command="")
    gpu = GpuWatch(open_gpu(0, Nvml(reasons=(0x20,))), interval=0.0)
    gpu.read()
    report = assemble_report(Measured(request=request, gpu=gpu, interrupted=True))
    assert any(r.name == "GPU clock, highest" and r.value for r in report.conditions.readings)
    assert any("lowered by its temperature, by the driver" in note for note in report.notes)
    assert any("interrupted" in note for note in report.notes)
