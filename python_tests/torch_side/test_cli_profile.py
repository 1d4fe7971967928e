"""``zsseg-rt profile`` as people type it: tables, JSON, HTML, gates, and everything refused."""

import json
import re
import sys

import pytest

from support import command_line
from support.profiling import QUICK
from zsseg_rt.cli.output import EXIT_FAILURE, EXIT_GATE
from zsseg_rt.common import schema
from zsseg_rt.errors import ConfigError
from zsseg_rt.profiling.report import read_report


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path_factory.getbasetemp() / "profile-home"))
    monkeypatch.setenv("COLUMNS", "160")


def run(*arguments):
    return command_line.run("profile", *arguments)


def quick(*arguments):
    return run(*arguments, *QUICK)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A profile of the demo with everything but a data set, as JSON and as HTML."""
    folder = tmp_path_factory.mktemp("profile")
    patch = pytest.MonkeyPatch()
    patch.setenv("ZSSEG_HOME", str(folder / "home"))
    patch.setenv("COLUMNS", "160")
    files = [folder / f"report.{kind}" for kind in ("json", "html", "trace")]
    code = run(
        "--demo", "scenes", "--against", "threads=2", "--sweep", "classes=1,40", "--rate", "50",
        "--max-duration", "3", "--threads", "1", "--device", "cpu",
        "--json", files[0], "--html", files[1], "--trace", files[2],
    )  # fmt: skip
    patch.undo()
    assert code == 0
    return files


def test_a_report_is_read_back_as_it_was_written(written):
    report = json.loads(written[0].read_text())
    assert schema.encode(read_report(written[0])) == report
    report["variants"][0]["unheard"] = 1
    written[0].with_name("other.json").write_text(json.dumps(report))
    with pytest.raises(ConfigError, match="unheard"):
        read_report(written[0].with_name("other.json"))


def test_the_first_lines_say_what_ran_and_whether_to_quote_it(written, tmp_path, capsys):
    """As trtexec's heading: device, backend, precision, threads, sizes, versions."""
    report = json.loads(written[0].read_text())
    ran = report["variants"][1]["described"]
    assert (ran["device"], ran["backend"], ran["threads"]) == ("cpu", "openvino", "2")
    assert ran["library"].startswith("openvino 20")
    assert ran["input"] == "128x128"
    busy = tmp_path / "busy.json"
    report["notes"] = ["do not quote these times: the neighbours"]
    busy.write_text(json.dumps(report))
    assert run("show", busy) == 0
    first = capsys.readouterr().out.partition("frames/s")[0]
    for text in (ran["library"], "do not quote", "what ran", ran["precision"], "128x128"):
        assert text in first


def test_a_report_holds_what_was_measured(written):
    report = json.loads(written[0].read_text())
    base, other, one, forty = report["variants"]
    assert [v["name"] for v in report["variants"]] == [
        "scenes.zsseg", "threads=2", "classes=1", "classes=40"
    ]  # fmt: skip
    assert (one["classes"], forty["classes"]) == (1, 40)
    assert (base["settings"]["num_threads"], other["settings"]["num_threads"]) == ("1", "2")
    for variant in report["variants"]:
        samples = variant["samples"]
        assert len(samples["wall_ms"]) == len(samples["rounds"]) == variant["wall"]["count"] > 0
        assert variant["wall"]["max"] == pytest.approx(max(samples["wall_ms"]), abs=1e-6)
        assert variant["paced"]["frames"] > 0
        assert variant["peak_mb"] > 10
        assert variant["failure"] == ""
    assert base["cpu"]["mean"] > 0.0
    assert base["device"] is None
    assert [start["cached"] for start in base["cold_starts"]] == [False, True]
    assert [start["cached"] for start in one["cold_starts"]] == [True]
    assert other["agreement"] > 0.95
    assert one["agreement"] is None  # its labels are of other classes
    assert [c["other"] for c in report["comparisons"]] == ["threads=2"]
    assert [g["key"] for g in report["growths"]] == ["classes"]
    assert [p[0] for p in report["growths"][0]["points"]] == [1.0, 40.0]


def test_stages_sum_to_the_frame(written):
    for variant in json.loads(written[0].read_text())["variants"]:
        stages = variant["samples"]["stages"]
        assert {"image_encoder", "upsample_argmax", "(around)"} <= set(stages)
        for index, wall in enumerate(variant["samples"]["wall_ms"]):
            total = sum(times[index] for times in stages.values())
            assert total == pytest.approx(wall, rel=0.01)


def test_the_command_repeats_it_without_passwords(written):
    command = json.loads(written[0].read_text())["command"]
    assert command.startswith(
        "zsseg-rt profile --demo scenes --against threads=2 --sweep classes=1,40"
    )
    assert "--rate 50" in command
    assert "--device cpu" in command


def test_the_page_needs_nothing_from_outside(written):
    page = written[1].read_text(encoding="utf-8")
    assert not re.findall(r"https?://|<script|<link|<img|@import|src=", page)
    assert page.count('<div class="box"') > 8
    shares = [float(share) for share in re.findall(r'class="bar" style="--share: ([0-9.]+)"', page)]
    assert len(shares) > 10
    assert all(0.0 <= share <= 1.0 for share in shares)
    for text in ("threads=2", "image_encoder", "A fresh process", "CPU pressure", "Repeat"):
        assert text in page


def test_a_page_escapes_names(written, tmp_path):
    from dataclasses import replace

    from zsseg_rt.profiling.page import render_html

    report = read_report(written[0])
    hostile = replace(report.variants[0], name="<script>alert(1)</script>")
    page = render_html(replace(report, variants=(hostile,), source="<b>x</b>"))
    assert "<script" not in page
    assert "<b>x" not in page


