"""The benchmark of the engine runs, checks what it times, and the documents hold its report."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.errors import refused

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "run.py"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def run(benchmarks, monkeypatch):
    """The script, with our way and OpenCV's to label and to paint: what opens fast."""
    import run
    from rivals import cases, measure

    few = {
        task: tuple(rival for rival in rivals if "torch" not in rival.name)
        for task, rivals in cases.RIVALS.items()
    }
    for module in (cases, measure, run):
        monkeypatch.setattr(module, "RIVALS", few)
    monkeypatch.setenv("ZSSEG_HOME", "unused")  # run() sets them; this brings them back
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")
    return run


def read(*files):
    from rivals.report import read_reports

    return read_reports(files)


def committed():
    """The report of the documents."""
    from rivals.tables import DOCUMENTS, sources_of

    return read(*sources_of(DOCUMENTS[0].read_text(encoding="utf-8")))


@pytest.mark.nightly
def test_a_quick_run_measures_every_group(tmp_path, benchmarks):
    for package in ("torch", "onnx", "onnxscript", "onnxruntime", "supervision"):
        pytest.importorskip(package)
    from rivals.cases import GROUPS, RIVALS
    from rivals.tables import TABLES

    file = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--json", str(file)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = read(file)
    assert report.groups == GROUPS
    assert report.machine["cpu"]
    assert report.commit
    assert {case.task for case in report.cases} == set(RIVALS)
    assert len({(c.task, c.classes, c.out_hw) for c in report.cases}) == len(report.cases)
    timed = {rival.name for case in report.cases for rival in case.rivals if rival.ms}
    assert timed >= {"engine float32", "torch float32", "ONNX Runtime float32", "supervision"}
    for case in report.cases:
        assert case.rounds >= 1
        for rival in case.rivals:
            if rival.note in ("left out of short runs", "one call only: too slow for more"):
                continue
            assert rival.note == ""
            assert rival.ms > 0
            assert rival.peak_mb > 10
            assert rival.equal_share >= 0.9
            assert (rival.difference is None) == (rival is case.rivals[0])
        names = [rival.name for rival in case.rivals]
        assert names == [rival.name for rival in RIVALS[case.task]]
    for name in ("engine", "classes", "output", "postprocess"):
        assert TABLES[name](report) in done.stdout
        assert "| --- |" in TABLES[name](report)


def test_wrong_results_are_not_timed(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("supervision")
    from rivals import measure

    monkeypatch.setattr(measure, "equal_share", lambda pixels, truth: 0.5)
    file = tmp_path / "report.json"
    assert run.main(["--quick", "postprocess", "--json", str(file)]) == 1
    for case in read(file).cases:
        ours, *others = case.rivals
        assert ours.ms > 0
        assert {rival.ms for rival in others} == {None}
        assert {rival.note for rival in others} == {"wrong: only 50.00% of the pixels are equal"}
    output = capsys.readouterr()
    assert "OpenCV: wrong: only 50.00%" in output.err
    assert "| wrong |" in output.out


def test_what_is_missing_or_fails_is_reported(run, tmp_path, monkeypatch, capsys):
    from rivals import measure
    from rivals.cases import Rival

    broken = Rival("broken", "labels", {"library": "none"})
    monkeypatch.setitem(measure.RIVALS, "labels", (*measure.RIVALS["labels"], broken))
    monkeypatch.setattr(run, "is_installed", lambda need: need != "supervision")
    file = tmp_path / "report.json"
    assert run.main(["--quick", "postprocess", "--json", str(file)]) == 0
    report = read(file)
    assert [dataclasses.asdict(absent) for absent in report.absent] == [
        {
            "rivals": ("supervision",),
            "need": "supervision",
            "command": "pip install supervision",
        }
    ]
    notes = {rival.name: rival.note for case in report.cases for rival in case.rivals}
    assert notes["supervision"] == "missing: supervision"
    assert notes["broken"] == "failed: broken: KeyError: 'none'"
    assert notes["OpenCV"] == ""
    assert "supervision: missing supervision; `pip install supervision`" in capsys.readouterr().out


def test_without_torch_nothing_can_be_made(run, monkeypatch, capsys):
    monkeypatch.setattr(run, "is_installed", lambda need: need != "torch")
    assert run.main(["--quick"]) == 4
    assert "pip install '.[torch]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["speed"], ["--seconds", "0"], ["--seconds", "nan"], ["--json", "/no/such/a"]]
)
def test_bad_arguments_are_refused(run, arguments, capsys):
    with pytest.raises(SystemExit) as refused:
        run.main(arguments)
    assert refused.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_the_list_names_what_the_work_asks_for(run, capsys):
    assert run.main(["--list", "classes", "output", "threads"]) == 0
    listed = capsys.readouterr().out
    for words in ("classes 1,", "classes 1000,", "256x256", "3840x2160", "threads 1", "threads 2"):
        assert words in listed


