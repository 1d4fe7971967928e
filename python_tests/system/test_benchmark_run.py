"""The benchmark of the engine runs, checks what it times, and the documents hold its report."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


@pytest.mark.nightly
def test_a_quick_run_measures_every_group(tmp_path, benchmarks):
    for package in ("torch", "onnx", "onnxruntime", "supervision"):
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


@pytest.mark.parametrize("document", ["docs/benchmarks.md"])
def test_documents_hold_what_their_report_says(benchmarks, document):
    """If this fails, run ``python benchmarks/run.py --tables`` with the reports that they name."""
    from rivals.tables import DOCUMENTS, filled, sources_of

    file = ROOT / document
    assert file in DOCUMENTS
    text = file.read_text(encoding="utf-8")
    sources = sources_of(text)
    assert filled(text, read(*sources), sources) == text
