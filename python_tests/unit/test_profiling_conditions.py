"""Conditions are read from the system's files; what is not there is absent, never zero."""

import dataclasses

import pytest

from zsseg_rt.profiling.conditions import compare_snapshots, take_snapshot


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


STAT = "cpu  {user} 0 100 {idle} 0 0 0 {steal} 0 0\ncpu0 1 2 3\n"
BEFORE = {
    "proc/stat": STAT.format(user=1000, idle=5000, steal=10),
    "proc/uptime": "100.00 180.00\n",
    "proc/pressure/cpu": "some avg10=1.10 avg60=0.0 avg300=0.0 total=1000000\nfull total=0\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2000000\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "3000000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "4\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "45500\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "-256000\n",
}
AFTER = {
    "proc/stat": STAT.format(user=1700, idle=5200, steal=110),
    "proc/uptime": "110.00 190.00\n",
    "proc/pressure/cpu": "some avg10=1.10 avg60=0.0 avg300=0.0 total=6000000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1000000\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "1000000\n",
    "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "7\n",
    "sys/class/thermal/thermal_zone0/temp": "81000\n",
}


@pytest.fixture
def found(tmp_path):
    write(tmp_path, BEFORE)
    before = take_snapshot(tmp_path)
    write(tmp_path, AFTER)
    return compare_snapshots(before, take_snapshot(tmp_path), waiting=0.74)


def test_figures_are_those_between_the_two_moments(found):
    values = {reading.name: reading.value for reading in found.readings}
    assert values["waiting for a CPU"] == 0.74
    assert values["CPU pressure"] == pytest.approx(0.5)
    assert values["CPUs in use"] == pytest.approx(0.8)
    assert values["steal"] == pytest.approx(0.1)
    assert values["CPU clock"] == 1000.0
    assert values["governor"] == "schedutil"
    assert values["cpu-thermal"] == 81.0
    assert "gpu-thermal" not in values  # it is switched off


def test_what_may_have_disturbed_is_noted(found):
    notes = " ".join(found.notes)
    assert "clock changed from 2500 to 1000 MHz" in notes
    assert "throttled 3 times" in notes
    assert "10% of the CPUs' time went to other virtual machines" in notes
    (clock,) = (r for r in found.readings if r.name == "CPU clock")
    assert clock.before == 2500.0


def test_what_is_not_there_is_absent_with_reason_and_command(tmp_path):
    empty = take_snapshot(tmp_path)
    found = compare_snapshots(empty, empty)
    assert len(found.readings) == 7
    for reading in found.readings:
        assert reading.value is None
        assert reading.reason
        assert reading.command
    assert found.notes == ()


@pytest.mark.parametrize("content", ["", "garbage\n", "-1 what\n"])
def test_sensors_that_give_no_number_are_absent(tmp_path, content):
    write(tmp_path, BEFORE)
    for name in BEFORE:
        if name.endswith(("temp", "cur_freq", "count", "pressure/cpu")):
            (tmp_path / name).write_text(content)
    broken = take_snapshot(tmp_path)
    assert broken.temperatures == {}
    assert broken.clocks_mhz == ()
    assert broken.throttle_events is None
    assert broken.pressure_us is None


def test_a_sensor_that_cannot_be_read_is_absent(tmp_path):
    write(tmp_path, BEFORE)
    zone = tmp_path / "sys/class/thermal/thermal_zone0/temp"
    zone.unlink()
    zone.mkdir()  # any read of it fails, also root's
    assert take_snapshot(tmp_path).temperatures == {}


def test_this_machine_has_conditions():
    before = take_snapshot()
    found = compare_snapshots(before, dataclasses.replace(take_snapshot()))
    names = [reading.name for reading in found.readings]
    assert "steal" in names
    assert before.cpu_ticks
