"""The profiler's parts: estimates, turns, sensors of a machine, and what a report says of them."""

import itertools
import math
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

from support.errors import refused
from support.profiling import GivenTimes
from zsseg_rt.demo import demo_bundle
from zsseg_rt.errors import ArgumentError
from zsseg_rt.profiling.conditions import (
    Conditions,
    EnergyMeter,
    GpuWatch,
    NvmlGpu,
    Reading,
    compare_snapshots,
    find_energy_meter,
    joules_of,
    measure_energy,
    take_snapshot,
)
from zsseg_rt.profiling.estimates import (
    MOST_PAIRS,
    choose_basis,
    judge,
    percentile,
    percentile_interval,
    shift_estimate,
)
from zsseg_rt.profiling.page import report_tables
from zsseg_rt.profiling.profiler import Profiler
from zsseg_rt.profiling.report import OUTSIDE, NodeRow, kind_of
from zsseg_rt.profiling.turns import (
    StopRule,
    pace_in_turns,
    take_turns,
    take_turns_locally,
    turn_ms,
)
from zsseg_rt.profiling.worker import (
    LocalCandidate,
    Sample,
    Turn,
    TurnPlan,
    read_memory_mb,
    read_thread_times,
    settle_threads,
    waiting_share,
)
from zsseg_rt.profiling.workload import Variant


def skewed(count, seed=0):
    return [float(value) for value in np.random.default_rng(seed).lognormal(1.0, 0.6, count)]


@pytest.mark.parametrize(
    ("share", "least"), [(0.5, 6), (0.9, 30), (0.95, 60), (0.99, 300)], ids=str
)
def test_percentiles_are_samples_with_three_above_them(share, least):
    for count in (301, 1000):
        expected = np.percentile(skewed(count), 100 * share, method="inverted_cdf")
        assert percentile(skewed(count), share) == expected
    samples = list(range(least))
    assert percentile(samples[:-1], share) is None
    assert percentile(samples, share) == samples[-4]


@pytest.mark.parametrize(("count", "share"), [(20, 0.5), (20, 0.99), (173, 0.9), (700, 0.5)])
def test_a_percentile_s_interval_is_between_binomial_order_statistics(count, share):
    ordered = sorted(skewed(count))
    below = scipy.stats.binom(count, share)
    low = max((k for k in range(count + 1) if below.cdf(k - 1) <= 0.025), default=0)
    high = min((k for k in range(count + 2) if below.sf(k - 1) <= 0.025), default=count + 1)
    interval = percentile_interval(ordered[::-1], share)
    if low < 1 or high > count:
        assert interval is None
    else:
        assert interval == (ordered[low - 1], ordered[high - 1])


@pytest.mark.parametrize(("count", "method", "slack"), [
    (6, "exact", 1e-9), (7, "exact", 1e-9), (50, "exact", 1e-9),
    (51, "approx", 0.07), (200, "approx", 0.035),  # a tenth of the interval's width
])  # fmt: skip
def test_the_shift_s_interval_holds_what_wilcoxon_s_test_does_not_refute(count, method, slack):
    values = np.random.default_rng(count).normal(0.3, 1.0, count)
    estimate = shift_estimate([float(value) for value in values])
    correction = {"correction": True} if method == "approx" else {}

    def chance(shift):
        return scipy.stats.wilcoxon(values - shift, method=method, **correction).pvalue

    assert chance(estimate.low + slack) > 0.05 >= chance(estimate.low - slack)
    assert chance(estimate.high - slack) > 0.05 >= chance(estimate.high + slack)
    pairs = [(a + b) / 2 for i, a in enumerate(values) for b in values[i:]]
    assert estimate.value == pytest.approx(np.median(pairs), abs=1e-12)


def test_a_handful_of_rounds_has_no_interval_and_too_many_are_thinned():
    estimate = shift_estimate([0.1, 0.2, 0.3, 0.4, 0.5])
    assert (estimate.value, estimate.low, estimate.high) == (pytest.approx(0.3), None, None)
    assert judge([1.0] * 5, [2.0] * 5, basis="wall", threshold=0.02).verdict == "undecided"
    values = [float(index) for index in range(3 * MOST_PAIRS)]
    assert shift_estimate(values).value == pytest.approx(np.median(values), rel=1e-3)


