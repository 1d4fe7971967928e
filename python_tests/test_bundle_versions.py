"""Bundles of every format version ever written still load and give what they gave."""

from pathlib import Path

import numpy as np
import pytest

from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.bundle import FAMILIES, FORMAT_VERSION

FOLDER = Path(__file__).parent / "bundles"
BUNDLES = sorted(FOLDER.glob("v*/*.zsseg"))
CPU = {"device": "cpu", "precision": "float32", "use_cache": False}


def test_every_version_is_kept():
    versions = {path.parent.name for path in BUNDLES}
    assert versions == {f"v{number}" for number in range(1, FORMAT_VERSION + 1)}
    assert {path.stem for path in BUNDLES if path.parent.name == "v1"} == set(FAMILIES)


@pytest.mark.parametrize("path", BUNDLES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_old_bundle_still_runs(path):
    bundle = Bundle.load(path)
    bundle.verify()
    with Engine(bundle, EngineConfig(**CPU)) as engine:
        report = engine.self_check()
        assert report.passed, report.first_failure
        names = list(bundle.text_bank.names)[:3]
        engine.set_classes(names)
        labels = engine.segment(np.zeros((30, 40, 3), np.uint8)).labels
    assert labels.max() < 3


def stored_inputs(name):
    """Bundle, class names and frames of what ``labels.npz`` holds."""
    path = FOLDER / "v1" / f"{name}.zsseg"
    with np.load(path / "golden.npz") as golden:
        frame = golden["frame"]
    blocks = np.random.RandomState(0).randint(0, 256, (5, 6, 3)).astype(np.uint8)
    blocks = blocks.repeat(24, 0).repeat(30, 1)
    return path, list(Bundle.load(path).text_bank.names), [frame, blocks]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_labels_are_those_of_version_0_1(name):
    """Equal bit for bit: no pixel here is so near a tie that another backend labels it otherwise.

    ``labels.npz`` was written by version 0.1 with OpenVINO; ONNX Runtime in the place of OpenVINO,
    and backend torch where it runs the graphs, gave the same.
    """
    path, names, frames = stored_inputs(name)
    with (
        np.load(FOLDER / "v1" / "labels.npz") as stored,
        Engine(path, EngineConfig(**CPU)) as engine,
    ):
        engine.set_classes(names)
        for index, frame in enumerate(frames):
            for threshold in (0.0, 0.3):
                labels = engine.segment(frame, unknown_below=threshold).labels
                np.testing.assert_array_equal(labels, stored[f"{name}.{index}.{threshold}"])
