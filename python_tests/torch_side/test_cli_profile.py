"""``zsseg-rt profile`` as people type it: tables, JSON, HTML, gates, and everything refused."""

import itertools
import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

from support import command_line
from support.colour_words import write_flags
from support.fakes import edit_manifest
from zsseg_rt.bundles.specs import FileEntry
from zsseg_rt.cli.output import EXIT_FAILURE, EXIT_GATE, EXIT_USAGE
from zsseg_rt.common import schema
from zsseg_rt.demo import demo_bundle
from zsseg_rt.errors import ConfigError
from zsseg_rt.profiling.conditions import EnergyMeter
from zsseg_rt.profiling.page import render_html
from zsseg_rt.profiling.profiler import Profiler
from zsseg_rt.profiling.report import read_report
from zsseg_rt.profiling.turns import ChildCandidate


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path_factory.getbasetemp() / "profile-home"))
    monkeypatch.setenv("COLUMNS", "160")


def run(*arguments):
    return command_line.run("profile", *arguments)


def quick(*arguments):
    short = ("--max-duration", "0.5", "--no-cold-start", "--no-nodes", "--threads", "1")
    return run(*short, *arguments)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A profile of the demo with everything but a data set, as JSON, HTML and trace."""
    folder = tmp_path_factory.mktemp("profile")
    files = [folder / f"report.{kind}" for kind in ("json", "html", "trace")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZSSEG_HOME", str(folder / "home"))
        assert run(
            "--demo", "scenes", "--against", "threads=2", "--sweep", "classes=40", "--rate", "50",
            "--max-duration", "1", "--threads", "1", "--device", "cpu", "--no-cold-start",
            "--json", files[0], "--html", files[1], "--trace", files[2],
        ) == 0  # fmt: skip
    return files


@pytest.fixture
def report(written):
    return json.loads(written[0].read_text())


def test_quality_stands_beside_speed(colour_bundle, tmp_path, capsys):
    root, file = write_flags(tmp_path / "flags", "red", "green"), tmp_path / "report.json"
    arguments = ["--dataset", "folder", "--root", root, "--split", "all", "--json", file]
    assert quick(colour_bundle, *arguments, "--classes", "red,green") == 0
    (variant,) = json.loads(file.read_text())["variants"]
    assert variant["miou"] > 90
    assert "which to ship" in capsys.readouterr().out


def test_the_trace_shows_two_frames_with_their_stages_and_nodes(written, report):
    trace = json.loads(written[2].read_text())
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    samples = report["variants"][0]["samples"]
    for thread, wall in ((1, None), (2, max(samples["wall_ms"]))):
        own = [span for span in spans if (span["pid"], span["tid"]) == (1, thread)]
        (frame,) = (span for span in own if span["name"] == "frame")
        stages = [span for span in own if span["name"] in samples["stages"]]
        nodes = [span for span in own if "args" in span]
        assert len(stages) == len(samples["stages"])
        assert sum(span["dur"] for span in stages) == pytest.approx(frame["dur"], rel=0.01)
        assert all(span["ts"] + span["dur"] <= frame["dur"] * 1.01 for span in nodes)
        (encoder,) = (span for span in stages if span["name"] == "image_encoder")
        inside = [n for n in nodes if n["ts"] < encoder["ts"] + encoder["dur"] - 1e-6]
        assert sum(span["dur"] for span in inside) == pytest.approx(encoder["dur"], rel=0.01)
        assert wall is None or frame["dur"] == pytest.approx(1e3 * wall)
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert {"scenes.zsseg", "threads=2", "median frame", "slowest frame"} <= names


# The package nvtx for a child process; appends "push NAME" and "pop" to the file beside it.
NVTX = """
import pathlib
FILE = pathlib.Path(__file__).with_name("ranges.txt").open("a", 1)
push_range = lambda message, domain: print("push", message, file=FILE)
pop_range = lambda domain: print("pop", file=FILE)
"""


def test_energy_stands_beside_time_and_ranges_are_marked(tmp_path, monkeypatch, capsys):
    """A board that takes 4 W, half a watt of it swinging, whatever happens."""
    swing = itertools.cycle([3.75, 4.25])
    meter = EnergyMeter("rail VDD_IN", lambda: [next(swing)])
    monkeypatch.setattr("zsseg_rt.profiling.profiler.find_energy_meter", lambda **_: (meter, ()))
    (tmp_path / "nvtx.py").write_text(NVTX)
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "report.json"
    assert quick("--demo", "scenes", "--nvtx", "--cold-start", "--json", file) == 0
    report = json.loads(file.read_text())
    (variant,) = report["variants"]
    energy = variant["energy"]
    assert (energy["watts"], energy["idle_watts"]) == pytest.approx((4.0, 4.0), rel=0.01)
    assert energy["mj"] == pytest.approx(4e3 * energy["seconds"] / energy["frames"], rel=0.01)
    assert abs(energy["mj_above_idle"]) < 0.02 * energy["mj"]
    assert [start["cached"] for start in variant["cold_starts"]] == [False, True]
    printed = capsys.readouterr().out
    assert "mJ a frame" in printed
    assert "a fresh process" in printed
    assert "--nvtx" in report["command"]
    lines = (tmp_path / "ranges.txt").read_text().splitlines()
    frames = lines.count("push frame")
    assert frames > variant["wall"]["count"]
    assert lines.count("push image_encoder") == frames - 3  # the first frame of each process
    assert lines.count("pop") == sum(line.startswith("push") for line in lines)


def test_a_report_is_read_back_as_it_was_written_and_shown(written, report, tmp_path, capsys):
    assert schema.encode(read_report(written[0])) == report
    report["notes"] = ["do not quote these times: the neighbours"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(report))
    assert run("show", written[0], other) == 0
    printed = capsys.readouterr().out
    for text in ("p50 ms", "threads=2", "stages of classes=40", "CPU pressure"):
        assert printed.count(text) >= 2
    ran = report["variants"][1]["described"]  # first, as trtexec's heading has it
    head = printed.rpartition("zsseg_rt ")[2].partition("frames/s")[0]
    for text in (ran["library"], "do not quote", "what ran", ran["precision"], "128x128"):
        assert text in head
    report["variants"][0]["unheard"] = 1
    other.write_text(json.dumps(report))
    with pytest.raises(ConfigError, match="unheard"):
        read_report(other)


def test_a_report_holds_what_was_measured(report):
    assert report["command"].startswith(
        "zsseg-rt profile --demo scenes --against threads=2 --sweep classes=40 --rate 50"
    )
    base, other, forty = report["variants"]
    names = [variant["name"] for variant in report["variants"]]
    assert (names, forty["classes"]) == (["scenes.zsseg", "threads=2", "classes=40"], 40)
    assert (base["settings"]["num_threads"], other["settings"]["num_threads"]) == ("1", "2")
    ran = other["described"]
    assert (ran["device"], ran["backend"], ran["threads"]) == ("cpu", "openvino", "2")
    assert ran["library"].startswith("openvino 20")
    assert ran["input"] == "128x128"
    for variant in report["variants"]:
        samples, stages = variant["samples"], variant["samples"]["stages"]
        assert len(samples["wall_ms"]) == len(samples["rounds"]) == variant["wall"]["count"] > 0
        assert variant["wall"]["max"] == pytest.approx(max(samples["wall_ms"]), abs=1e-6)
        assert {"image_encoder", "upsample_argmax", "(around)"} <= set(stages)
        for wall, *times in zip(samples["wall_ms"], *stages.values(), strict=True):
            assert sum(times) == pytest.approx(wall, rel=0.01)
        assert variant["paced"]["frames"] > 0
        assert variant["peak_mb"] > 10
        assert variant["failure"] == ""
    assert base["cpu"]["mean"] > 0.0
    assert (base["device"], forty["agreement"]) == (None, None)  # its labels: of other classes
    assert other["agreement"] > 0.95
    assert [c["other"] for c in report["comparisons"]] == ["threads=2"]
    readings = {r["name"]: r for r in report["conditions"]["readings"]}
    energy = [reading for name, reading in readings.items() if "energy" in name]
    assert bool(energy) == (base["energy"] is None)
    assert all(r["value"] is None and r["reason"] and r["command"] for r in energy)


def test_nodes_sum_to_their_stage_or_a_note_says_why_not(report):
    base, *others = report["variants"]
    assert not any(other["nodes"] for other in others)
    assert {"linear", "attention"} <= {node["kind"] for node in base["nodes"]}
    assert {node["graph"] for node in base["nodes"]} == {"image_encoder", "decoder"}
    for graph in ("image_encoder", "decoder"):
        total = sum(node["ms"] for node in base["nodes"] if node["graph"] == graph)
        near = abs(total / base["stages"][graph]["mean"] - 1.0) <= 0.05
        noted = [note for note in report["notes"] if f": {graph} took" in note]
        assert len(noted) == (0 if near else 1)


def test_the_page_needs_nothing_from_outside_and_escapes_names(written):
    page = written[1].read_text(encoding="utf-8")
    assert not re.findall(r"https?://|<script|<link|<img|@import|src=", page)
    assert page.count('<div class="box"') > 8
    shares = [float(share) for share in re.findall(r'class="bar" style="--share: ([0-9.]+)"', page)]
    assert len(shares) > 10
    assert all(0.0 <= share <= 1.0 for share in shares)
    for text in ("threads=2", "image_encoder", "Frames", "CPU pressure", "Repeat"):
        assert text in page
    report = replace(read_report(written[0]), notes=(), comparisons=())
    hostile = replace(report.variants[0], name="<script>alert(1)</script>")
    page = render_html(replace(report, variants=(hostile,), source="<b>x</b>"))
    assert '<ul class="verdicts">' not in page
    assert "<script" not in page
    assert "<b>x" not in page


@pytest.mark.parametrize(("verdicts", "strict", "code"), [
    (["equal"], False, 0), (["faster"], True, 0), (["undecided"], False, 0),
    (["undecided"], True, EXIT_GATE), (["equal", "slower"], False, EXIT_GATE),
    (["failed"], False, EXIT_FAILURE),
])  # fmt: skip
def test_the_gate_looks_at_verdicts(written, monkeypatch, capsys, verdicts, strict, code):
    report = read_report(written[0])
    (one,) = report.comparisons
    judged = tuple(replace(one, difference=replace(one.difference, verdict=v)) for v in verdicts)
    failure = "its process was killed" if verdicts == ["failed"] else ""
    variants = (*report.variants[:-1], replace(report.variants[-1], failure=failure))
    outcome = replace(report, comparisons=judged, variants=variants)
    monkeypatch.setattr(Profiler, "run", lambda self: outcome)
    more = ["--strict"] if strict else []
    assert run("--demo", "scenes", "--against", "threads=2", "--fail-above", "5%", *more) == code
    assert ("failed: its process was killed" in capsys.readouterr().out) == bool(failure)


def test_a_bundle_that_fails_its_self_check_is_not_timed(tmp_path, capsys):
    bundle, file = tmp_path / "broken.zsseg", tmp_path / "report.json"
    golden = shutil.copytree(demo_bundle("scenes"), bundle) / "golden.npz"
    arrays = dict(np.load(golden))
    np.savez(golden, **arrays | {"mask_logits": -arrays["mask_logits"]})
    edit_manifest(bundle, ("golden",), FileEntry.describe(golden, bundle))
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
    ([DEMO, "--rate", "nan"], EXIT_USAGE, "--rate: expected a number above 0"),
    ([DEMO, "--max-duration", "0"], EXIT_USAGE, "--max-duration: expected a number above 0"),
    ([DEMO, "--fail-above", "5"], EXIT_USAGE, "expected --against"),
    ([DEMO, "--against", "threads=2", "--fail-above", "much"], EXIT_USAGE, "such as 5%"),
    ([DEMO, "--threshold", "-1%"], EXIT_USAGE, "--threshold: expected a share"),
    ([DEMO, "--strict"], EXIT_USAGE, "expected --fail-above"),
    ([DEMO, "--against", "frame=64x64"], EXIT_USAGE, r"another frame size \(frame=64x64\)"),
    ([DEMO, "--against", "classes=5"], EXIT_USAGE, r"another class count \(classes=5\)"),
    ([DEMO, "--against", "streams=2"], EXIT_USAGE, "another number of streams"),
    ([DEMO, "--against", "thread=2"], EXIT_USAGE, "unknown key 'thread'. Did you mean"),
    ([DEMO, "--against", "threads=many"], EXIT_USAGE, "num_threads"),
    ([DEMO, "--against", "no-such-bundle"], EXIT_USAGE, "expected a bundle or KEY=VALUE"),
    ([DEMO, "--against", "threads="], EXIT_USAGE, "expected KEY=VALUE"),
    ([DEMO, "--against", "{colours}"], EXIT_USAGE, r"\d+ classes as in scenes.*, got .*--classes"),
    ([DEMO, "--against-python", "/no/python"], EXIT_USAGE, "expected an interpreter"),
    ([DEMO, "--sweep", "colour=red"], EXIT_USAGE, "unknown key 'colour'"),
    ([DEMO, "--sweep", "classes=0,5"], EXIT_USAGE, "expected classes from 1 to"),
    ([DEMO, "--sweep", "classes=5,5"], EXIT_USAGE, "expected distinct values"),
    ([DEMO, "--sweep", "frame=64"], EXIT_USAGE, "expected frame=WIDTHxHEIGHT"),
    ([DEMO, "--sweep", "classes"], EXIT_USAGE, "expected KEY=VALUE"),
    ([DEMO, "--source", "{empty}"], EXIT_USAGE, "--source"),
    ([DEMO, "--source", "{missing}"], EXIT_USAGE, "--source"),
    ([DEMO, "--json", "{missing}/a.json"], EXIT_USAGE, "can be written to"),
    ([DEMO, "--html", "/proc/a.html"], EXIT_USAGE, "--html: expected a folder that can be"),
    ([DEMO, "--json", "{text}", "--trace", "{text}"], EXIT_USAGE, "a file of its own"),
    ([DEMO, "--classes", ""], EXIT_USAGE, "--classes"),
    ([DEMO, "another.zsseg", "third.zsseg"], EXIT_USAGE, "expected one bundle"),
    (["{missing}"], EXIT_FAILURE, "expected a bundle folder"),
    ([DEMO, "--dataset", "unheard-of"], EXIT_FAILURE, "unheard-of"),
    (["show"], EXIT_USAGE, "expected reports, got none"),
    (["show", "{missing}"], EXIT_USAGE, "cannot be read"),
    (["show", "{foreign}"], EXIT_USAGE, "expected kind 'zsseg_rt profile', got trtexec"),
    (["show", "{newer}"], EXIT_USAGE, "expected format 2, got 99"),
    (["show", "{text}"], EXIT_USAGE, "expected a profile's JSON, got other text"),
    (["show", "{nameless}"], EXIT_USAGE, "expected kind 'zsseg_rt profile', got none"),
]


FILES = {
    "foreign": '{"kind": "trtexec"}',
    "newer": '{"kind": "zsseg_rt profile", "format": 99}',
    "nameless": '{"traceEvents": []}',
    "text": "p50 2 ms",
}


@pytest.mark.parametrize(("arguments", "code", "message"), BAD)
def test_bad_input_is_refused_before_anything_is_measured(
    arguments, code, message, tmp_path, colour_bundle, capsys, monkeypatch
):
    monkeypatch.setattr("zsseg_rt.profiling.profiler.ChildCandidate", None)
    places = {name: tmp_path / name for name in ("empty", "missing", *FILES)}
    places["empty"].mkdir()
    for name, content in FILES.items():
        places[name].write_text(content)
    assert run(*(word.format(colours=colour_bundle, **places) for word in arguments)) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line)


def test_ctrl_c_reports_what_was_measured(tmp_path, monkeypatch, capsys):
    turn, turns = ChildCandidate.turn, itertools.count(1)

    def interrupted(self, plan):
        if self.name == "scenes.zsseg" and next(turns) == 3:
            raise KeyboardInterrupt
        return turn(self, plan)

    monkeypatch.setattr(ChildCandidate, "turn", interrupted)
    file = tmp_path / "report.json"
    python = ("--against-python", sys.executable)  # which may not find the package by itself
    assert quick(DEMO, *python, "--json", file) == EXIT_FAILURE
    report = json.loads(file.read_text())
    assert report["interrupted"]
    base, same = report["variants"]
    assert set(base["samples"]["rounds"]) == {0, 1}
    assert bool(same["failure"]) != bool(same["wall"])
    assert "interrupted: this is what was measured" in capsys.readouterr().out
