"""The benchmark of folders runs, and every way to label a folder writes the same files."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import photo_folder

    return photo_folder


def test_lanes_and_a_plain_loop_write_the_same_files(benchmark, tmp_path):
    file = tmp_path / "report.json"
    arguments = ["--photos", "4", "--size", "160x120", "--rounds", "1", "--json", str(file)]
    assert benchmark.main(arguments) == 0
    report = json.loads(file.read_text())
    assert report["same files"] is True
    assert report["lanes"]["one lane"] == report["lanes"]["one by one"] == 1
    assert report["lanes"]["chosen lanes"] >= 1
    assert set(report["longer than chosen lanes"]) == {"one lane", "one by one"}
    assert min(report["photos per second"].values()) > 0
    assert report["machine"]["commit"]


def test_a_bundle_is_named_or_made_but_not_both(benchmark, capsys):
    with pytest.raises(SystemExit) as refused:
        benchmark.main(["--real", "--bundle", "a.zsseg"])
    assert refused.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
