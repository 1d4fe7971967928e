"""Benchmarks measure with one sampler, and that sampler reaches its goals on simulated times."""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "benchmarks").rglob("*.py")), ROOT / "tools" / "benchmark_kernels.py"]
# These tell how old a frame is: they need the clock by which it was captured.
AGES = {"follow.py", "stream.py"}
CLOCKS = {"perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "time_ns", "timeit"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_benchmarks_read_no_clock_of_their_own(script):
    names = {
        getattr(node, "attr", getattr(node, "id", getattr(node, "name", "")))
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
    }
    allowed = {"monotonic"} if script.name in AGES else set()
    assert not names & CLOCKS - allowed


def test_the_goals_are_reached_on_simulated_times(tmp_path, monkeypatch, capsys):
    """40 comparisons with itself give at most 2 verdicts; 10 % is found in 19 of 20."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sampler

    file = tmp_path / "report.json"
    assert sampler.main(["simulated", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    wrong = [one for one in report["self"] if one["verdict"] in ("slower", "faster")]
    found = [one for one in report["slow"] if one["verdict"] == "slower"]
    assert len(report["self"]) == 40
    assert len(report["slow"]) == 20
    assert len(wrong) <= report["goals"]["false verdicts of 40"]
    assert len(found) >= report["goals"]["found of 20"]
    assert {one["basis"] for one in report["self"]} == {"cpu"}  # the simulated machine is busy
    assert max(one["rounds"] for one in report["slow"]) <= 200
    assert "found in 20 of 20" in capsys.readouterr().out


def test_a_form_compares_engines_in_processes_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    import sampler

    file = tmp_path / "report.json"
    few = ["--comparisons", "1", "--found", "1", "--max-rounds", "10", "--json", str(file)]
    assert sampler.main(["quiet-2ms", *few]) == 0
    report = json.loads(file.read_text())
    assert (len(report["self"]), len(report["slow"])) == (1, 1)
    assert (report["form"], report["threads"], report["busy"]) == ("quiet-2ms", 1, 0)
    assert {one["rounds"] for one in report["self"]} == {10}
    assert "of 1 got a verdict (goal: at most 2 of 40)" in capsys.readouterr().out


@pytest.mark.parametrize(("basis", "verdict"), [("wall", "undecided"), ("cpu", "slower")])
def test_the_simulated_machine_hides_it_from_wall_time(monkeypatch, basis, verdict):
    """The goals say something: by the time on the clock, the same rounds do not find 10 %."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sampler

    monkeypatch.setattr("zsseg_rt.profiling.turns.choose_basis", lambda *_, **__: basis)
    machine = sampler.BusyMachine(0)
    pair = [sampler.SimulatedCandidate(n, machine, ms) for n, ms in (("first", 2.0), ("slow", 2.2))]
    assert sampler.trial(tuple(pair), sampler.TurnPlan(), 100, 0)["verdict"] == verdict
