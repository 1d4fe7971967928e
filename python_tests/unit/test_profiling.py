"""The profiler's parts: estimates, turns, processes, sensors of a machine, what a report says."""

import itertools
import math
import os
import signal
import sys
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.stats

from support.errors import refused
from zsseg_rt.demo import demo_bundle, demo_classes, demo_photos
from zsseg_rt.errors import ArgumentError
from zsseg_rt.photos import read_photo
from zsseg_rt.profiling import conditions, turns, worker
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
from zsseg_rt.profiling.workload import Variant, Workload


def skewed(count, seed=0):
    return [float(value) for value in np.random.default_rng(seed).lognormal(1.0, 0.6, count)]


@pytest.mark.parametrize(("share", "least"), [(0.5, 6), (0.9, 30), (0.95, 60), (0.99, 300)])
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
    few = judge([1.0] * 5, [2.0] * 5, basis="wall", threshold=0.02)
    assert (few.verdict, few.rounds_needed) == ("undecided", 6)
    values = [float(index) for index in range(3 * MOST_PAIRS)]
    assert shift_estimate(values).value == pytest.approx(np.median(values), rel=1e-3)
    for base, other, problem in (([], [], "rounds"), ([1.0], [1.0, 2.0], "rounds"),
                                 ([1.0], [0.0], "times")):  # fmt: skip
        with refused(ArgumentError, problem):
            judge(base, other, basis="wall", threshold=0.02)


def test_wall_time_is_compared_unless_threads_waited():
    assert [choose_basis(share) for share in (None, 0.2, 0.21)] == ["wall", "wall", "cpu"]
    assert choose_basis(0.74, on_gpu=True) == "device"
    turn = worker.Turn(
        None, (worker.Sample(1.0, 1.0), worker.Sample(2.0, 4.0), worker.Sample(90.0, 4.0))
    )
    assert [turns.turn_ms(turn, basis) for basis in ("wall", "device", "cpu")] == [2.0, 2.0, 3.0]
    before = {"1": (100, 10), "2": (50, 0)}
    after = {"1": (200, 40), "3": (50, 20)}  # threads are counted from when they began
    assert worker.waiting_share(before, after) == pytest.approx(50 / 200)
    assert worker.waiting_share(after, after) is None


def rounds(change, spread, count=100, seed=0):
    """Times whose ratio is a change, give or take a spread, on a machine that varies by half."""
    generator = np.random.default_rng(seed)
    base = generator.uniform(5.0, 10.0, count)
    other = base * (1.0 + change) * np.exp(generator.normal(0.0, spread, count))
    return [float(value) for value in base], [float(value) for value in other]


@pytest.mark.parametrize(("change", "spread", "verdict"), [
    (0.10, 0.05, "slower"), (-0.10, 0.05, "faster"), (0.0, 0.02, "equal"),
    (0.01, 0.01, "equal"), (0.02, 0.05, "undecided"), (0.0, 0.5, "undecided"),
])  # fmt: skip
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


class GivenTimes:
    """Takes turns of given milliseconds; waits for CPUs for a given share of the time."""

    on_gpu = False

    def __init__(self, name, times=(1.0,), *, waiting=0.0, fails_in=None, stops_in=None):
        self.name, self._times, self._waiting = name, itertools.cycle(times), waiting
        self._fails_in, self._stops_in = fails_in, stops_in
        self.turns = self.settled = self.ran = 0

    def turn(self, plan):
        self.turns += 1
        if self.turns == self._fails_in:
            raise turns.CandidateError(f"{self.name}: its process was killed by SIGKILL.")
        if self.turns == self._stops_in:
            raise KeyboardInterrupt
        ms = next(self._times)
        self.ran += round(ms * 1e6)
        sample = worker.Sample(wall_ms=3.0 * ms, cpu_ms=ms, device_ms=2.0 * ms)
        return worker.Turn(sample if plan.cold else None, (sample,))

    def pace(self, rate, seconds):
        if self._fails_in:
            raise turns.CandidateError(f"{self.name}: ended")
        return [(1.0, 1.0)] * round(rate * seconds)

    def settle(self):
        self.settled += 1

    def thread_times(self):
        return {"1": (self.ran, round(self.ran * self._waiting / (1.0 - self._waiting)))}


def rounds_of(*candidates, count=20, **rule):
    rule = {"max_seconds": math.inf, "max_rounds": count, "half_width": None} | rule
    return turns.take_turns(
        candidates, worker.TurnPlan(pause_ms=0.0), turns.StopRule(**rule), seed=1
    )


