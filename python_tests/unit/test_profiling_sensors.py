"""Conditions and energy come from files of the system and from NVML; what is absent is no zero."""

import itertools
import math
import sys

import pytest

from zsseg_rt.profiling.conditions import (
    GpuWatch,
    Rail,
    compare_snapshots,
    find_energy_sources,
    joules_of,
    measure_energy,
    open_gpu,
    take_snapshot,
)


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


STAT = "cpu  {user} 0 100 {idle} 0 0 0 {steal} 0 0\ncpu0 1 2 3"
CPUS, ZONES = "sys/devices/system/cpu", "sys/class/thermal"
BEFORE = {
    "proc/stat": STAT.format(user=1000, idle=5000, steal=10),
    "proc/uptime": "100.00 180.00",
    "proc/pressure/cpu": "some avg10=1.10 avg60=0.0 avg300=0.0 total=1000000\nfull total=0",
    f"{CPUS}/cpu0/cpufreq/scaling_cur_freq": 2000000,
    f"{CPUS}/cpu1/cpufreq/scaling_cur_freq": 3000000,
    f"{CPUS}/cpu0/cpufreq/scaling_governor": "schedutil",
    f"{CPUS}/cpu1/cpufreq/scaling_governor": "schedutil",
    f"{CPUS}/cpu0/thermal_throttle/package_throttle_count": 4,
    f"{ZONES}/thermal_zone0/type": "cpu-thermal",
    f"{ZONES}/thermal_zone0/temp": 45500,
    f"{ZONES}/thermal_zone1/type": "gpu-thermal",  # it is switched off
    f"{ZONES}/thermal_zone1/temp": -256000,
}
AFTER = {
    "proc/stat": STAT.format(user=1700, idle=5200, steal=110),
    "proc/uptime": "110.00 190.00",
    "proc/pressure/cpu": "some avg10=1.10 avg60=0.0 avg300=0.0 total=6000000",
    f"{CPUS}/cpu0/cpufreq/scaling_cur_freq": 1000000,
    f"{CPUS}/cpu1/cpufreq/scaling_cur_freq": 1000000,
    f"{CPUS}/cpu1/cpufreq/scaling_governor": "performance",
    f"{CPUS}/cpu0/thermal_throttle/package_throttle_count": 7,
    f"{ZONES}/thermal_zone0/temp": 81000,
}


def test_conditions_are_those_between_two_moments(tmp_path):
    write(tmp_path, BEFORE)
    before = take_snapshot(tmp_path)
    write(tmp_path, AFTER)
    between = compare_snapshots(before, take_snapshot(tmp_path), waiting=0.74)
    assert {reading.name: (reading.value, reading.before) for reading in between.readings} == {
        "waiting for a CPU": (0.74, None),
        "CPU pressure": (pytest.approx(0.5), None),
        "CPUs in use": (pytest.approx(0.8), None),
        "steal": (pytest.approx(0.1), None),
        "CPU clock": (1000.0, 2500.0),
        "governor": ("performance, schedutil", None),
        "cpu-thermal": (81.0, 45.5),
    }
    assert between.notes == (
        "the CPUs' clock changed from 2500 to 1000 MHz",
        "the CPUs were throttled 3 times: too hot",
        "the governor changed from schedutil to performance, schedutil",
        "10% of the CPUs' time went to other virtual machines",
    )


@pytest.mark.parametrize("content", [None, "", "garbage", "-1 what", "a folder"])
def test_what_gives_no_number_is_absent_with_reason_and_command(tmp_path, content):
    if content is not None:
        write(tmp_path, BEFORE)
        for name in BEFORE:
            if name.endswith(("temp", "cur_freq", "count", "pressure/cpu", "stat", "governor")):
                (tmp_path / name).unlink()
                if content == "a folder":  # any read of it fails, also root's
                    (tmp_path / name).mkdir()
                else:
                    write(tmp_path, {name: "" if name.endswith(("stat", "governor")) else content})
    broken = take_snapshot(tmp_path)
    nothing = compare_snapshots(broken, broken)
    assert len(nothing.readings) == 7
    assert all(r.value is None and r.reason and r.command for r in nothing.readings)
    assert nothing.notes == ()


def test_clocks_stand_in_cpuinfo_where_there_is_no_cpufreq(tmp_path):
    write(tmp_path, {"proc/cpuinfo": "cpu MHz\t\t: 2000.0\nflags : x\ncpu MHz\t\t: 3000.5"})
    assert take_snapshot(tmp_path).clock_mhz == pytest.approx(2500.25)


