"""The short form of the ladder of precisions: every figure is there, and its tables can be made."""

import json
import re

import pytest

pytest.importorskip("torch")

import models_table  # in benchmarks/
import precision

from support.cpus import needs_vnni


@needs_vnni
def test_the_short_form_measures_every_precision(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZSSEG_HOME", "")  # the script sets it
    report = tmp_path / "report.json"
    short = ["--quick", "--only", "clip_rc", "scenes", "--threads", "1", "--json", str(report)]
    assert precision.main(short) == 0
    printed = capsys.readouterr().out
    random, scenes = json.loads(report.read_text())["rows"]
    assert random["side"] == 64
    assert scenes["layers"]["int8"] == [45, 45]
    kept, of_all = scenes["layers"]["fp8"]  # where the gate asks for it, layers stay in float16
    assert 0 < kept <= of_all == 45
    for row in (random, scenes):
        assert {"float32", "int8"} <= set(row["ms"]) == set(row["same"])
        assert row["same"]["float32"] == 1.0
    assert scenes["gate"]["int8"] >= 0.98
    for group in ("miou", "seen", "unseen"):
        assert abs(scenes[group]["int8"] - scenes[group]["float32"]) < 2.0
    assert precision.main(["--markdown", str(report)]) == 0
    assert capsys.readouterr().out == printed
    assert printed.count("the scenes demo's ZegCLIP") == 4


def test_the_page_of_models_has_the_table_of_the_reports_that_it_names():
    page = models_table.PAGE.read_text(encoding="utf-8")
    names = re.search(r"^<!-- models table: (.*) -->$", page, re.MULTILINE)[1].split()
    results = models_table.ROOT / "benchmarks" / "results"
    assert models_table.with_table(page, [results / name for name in names]) == page
