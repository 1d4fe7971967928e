"""Candidates that are processes: they answer, and their deaths are named."""

import os
import signal
import sys

import numpy as np
import pytest

from support.errors import refused
from support.profiling import FILE
from zsseg_rt.demo import demo_bundle, demo_classes, demo_photos
from zsseg_rt.photos import read_photo
from zsseg_rt.profiling.turns import CandidateError, ChildCandidate, StopRule, take_turns
from zsseg_rt.profiling.worker import TurnPlan
from zsseg_rt.profiling.workload import Variant, Workload

PLAN = TurnPlan(pause_ms=0.0, measuring_ms=0.0)


def spec_of(function, **arguments):
    return {"file": FILE, "function": function, "arguments": arguments}


@pytest.fixture
def child():
    opened = []

    def open_one(name, function, **arguments):
        opened.append(ChildCandidate(name, spec_of(function, **arguments)))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close(at_once=True)


@pytest.fixture(scope="module")
def demo_spec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    frames, classes = [read_photo(demo_photos("scenes")[0])], demo_classes("scenes")
    config = {"cache_dir": str(folder / "cache"), "num_threads": 1, "device": "cpu"}
    variant = Variant(name="demo", bundle=demo_bundle("scenes"), config=config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cv2", None)  # frames that keep their size do not need it
        return Workload(folder, frames, classes).spec(variant)


def test_a_child_takes_turns_with_its_own_threads_and_memory(child):
    one = child("counter", "make_counter", start=5)
    turn = one.turn(PLAN)
    assert turn.cold.wall_ms >= 0.0
    assert len(turn.warm) == 1
    assert sum(ran for ran, _ in one.thread_times().values()) > 0
    assert one.peak_memory_mb() > 1.0
    assert one.process != os.getpid()
    one.settle()
    one.close()
    one.close()


def test_an_engine_as_a_child_tells_its_cold_start_its_stages_and_its_self_check(demo_spec):
    one = ChildCandidate("engine", {**demo_spec, "streams": 2})
    try:
        assert set(one.started) == {"import_s", "load_s", "classes_s", "first_frame_s"}
        assert all(seconds > 0.0 for seconds in one.started.values())
        assert one.described["backend"] == "openvino"
        assert one.described["classes"] == len(demo_classes("scenes"))
        assert one.request("check") == ""
        assert one.warm_up() > 0.0
        sample = one.turn(PLAN).warm[0]
        assert sample.stages["image_encoder"] > 0.0
        parts = sum(ms for name, ms in sample.stages.items() if name != "total")
        assert parts == pytest.approx(sample.stages["total"], rel=1e-6)
        assert sample.stages["total"] <= sample.wall_ms
        assert len(one.pace(200.0, 0.02)) == 4
        out = demo_spec["frames"][0] + ".labels.npy"
        one.save_labels(out)
        assert np.load(out).shape == np.load(demo_spec["frames"][0]).shape[:2]
    finally:
        one.close()


def test_a_function_s_candidate_can_be_given_other_work(child, tmp_path):
    one = child("choosing", "make_choosing", numbers=[1, 2])
    assert one.described == {"precision": "exact"}
    assert one.select(numbers=[7, 8]) > 0.0
    one.save_labels(tmp_path / "labels.npy", 5)
    assert np.load(tmp_path / "labels.npy").tolist() == [7, 5]


def test_what_cannot_be_opened_or_called_says_why(demo_spec, child):
    bad = {**demo_spec, "config": {"precision": "int8", "device": "cpu"}}
    with refused(CandidateError, "engine"):
        ChildCandidate("engine", bad)
    with pytest.raises(CandidateError, match="ending: its process ended .* out of ideas"):
        ChildCandidate("ending", spec_of("make_ending"))
    with pytest.raises(CandidateError, match="other: cannot run /no/python"):
        ChildCandidate("other", spec_of("make_counter"), python="/no/python")
    one = child("failing", "make_failing", message="no luck today")
    for _ in range(2):  # it goes on answering
        with refused(CandidateError, "failing"):
            one.turn(PLAN)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_killed_child_is_named_with_its_signal_and_the_others_finish(child, name):
    number = int(getattr(signal, name))
    doomed = child("doomed", "make_killed", signal_number=number, at=6)
    sound = child("sound", "make_counter")
    stop = StopRule(max_seconds=60.0, max_rounds=5, half_width=None)
    taken = take_turns((sound, doomed), PLAN, stop)
    assert list(taken.failures) == ["doomed"]
    assert f"doomed: its process was killed by {name}." in taken.failures["doomed"]
    assert ("memory" in taken.failures["doomed"]) == (name == "SIGKILL")
    assert len(taken.warm("sound")) == 5
    assert len(taken.warm("doomed")) == 2


def test_another_interpreter_does_not_see_this_one_s_packages(tmp_path, monkeypatch):
    """It is given neither PYTHONPATH nor the worker's own folder, whose names are common ones."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probe = tmp_path / "probe.py"
    probe.write_text("import sys\ndef make():\n    import turtle_of_no_package\n")
    (tmp_path / "turtle_of_no_package.py").write_text("")
    spec = {"file": str(probe), "function": "make"}
    with refused(CandidateError, "other"):
        ChildCandidate("other", spec, python=sys.executable)


def test_the_worker_s_neighbours_shadow_nothing(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(
        "from importlib.util import find_spec\n"
        "def make():\n    assert find_spec('report') is find_spec('turns') is None\n"
        "    return list\n"
    )
    ChildCandidate("probe", {"file": str(probe), "function": "make"}).close()
