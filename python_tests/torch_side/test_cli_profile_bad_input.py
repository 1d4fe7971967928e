"""``zsseg-rt profile`` refuses what it cannot measure, and survives what goes wrong meanwhile."""

import json
import os
import re
import signal

import pytest

from support import command_line
from support.profiling import QUICK
from zsseg_rt.cli.output import EXIT_FAILURE, EXIT_GATE, EXIT_USAGE
from zsseg_rt.demo import demo_bundle


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path_factory.getbasetemp() / "profile-home"))
    monkeypatch.setenv("COLUMNS", "160")


def run(*arguments):
    return command_line.run("profile", *arguments)


def quick(*arguments):
    return run(*arguments, *QUICK)


def broken_bundle(folder):
    """The demo with another golden sample: it loads, and its results differ."""
    import hashlib
    import shutil

    import numpy as np

    path = folder / "broken.zsseg"
    shutil.copytree(demo_bundle("scenes"), path)
    manifest = json.loads((path / "bundle.json").read_text())
    file = path / manifest["golden"]["file"]
    with np.load(file) as archive:
        arrays = dict(archive)
    arrays["mask_logits"] = -arrays["mask_logits"]
    np.savez(file, **arrays)
    data = file.read_bytes()
    manifest["golden"] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (path / "bundle.json").write_text(json.dumps(manifest))
    return path


def test_a_bundle_that_fails_its_self_check_is_not_timed(tmp_path, capsys):
    bundle, file = broken_bundle(tmp_path), tmp_path / "report.json"
    assert quick(bundle, "--json", file) == EXIT_GATE
    output = capsys.readouterr()
    assert "mask_logits: error" in output.err
    assert "not timed" in output.err
    assert "p50" not in output.out
    assert not file.exists()


DEMO = "--demo=scenes"
BAD = [
    # arguments, exit code, part of the message
    ([], EXIT_USAGE, "name a bundle"),
    ([DEMO, "--rate", "0"], EXIT_USAGE, "--rate: expected a number above 0, got 0"),
    ([DEMO, "--rate", "-3"], EXIT_USAGE, "--rate: expected a number above 0"),
    ([DEMO, "--rate", "nan"], EXIT_USAGE, "--rate: expected a number above 0"),
    ([DEMO, "--max-duration", "0"], EXIT_USAGE, "--max-duration: expected a number above 0"),
    ([DEMO, "--fail-above", "5"], EXIT_USAGE, "expected --against"),
    ([DEMO, "--against", "threads=2", "--fail-above", "much"], EXIT_USAGE, "such as 5%"),
    ([DEMO, "--threshold", "-1%"], EXIT_USAGE, "--threshold: expected a share"),
    ([DEMO, "--strict"], EXIT_USAGE, "expected --fail-above"),
    ([DEMO, "--against", "frame=64x64"], EXIT_USAGE, "another frame size (frame=64x64)"),
    ([DEMO, "--against", "classes=5"], EXIT_USAGE, "another class count (classes=5)"),
    ([DEMO, "--against", "streams=2"], EXIT_USAGE, "another number of streams"),
    ([DEMO, "--against", "thread=2"], EXIT_USAGE, "unknown key 'thread'. Did you mean"),
    ([DEMO, "--against", "threads=many"], EXIT_USAGE, "num_threads"),
    ([DEMO, "--against", "precision=float128"], EXIT_USAGE, "expected one of auto, float32"),
    ([DEMO, "--against", "no-such-bundle"], EXIT_USAGE, "expected a bundle or KEY=VALUE"),
    ([DEMO, "--against", "threads="], EXIT_USAGE, "expected KEY=VALUE"),
    ([DEMO, "--against-python", "/no/python"], EXIT_USAGE, "expected an interpreter"),
    ([DEMO, "--sweep", "colour=red"], EXIT_USAGE, "unknown key 'colour'"),
    ([DEMO, "--sweep", "classes=0,5"], EXIT_USAGE, "expected classes from 1 to"),
    ([DEMO, "--sweep", "classes=5,5"], EXIT_USAGE, "expected distinct values"),
    ([DEMO, "--sweep", "frame=64"], EXIT_USAGE, "expected frame=WIDTHxHEIGHT"),
    ([DEMO, "--sweep", "classes"], EXIT_USAGE, "expected KEY=VALUE"),
    ([DEMO, "--source", "{empty}"], EXIT_USAGE, "--source"),
    ([DEMO, "--source", "{missing}"], EXIT_USAGE, "--source"),
    ([DEMO, "--json", "{missing}/a.json"], EXIT_USAGE, "can be written to"),
    ([DEMO, "--html", "{missing}/a.html"], EXIT_USAGE, "can be written to"),
    ([DEMO, "--trace", "{missing}/a.trace"], EXIT_USAGE, "can be written to"),
    ([DEMO, "--json", "{empty}"], EXIT_USAGE, "--json: expected a file to write"),
    ([DEMO, "--html", "/proc/a.html"], EXIT_USAGE, "--html: expected a folder that can be"),
    ([DEMO, "--json", "{text}", "--trace", "{text}"], EXIT_USAGE, "another file than --json's"),
    ([DEMO, "--classes", ""], EXIT_USAGE, "--classes"),
    ([DEMO, "another.zsseg", "third.zsseg"], EXIT_USAGE, "expected one bundle"),
    (["{missing}"], EXIT_FAILURE, "expected a bundle folder"),
    ([DEMO, "--dataset", "unheard-of"], EXIT_FAILURE, "unheard-of"),
    (["show"], EXIT_USAGE, "expected one or two reports"),
    (["show", "{missing}"], EXIT_USAGE, "cannot be read"),
    (["show", "{foreign}"], EXIT_USAGE, "expected kind 'zsseg_rt profile', got 'trtexec'"),
    (["show", "{newer}"], EXIT_USAGE, "expected format 1, got 99"),
    (["show", "{text}"], EXIT_USAGE, "expected a profile's JSON, got other text"),
    (["show", "{nameless}"], EXIT_USAGE, "expected kind 'zsseg_rt profile', got none"),
]


