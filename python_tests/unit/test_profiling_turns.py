"""Candidates take turns: fairly, in random order, until a rule ends it, whatever happens to one."""

import itertools
import math
import threading

import numpy as np
import pytest

from support.errors import refused
from support.profiling import GivenTimes
from zsseg_rt.errors import ArgumentError
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


def test_differences_are_of_the_same_rounds():
    taken = rounds_of(GivenTimes("a", noisy(2.0, 1)), GivenTimes("b", noisy(2.2, 2)), count=100)
    found = taken.difference("a", "b", 0.02)
    assert (found.verdict, found.rounds) == ("slower", 100)
    assert found.low < 0.1 < found.high


def test_rounds_end_when_the_interval_is_narrow_enough():
    pair = GivenTimes("a", noisy(2.0, 1)), GivenTimes("b", noisy(2.0, 2))
    taken = rounds_of(*pair, count=400, half_width=0.01)
    found = taken.difference("a", "b", 0.02)
    assert 50 < taken.count < 400
    assert found.high - found.change <= 0.01
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


def test_ctrl_c_keeps_what_was_measured():
    taken = rounds_of(GivenTimes("a", [1.0]), GivenTimes("b", [1.0], stops_in=6))
    assert taken.interrupted
    assert len(taken.warm("b")) == 5


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_names_must_be_distinct(names):
    with refused(ArgumentError, "candidates"):
        rounds_of(*(GivenTimes(name, [1.0]) for name in names))


def test_a_turn_counts_by_its_median_or_its_mean_cpu_time():
    samples = tuple(Sample(wall, cpu) for wall, cpu in ((1.0, 1.0), (2.0, 4.0), (90.0, 4.0)))
    turn = Turn(None, samples)
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

    assert not LocalCandidate("quick", int).pace(rate=0.1, seconds=1.0)[0].late
    frames = LocalCandidate("slow", slow_first).pace(rate=100.0, seconds=0.2)
    assert len(frames) == 20
    assert frames[0].late
    assert frames[0].service_ms >= 499.0
    assert all(frame.latency_ms >= frame.service_ms for frame in frames)
    assert frames[10].latency_ms >= 390.0  # it fell due 100 ms after the first began


def test_pacing_shares_the_time_and_leaves_out_what_fails():
    candidates = [GivenTimes("a", [1.0]), GivenTimes("b", [1.0], fails_in=9)]
    found = pace_in_turns(candidates, rate=30.0, seconds=3.0)
    assert {name: len(frames) for name, frames in found.items()} == {"a": 90}


def test_threads_that_wait_are_counted_from_when_they_began():
    before = {"1": (100, 10), "2": (50, 0)}
    after = {"1": (200, 40), "3": (50, 20)}
    assert waiting_share(before, after) == pytest.approx(50 / 200)
    assert waiting_share(after, after) is None


def test_threads_settle_once_none_runs():
    stop = threading.Event()

    def spin():
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin, daemon=True)
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
    class Result:
        times = {"total": 1.0}  # noqa: RUF012 - a stand-in

    taken = take_turns_locally({"a": Result, "b": Result}, rounds=3, stages=True)
    assert taken.count == 3
    assert [len(turn.warm) for turn in taken.turns["a"]] == [1, 1, 1]
    assert taken.warm("b")[0].stages == {"total": 1.0}


class BusyMachine:
    """Times as a busy machine gives them: slow drifts, and waits of whole time slices."""

    def __init__(self, seed):
        self.random, self.load = np.random.default_rng(seed), 1.0

    def sample(self, frame_ms):
        self.load = float(np.clip(self.load * np.exp(self.random.normal(0.0, 0.05)), 0.8, 1.4))
        cpu = frame_ms * self.load * float(np.exp(self.random.normal(0.0, 0.03)))
        return Sample(wall_ms=cpu + 3.0 * float(self.random.poisson(1.5)), cpu_ms=cpu)


class Simulated(GivenTimes):
    def __init__(self, name, machine, frame_ms):
        super().__init__(name, [frame_ms])
        self.machine, self.frame_ms, self.waited = machine, frame_ms, 0.0

    def turn(self, plan):
        count = min(plan.most_calls, max(1, round(plan.measuring_ms / self.frame_ms)))
        warm = tuple(self.machine.sample(self.frame_ms) for _ in range(count))
        self.ran += sum(round(sample.cpu_ms * 1e6) for sample in warm)
        self.waited += sum(sample.wall_ms - sample.cpu_ms for sample in warm)
        return Turn(self.machine.sample(self.frame_ms), warm)

    def thread_times(self):
        return {"1": (self.ran, round(self.waited * 1e6))}


def simulated(seed, frame_ms):
    """Compare 2 ms with another frame on a busy machine, as the profiler does."""
    machine = BusyMachine(seed)
    pair = [Simulated(name, machine, ms) for name, ms in (("first", 2.0), ("other", frame_ms))]
    stop = StopRule(max_seconds=UNBOUNDED, max_rounds=200, half_width=0.01)
    return take_turns(pair, TurnPlan(), stop, seed=seed).difference("first", "other", 0.02)


def test_equal_engines_get_no_verdict_and_ten_per_cent_is_found():
    same = [simulated(seed, 2.0) for seed in range(40)]
    slow = [simulated(1000 + seed, 2.2) for seed in range(20)]
    assert sum(one.verdict in ("slower", "faster") for one in same) <= 2
    assert sum(one.verdict == "slower" for one in slow) >= 19
    assert {one.basis for one in same} == {"cpu"}  # the machine is busy


def test_wall_time_would_not_have_found_it(monkeypatch):
    monkeypatch.setattr("zsseg_rt.profiling.turns.choose_basis", lambda *_, **__: "wall")
    assert simulated(0, 2.2).verdict == "undecided"
