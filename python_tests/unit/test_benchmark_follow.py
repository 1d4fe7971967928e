"""The benchmark of labels that follow runs, and on one clip following does what it is for."""

import json

import pytest


@pytest.mark.nightly
def test_moved_labels_are_nearer_to_the_truth_than_held_ones(tmp_path, monkeypatch):
    from benchmarks import follow

    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    report = tmp_path / "report.json"
    assert follow.main(["--quick", "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    for every in ("4", "8", "16"):
        ways = found["drawn, 2"][every]
        for way in ("past, held", "near", "near, held"):
            assert ways[way]["differ"] < 0.9 * ways["hold"]["differ"]
            assert ways[way]["foreground"] > ways["hold"]["foreground"]
    assert found["ms per 1280x720 frame, one core"]["least"] > 0.0
