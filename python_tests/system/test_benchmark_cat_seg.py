"""The short form of CAT-Seg's benchmark: every candidate labels alike, and figures are there."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cat_seg

    return cat_seg


@torch.no_grad()
def test_its_eager_form_is_the_model(benchmark, monkeypatch):
    from zsseg_rt.models.cat_seg import aggregator

    monkeypatch.setattr(aggregator, "sum_linear", aggregator.sum_linear)  # and back again
    model = benchmark.build_model("tiny")
    image, text = torch.randn(2, 3, 96, 96), torch.randn(5, 32)
    expected = model(image, text).mask_logits
    benchmark.use_published_arithmetic(model)
    lengths = []
    model.aggregator.layers[0].attention.norm2.register_forward_hook(
        lambda _, given, __: lengths.append(given[0].shape[1])
    )
    found = model(image, text).mask_logits
    assert lengths == [256]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_short_form_measures_all_candidates(benchmark, tmp_path):
    # exported here, where graphs are kept; its processes use what is in the folder
    benchmark.bundle_of(argparse.Namespace(folder=tmp_path, size="tiny"))
    report = tmp_path / "report.json"
    command = [sys.executable, BENCHMARKS / "cat_seg.py", "--size", "tiny", "--classes", "40"]
    command += ["--rounds", "1", "--threads", "1", "--json", report, "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(report.read_text())["classes"]["40"]
    assert row["same_labels_as_eager"] > 0.999
    assert set(row["median_ms"]) == set(row["memory"]) == {"engine", "one graph", "eager"}
    assert row["eager / engine"] > 0
    assert "40 classes" in done.stdout