def test_a_report_is_shown_again(written, capsys):
    assert run("show", written[0]) == 0
    printed = capsys.readouterr().out
    for text in ("p50 ms", "threads=2", "stages of classes=40", "a class", "CPU pressure"):
        assert text in printed


def test_two_reports_are_shown_side_by_side_and_not_judged(written, tmp_path, capsys):
    changed = json.loads(written[0].read_text())
    changed["variants"][0]["frame"] = "1x1"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(changed))
    assert run("show", written[0], other) == 0
    printed = capsys.readouterr().out
    assert "took no turns, so nothing is judged" in printed
    assert "frame differs: 256x256 in A, 1x1 in B" in printed
    assert not re.search("slower|faster|equal:", printed)


def test_what_is_not_ten_times_slower_passes_that_gate(capsys):
    assert quick("--demo", "scenes", "--against", "with_scores=true", "--fail-above", "900%") == 0
    assert "with_scores=true" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verdicts", "strict", "code"),
    [
        (["equal"], False, 0), (["faster"], True, 0), (["undecided"], False, 0),
        (["undecided"], True, EXIT_GATE), (["equal", "slower"], False, EXIT_GATE),
    ],
)  # fmt: skip
def test_the_gate_looks_at_verdicts(written, verdicts, strict, code):
    from dataclasses import replace

    from zsseg_rt.cli.profile import _exit_code

    report = read_report(written[0])
    (one,) = report.comparisons
    judged = tuple(replace(one, difference=replace(one.difference, verdict=v)) for v in verdicts)
    assert _exit_code(replace(report, comparisons=judged), 0.05, strict=strict) == code


def test_a_bundle_against_itself_in_another_interpreter(capsys):
    """This one, which must find the package by itself: the report says whether it could."""
    code = quick("--demo", "scenes", "--against-python", sys.executable)
    printed = capsys.readouterr().out
    assert "python" in printed
    assert code == (EXIT_FAILURE if "failed:" in printed else 0)


def test_quality_stands_beside_speed(colour_bundle, tmp_path, capsys):
    import cv2
    import numpy as np

    from support.colour_words import COLOUR_WORDS

    root = tmp_path / "flags"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("red\ngreen\n")
    colours = np.array([COLOUR_WORDS["red"], COLOUR_WORDS["green"]], np.uint8)
    labels = np.arange(2, dtype=np.uint8).repeat(32)[None].repeat(64, axis=0)
    cv2.imwrite(str(root / "images" / "0.png"), colours[labels][:, :, ::-1])
    cv2.imwrite(str(root / "masks" / "0.png"), labels)
    file = tmp_path / "report.json"
    arguments = ["--dataset", "folder", "--root", root, "--split", "all", "--json", file]
    arguments += ["--sweep", "precision=float32", "--classes", "red,green"]
    code = quick(colour_bundle, *arguments)
    assert code == 0, capsys.readouterr().err
    for variant in json.loads(file.read_text())["variants"]:
        assert variant["miou"] > 90
    assert "which to ship" in capsys.readouterr().out


def test_the_trace_shows_two_frames_with_their_stages_and_nodes(written):
    report, trace = (json.loads(written[index].read_text()) for index in (0, 2))
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


def test_energy_stands_beside_time(tmp_path, monkeypatch, capsys):
    """A board that takes 4 W, half a watt of it swinging, whatever happens."""
    import itertools

    from zsseg_rt.profiling.energy import EnergySources, Rail

    swing = itertools.cycle([3.75, 4.25])
    rail = Rail(name="VDD_IN", read=lambda: next(swing))
    monkeypatch.setattr(
        "zsseg_rt.profiling.profiler.find_energy_sources",
        lambda **_: EnergySources(total=(rail,), note="rail VDD_IN"),
    )
    file = tmp_path / "report.json"
    assert quick("--demo", "scenes", "--json", file) == 0
    (variant,) = json.loads(file.read_text())["variants"]
    energy = variant["energy"]
    assert energy["watts"] == pytest.approx(4.0, rel=0.01)
    assert energy["idle_watts"] == pytest.approx(4.0, rel=0.01)
    assert energy["mj"] == pytest.approx(4e3 * energy["seconds"] / energy["frames"], rel=0.01)
    assert abs(energy["mj_above_idle"]) < 0.02 * energy["mj"]
    assert len(energy["samples"]) > 10
    assert "mJ a frame" in capsys.readouterr().out


def test_energy_that_nothing_tells_is_absent_with_its_reason(written):
    report = json.loads(written[0].read_text())
    if report["variants"][0]["energy"] is not None:
        pytest.skip("this machine tells its energy")
    absent = [r for r in report["conditions"]["readings"] if "energy" in r["name"]]
    assert absent
    assert all(r["value"] is None and r["reason"] and r["command"] for r in absent)


def test_nodes_are_counted_by_kind(written):
    (base, *others) = json.loads(written[0].read_text())["variants"]
    assert {node["graph"] for node in base["nodes"]} == {"image_encoder", "decoder"}
    assert {"linear", "attention"} <= {node["kind"] for node in base["nodes"]}
    assert not any(other["nodes"] for other in others)


def test_nodes_sum_to_their_stage_or_a_note_says_why_not(written):
    report = json.loads(written[0].read_text())
    base = report["variants"][0]
    for graph in ("image_encoder", "decoder"):
        total = sum(node["ms"] for node in base["nodes"] if node["graph"] == graph)
        near = abs(total / base["stages"][graph]["mean"] - 1.0) <= 0.05
        noted = [note for note in report["notes"] if f": {graph} took" in note]
        assert len(noted) == (0 if near else 1)