def ina3221(number, *channels):
    """A sensor with channels of (label, millivolts, milliamperes)."""
    files = {"name": "ina3221", "in7_label": "sum of shunt voltages", "in7_input": 1234}
    for i, (label, millivolts, milliamperes) in enumerate(channels, start=1):
        files |= {f"in{i}_label": label, f"in{i}_input": millivolts, f"curr{i}_input": milliamperes}
    return {f"sys/class/hwmon/hwmon{number}/{name}": content for name, content in files.items()}


THOR = {"name": "ina238", "label": "VIN", "power1_input": 31500000}
BOARDS = [
    (  # Orin Nano; hwmon0 is no sensor of a rail
        {"sys/class/hwmon/hwmon0/name": "ucsi_source_psy_1"}
        | ina3221(1, ("VDD_IN", 5000, 1200), ("VDD_CPU_GPU_CV", 5000, 400), ("VDD_SOC", 5000, -8)),
        ["VDD_IN"], 6.0, "rail VDD_IN",
    ),
    (  # AGX Orin
        ina3221(2, ("VDD_GPU_SOC", 20000, 160), ("VDD_CPU_CV", 20000, 20),
                ("VIN_SYS_5V0", 5000, 600))
        | ina3221(3, ("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 100)),
        ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"], 7.1, "sum",
    ),
    (
        {f"sys/class/hwmon/hwmon4/{name}": content for name, content in THOR.items()}
        | ina3221(5, ("VDD_GPU", 12000, 500), ("VDD_CPU_SOC_MSS", 12000, 700)),
        ["VIN"], 31.5, "rail VIN",
    ),
    (ina3221(1, ("VDD_SOC", 5000, -8)), ["VDD_SOC"], -0.04, "sum"),  # an idle rail
]  # fmt: skip


@pytest.mark.parametrize(("files", "total", "watts", "note"), BOARDS)
def test_a_board_s_total_is_its_input_rail_or_the_sum(tmp_path, files, total, watts, note):
    write(tmp_path, files)
    sources = find_energy_sources(tmp_path)
    assert [rail.name for rail in sources.total] == total
    assert sum(rail.read() for rail in sources.total) == pytest.approx(watts)
    assert note in sources.note


def measure(moments, values, *, counts=False):
    """Joules of one rail over readings at given moments."""
    rails = [Rail(name="p", read=float, counts=counts)]
    return joules_of(rails, moments, [[value] for value in values])


@pytest.mark.parametrize(
    ("moments", "values", "counts", "joules"),
    [  # power by trapezoids over uneven moments, a counter by its differences
        ([0.0, 1.0, 3.0, 3.5], [2.0, 4.0, 4.0, 8.0], False, 3.0 + 8.0 + 3.0),
        ([0.0, 1.0, 2.0], [98.0, 99.5, 103.0], True, 5.0),
    ],
)
def test_readings_are_added_up(moments, values, counts, joules):
    assert measure(moments, values, counts=counts) == pytest.approx(joules)


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ([98.0, 99.5, 1.0, 2.0], True),  # it goes back
        ([5.0] * 40, True),  # it is stuck
        ([5.0] * 40, False),
        ([1.0, math.nan, 2.0], False),
    ],
)
def test_a_sensor_that_fails_gives_nothing_rather_than_zero(values, counts):
    assert measure([0.05 * index for index in range(len(values))], values, counts=counts) is None


def test_a_thread_reads_while_work_is_done():
    values = itertools.count(1.0)
    rail = Rail(name="a", read=lambda: next(values))
    work = lambda: any(next(values) % 50 == 0 for _ in range(999))  # noqa: E731
    result, seconds, joules = measure_energy([rail], work, interval=0.001)
    assert result
    assert min(seconds, joules) > 0.0
    assert measure_energy([], list, interval=0.001)[2] is None


def test_a_rail_that_cannot_be_read_gives_no_energy(tmp_path):
    write(tmp_path, dict.fromkeys(("sys/class/hwmon/hwmon0/power1_input",), 1))
    write(tmp_path, {"sys/class/hwmon/hwmon0/name": "ina238"})
    sources = find_energy_sources(tmp_path)
    (tmp_path / "sys/class/hwmon/hwmon0/power1_input").unlink()
    assert measure_energy(sources.total, list, interval=0.001)[2] is None


