"""Papers' protocols: the lists are the published ones, and one command follows them."""

import hashlib
import itertools
import json

import numpy as np
import pytest
from onnx import helper

from benchmarks.papers.__main__ import main as evaluate_as
from benchmarks.papers.protocol import papers, read_protocol
from support.cells import dense_bundle
from support.dataset_trees import build_voc
from zsseg_rt import ArgumentError
from zsseg_rt.evaluation.datasets.published import PUBLISHED

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


@pytest.mark.nightly
def test_one_command_evaluates_as_a_paper_does(tmp_path, capsys):
    phrases = list(dict.fromkeys(", ".join(read_protocol("sclip", "voc21").classes).split(", ")))
    rows = np.random.default_rng(5).normal(size=(len(phrases), 3)).astype(np.float32)
    pool = helper.make_node(
        "AveragePool", ["image"], ["embeds"], kernel_shape=[16, 16], strides=[16, 16]
    )
    bundle = dense_bundle(
        tmp_path, [pool], (224, 224), (3, 14, 14), normalize=True, activation="softmax",
        logit_scale=30.0, text_bank=(phrases, rows / np.linalg.norm(rows, axis=1, keepdims=True)),
    )  # fmt: skip
    options = ["--dataset", "voc21", "--root", build_voc(tmp_path), "--partial"]
    options = [*map(str, [bundle, *options, "--json", tmp_path / "report.json"])]
    assert evaluate_as([*options, "--paper", "sclip", "--precision", "float32"]) == 0
    printed = capsys.readouterr().out
    for text in ("as published: sclip on voc21", "short side of 336", "scale 65, prob_thd 0.1",
                 "area_thd 0.1", "(56 phrases)", "no text encoder", "mIoU 59.63",
                 "differs: head: published with sclip; the bundle is"):  # fmt: skip
        assert text in printed
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["segmenter"]["as_published"]["followed"]["area_thd"] == 0.1
    assert evaluate_as([*options, "--paper", "naclip"]) == 1
    assert "export dense-clip --clip FILE --head naclip --size 336x448" in capsys.readouterr().err
