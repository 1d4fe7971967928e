"""Hostile input of every kind is accepted or refused; what does worse is found and named."""

import json
import os
from pathlib import Path

import pytest

from support.command_line import python
from tools.torture.__main__ import main

ROOT = Path(__file__).parents[2]


def torture(*arguments, timeout):
    return python("-m", "tools.torture", *arguments, cwd=ROOT, timeout=timeout)


@pytest.mark.nightly
def test_it_finds_crashes_hangs_memory_and_foreign_errors(tmp_path):
    path = tmp_path / "report.json"
    done = torture("--cases", 10, "--seconds", 300, "--hangs-after", 1, "--json", path, "itself",
                   timeout=400)  # fmt: skip
    assert done.returncode == 1, done.stderr
    report = json.loads(path.read_text())
    kinds = {entry["case"]: entry["kind"] for entry in report["failures"]}
    assert kinds == {2: "crash", 4: "hang", 6: "untyped", 8: "memory"}
    (crash, hang) = sorted(
        (e for e in report["failures"] if e["kind"] in ("crash", "hang")), key=lambda e: e["case"]
    )
    assert crash["message"] == "SIGSEGV"
    assert "itself.py" in hang["trace"]  # where it hung
    assert report["targets"]["itself"] == {"accepted": 2, "refused": 5, "failed": 4}
    assert "itself 1 2: crash: SIGSEGV" in done.stdout


@pytest.mark.parametrize("arguments", ["nothing", "--case 1", "--case 1 ops uris"])
def test_a_wrong_call_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["torture", *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "error:" in capsys.readouterr().err


@pytest.mark.nightly
def test_no_case_of_a_short_run_fails(tmp_path):
    """The number of cases depends on the machine, their content does not."""
    pytest.importorskip("torch")
    path = tmp_path / "report.json"
    done = torture("--seconds", 60, "--json", path, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    report = json.loads(path.read_text())
    tried = {name for name, counts in report["targets"].items() if sum(counts.values())}
    assert not tried & set(report["untried"])
    for name in report["untried"]:
        assert f"{name}: not tried: no time was left" in done.stdout
    if report["untried"]:  # a busy machine does not come to all of them
        options = ("--seconds", 400, "--cases", 2, "--json", path)
        done = torture(*options, *report["untried"], timeout=500)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        assert json.loads(path.read_text())["untried"] == []


def test_operations_are_tried_in_every_run(tmp_path):
    """Beside each other target a short run hardly comes to them, and one that fails goes unseen."""
    path = tmp_path / "report.json"
    names = ["ops", "overlaps"]
    if os.environ.get("ZSSEG_EMULATED_EXTENSION"):
        names += ["ops-cuda", "overlaps-cuda"]
    done = torture("--seconds", 60, "--cases", 150, "--json", path, *names, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    report = json.loads(path.read_text())
    for name in set(names) - set(report["untried"]):
        counts = report["targets"][name]
        assert min(counts["accepted"], counts["refused"]) > 0, name
    assert not {"ops", "overlaps"} & set(report["untried"])