def test_every_candidate_takes_one_turn_a_round_in_changing_order():
    order = []

    class Noted(GivenTimes):
        def turn(self, plan):
            order.append(self.name)
            return super().turn(plan)

    names = ["a", "b", "c"]
    noted = [Noted(name) for name in names]
    taken = rounds_of(*noted, count=30)
    assert noted[0].settled == 30  # threads, after each turn
    by_round = [tuple(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert all(sorted(one) == names for one in by_round)
    assert set(by_round) == set(itertools.permutations(names))
    assert taken.count == 30
    assert len(taken.warm("a")) == len(taken.cold("c")) == 30
    assert taken.median_ms("a") == taken.median_ms("b", cold=True) == 2.0  # on the device


def test_rounds_end_when_the_interval_is_narrow_enough():
    base, other = rounds(0.1, 0.07, 500)
    pair = GivenTimes("a", base), GivenTimes("b", other)
    taken = rounds_of(*pair, count=400, half_width=0.01)
    difference = taken.difference("a", "b", 0.02)
    assert difference.low < 0.1 < difference.high
    assert 50 < taken.count == difference.rounds < 400
    assert difference.high - difference.change <= 0.01
    assert rounds_of(*pair, count=60, half_width=0.001).count == 60


def test_a_candidate_that_fails_drops_out_and_the_others_go_on():
    taken = rounds_of(GivenTimes("a"), GivenTimes("b", fails_in=4), GivenTimes("c"))
    assert set(taken.failures) == {"b"}
    assert "SIGKILL" in taken.failures["b"]
    assert len(taken.warm("b")) == 3
    assert len(taken.warm("a")) == len(taken.warm("c")) == 20
    assert taken.difference("a", "b", 0.02).rounds == 3
    taken = rounds_of(GivenTimes("a", fails_in=1), GivenTimes("b", fails_in=2))
    assert set(taken.failures) == {"a", "b"}
    assert taken.difference("a", "b", 0.02) is None
    assert rounds_of(GivenTimes("a"), max_seconds=0.0).count == 0
    taken = rounds_of(GivenTimes("a"), GivenTimes("b", stops_in=6))  # by Ctrl-C
    assert taken.interrupted
    assert len(taken.warm("b")) == 5
    for names in ("", "aa"):
        with refused(ArgumentError, "candidates"):
            rounds_of(*map(GivenTimes, names))


def test_a_turn_has_a_cold_call_warming_and_as_many_calls_as_were_allowed():
    calls = []
    one = worker.LocalCandidate(
        "a", lambda: calls.append(1) or float(len(calls)), stages_of=lambda result: {"all": result}
    )
    turn = one.turn(worker.TurnPlan(pause_ms=0.0, warming_ms=5.0, measuring_ms=1e6, most_calls=4))
    assert turn.cold.stages == {"all": 1.0}
    assert len(turn.warm) == 4
    assert turn.warm[-1].stages == {"all": float(len(calls))}
    assert len(calls) > 5


def test_what_warms_up_a_gpu_is_waited_for_and_its_time_is_the_device_s():
    """Calls only enqueue; the measured one would wait for all of them."""
    waiting = []

    class Timer:
        begin = staticmethod(lambda: None)

        def end_ms(self):
            waiting.clear()
            return 1.0

    queued = []
    call = lambda: (queued.append(len(waiting)), waiting.append(1))  # noqa: E731
    worker.LocalCandidate("a", call, device_timer=Timer()).turn(worker.TurnPlan(warming_ms=1.0))
    assert len(queued) > 2
    assert set(queued) == {0}
    call = lambda: sum(range(1_000_000)) and {"total": 4.5, "a": 4.5}  # noqa: E731
    sample = worker.LocalCandidate("a", call, stages_of=dict, device_stage="total").measure()
    assert sample.device_ms == 4.5
    assert min(sample.wall_ms, sample.cpu_ms) > 1.0  # of the call itself


def test_frames_that_fall_due_wait_for_the_one_before():
    """The first frame holds up the next ones; a clock that waited for it would not see that."""
    gate = threading.Event()

    def slow_first():
        if not gate.is_set():
            gate.set()
            threading.Event().wait(0.5)

    frames = worker.LocalCandidate("slow", slow_first).pace(rate=100.0, seconds=0.2)
    assert len(frames) == 20
    assert frames[0][1] >= 499.0
    assert all(latency >= service for latency, service in frames)
    assert frames[10][0] >= 390.0  # it fell due 100 ms after the first began

    paced = turns.pace_in_turns(
        [GivenTimes("a"), GivenTimes("b", fails_in=9)], rate=30.0, seconds=3.0
    )
    assert {name: len(frames) for name, frames in paced.items()} == {"a": 90}


def test_this_process_has_threads_that_settle_and_memory():
    stop = threading.Event()
    thread = threading.Thread(target=lambda: all(not stop.is_set() for _ in iter(int, 1)))
    thread.start()
    assert not worker.settle_threads(seconds=0.02)
    stop.set()
    thread.join()
    assert worker.settle_threads(seconds=60.0)
    assert sum(ran for ran, _ in worker.read_thread_times().values()) > 0
    now, peak = worker.read_memory_mb()
    assert 0 < now <= peak
    assert worker.read_memory_mb(2**22 + 1) is None
    assert worker.read_thread_times(2**22 + 1) == {}


def test_local_candidates_take_as_many_rounds_as_asked_for():
    result = SimpleNamespace(times={"total": 1.0})
    calls = {"a": lambda: result, "b": lambda: result}
    taken = turns.take_turns_locally(calls, rounds=3, stages=True)
    assert taken.count == 3
    assert [len(turn.warm) for turn in taken.turns["a"]] == [1, 1, 1]
    assert taken.warm("b")[0].stages == {"total": 1.0}


# For a child process; beside it is a module that no interpreter of another checkout may find.
CANDIDATES = """
import itertools, os
from importlib.util import find_spec

def counter():
    assert find_spec("report") is find_spec("turns") is None  # the worker's own neighbours
    return itertools.count().__next__

def killed(number):
    calls = itertools.count(1)
    return lambda: next(calls) == 6 and os.kill(os.getpid(), number)

def failing():
    calls = itertools.count()
    return lambda: 1 // (not next(calls))

def ending():
    raise SystemExit("out of ideas")

def foreign():
    import turtle_of_no_package

class Choosing:
    described = {"precision": "exact"}
    def __init__(self, numbers):
        self.select(numbers)
    def select(self, numbers):
        self.left = list(numbers)
    def __call__(self):
        self.last = self.left.pop(0)
    def labels(self, index):
        return [self.last, index]
"""
NO_WAIT = worker.TurnPlan(pause_ms=0.0, measuring_ms=0.0)


@pytest.fixture
def child(tmp_path):
    (tmp_path / "candidates.py").write_text(CANDIDATES)
    opened = []

    def open_one(function, python=None, **arguments):
        spec = {"file": str(tmp_path / "candidates.py"), "function": function}
        spec["arguments"] = arguments
        opened.append(turns.ChildCandidate(function, spec, python=python))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close(at_once=True)


def test_a_child_takes_turns_with_its_own_threads_and_memory(child):
    one = child("counter")
    turn = one.turn(NO_WAIT)
    assert turn.cold.wall_ms >= 0.0
    assert len(turn.warm) == 1
    assert sum(ran for ran, _ in one.thread_times().values()) > 0
    assert one.peak_memory_mb() > 1.0
    assert one.process != os.getpid()
    one.settle()
    one.close()
    one.close()


def test_an_engine_as_a_child_tells_its_cold_start_its_stages_and_its_self_check(tmp_path):
    frame, classes = read_photo(demo_photos("scenes")[0]), demo_classes("scenes")
    config = {"cache_dir": str(tmp_path / "cache"), "num_threads": 1, "device": "cpu"}
    variant = Variant(name="demo", bundle=demo_bundle("scenes"), config=config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cv2", None)  # frames that keep their size do not need it
        spec = Workload(tmp_path, [frame], classes).spec(variant)
    with refused(turns.CandidateError, "engine"):
        turns.ChildCandidate("engine", {**spec, "config": {"precision": "int8", "device": "cpu"}})
    one = turns.ChildCandidate("engine", {**spec, "streams": 2})
    try:
        assert set(one.started) == {"import_s", "load_s", "classes_s", "first_frame_s"}
        assert all(seconds > 0.0 for seconds in one.started.values())
        assert (one.described["backend"], one.described["classes"]) == ("openvino", len(classes))
        assert one.request("check") == ""
        assert one.warm_up() > 0.0
        sample = one.turn(NO_WAIT).warm[0]
        assert sample.stages["image_encoder"] > 0.0
        parts = sum(ms for name, ms in sample.stages.items() if name != "total")
        assert parts == pytest.approx(sample.stages["total"], rel=1e-6)
        assert sample.stages["total"] <= sample.wall_ms
        assert len(one.pace(200.0, 0.02)) == 4
        one.save_labels(tmp_path / "labels.npy")
        assert np.load(tmp_path / "labels.npy").shape == frame.shape[:2]
    finally:
        one.close()


def test_a_function_s_candidate_can_be_given_other_work(child, tmp_path):
    one = child("Choosing", numbers=[1, 2])
    assert one.described == {"precision": "exact"}
    assert one.select(numbers=[7, 8]) > 0.0
    one.save_labels(tmp_path / "labels.npy", 5)
    assert np.load(tmp_path / "labels.npy").tolist() == [7, 5]


def test_what_cannot_be_opened_or_called_says_why(child, tmp_path, monkeypatch):
    with pytest.raises(turns.CandidateError, match="ending: its process ended .* out of ideas"):
        child("ending")
    with pytest.raises(turns.CandidateError, match="counter: cannot run /no/python"):
        child("counter", "/no/python")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # which another interpreter is not given
    (tmp_path / "turtle_of_no_package.py").touch()
    with refused(turns.CandidateError, "foreign"):
        child("foreign", sys.executable)
    one = child("failing")
    for _ in range(2):  # it goes on answering
        with refused(turns.CandidateError, "failing"):
            one.turn(NO_WAIT)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_killed_child_is_named_with_its_signal_and_the_others_finish(child, name):
    stop = turns.StopRule(max_seconds=60.0, max_rounds=5, half_width=None)
    doomed = child("killed", number=int(getattr(signal, name)))
    taken = turns.take_turns((child("counter"), doomed), NO_WAIT, stop)
    assert list(taken.failures) == ["killed"]
    assert f"killed: its process was killed by {name}." in taken.failures["killed"]
    assert ("memory" in taken.failures["killed"]) == (name == "SIGKILL")
    assert (len(taken.warm("counter")), len(taken.warm("killed"))) == (5, 2)


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
    before = conditions.take_snapshot(tmp_path)
    write(tmp_path, AFTER)
    between = conditions.compare_snapshots(before, conditions.take_snapshot(tmp_path), waiting=0.74)
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
    broken = conditions.take_snapshot(tmp_path)
    nothing = conditions.compare_snapshots(broken, broken)
    assert len(nothing.readings) == 7
    assert all(r.value is None and r.reason and r.command for r in nothing.readings)
    assert nothing.notes == ()
    write(tmp_path, {"proc/cpuinfo": "cpu MHz\t\t: 2000.0\nflags : x\ncpu MHz\t\t: 3000.5"})
    assert conditions.take_snapshot(tmp_path).clock_mhz == pytest.approx(2500.25)  # without cpufreq


def ina3221(number, *channels):
    """A sensor with channels of (label, millivolts, milliamperes)."""
    files = {"name": "ina3221", "in7_label": "sum of shunt voltages", "in7_input": 1234}
    for i, (label, millivolts, milliamperes) in enumerate(channels, start=1):
        files |= {f"in{i}_label": label, f"in{i}_input": millivolts, f"curr{i}_input": milliamperes}
    return {f"sys/class/hwmon/hwmon{number}/{name}": content for name, content in files.items()}


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
    (  # Thor
        {"sys/class/hwmon/hwmon4/name": "ina238", "sys/class/hwmon/hwmon4/label": "VIN",
         "sys/class/hwmon/hwmon4/power1_input": 31500000}
        | ina3221(5, ("VDD_GPU", 12000, 500), ("VDD_CPU_SOC_MSS", 12000, 700)),
        31.5, "rail VIN",
    ),
    (ina3221(1, ("VDD_SOC", 5000, -8)), -0.04, "sum of the module's rails (VDD_SOC)"),  # idle
]  # fmt: skip


@pytest.mark.parametrize(("files", "watts", "source"), BOARDS)
def test_a_board_s_total_is_its_input_rail_or_the_sum(tmp_path, files, watts, source):
    write(tmp_path, files)
    meter, absent = conditions.find_energy_meter(tmp_path)
    assert sum(meter.read()) == pytest.approx(watts)
    assert (meter.source, absent) == (source, ())


@pytest.mark.parametrize(("moments", "values", "counts", "joules"), [
    # power by trapezoids over uneven moments, a counter by its differences
    ([0.0, 1.0, 3.0, 3.5], [2.0, 4.0, 4.0, 8.0], False, 3.0 + 8.0 + 3.0),
    ([0.0, 1.0, 2.0], [98.0, 99.5, 103.0], True, 5.0),
    (range(4), [98.0, 99.5, 1.0, 2.0], True, None),  # it goes back
    (range(40), [5.0] * 40, True, None),  # it is stuck
    (range(40), [5.0] * 40, False, None),
    (range(3), [1.0, math.nan, 2.0], False, None),
    (range(3), [(1.0, 2.0), (3.0, 2.0), (2.0, 2.0)], False, 4.0 + 4.5),  # rails
    (range(40), [(watts, 5.0) for watts in range(40)], False, None),  # one is stuck
])  # fmt: skip
def test_readings_are_added_up_or_give_nothing(moments, values, counts, joules):
    values = [value if isinstance(value, tuple) else (value,) for value in values]
    assert conditions.joules_of(moments, values, counts=counts) == pytest.approx(joules)


def test_a_thread_reads_while_work_is_done(tmp_path):
    values = itertools.count(1.0)
    work = lambda: any(next(values) % 50 == 0 for _ in range(999))  # noqa: E731
    result, seconds, joules = conditions.measure_energy(
        conditions.EnergyMeter("a", lambda: [next(values)]), work, interval=0.001
    )
    assert result
    assert min(seconds, joules) > 0.0
    lost = conditions.EnergyMeter("b", lambda: [float((tmp_path / "lost").read_text())])
    assert conditions.measure_energy(lost, list, interval=0.001)[2] is None


class NVMLError(Exception):
    """Refused by NVML."""


LACKING, DENIED = NVMLError("Not Supported"), NVMLError("Insufficient Permissions")


def nvml_of(*, clocks=(1800,), reasons=(0,), energy=(LACKING,), start=(0,)):
    """Stands for the module pynvml, with values in turn, of which the last one stays."""
    nvml = Mock(NVMLError=NVMLError)
    for function, values in {
        "Init": start, "DeviceGetName": [b"RTX 9999"], "DeviceGetClockInfo": clocks,
        "DeviceGetCurrentClocksThrottleReasons": reasons,
        "DeviceGetTotalEnergyConsumption": energy,
    }.items():  # fmt: skip
        stream = itertools.chain(values, itertools.repeat(values[-1]))
        getattr(nvml, f"nvml{function}").side_effect = stream
    return nvml


@pytest.fixture(autouse=True)
def visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def watch(nvml, readings=3, interval=0.0):
    gpu = conditions.GpuWatch(0, nvml, interval=interval)
    for _ in range(readings):
        gpu.read()
    told = gpu.conditions()
    return {reading.name: reading for reading in told.readings}, " ".join(told.notes)


def test_clocks_are_those_between_turns_and_throttling_is_noted_with_its_reason():
    readings, notes = watch(nvml_of(clocks=(1800, 1790, 1795)))
    assert {name: (reading.value, reading.unit) for name, reading in readings.items()} == {
        "GPU": ("0: RTX 9999", ""),
        "GPU clock, lowest": (1790.0, "MHz"),
        "GPU clock, highest": (1800.0, "MHz"),
        "GPU throttled by": ("nothing", ""),
    }
    assert notes == ""
    assert watch(nvml_of(clocks=(1800, 1)), interval=3600.0)[0]["GPU clock, lowest"].value == 1800.0
    readings, notes = watch(nvml_of(clocks=(1800, 1700, 1200), reasons=(0, 0x4, 0x4 | 0x40)))
    assert readings["GPU throttled by"].value == "its power limit, its temperature, by hardware"
    assert "lowered by its power limit, in 2 of 3 readings" in notes
    assert "changed between 1200 and 1800 MHz" in notes
    # an idle GPU's clocks, and clocks that someone set
    assert watch(nvml_of(clocks=(1800, 300, 1800), reasons=(0x2, 0x1, 0x100)))[1] == ""


FIGURES = ["GPU clock, lowest", "GPU clock, highest", "GPU throttled by"]


@pytest.mark.parametrize(("figures", "names", "reason"), [
    ({"clocks": [DENIED]}, FIGURES, f"NVML: {DENIED}"),
    ({"reasons": [DENIED]}, FIGURES, f"NVML: {DENIED}"),
    ({"clocks": [0]}, FIGURES[:2], "no reading was taken"),
    ({"start": [LACKING]}, ["GPU"], f"NVML: {LACKING}"),
])  # fmt: skip
def test_a_figure_that_is_refused_is_absent_with_the_reason(figures, names, reason):
    readings, notes = watch(nvml_of(**figures))
    absent = {name: one for name, one in readings.items() if one.value is None}
    assert list(absent) == names
    assert all(one.reason == reason and "nvidia-smi" in one.command for one in absent.values())
    assert notes == ""


@pytest.mark.parametrize(("visible", "index", "kind", "opened"), [
    (None, 1, "Index", 1), ("", 1, "Index", 1), ("3,2", 1, "Index", 2),
    ("GPU-aa,GPU-bb", 0, "UUID", "GPU-aa"), ("0", 4, "Index", 4),
])  # fmt: skip
def test_the_gpu_is_the_one_that_cuda_counts(monkeypatch, visible, index, kind, opened):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = nvml_of()
    assert conditions.NvmlGpu(index, nvml).name == f"{opened}: RTX 9999"
    getattr(nvml, f"nvmlDeviceGetHandleBy{kind}").assert_called_once_with(opened)


@pytest.mark.parametrize(
    ("nvml", "reason"), [(nvml_of(), "Not Supported"), (None, "pip install nvidia-ml-py")]
)
def test_energy_is_read_by_nvml_or_absent(tmp_path, monkeypatch, nvml, reason):
    gpu, _ = conditions.find_energy_meter(tmp_path, nvml_of(energy=(5000, 5250)))
    assert (gpu.counts, gpu.source) == (True, "GPU alone, by NVML")
    assert gpu.read() == pytest.approx([5.25])
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter, readings = conditions.find_energy_meter(tmp_path, nvml)
    absent = {reading.name: reading for reading in readings}
    assert meter is None
    assert reason in absent["GPU energy"].reason
    assert "ina3221" in absent["board rails"].reason
    assert all(reading.command and reading.value is None for reading in readings)
    if nvml is None:
        assert reason in watch(None)[0]["GPU"].reason


def measured(*configs, waiting=0.0, nodes=(), **fields):
    """Variants whose frames take given times, the first of them 2 ms."""
    times = {"v0": [2.0, 2.01, 1.99], "v1": [3.0, 3.01, 2.99]}
    rounds = rounds_of(*(GivenTimes(name, ms, waiting=waiting) for name, ms in times.items()))
    variants = tuple(
        Variant(name=name, bundle=demo_bundle("scenes"), config=config)
        for name, config in zip(times, configs, strict=False)
    )
    work = SimpleNamespace(num_classes=lambda _: 1, frame_sizes=lambda _: "1x1")
    profiler = Profiler(
        variants=variants, workload=work, source="", command="", rounds=rounds, **fields
    )
    profiler.reports["v0"].nodes = tuple(
        NodeRow(graph=graph, name=name, type=kind, kind=kind_of(name, kind), ms=ms)
        for graph, name, kind, ms in nodes
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
    own = conditions.Conditions(
        readings=(conditions.Reading(name="GPU clock", value=1.0),), notes=("it was hot",)
    )
    report = measured({}, conditions=[own], interrupted=True)
    assert own.readings[0] in report.conditions.readings
    assert "it was hot" in report.notes
    assert any("interrupted" in note for note in report.notes)


def test_nodes_are_listed_by_graph_with_the_rest_last():
    encoder, decoder = "image_encoder", "decoder"
    nodes = [
        (encoder, "a/MatMul", "MatMul", 1.0), (encoder, "a/Reshape", "", 2.0),
        (encoder, OUTSIDE, "", 9.0), (decoder, "b/MatMul", "MatMul", 5.0),
        (decoder, OUTSIDE, "", 6.0),
    ]  # fmt: skip
    tables = {t.title: t for t in report_tables(measured({}, nodes=nodes))}
    assert [row[:3] for row in tables["nodes of v0 by kind"].rows] == [
        (encoder, "layout", "2.000"), (encoder, "linear", "1.000"), (encoder, OUTSIDE, "9.000"),
        (decoder, "linear", "5.000"), (decoder, OUTSIDE, "6.000"),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "type_", "kind"), [
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
])  # fmt: skip
def test_a_node_has_a_kind(name, type_, kind):
    assert kind_of(name, type_) == kind