@pytest.mark.parametrize(
    ("waiting", "on_gpu", "basis"),
    [(None, False, "wall"), (0.2, False, "wall"), (0.21, False, "cpu"), (0.74, True, "device")],
)
def test_wall_time_is_compared_unless_threads_waited(waiting, on_gpu, basis):
    assert choose_basis(waiting, on_gpu=on_gpu) == basis


def rounds(change, spread, count=100, seed=0):
    """Times whose ratio is a change, give or take a spread, on a machine that varies by half."""
    generator = np.random.default_rng(seed)
    base = generator.uniform(5.0, 10.0, count)
    other = base * (1.0 + change) * np.exp(generator.normal(0.0, spread, count))
    return [float(value) for value in base], [float(value) for value in other]


@pytest.mark.parametrize(
    ("change", "spread", "verdict"),
    [
        (0.10, 0.05, "slower"), (-0.10, 0.05, "faster"), (0.0, 0.02, "equal"),
        (0.01, 0.01, "equal"), (0.02, 0.05, "undecided"), (0.0, 0.5, "undecided"),
    ],
)  # fmt: skip
def test_verdicts(change, spread, verdict):
    base, other = rounds(change, spread)
    forth = judge(base, other, basis="wall", threshold=0.02)
    assert forth.verdict == verdict
    assert forth.low < forth.change < forth.high
    assert (forth.rounds_needed is None) or verdict == "undecided"
    back = judge(other, base, basis="wall", threshold=0.02)
    opposite = {"slower": "faster", "faster": "slower"}
    assert back.verdict == opposite.get(verdict, verdict)
    assert (1 + forth.change) * (1 + back.change) == pytest.approx(1.0)


def test_an_undecided_verdict_names_enough_rounds_to_be_decided():
    first = judge(*rounds(0.06, 0.3, seed=1), basis="wall", threshold=0.02)
    assert first.verdict == "undecided"
    count = 3 * first.rounds_needed
    again = [rounds(first.change, 0.3, count, seed) for seed in range(8)]
    verdicts = [judge(*pair, basis="wall", threshold=0.02).verdict for pair in again]
    assert verdicts.count("undecided") <= 2


@pytest.mark.parametrize(
    ("base", "other", "problem"),
    [([], [], "rounds"), ([1.0], [1.0, 2.0], "rounds"), ([1.0], [0.0], "times")],
)
def test_what_cannot_be_compared_is_refused(base, other, problem):
    with refused(ArgumentError, problem):
        judge(base, other, basis="wall", threshold=0.02)


NO_PAUSE = TurnPlan(pause_ms=0.0)
UNBOUNDED = math.inf


def noisy(level, seed):
    generator = np.random.default_rng(seed)
    return [float(ms) for ms in level * np.exp(generator.normal(0.0, 0.05, 500))]


def rounds_of(*candidates, count=20, **rule):
    rule = {"max_seconds": UNBOUNDED, "max_rounds": count, "half_width": None} | rule
    return take_turns(candidates, NO_PAUSE, StopRule(**rule), seed=1)


