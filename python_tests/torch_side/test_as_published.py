"""Papers' protocols: the lists are the published ones, and labels those of the rules in NumPy."""

import hashlib
import json

import cv2
import numpy as np
import pytest
from onnx import TensorProto, helper
from PIL import Image

from benchmarks.papers.__main__ import main as evaluate_as
from benchmarks.papers.protocol import Protocol, papers, read_protocol
from benchmarks.papers.segmenter import PublishedSegmenter
from support.cells import picture
from support.command_line import run
from support.dataset_trees import build_voc
from support.graphs import write_graph
from zsseg_rt import ArgumentError, Engine, EngineConfig
from zsseg_rt.evaluation.datasets.published import PUBLISHED
from zsseg_rt.export import export_dense_bundle
from zsseg_rt.ops import reference

STATISTICS = {"mean": (0.5, 0.4, 0.6), "std": (0.2, 0.3, 0.25)}
SCALE = 30.0  # of the bundle; protocols have others
CLASSES = ("sky, wall, grass", "red", "blue, navy", "grass", "green")  # "grass" twice


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
    encoder = write_graph(
        folder / "encoder.onnx",
        nodes,
        {"image": (TensorProto.FLOAT, [1, 3, side[0], side[1]])},
        {"embeds": (TensorProto.FLOAT, [1, 6, side[0] // step, side[1] // step])},
    )
    bank = (list(phrases), rows_of(phrases))
    return export_dense_bundle(
        encoder, folder / "cells.zsseg", image_size=side, normalize=True, activation="softmax",
        logit_scale=SCALE, text_bank=bank, **STATISTICS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory):
    return bundle_at(tmp_path_factory.mktemp("small"), (24, 24), 4, unique(CLASSES))


def unique(classes):
    return list(dict.fromkeys(", ".join(classes).split(", ")))


def protocol(**settings):
    usual = {"paper": "test", "dataset": "made", "source": "", "figures": "", "head": "naclip"}
    usual |= {"short_side": 40, "crop": 24, "stride": 12, "logit_scale": 12.0}
    return Protocol(**{**usual, "classes": CLASSES, **settings})


def labels_by(bundle, rules, frame):
    config = PublishedSegmenter.config(EngineConfig(device="cpu", precision="float32"))
    with Engine(bundle, config) as engine:
        return PublishedSegmenter(engine, rules, (), ("{}",)).segment(frame)


# --- the rules, from their definition ---


def cosines(window, size_hw, step, phrases):
    """Of a window uint8 [h, w, 3]: [P, gh, gw]."""
    image = reference.preprocess(window, size_hw=size_hw, **STATISTICS)
    cells = image.reshape(3, size_hw[0] // step, step, size_hw[1] // step, step)
    mean, most = cells.mean(axis=(2, 4)), cells.max(axis=(2, 4))
    embeds = np.concatenate([mean, most - mean])
    embeds /= np.linalg.norm(embeds, axis=0)
    unit = dict(zip(unique(phrases), rows_of(unique(phrases)), strict=True))
    rows = np.stack([unit[phrase] for phrase in ", ".join(phrases).split(", ")])
    return np.einsum("pd,dyx->pyx", rows, embeds)


def softmax(logits):
    shares = np.exp(logits - logits.max(axis=0))
    return shares / shares.sum(axis=0)


def upsampled(maps, size_hw):
    return reference.upsample_bilinear(maps[None].astype(np.float32), size_hw)[0]


def averaged(rules, frame, step):
    height, width = frame.shape[:2]
    if rules.resize == "bicubic":
        short = rules.short_side / min(height, width)
        size_wh = (int(width * short + 1e-9), int(height * short + 1e-9))
        whole = np.asarray(Image.fromarray(frame).resize(size_wh, Image.Resampling.BICUBIC))
    else:
        short = min(rules.short_side / min(height, width), 2048 / max(height, width))
        whole = cv2.resize(frame, (round(width * short), round(height * short)))
    side, (height, width) = rules.crop, whole.shape[:2]
    phrases = ", ".join(rules.classes).count(",") + 1
    total, counts = np.zeros((phrases, height, width)), np.zeros((height, width))
    ends = [
        sorted({min(n * rules.stride + side, size) for n in range(size)})
        for size in (height, width)
    ]
    for bottom in ends[0]:
        for right in ends[1]:
            part = (slice(bottom - side, bottom), slice(right - side, right))
            maps = upsampled(cosines(whole[part], (side, side), step, rules.classes), (side, side))
            total[(slice(None), *part)] += maps if rules.averaged == "cosines" else softmax(maps)
            counts[part] += 1
    return total / counts


def expected(rules, frame, size_hw, step):
    """Labels, and the margin of each pixel's winner."""
    if rules.crop:
        maps = averaged(rules, frame, step)
    else:
        maps = cosines(frame, size_hw, step, rules.classes)
    maps = upsampled(maps, frame.shape[:2])
    shares = softmax(rules.logit_scale * maps) if rules.averaged == "cosines" else maps
    owners = [n for n, entry in enumerate(rules.classes) for _ in entry.split(", ")]
    scores = np.zeros((len(rules.classes), *frame.shape[:2]))
    for owner, share in zip(owners, shares, strict=True):
        scores[owner] = np.maximum(scores[owner], share)
    if rules.area_thd:
        winners = scores.argmax(axis=0)
        areas = [(winners == n).sum() for n in range(len(scores))]
        for n in range(1, len(scores)):
            if areas[n] <= rules.area_thd * sum(areas[1:]):
                scores[n] = 0
    labels = scores.argmax(axis=0)
    labels[scores.max(axis=0) < rules.prob_thd] = 0
    best = np.sort(scores, axis=0)
    second = np.where(best[-2] == best[-1], best[-3], best[-2])  # two classes have one phrase
    margin = np.minimum(best[-1] - second, abs(best[-1] - rules.prob_thd))
    return labels, margin


@pytest.mark.parametrize(
    ("settings", "usual"),
    [
        ({}, {"crop": 24, "stride": 24}),  # what makes a difference to labels, against what
        ({"logit_scale": 4.0, "prob_thd": 0.25}, {"prob_thd": 0.0}),
        ({"area_thd": 0.25}, {"area_thd": 0.0}),
        ({"area_thd": 0.25, "prob_thd": 0.3}, {"area_thd": 0.0}),
        ({"short_side": 57}, {"short_side": 40}),
        ({"averaged": "shares", "logit_scale": 1.0, "resize": "bicubic"}, {"resize": "bilinear"}),
        ({"classes": CLASSES}, {"classes": ("sky", "red, wall", "blue", "navy", "grass, green")}),
    ],
)
@pytest.mark.parametrize("frame_hw", [(50, 83)])
def test_labels_follow_every_rule(small_bundle, settings, usual, frame_hw):
    frame, rules = picture(*frame_hw), protocol(**settings)
    labels = labels_by(small_bundle, rules, frame)
    wanted, margin = expected(rules, frame, (24, 24), 4)
    clear = margin > 1e-5
    assert clear.mean() > 0.99
    assert np.array_equal(labels[clear], wanted[clear])
    assert len(np.unique(labels)) > 1
    other = labels_by(small_bundle, protocol(**settings | usual), frame)
    assert (labels != other).mean() > 0.01


# --- the data ---

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
}
SHORTER = {
    ("sclip", "voc20"): "c68f65a2b342397c",
    ("sfp", "voc20"): "317dafe95650b39e",
    ("sclip", "context59"): "cd808465f06a1616",
}


def hash_of(classes, end=""):
    return hashlib.sha256(("\n".join(classes) + end).encode()).hexdigest()[:16]


def test_names_are_the_published_lists():
    found = {}
    for paper in papers():
        for dataset in PUBLISHED:
            try:
                rules = read_protocol(paper, dataset)
            except ArgumentError:
                continue
            if dataset not in ("voc20", "context59"):
                end = " " if dataset == "context60" else ""  # the official file ends in a blank
                found[rules.names] = hash_of(rules.classes, end)
    assert {name: found[name] for name in HASHES} == HASHES
    for where, digest in SHORTER.items():
        assert hash_of(read_protocol(*where).classes) == digest


# --- the command ---


@pytest.fixture(scope="module")
def voc_bundle(tmp_path_factory):
    phrases = unique(read_protocol("sclip", "voc21").classes)
    return bundle_at(tmp_path_factory.mktemp("voc"), (224, 224), 16, phrases)


@pytest.fixture
def voc(tmp_path):
    base = build_voc(tmp_path)
    frame = picture(60, 90)
    Image.fromarray(frame).save(base / "JPEGImages" / "2007_2.jpg", quality=95)
    mask = np.full((60, 90), 5, np.uint8)
    mask[:30] = 0
    Image.fromarray(mask).save(base / "SegmentationClass" / "2007_2.png")
    return base


def test_one_command_evaluates_as_a_paper_does(voc_bundle, voc, tmp_path, capsys):
    report = tmp_path / "report.json"
    given = [voc_bundle, "--dataset", "voc21", "--root", voc, "--partial"]
    settings = ["--precision", "float32", "--json", report]
    assert evaluate_as([*map(str, given), "--paper", "sclip", *map(str, settings)]) == 0
    printed = capsys.readouterr().out
    for text in ("as published: sclip on voc21", "short side of 336", "scale 65, prob_thd 0.1",
                 "area_thd 0.1", "(56 phrases)", "no text encoder", "mIoU 59.63",
                 "differs: head: published with sclip; the bundle is"):  # fmt: skip
        assert text in printed
    written = json.loads(report.read_text())
    assert written["segmenter"]["as_published"]["followed"]["area_thd"] == 0.1
    rules = read_protocol("sclip", "voc21")
    frame = cv2.imread(str(voc / "JPEGImages" / "2007_2.jpg"))[..., ::-1]
    labels, margin = expected(rules, np.ascontiguousarray(frame), (224, 224), 16)
    right = sum(written["confusion"][n][n] for n in (0, 5))
    wanted = (labels[:30] == 0).sum() + (labels[30:] == 5).sum()
    assert abs(right - wanted) <= (margin < 1e-4).sum()
    assert evaluate_as([*map(str, given), "--paper", "naclip"]) == 1
    assert "export dense-clip --clip FILE --head naclip --size 336x448" in capsys.readouterr().err


def test_the_option_of_earlier_versions_says_where_it_went(voc_bundle, voc, capsys):
    given = ("--dataset", "voc21", "--root", voc, "--as-published", "sclip")
    assert run("evaluate", voc_bundle, *given) == 2
    assert (
        "--as-published: is retired here. Run python -m benchmarks.papers"
        in capsys.readouterr().err
    )