class Nvml:
    """Stands for the module pynvml; a figure that is a text is refused with it."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, clocks=(1800,), reasons=(0,), energy=(), start=""):
        self._clocks, self._reasons = list(clocks), list(reasons)
        self._energy, self._start = iter(energy), start
        self.opened = []

    def _give(self, value):
        if isinstance(value, list):
            value = value.pop(0) if len(value) > 1 else value[0]
        if isinstance(value, str):
            raise self.NVMLError(value)
        return value

    def nvmlInit(self):  # noqa: N802 - NVML's names
        self._give(self._start or 0)

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        self.opened.append(index)
        return index

    nvmlDeviceGetHandleByUUID = nvmlDeviceGetHandleByIndex  # noqa: N815

    def nvmlDeviceGetName(self, handle):  # noqa: N802
        return b"RTX 9999"

    def nvmlDeviceGetClockInfo(self, handle, kind):  # noqa: N802
        return self._give({1: self._clocks}[kind])

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):  # noqa: N802
        return self._give(self._reasons)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        return self._give(next(self._energy, "Not Supported"))


@pytest.fixture(autouse=True)
def visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def watch(nvml, readings=3, interval=0.0):
    gpu = GpuWatch(open_gpu(0, nvml), interval=interval)
    for _ in range(readings):
        gpu.read()
    conditions = gpu.conditions()
    return {reading.name: reading for reading in conditions.readings}, " ".join(conditions.notes)


def test_clocks_are_those_between_turns():
    readings, notes = watch(Nvml(clocks=(1800, 1790, 1795)))
    assert {name: (reading.value, reading.unit) for name, reading in readings.items()} == {
        "GPU": ("0: RTX 9999", ""),
        "GPU clock, lowest": (1790.0, "MHz"),
        "GPU clock, highest": (1800.0, "MHz"),
        "GPU throttled by": ("nothing", ""),
    }
    assert notes == ""
    assert watch(Nvml(clocks=(1800, 1)), interval=3600.0)[0]["GPU clock, lowest"].value == 1800.0


def test_throttling_is_noted_with_its_reason():
    readings, notes = watch(Nvml(clocks=(1800, 1700, 1200), reasons=(0, 0x4, 0x4 | 0x40)))
    assert readings["GPU throttled by"].value == "its power limit, its temperature, by hardware"
    assert "lowered by its power limit, in 2 of 3 readings" in notes
    assert "lowered by its temperature, by hardware, in 1 of 3" in notes
    assert "changed between 1200 and 1800 MHz" in notes


def test_clocks_of_an_idle_gpu_and_clocks_that_someone_set_are_no_throttling():
    assert watch(Nvml(clocks=(1800, 300, 1800), reasons=(0x2, 0x1, 0x100)))[1] == ""


REFUSED = "Insufficient Permissions"
FIGURES = ["GPU clock, lowest", "GPU clock, highest", "GPU throttled by"]


@pytest.mark.parametrize(
    ("figures", "names", "reason"),
    [
        ({"clocks": [REFUSED]}, FIGURES, f"NVML: {REFUSED}"),
        ({"reasons": [REFUSED]}, FIGURES, f"NVML: {REFUSED}"),
        ({"clocks": [0]}, FIGURES[:2], "no reading was taken"),
        ({"start": "Driver Not Loaded"}, ["GPU"], "NVML: Driver Not Loaded"),
    ],
)
def test_a_figure_that_is_refused_is_absent_with_the_reason(figures, names, reason):
    readings, notes = watch(Nvml(**figures))
    absent = {name: one for name, one in readings.items() if one.value is None}
    assert list(absent) == names
    assert all(one.reason == reason and "nvidia-smi" in one.command for one in absent.values())
    assert notes == ""


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


def test_a_gpu_s_energy_is_read_by_nvml(tmp_path):
    sources = find_energy_sources(tmp_path, Nvml(energy=itertools.count(5000, 250)))
    (gpu,) = sources.total
    assert gpu.counts
    assert gpu.read() == pytest.approx(5.25)
    assert "GPU alone" in sources.note


@pytest.mark.parametrize(
    ("nvml", "reason"), [(Nvml(), "Not Supported"), (None, "pip install nvidia-ml-py")]
)
def test_energy_that_nothing_gives_is_absent(tmp_path, monkeypatch, nvml, reason):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    sources = find_energy_sources(tmp_path, nvml)
    absent = {reading.name: reading for reading in sources.absent}
    assert sources.total == ()
    assert reason in absent["GPU energy"].reason
    assert "ina3221" in absent["board rails"].reason
    assert all(reading.command and reading.value is None for reading in sources.absent)
    if nvml is None:
        assert reason in watch(None)[0]["GPU"].reason
