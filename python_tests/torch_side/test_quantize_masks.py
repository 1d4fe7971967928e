"""The gate of quantised bundles where masks are given: mIoU of all, seen and unseen classes."""

import json

import cv2
import numpy as np
import pytest

from support.cpus import needs_vnni
from support.errors import refused
from support.quantizing import FAST, FewScenes, write_photos
from zsseg_rt import ArgumentError, Bundle, BundleError, Engine, EngineConfig
from zsseg_rt.bundles.specs import MaskLoss
from zsseg_rt.cli import main
from zsseg_rt.evaluation.evaluate import EngineSegmenter
from zsseg_rt.evaluation.metrics import ConfusionMatrix, score
from zsseg_rt.export.quantized import bundle as quantizing
from zsseg_rt.export.quantized.bundle import Agreement, choose_images, quantize_bundle
from zsseg_rt.text.class_names import split_synonyms


def names_of(dataset):
    return split_synonyms(dataset.class_names)


def miou(bundle, precision, pictures, dataset):
    """Measured apart from the code under test: an engine as users open it, picture by picture."""
    counts = ConfusionMatrix(len(dataset.class_names), ignore_label=dataset.ignore_label)
    with Engine(bundle, EngineConfig(device="cpu", precision=precision, use_cache=False)) as engine:
        segmenter = EngineSegmenter(engine, dataset.class_names)
        for picture in pictures:
            sample = picture()
            counts.update(sample.labels, segmenter.segment(sample.image))
    found = score(counts.counts, dataset.seen)
    held, seen = found.true_pixels > 0, np.isin(np.arange(len(found.iou)), dataset.seen)
    return {
        "mIoU": 100 * found.iou[held].mean(),
        "mIoU(S)": 100 * found.iou[held & seen].mean(),
        "mIoU(U)": 100 * found.iou[held & ~seen].mean(),
    }


@needs_vnni
def test_a_bundle_holds_what_it_loses_on_masks(tmp_path, capsys):
    data, out = FewScenes(16), tmp_path / "small.zsseg"
    report = quantize_bundle(Bundle.demo("scenes"), out, None, names_of(data), FAST, dataset=data)
    bundle = Bundle.load(out)
    told, held_back = bundle.quantization["int8"], choose_images(None, data).measured
    assert told == report.spec
    assert told.measured_photos == len(held_back) == 4
    assert len(set(told.photos)) == 16
    masks = told.masks
    assert masks.float32 == pytest.approx(miou(bundle, "float32", held_back, data), abs=1e-3)
    assert masks.narrow == pytest.approx(miou(bundle, "int8", held_back, data), abs=1e-3)
    assert masks.lost["mIoU"] <= masks.most == 0.5
    assert main(["info", str(out)]) == 0
    assert (
        f"mIoU {masks.float32['mIoU']:.2f} -> {masks.narrow['mIoU']:.2f}" in capsys.readouterr().out
    )


def test_unseen_classes_may_not_lose_more_than_seen_ones():
    whole = {"mIoU": 50.0, "mIoU(S)": 60.0, "mIoU(U)": 30.0}

    def passed(all_, seen, unseen):
        lost = dict(zip(whole, (all_, seen, unseen), strict=True))
        narrow = {name: value - lost[name] for name, value in whole.items()}
        return MaskLoss(dataset="d", float32=whole, narrow=narrow, most=0.5).passed

    assert passed(0.5, 0.5, 1.0)
    assert passed(-1.0, -1.0, -0.6)
    assert not passed(0.51, 0.5, 0.5)
    assert not passed(0.4, 0.1, 0.7)
    assert not passed(float("nan"), 0.0, 0.0)
    assert not passed(0.0, 0.0, float("nan"))
    alone = MaskLoss(dataset="d", float32={"mIoU": 50.0}, narrow={"mIoU": 49.6}, most=0.5)
    assert alone.passed


@needs_vnni
def test_too_much_mask_loss_writes_only_the_report(tmp_path, monkeypatch, capsys):
    report, out = tmp_path / "report.json", tmp_path / "new.zsseg"
    for kind in ("images", "masks"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    data = FewScenes(8)
    (tmp_path / "set" / "classes.txt").write_text("\n".join(data.class_names))
    for index in range(8):
        sample = data[index]
        cv2.imwrite(str(tmp_path / "set" / "images" / f"{index}.png"), sample.image[..., ::-1])
        cv2.imwrite(str(tmp_path / "set" / "masks" / f"{index}.png"), sample.labels)

    def measure(bundle, precision, reference):
        lower = {name: value - 0.6 for name, value in reference.miou.items()}
        return Agreement(clear=1.0, everywhere=0.9, miou=lower)

    monkeypatch.setattr(quantizing, "measure", measure)
    given = ["quantize", "demo-scenes", "--dataset", "folder", "--root", str(tmp_path / "set"),
             "--split", "all", "--out", str(out), "--json", str(report)]  # fmt: skip
    assert main(given) == 3
    assert not out.exists()
    masks = json.loads(report.read_text())["spec"]["masks"]
    assert masks["dataset"] == "set/all"
    assert masks["float32"]["mIoU"] - masks["narrow"]["mIoU"] == pytest.approx(0.6)
    assert "mIoU" in capsys.readouterr().out
    assert main([*given, "--max-miou-loss", "0.7"]) == 0
    assert Bundle.load(out).quantization["int8"].masks.most == 0.7
    written = json.loads((out / "bundle.json").read_text())
    del written["quantization"]["int8"]["masks"]["narrow"]["mIoU"]
    (out / "bundle.json").write_text(json.dumps(written))
    with refused(BundleError, None, "narrow", "mIoU"):
        Bundle.load(out)


@pytest.mark.usefixtures("vnni")
def test_unfit_masks_are_refused(tmp_path):
    demo, out, data = Bundle.demo("scenes"), tmp_path / "new.zsseg", FewScenes(8)
    with refused(ArgumentError, "class_names", str(len(data.class_names)), "1"):
        quantize_bundle(demo, out, None, ["sky"], FAST, dataset=data)
    with refused(ArgumentError, "dataset", "8", "7"):
        quantize_bundle(demo, out, None, names_of(data), FAST, dataset=FewScenes(7))
    with refused(ArgumentError, "dataset", "class"):
        blank = FewScenes(8, blank=True)
        quantize_bundle(demo, out, None, names_of(data), FAST, dataset=blank)
    with refused(ArgumentError, "photos", "neither"):
        quantize_bundle(demo, out, None, ["sky", "ball"], FAST)
    assert not out.exists()


def test_photos_give_ranges_and_a_data_set_figures(tmp_path):
    folder = write_photos(tmp_path)
    both = choose_images(folder, FewScenes(3))
    assert len(both.ranged) == 8
    assert len(both.measured) == 3
    assert {picture().labels.size > 0 for picture in both.measured} == {True}
    assert {picture().labels.size > 0 for picture in both.ranged} == {False}