@pytest.fixture
def never_opened(monkeypatch):
    """Fails a test in which a candidate's process is started."""

    def refuse(*_, **__):
        raise AssertionError("something was measured")

    monkeypatch.setattr("zsseg_rt.profiling.profiler.ChildCandidate", refuse)


@pytest.mark.parametrize(("arguments", "code", "message"), BAD, ids=lambda value: str(value)[:60])
def test_bad_input_is_refused_before_anything_is_measured(
    arguments, code, message, tmp_path, capsys, never_opened
):
    places = {name: tmp_path / name for name in ("empty", "missing", "foreign", "newer", "text")}
    places["nameless"] = tmp_path / "nameless"
    places["nameless"].write_text('{"traceEvents": []}')
    places["empty"].mkdir()
    places["foreign"].write_text('{"kind": "trtexec"}')
    places["newer"].write_text('{"kind": "zsseg_rt profile", "format": 99}')
    places["text"].write_text("p50 2 ms")
    assert run(*(argument.format(**places) for argument in arguments)) == code
    output = capsys.readouterr()
    assert message in output.err
    assert len(output.err.strip().splitlines()) == 1


def test_bundles_with_other_class_counts_are_not_compared(colour_bundle, capsys, never_opened):
    code = run(DEMO, "--against", colour_bundle)
    assert code == EXIT_USAGE
    message = capsys.readouterr().err
    assert re.search(r"expected \d+ classes as in scenes.zsseg, got \d+", message)
    assert "--classes" in message


def test_a_variant_whose_process_dies_is_named_and_the_rest_is_reported(
    tmp_path, monkeypatch, capsys
):
    from zsseg_rt.profiling.turns import ChildCandidate

    turn = ChildCandidate.turn

    def killed_in_its_second_turn(self, plan):
        self.count = getattr(self, "count", 0) + 1
        if self.name == "threads=2" and self.count == 2:
            os.kill(self.process, signal.SIGKILL)
        return turn(self, plan)

    monkeypatch.setattr(ChildCandidate, "turn", killed_in_its_second_turn)
    file = tmp_path / "report.json"
    assert quick(DEMO, "--against", "threads=2", "--json", file) == EXIT_FAILURE
    base, other = json.loads(file.read_text())["variants"]
    assert "killed by SIGKILL" in other["failure"]
    assert other["wall"]["count"] > 0
    assert base["failure"] == ""
    assert base["wall"]["count"] > 0
    assert "killed by SIGKILL" in capsys.readouterr().out


def test_ctrl_c_reports_what_was_measured(tmp_path, monkeypatch, capsys):
    from zsseg_rt.profiling.turns import ChildCandidate

    turn = ChildCandidate.turn

    def interrupted_in_the_third_turn(self, plan):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 3:
            raise KeyboardInterrupt
        return turn(self, plan)

    monkeypatch.setattr(ChildCandidate, "turn", interrupted_in_the_third_turn)
    file = tmp_path / "report.json"
    assert run(DEMO, "--no-cold-start", "--no-nodes", "--json", file) == EXIT_FAILURE
    report = json.loads(file.read_text())
    assert report["interrupted"]
    assert set(report["variants"][0]["samples"]["rounds"]) == {0, 1}
    assert "interrupted: this is what was measured" in capsys.readouterr().out
