"""Papers' protocols: the lists are the published ones, and one command follows them."""

import hashlib
import itertools
import json

import numpy as np
import pytest
from onnx import helper
from PIL import Image

from benchmarks.papers.__main__ import main as evaluate_as
from benchmarks.papers.protocol import papers, read_protocol
from support.cells import dense_bundle, image
from support.dataset_trees import build_voc
from zsseg_rt import ArgumentError
from zsseg_rt.evaluation.datasets.published import PUBLISHED

SCALE = 30.0  # of the bundle; protocols have others


def rows_of(phrases, width=6):
    rows = np.random.default_rng(5).normal(size=(len(phrases), width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def bundle_at(folder, side, step, phrases):
    """A dense bundle of cosines: cells are means and contrasts of their pixels."""
    folder.mkdir(exist_ok=True)
    kernel = {"kernel_shape": [step] * 2, "strides": [step] * 2}
    nodes = [
        helper.make_node("AveragePool", ["image"], ["mean"], **kernel),
        helper.make_node("MaxPool", ["image"], ["most"], **kernel),
        helper.make_node("Sub", ["most", "mean"], ["contrast"]),
        helper.make_node("Concat", ["mean", "contrast"], ["embeds"], axis=1),
    ]
    return dense_bundle(
        folder, nodes, side, (6, side[0] // step, side[1] // step), normalize=True,
        activation="softmax", logit_scale=SCALE, text_bank=(list(phrases), rows_of(phrases)),
    )  # fmt: skip


def unique(classes):
    return list(dict.fromkeys(", ".join(classes).split(", ")))


# First 16 hex digits of the SHA-256 of the official lists (SCLIP's and SC-CLIP's; SFP's).
HASHES = {
    "voc21": "80e643a9a1439668",
    "voc21, people": "3b5987c2d5028cff",
    "context60": "5e620446a8699f29",
    "coco-object": "3475d03d61f85ce0",
    "coco-stuff": "fb98709b9ab1baff",
    "cityscapes": "6f6782fc1bf92bfd",
    "cityscapes, people": "8dba4f1e3eeefc37",
    "ade20k": "e53ded02c488bdb9",
    "sclip on voc20": "c68f65a2b342397c",
    "sfp on voc20": "317dafe95650b39e",
    "sclip on context59": "cd808465f06a1616",
}


def test_names_are_the_published_lists():
    digests = {}
    for paper, dataset in itertools.product(papers(), PUBLISHED):
        try:
            rules = read_protocol(paper, dataset)
        except ArgumentError:
            continue
        end = " " if dataset == "context60" else ""  # the official file ends in a blank
        digest = hashlib.sha256(("\n".join(rules.classes) + end).encode()).hexdigest()[:16]
        shorter = dataset in ("voc20", "context59")
        digests[f"{paper} on {dataset}" if shorter else rules.names] = digest
    assert HASHES.items() <= digests.items()


@pytest.fixture(scope="module")
def voc_bundle(tmp_path_factory):
    phrases = unique(read_protocol("sclip", "voc21").classes)
    return bundle_at(tmp_path_factory.mktemp("voc"), (224, 224), 16, phrases)


@pytest.fixture
def voc(tmp_path):
    base = build_voc(tmp_path)
    frame = image(60, 90)
    Image.fromarray(frame).save(base / "JPEGImages" / "2007_2.jpg", quality=95)
    mask = np.full((60, 90), 5, np.uint8)
    mask[:30] = 0
    Image.fromarray(mask).save(base / "SegmentationClass" / "2007_2.png")
    return base


@pytest.mark.nightly
def test_one_command_evaluates_as_a_paper_does(voc_bundle, voc, tmp_path, capsys):
    report = tmp_path / "report.json"
    options = [voc_bundle, "--dataset", "voc21", "--root", voc, "--partial"]
    settings = ["--precision", "float32", "--json", report]
    assert evaluate_as([*map(str, options), "--paper", "sclip", *map(str, settings)]) == 0
    printed = capsys.readouterr().out
    for text in ("as published: sclip on voc21", "short side of 336", "scale 65, prob_thd 0.1",
                 "area_thd 0.1", "(56 phrases)", "no text encoder", "mIoU 59.63",
                 "differs: head: published with sclip; the bundle is"):  # fmt: skip
        assert text in printed
    written = json.loads(report.read_text())
    assert written["segmenter"]["as_published"]["followed"]["area_thd"] == 0.1
    assert evaluate_as([*map(str, options), "--paper", "naclip"]) == 1
    assert "export dense-clip --clip FILE --head naclip --size 336x448" in capsys.readouterr().err
