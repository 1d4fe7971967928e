"""Bundles of every format version ever written still load and give what they gave."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ArgumentError, Bundle, BundleError, Engine, EngineConfig, FrameMemory
from zsseg_rt.bundles.bundle import FORMAT_VERSION
from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.runtime.families import registry
from zsseg_rt.runtime.families.dense import DenseFamily
from zsseg_rt.runtime.families.registry import create_family

FOLDER = Path(__file__).parents[1] / "bundles"
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


def labels_of(name):
    """What a family's stored bundle gives now, by its key in ``labels.npz``."""
    path, names, frames = stored_inputs(name)
    with Engine(path, EngineConfig(**CPU)) as engine:
        engine.set_classes(names)
        return {
            f"{name}.{index}.{threshold}": engine.segment(frame, unknown_below=threshold).labels
            for index, frame in enumerate(frames)
            for threshold in (0.0, 0.3)
        }


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_labels_are_those_of_version_0_1(name):
    """Equal bit for bit: no pixel here is so near a tie that another backend labels it otherwise.

    ``labels.npz`` was written by version 0.1 with OpenVINO; ONNX Runtime in the place of OpenVINO,
    and backend torch where it runs the graphs, gave the same. :func:`labels_of` makes those of a
    new family, which are added to the file.
    """
    with np.load(FOLDER / "v1" / "labels.npz") as stored:
        for key, labels in labels_of(name).items():
            np.testing.assert_array_equal(labels, stored[key])


def stored_as(tmp_path, family, name="dense", **changes):
    """A copy of a stored bundle that names another family, with changes to its head."""
    path = Path(shutil.copytree(FOLDER / "v1" / f"{name}.zsseg", tmp_path / f"{family}.zsseg"))
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["family"] = family
    manifest["head"].update(changes)
    (path / "bundle.json").write_text(json.dumps(manifest))
    return path


def test_a_blend_with_cosines_is_refused_and_none_is_read(tmp_path):
    """Earlier versions could blend masks with cosines, and wrote null where they did not."""
    rule, kind = {"seen_weight": 0.0, "unseen_weight": 0.4, "scale": 5.0}, "descriptor"
    with pytest.raises(BundleError, match=r"bundle.json.head: cosine: .* Export the bundle again"):
        Bundle.load(stored_as(tmp_path / "blended", kind, kind, cosine=rule))
    plain = Bundle.load(stored_as(tmp_path / "plain", kind, kind, cosine=None))
    assert plain.head == Bundle.load(FOLDER / "v1" / f"{kind}.zsseg").head


def test_a_family_is_added_by_a_file_a_line_and_a_row(monkeypatch, tmp_path):
    """What CONTRIBUTING.md says; every room takes the rest from the row."""

    class Twin(DenseFamily):
        name = "twin"

    path = stored_as(tmp_path, "twin")
    with refused(BundleError, None, "'twin'"):
        Bundle.load(path)
    monkeypatch.setitem(FAMILIES, "twin", replace(FAMILIES["dense"], settings=("max_candidates",)))
    monkeypatch.setitem(registry._FACTORIES, "twin", Twin)
    config = EngineConfig(max_candidates=100, **CPU)
    _, names, (frame, _) = stored_inputs("dense")
    with Engine(path, config) as engine, Engine(FOLDER / "v1" / "dense.zsseg") as dense:
        assert engine.self_check().passed
        for each in (engine, dense):
            each.set_classes(names)
        memory = FrameMemory()
        expected = dense.segment(frame, memory=FrameMemory()).labels
        np.testing.assert_array_equal(engine.segment(frame, memory=memory).labels, expected)
    with refused(ArgumentError, "min_region_score"):
        Engine(path, EngineConfig(min_region_score=0.5, **CPU))
    monkeypatch.setitem(FAMILIES, "twin", replace(FAMILIES["twin"], keys=("segments",)))
    with refused(BundleError, None, "'segments'"):
        Bundle.load(path)


@pytest.mark.parametrize(
    ("architecture", "stated", "rows"),
    [("zegclip", {}, 8), ("clip_rc", {}, 3), ("next", {"independent_queries": True}, 8),
     ("zegclip", {"independent_queries": False}, 3)],
)  # fmt: skip
def test_captures_share_rows_where_queries_are_independent(tmp_path, architecture, stated, rows):
    bundle = Bundle.load(stored_as(tmp_path, "descriptor", "descriptor", **stated))
    family = create_family(replace(bundle, architecture=architecture), EngineConfig(**CPU))
    assert family.rows_for(3) == rows
    assert ("independent_queries" in bundle.to_manifest()["head"]) == bool(stated)