def test_equal_pixels_are_counted(benchmarks):
    from rivals.measure import equal_share

    labels = np.zeros((10, 10), np.uint8)
    other = labels.astype(np.int64)
    other[0] = 3
    assert equal_share(labels, labels) == 1.0
    assert equal_share(other, labels) == 0.9
    assert equal_share(labels[:5], labels) == 0.0
    picture = np.zeros((2, 2, 3), np.uint8)
    near, far = picture.copy(), picture.copy()
    near[0, 0], far[0, 0, 1] = 1, 2
    assert equal_share(near, picture) == 1.0
    assert equal_share(far, picture) == 0.75


def test_logits_that_do_not_fit_are_not_made(benchmarks):
    from rivals.cases import Case, Rival, refused_memory

    case = Case("labels", "", 1000, (2160, 3840), 2)
    assert refused_memory(Rival("a", "labels", full_logits=True), case, 24 << 30) == (
        "its logits would take 33 GB"
    )
    assert refused_memory(Rival("a", "labels", full_logits=True), case, 96 << 30) == ""
    assert refused_memory(Rival("a", "labels"), case, 1 << 30) == ""


@pytest.mark.parametrize("document", ["docs/benchmarks.md"])
def test_documents_hold_what_their_report_says(benchmarks, document):
    """If this fails, run ``python benchmarks/run.py --tables`` with the reports that they name."""
    from rivals.tables import DOCUMENTS, filled, sources_of

    file = ROOT / document
    assert file in DOCUMENTS
    text = file.read_text(encoding="utf-8")
    sources = sources_of(text)
    assert filled(text, read(*sources), sources) == text


def test_documents_are_filled_from_any_report(benchmarks, tmp_path):
    from rivals import tables
    from rivals.report import write_report

    report = committed()
    other, file = dataclasses.replace(report, commit="abc1234", cases=()), tmp_path / "other.json"
    write_report(other, file)
    assert read(file) == other
    copy = tmp_path / "page.md"
    copy.write_text(tables.DOCUMENTS[0].read_text(encoding="utf-8"), encoding="utf-8")
    tables.fill_documents(other, [file], [copy])
    text = copy.read_text(encoding="utf-8")
    assert "commit `abc1234`" in text
    assert f"; commit `{report.commit.removesuffix('-dirty')}`" not in " ".join(text.split())
    assert "Not measured in this run." in text
    assert tables.filled(text, other, [file]) == text
    changed = tables.conditions_text(dataclasses.replace(other, commit="abc1234-dirty"))
    assert "commit `abc1234` with uncommitted changes; " in " ".join(changed.split())
    assert max(map(len, changed.splitlines())) <= 140


def test_parts_of_a_run_are_put_together(benchmarks, tmp_path):
    from rivals.report import write_report

    from zsseg_rt.errors import ArgumentError

    report = committed()
    parts = []
    for index, cases in enumerate((report.cases[:1], report.cases[1:])):
        parts.append(tmp_path / f"{index}.json")
        part = dataclasses.replace(report, cases=cases, seconds=report.seconds / 2)
        write_report(part, parts[-1])
    assert read(*parts).cases == report.cases
    assert read(*parts).seconds == report.seconds
    write_report(dataclasses.replace(part, commit="abc1234"), parts[1])
    with refused(ArgumentError, None, "1.json"):
        read(*parts)


def test_places_for_unknown_tables_are_refused(benchmarks):
    from rivals.tables import DOCUMENTS, filled, sources_of

    from zsseg_rt.errors import ArgumentError

    text, report = DOCUMENTS[0].read_text(encoding="utf-8"), committed()
    with refused(ArgumentError, None, "-->"):
        filled(text.replace("benchmark threads", "benchmark speed"), report, DOCUMENTS)
    with refused(ArgumentError, "document"):
        filled("# nothing", report, DOCUMENTS)
    with refused(ArgumentError, "document"):
        sources_of("# nothing")


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', "no JSON"])
def test_other_files_are_no_reports(run, tmp_path, content, capsys):
    file = tmp_path / "other.json"
    file.write_text(content)
    assert run.main(["--tables", str(file)]) == 1
    assert "other.json" in capsys.readouterr().err


def test_reports_of_another_format_are_refused(benchmarks, tmp_path):
    from rivals.report import write_report

    from zsseg_rt.errors import ArgumentError

    file = tmp_path / "newer.json"
    write_report(committed(), file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with refused(ArgumentError, None, "1", "2"):
        read(file)
