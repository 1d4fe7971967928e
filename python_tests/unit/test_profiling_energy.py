"""Energy is read from trees of files like those of real boards; what cannot be read is absent."""

import itertools

import pytest

from zsseg_rt.profiling.energy import EnergyMeter, EnergySources, Rail, find_energy_sources


def tree(root, folder, files):
    """Writes the files of one sensor."""
    path = root / "sys" / "class" / folder
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name).write_text(f"{content}\n")


def ina3221(root, number, *channels):
    """A sensor with channels of (label, millivolts, milliamperes)."""
    files = {"name": "ina3221", "in7_label": "sum of shunt voltages", "in7_input": 1234}
    for index, (label, millivolts, milliamperes) in enumerate(channels, start=1):
        files |= {
            f"in{index}_label": label,
            f"in{index}_input": millivolts,
            f"curr{index}_input": milliamperes,
        }
    tree(root, f"hwmon/hwmon{number}", files)


AGX_RAILS = ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"]


def orin_nano(root):
    tree(root, "hwmon/hwmon0", {"name": "ucsi_source_psy_1", "in1_input": 0, "curr1_input": 0})
    ina3221(root, 1, ("VDD_IN", 5000, 1200), ("VDD_CPU_GPU_CV", 5000, 400), ("VDD_SOC", 5000, -8))


def agx_orin(root):
    ina3221(
        root, 2, ("VDD_GPU_SOC", 20000, 160), ("VDD_CPU_CV", 20000, 20), ("VIN_SYS_5V0", 5000, 600)
    )
    ina3221(root, 3, ("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 100))


def thor(root):
    tree(root, "hwmon/hwmon4", {"name": "ina238", "label": "VIN", "power1_input": 31500000})
    ina3221(
        root,
        5,
        ("VDD_GPU", 12000, 500),
        ("VDD_CPU_SOC_MSS", 12000, 700),
        ("VIN_SYS_5V0", 5000, 900),
    )


@pytest.mark.parametrize(
    ("board", "total", "watts", "note"),
    [
        (orin_nano, ["VDD_IN"], 6.0, "rail VDD_IN"),
        (agx_orin, AGX_RAILS, 7.1, "sum"),
        (thor, ["VIN"], 31.5, "rail VIN"),
    ],
)  # fmt: skip
def test_a_board_s_total_is_its_input_rail_or_the_sum_of_its_rails(
    tmp_path, board, total, watts, note
):
    board(tmp_path)
    sources = find_energy_sources(tmp_path)
    assert [rail.name for rail in sources.total] == total
    assert sum(rail.read() for rail in sources.total) == pytest.approx(watts)
    assert note in sources.note


def test_an_idle_rail_may_read_below_zero(tmp_path):
    ina3221(tmp_path, 1, ("VDD_SOC", 5000, -8))
    (rail,) = find_energy_sources(tmp_path).total
    assert rail.read() == pytest.approx(-0.04)


class Nvml:
    """Stands for the module pynvml."""

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules=None):
        self._millijoules = millijoules

    def nvmlInit(self):  # noqa: N802 - NVML's name
        pass

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802 - NVML's name
        return index

    def nvmlDeviceGetName(self, handle):  # noqa: N802 - NVML's name
        return "a GPU"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802 - NVML's name
        if self._millijoules is None:
            raise self.NVMLError("Not Supported")
        return next(self._millijoules)


def test_a_gpu_is_read_by_nvml(tmp_path):
    sources = find_energy_sources(tmp_path, Nvml(itertools.count(5000, 250)))
    (gpu,) = sources.total
    assert gpu.counts
    assert gpu.read() == pytest.approx(5.25)
    assert "GPU alone" in sources.note


def test_nvml_that_starts_and_then_does_not_answer_is_absent(tmp_path):
    sources = find_energy_sources(tmp_path, Nvml())
    reasons = {reading.name: reading.reason for reading in sources.absent}
    assert sources.total == ()
    assert "Not Supported" in reasons["GPU energy"]
    assert "ina3221" in reasons["board rails"]
    assert all(reading.command and reading.value is None for reading in sources.absent)


def measure(rail, moments):
    """Energy of one rail over readings at given moments."""
    clock = iter(moments)
    meter = EnergyMeter(EnergySources(total=(rail,)), clock=lambda: next(clock))
    for _ in moments:
        meter.read()
    stretch = meter.stretch()
    return stretch.joules, stretch


def test_power_is_added_up_by_trapezoids_over_uneven_moments():
    watts = iter([2.0, 4.0, 4.0, 8.0])
    joules, stretch = measure(Rail(name="a", read=lambda: next(watts)), [0.0, 1.0, 3.0, 3.5])
    assert joules == pytest.approx(3.0 + 8.0 + 3.0)
    assert stretch.seconds == 3.5
    assert [power for _, power in stretch.watts] == pytest.approx([3.0, 4.0, 6.0])


def test_recorded_rails_are_within_a_percent():
    """A rail that swings as a frame rate does, read 20 times a second for ten seconds."""
    import math

    moments = [0.05 * index for index in range(201)]
    rows = iter(moments)
    rail = Rail(name="VDD_IN", read=lambda: 8.0 + 3.0 * math.sin(2 * math.pi * 0.7 * next(rows)))
    exact = 80.0 + 3.0 / (2 * math.pi * 0.7) * (1 - math.cos(2 * math.pi * 7))
    joules, _ = measure(rail, moments)
    assert joules == pytest.approx(exact, rel=0.01)


def test_a_counter_that_goes_back_gives_nothing():
    values = iter([98.0, 99.5, 1.0, 2.0])
    rail = Rail(name="p", read=lambda: next(values), counts=True)
    assert measure(rail, [0.0, 1.0, 2.0, 3.0])[0] is None


@pytest.mark.parametrize("counts", [True, False])
def test_a_stuck_sensor_gives_nothing_rather_than_zero(counts):
    rail = Rail(name="p", read=lambda: 5.0, counts=counts)
    joules, stretch = measure(rail, [0.05 * index for index in range(40)])
    assert joules is None
    assert stretch.watts == ()


def test_a_sensor_that_fails_once_gives_nothing():
    values = iter([1.0, OSError(5, "Input/output error"), 2.0])

    def read():
        value = next(values)
        if isinstance(value, Exception):
            raise value
        return value

    joules, _ = measure(Rail(name="p", read=read), [0.0, 1.0, 2.0])
    assert joules is None


def test_without_sources_there_is_no_total():
    meter = EnergyMeter(EnergySources(total=()), interval=0.001)
    meter.start()
    assert meter.stop().joules is None


def test_the_thread_reads_from_start_to_stop(tmp_path):
    values = itertools.count(1.0)
    sources = EnergySources(total=(Rail(name="a", read=lambda: next(values)),))
    meter = EnergyMeter(sources, interval=0.001)
    for _ in range(2):  # a second stretch starts afresh
        meter.start()
        while next(values) % 50:
            pass
        stretch = meter.stop()
        assert stretch.seconds > 0.0
        assert stretch.joules > 0.0
