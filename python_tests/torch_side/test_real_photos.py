"""Real photos, real names, a real encoder: the whole open-vocabulary path against true masks."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import photo_demo, real_photos
from support.command_line import run


def test_labels_agree_with_true_masks_and_names_of_the_command_line(
    shared_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    stem = str(shared_dir / "data" / "encoders" / "deeplabv3_mnv2_voc_clipspace")
    parts = (Path(f"{stem}{end}") for end in (".onnx", "_train_text_rows.npy", "_classes.json"))
    voc_bundle = real_photos.export(*parts, tmp_path / "voc.zsseg")
    report = real_photos.evaluate(voc_bundle, shared_dir / "data" / "tinycoco")
    # Measured on these photos: 0.926 and 0.395. A shuffled or shifted class list gives < 0.1.
    assert report["pixel_accuracy"] > 0.90
    assert report["miou_classes_in_truth"] > 0.36
    photo = shared_dir / "data" / "photos" / "dog_1.jpg"
    report = tmp_path / "report.json"
    arguments = ["segment", photo, "--bundle", voc_bundle, "--out", tmp_path / "out"]
    arguments += ["--classes", "dog,cat,couch,person", "--background", "background"]
    assert run(*arguments, "--json", report) == 0
    (entry,) = json.loads(report.read_text())["photos"]
    shares = {c["name"]: c["share"] for c in entry["classes"]}
    assert set(shares) == {"dog", "person"}  # a man and a dog pull at a toy on a beach
    assert min(shares.values()) > 0.1
    assert np.isclose(sum(shares.values()) + entry["unknown_share"], 1.0)


@pytest.mark.nightly
def test_the_photo_demo_takes_synonyms_and_stuff(shared_dir):
    """Measured: 47.1 with the 20 names and with stuff beside them, 41.5 with these synonyms."""
    things, synonyms, stuff = photo_demo.compare(
        shared_dir / "data" / "tinycoco", draws=1, few=False
    )
    assert things["miou"] >= 45
    assert synonyms["miou"] >= 39
    assert stuff["miou"] >= 45
    assert min(row["pixel_accuracy"] for row in (things, synonyms, stuff)) >= 92
