"""Inputs that were once accepted in silence, or refused without a name."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import zsseg_rt
from support.errors import refused
from zsseg_rt import BundleError, Engine, EngineConfig, Segmentation
from zsseg_rt.errors import (
    ArgumentError,
    DTypeError,
    ShapeError,
    SourceError,
)
from zsseg_rt.results.visualize import save_file

DEMO = Path(zsseg_rt.__file__).parent / "demo" / "scenes.zsseg"
FRAME = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def demo_engine(cache: Path) -> Engine:
    return Engine(DEMO, EngineConfig(num_threads=1, cache_dir=cache))


@pytest.mark.parametrize("name", ["Blue sky", "blue  sky", "\ufeffblue sky"])
def test_seen_names_are_matched_as_the_tokenizer_reads_them(name, tmp_path):
    cv2 = pytest.importorskip("cv2")
    photo = np.ascontiguousarray(cv2.imread(str(DEMO.parent / "beach.png"))[..., ::-1])
    with demo_engine(tmp_path) as engine:
        engine.set_classes(["blue sky", "yellow sand"])
        expected = engine.segment(photo).labels
        engine.set_classes([name, "yellow sand"])
        assert (engine.segment(photo).labels == expected).all()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("head", "seen_bias", float("nan")),
        ("head", "logit_scale", float("inf")),
        ("head", "unknown_below", 2.0),
        ("head", "unknown_below", -1.0),
        ("preprocess", "mean", [float("nan")] * 3),
        ("text", "templates", []),
        ("head", "grid_hw", [4, 4]),
        ("preprocess", "size_hw", [1000000000, 128]),
    ],
)
def test_a_manifest_with_a_useless_setting_is_refused(section, key, value, tmp_path):
    bundle = tmp_path / "x.zsseg"
    shutil.copytree(DEMO, bundle)
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest[section][key] = value
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"{key}|expected JSON, got the number"):
        Engine(bundle, EngineConfig(use_cache=False))


def test_frames_of_odd_kinds_are_refused(tmp_path):
    odd = [np.zeros((8, 8, 3), kind) for kind in ("M8[s]", "m8[s]", "O", ">u2", "U1", "u1,u1")]
    with demo_engine(tmp_path) as engine:
        engine.set_classes(["blue sky", "yellow sand"])
        for frame in odd:
            message = rf"frame: expected uint8, got {re.escape(str(frame.dtype))}"
            with pytest.raises(DTypeError, match=message):
                engine.segment(frame)
        with refused(DTypeError, "frame"):
            engine.segment(np.ma.masked_array(FRAME, mask=True))
        with refused(ShapeError, "frame"):
            engine.segment(np.zeros((), np.uint8))


def test_a_file_without_a_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="cannot be written"):
        save_file("", b"x")


@pytest.mark.parametrize("name", ["mask.jpg", "mask", ""])
def test_labels_are_written_as_png_only(name, tmp_path):
    seg = Segmentation(labels=np.zeros((2, 2), np.uint8), names=("a",), vocabulary_version=1)
    with refused(ArgumentError, "path"):
        seg.save(tmp_path / name if name else name)
    seg.save(tmp_path / "mask.PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["mask.PNG"]