def test_every_candidate_takes_one_turn_a_round_in_changing_order():
    order = []

    class Noted(GivenTimes):
        def turn(self, plan):
            order.append(self.name)
            return super().turn(plan)

    names = ["a", "b", "c"]
    noted = [Noted(name, [1.0]) for name in names]
    taken = rounds_of(*noted, count=30)
    assert noted[0].settled == 30  # threads, after each turn
    by_round = [tuple(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert all(sorted(one) == names for one in by_round)
    assert set(by_round) == set(itertools.permutations(names))
    assert taken.count == 30
    assert len(taken.warm("a")) == len(taken.cold("c")) == 30
    assert taken.median_ms("a") == taken.median_ms("b", cold=True) == 2.0  # on the device


def test_rounds_end_when_the_interval_is_narrow_enough():
    pair = GivenTimes("a", noisy(2.0, 1)), GivenTimes("b", noisy(2.2, 2))
    taken = rounds_of(*pair, count=400, half_width=0.01)
    difference = taken.difference("a", "b", 0.02)
    assert difference.low < 0.1 < difference.high
    assert 50 < taken.count == difference.rounds < 400
    assert difference.high - difference.change <= 0.01
    assert rounds_of(*pair, count=60, half_width=0.001).count == 60


def test_a_candidate_that_fails_drops_out_and_the_others_go_on():
    names = ["a", "b", "c"]
    taken = rounds_of(*(GivenTimes(n, [1.0], fails_in=4 if n == "b" else None) for n in names))
    assert set(taken.failures) == {"b"}
    assert "SIGKILL" in taken.failures["b"]
    assert len(taken.warm("b")) == 3
    assert len(taken.warm("a")) == len(taken.warm("c")) == 20
    assert taken.difference("a", "b", 0.02).rounds == 3
    taken = rounds_of(GivenTimes("a", [1.0], fails_in=1), GivenTimes("b", [1.0], fails_in=2))
    assert set(taken.failures) == {"a", "b"}
    assert taken.difference("a", "b", 0.02) is None
    assert rounds_of(GivenTimes("a", [1.0]), max_seconds=0.0).count == 0
    taken = rounds_of(GivenTimes("a", [1.0]), GivenTimes("b", [1.0], stops_in=6))  # by Ctrl-C
    assert taken.interrupted
    assert len(taken.warm("b")) == 5


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_names_must_be_distinct(names):
    with refused(ArgumentError, "candidates"):
        rounds_of(*(GivenTimes(name, [1.0]) for name in names))


def test_a_turn_counts_by_its_median_or_its_mean_cpu_time():
    turn = Turn(None, (Sample(1.0, 1.0), Sample(2.0, 4.0), Sample(90.0, 4.0)))
    assert turn_ms(turn, "wall") == turn_ms(turn, "device") == 2.0
    assert turn_ms(turn, "cpu") == 3.0


def test_a_turn_has_a_cold_call_warming_and_as_many_calls_as_were_allowed():
    calls = []
    one = LocalCandidate(
        "a", lambda: calls.append(1) or float(len(calls)), stages_of=lambda result: {"all": result}
    )
    turn = one.turn(TurnPlan(pause_ms=0.0, warming_ms=5.0, measuring_ms=1e6, most_calls=4))
    assert turn.cold.stages == {"all": 1.0}
    assert len(turn.warm) == 4
    assert turn.warm[-1].stages == {"all": float(len(calls))}
    assert len(calls) > 5


def test_what_warms_up_a_gpu_is_waited_for():
    """Calls only enqueue; the measured one would wait for all of them."""
    waiting = []

    class Timer:
        begin = staticmethod(lambda: None)

        def end_ms(self):
            waiting.clear()
            return 1.0

    queued = []
    call = lambda: (queued.append(len(waiting)), waiting.append(1))  # noqa: E731
    LocalCandidate("a", call, device_timer=Timer()).turn(TurnPlan(warming_ms=1.0))
    assert len(queued) > 2
    assert set(queued) == {0}


def test_a_result_timed_on_a_gpu_gives_the_device_s_time():
    call = lambda: sum(range(1_000_000)) and {"total": 4.5, "a": 4.5}  # noqa: E731
    sample = LocalCandidate("a", call, stages_of=dict, device_stage="total").measure()
    assert sample.device_ms == 4.5
    assert min(sample.wall_ms, sample.cpu_ms) > 1.0  # of the call itself


def test_frames_that_fall_due_wait_for_the_one_before():
    """The first frame holds up the next ones; a clock that waited for it would not see that."""
    gate = threading.Event()

    def slow_first():
        if not gate.is_set():
            gate.set()
            threading.Event().wait(0.5)

    frames = LocalCandidate("slow", slow_first).pace(rate=100.0, seconds=0.2)
    assert len(frames) == 20
    assert frames[0][1] >= 499.0
    assert all(latency >= service for latency, service in frames)
    assert frames[10][0] >= 390.0  # it fell due 100 ms after the first began


def test_pacing_shares_the_time_and_leaves_out_what_fails():
    candidates = [GivenTimes("a", [1.0]), GivenTimes("b", [1.0], fails_in=9)]
    paced = pace_in_turns(candidates, rate=30.0, seconds=3.0)
    assert {name: len(frames) for name, frames in paced.items()} == {"a": 90}


def test_threads_that_wait_are_counted_from_when_they_began():
    before = {"1": (100, 10), "2": (50, 0)}
    after = {"1": (200, 40), "3": (50, 20)}
    assert waiting_share(before, after) == pytest.approx(50 / 200)
    assert waiting_share(after, after) is None


def test_threads_settle_once_none_runs():
    stop = threading.Event()
    thread = threading.Thread(target=lambda: all(not stop.is_set() for _ in iter(int, 1)))
    thread.start()
    assert not settle_threads(seconds=0.02)
    stop.set()
    thread.join()
    assert settle_threads(seconds=60.0)


def test_this_process_has_threads_and_memory():
    assert sum(ran for ran, _ in read_thread_times().values()) > 0
    now, peak = read_memory_mb()
    assert 0 < now <= peak
    assert read_memory_mb(2**22 + 1) is None
    assert read_thread_times(2**22 + 1) == {}


def test_local_candidates_take_as_many_rounds_as_asked_for():
    result = SimpleNamespace(times={"total": 1.0})
    calls = {"a": lambda: result, "b": lambda: result}
    taken = take_turns_locally(calls, rounds=3, stages=True)
    assert taken.count == 3
    assert [len(turn.warm) for turn in taken.turns["a"]] == [1, 1, 1]
    assert taken.warm("b")[0].stages == {"total": 1.0}


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
        6.0, "rail VDD_IN",
    ),
    (  # AGX Orin
        ina3221(2, ("VDD_GPU_SOC", 20000, 160), ("VDD_CPU_CV", 20000, 20),
                ("VIN_SYS_5V0", 5000, 600))
        | ina3221(3, ("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 100)),
        7.1, "sum of the module's rails (VDD_GPU_SOC, VDD_CPU_CV, VIN_SYS_5V0, VDDQ_VDD2_1V8AO)",
    ),
    (
        {f"sys/class/hwmon/hwmon4/{name}": content for name, content in THOR.items()}
        | ina3221(5, ("VDD_GPU", 12000, 500), ("VDD_CPU_SOC_MSS", 12000, 700)),
        31.5, "rail VIN",
    ),
    (ina3221(1, ("VDD_SOC", 5000, -8)), -0.04, "sum of the module's rails (VDD_SOC)"),  # idle
]  # fmt: skip


@pytest.mark.parametrize(("files", "watts", "source"), BOARDS)
def test_a_board_s_total_is_its_input_rail_or_the_sum(tmp_path, files, watts, source):
    write(tmp_path, files)
    meter, absent = find_energy_meter(tmp_path)
    assert sum(meter.read()) == pytest.approx(watts)
    assert meter.source == source
    assert absent == ()


@pytest.mark.parametrize(
    ("moments", "values", "counts", "joules"),
    [  # power by trapezoids over uneven moments, a counter by its differences
        ([0.0, 1.0, 3.0, 3.5], [2.0, 4.0, 4.0, 8.0], False, 3.0 + 8.0 + 3.0),
        ([0.0, 1.0, 2.0], [98.0, 99.5, 103.0], True, 5.0),
        (range(4), [98.0, 99.5, 1.0, 2.0], True, None),  # it goes back
        (range(40), [5.0] * 40, True, None),  # it is stuck
        (range(40), [5.0] * 40, False, None),
        (range(3), [1.0, math.nan, 2.0], False, None),
        (range(3), [(1.0, 2.0), (3.0, 2.0), (2.0, 2.0)], False, 4.0 + 4.5),  # rails
        (range(40), [(watts, 5.0) for watts in range(40)], False, None),  # one is stuck
    ],
)
def test_readings_are_added_up_or_give_nothing(moments, values, counts, joules):
    values = [value if isinstance(value, tuple) else (value,) for value in values]
    assert joules_of(moments, values, counts=counts) == pytest.approx(joules)


def test_a_thread_reads_while_work_is_done(tmp_path):
    values = itertools.count(1.0)
    work = lambda: any(next(values) % 50 == 0 for _ in range(999))  # noqa: E731
    result, seconds, joules = measure_energy(
        EnergyMeter("a", lambda: [next(values)]), work, interval=0.001
    )
    assert result
    assert min(seconds, joules) > 0.0
    lost = EnergyMeter("b", lambda: [float((tmp_path / "lost").read_text())])
    assert measure_energy(lost, list, interval=0.001)[2] is None


class Nvml:
    """Stands for the module pynvml, with values in turn; a text is what it refuses with."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, clocks=(1800,), reasons=(0,), energy=("Not Supported",), start=0):
        self.opened = []
        self._values = {
            "nvmlInit": [start],
            "nvmlDeviceGetName": [b"RTX 9999"],
            "nvmlDeviceGetClockInfo": list(clocks),
            "nvmlDeviceGetCurrentClocksThrottleReasons": list(reasons),
            "nvmlDeviceGetTotalEnergyConsumption": list(energy),
        }

    def __getattr__(self, name):
        def answer(*arguments):
            if "HandleBy" in name:
                self.opened.append(arguments[0])
            values = self._values.get(name, [0])
            value = values.pop(0) if len(values) > 1 else values[0]
            if isinstance(value, str):
                raise self.NVMLError(value)
            return value

        return answer


@pytest.fixture(autouse=True)
def visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def watch(nvml, readings=3, interval=0.0):
    gpu = GpuWatch(0, nvml, interval=interval)
    for _ in range(readings):
        gpu.read()
    conditions = gpu.conditions()
    return {reading.name: reading for reading in conditions.readings}, " ".join(conditions.notes)


def test_clocks_are_those_between_turns_and_throttling_is_noted_with_its_reason():
    readings, notes = watch(Nvml(clocks=(1800, 1790, 1795)))
    assert {name: (reading.value, reading.unit) for name, reading in readings.items()} == {
        "GPU": ("0: RTX 9999", ""),
        "GPU clock, lowest": (1790.0, "MHz"),
        "GPU clock, highest": (1800.0, "MHz"),
        "GPU throttled by": ("nothing", ""),
    }
    assert notes == ""
    assert watch(Nvml(clocks=(1800, 1)), interval=3600.0)[0]["GPU clock, lowest"].value == 1800.0
    readings, notes = watch(Nvml(clocks=(1800, 1700, 1200), reasons=(0, 0x4, 0x4 | 0x40)))
    assert readings["GPU throttled by"].value == "its power limit, its temperature, by hardware"
    assert "lowered by its power limit, in 2 of 3 readings" in notes
    assert "changed between 1200 and 1800 MHz" in notes
    # an idle GPU's clocks, and clocks that someone set
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
    assert NvmlGpu(index, nvml).name.endswith(": RTX 9999")
    assert nvml.opened == [opened]


def test_a_gpu_s_energy_is_read_by_nvml(tmp_path):
    gpu, _ = find_energy_meter(tmp_path, Nvml(energy=(5000, 5250)))
    assert gpu.counts
    assert gpu.read() == pytest.approx([5.25])
    assert gpu.source == "GPU alone, by NVML"


@pytest.mark.parametrize(
    ("nvml", "reason"), [(Nvml(), "Not Supported"), (None, "pip install nvidia-ml-py")]
)
def test_energy_that_nothing_gives_is_absent(tmp_path, monkeypatch, nvml, reason):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter, readings = find_energy_meter(tmp_path, nvml)
    absent = {reading.name: reading for reading in readings}
    assert meter is None
    assert reason in absent["GPU energy"].reason
    assert "ina3221" in absent["board rails"].reason
    assert all(reading.command and reading.value is None for reading in readings)
    if nvml is None:
        assert reason in watch(None)[0]["GPU"].reason


def measured(*configs, waiting=0.0, nodes=None, **fields):
    """Variants whose frames take given times, the first of them 2 ms."""
    names = [f"v{index}" for index in range(len(configs))]
    times = [[2.0, 2.01, 1.99], [3.0, 3.01, 2.99]]
    candidates = [
        GivenTimes(name, ms, waiting=waiting) for name, ms in zip(names, times, strict=False)
    ]
    stop = StopRule(max_seconds=60.0, max_rounds=20, half_width=None)
    rounds = take_turns(candidates, TurnPlan(pause_ms=0.0), stop)
    variants = tuple(
        Variant(name=name, bundle=demo_bundle("scenes"), config=config)
        for name, config in zip(names, configs, strict=True)
    )
    work = SimpleNamespace(num_classes=lambda _: 1, frame_sizes=lambda _: "1x1")
    profiler = Profiler(
        variants=variants, workload=work, source="", command="", rounds=rounds, **fields
    )
    profiler.reports["v0"].nodes = tuple(
        NodeRow(graph=graph, name=name, type=kind, kind=kind_of(name, kind), ms=ms)
        for graph, some in (nodes or {}).items()
        for name, kind, ms in some
    )
    return profiler.report()


@pytest.mark.parametrize(
    ("threads", "waiting", "noted"),
    [((1, 2), 0.5, True), ((None, 2), 0.5, True), ((1, 2), 0.0, False), ((2, 2), 0.5, False)],
)
def test_cpu_time_of_other_numbers_of_threads_is_warned_of(threads, waiting, noted):
    report = measured(*({"num_threads": n} if n else {} for n in threads), waiting=waiting)
    assert [one.difference.verdict for one in report.comparisons] == ["slower"]
    notes = [note for note in report.notes if "adds up over threads" in note]
    assert len(notes) == noted
    assert all(note.startswith("v1: ") for note in notes)


def test_a_report_has_what_the_gpu_did_also_after_ctrl_c():
    conditions = Conditions(readings=(Reading(name="GPU clock", value=1.0),), notes=("it was hot",))
    report = measured({}, conditions=[conditions], interrupted=True)
    assert conditions.readings[0] in report.conditions.readings
    assert "it was hot" in report.notes
    assert any("interrupted" in note for note in report.notes)


def test_nodes_are_listed_by_graph_with_the_rest_last():
    nodes = {
        "image_encoder": [["a/MatMul", "MatMul", 1.0], ["a/Reshape", "", 2.0], [OUTSIDE, "", 9.0]],
        "decoder": [["b/MatMul", "MatMul", 5.0], [OUTSIDE, "", 6.0]],
    }
    tables = {t.title: t for t in report_tables(measured({}, nodes=nodes))}
    assert [row[:3] for row in tables["nodes of v0 by kind"].rows] == [
        ("image_encoder", "layout", "2.000"), ("image_encoder", "linear", "1.000"),
        ("image_encoder", OUTSIDE, "9.000"),
        ("decoder", "linear", "5.000"), ("decoder", OUTSIDE, "6.000"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "type_", "kind"),
    [
        ("blocks.3.mlp.c_fc/Add", "FullyConnected", "linear"),
        ("layer1.0.conv1/Conv", "Convolution", "linear"),
        ("blocks.11/attention/MatMul", "MatMul", "attention"),
        ("", "ScaledDotProductAttention", "attention"),
        ("node_scaled_dot_product_attention", "Subgraph", "attention"),
        ("MVN_33", "MVN", "norm"), ("ln_pre/LayerNormalization", "Sub", "norm"),
        ("decoder.layers.2.norm/Concat", "Concat", "layout"),
        ("", "Reorder", "layout"), ("/Transpose", "", "layout"),
        ("blocks.0/Add", "Subgraph", "other"), ("blocks.1/Reshape + blocks.2/Add", "Sub", "other"),
        (OUTSIDE, "", OUTSIDE),
    ],
)  # fmt: skip
def test_a_node_has_a_kind(name, type_, kind):
    assert kind_of(name, type_) == kind
