"""The data loading benchmark runs, without photos at hand, and its figures are rates."""

import importlib.util
from pathlib import Path

from zsseg_rt.training.data.transforms import FitInsideAugmentation


def load_benchmark(monkeypatch):
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "data_loading.py"
    monkeypatch.setattr("sys.path", ["unused", *__import__("sys").path])
    spec = importlib.util.spec_from_file_location("data_loading_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measures_rates(monkeypatch, tmp_path, capsys):
    benchmark = load_benchmark(monkeypatch)
    dataset = benchmark.make_dataset(tmp_path / "set", tmp_path / "no photos", (60, 80))
    assert len(dataset) == benchmark.PICTURES
    assert dataset.verify().problems == ()
    augmentation = FitInsideAugmentation(crop_hw=(32, 32), scale=(128, 32))
    row = benchmark.measure(dataset, augmentation, seconds=0.02, workers=0)
    assert set(row) == {
        "reading_per_second",
        "augmentation_per_second",
        "per_core_per_second",
        "loader_per_second",
    }
    assert min(row.values()) > 0
    named = {"pictures": "tiny", "size_hw": (60, 80), "augmentation": "fit_inside"} | row
    benchmark.print_report({"machine": {"cpu": "x"}, "workers": 0, "rows": [named]})
    assert f"| 80x60 | fit_inside | {row['reading_per_second']:.0f} |" in capsys.readouterr().out
