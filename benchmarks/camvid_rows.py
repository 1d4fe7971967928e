"""CamVid's other rows: what all labels would give, self-training, and a calibrated seen bias.

    python benchmarks/camvid_rows.py --rows ceiling transductive calibrated [options of camvid.py]

``ceiling`` annotates all 11 classes. ``transductive`` is told where unseen classes are, but not
which of them it is: each such cell gets the unseen word that is nearest to what the inductive head
makes of it, and a new head learns all words. ``calibrated`` lowers the probabilities of seen names
by what is best for names held out of a brief training: two of the eight seen ones, on photos
that were not trained on. Only ``ceiling`` uses an unseen label. Figures are those of ``val``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import camvid
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zsseg_rt import ops
from zsseg_rt.backends.base import Session
from zsseg_rt.evaluation.datasets import create_dataset
from zsseg_rt.evaluation.datasets.base import SegmentationDataset
from zsseg_rt.evaluation.evaluate import evaluate
from zsseg_rt.evaluation.metrics import ConfusionMatrix, score
from zsseg_rt.models.functional import patch_text_similarity

ROWS = ("ceiling", "transductive", "calibrated")
BIASES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
IGNORED = 255
EVERY = 5  # one training photo in so many chooses the bias


def main() -> int:
    """Train and evaluate every row and seed, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    args = camvid.read_arguments(parser)
    study = Study.open(args)
    report: dict[str, list[Any]] = {row: [] for row in args.rows}
    for seed in range(args.seeds):
        for row in args.rows:
            report[row].append(study.run(row, seed))
            print(f"{row}, seed {seed}: {report[row][-1]['metrics_percent']}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


class Study:
    """What all rows share.

    Args:
        args: The command's options.
        session: The frozen encoder.
        features: Training photos, with labels of the seen classes.
        training: The training photos, with the split.
        everything: Their labels, of all classes.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        session: Session,
        features: camvid.Features,
        training: SegmentationDataset,
        everything: Tensor,
    ) -> None:
        self.args, self.session, self.features = args, session, features
        self.training, self.everything = training, everything
        self._heads: dict[int, camvid.WordHead] = {}

    @classmethod
    def open(cls, args: argparse.Namespace) -> Study:
        """Run the encoder."""
        training = create_dataset("camvid", args.camvid, "train", unseen=camvid.UNSEEN)
        every = create_dataset("camvid", args.camvid, "train", unseen=[])
        with tempfile.TemporaryDirectory() as folder:
            encoder = camvid.tap_encoder(args.encoder, Path(folder) / "encoder.onnx")
            session = camvid.load_encoder(encoder, args.threads)
        features = camvid.Features.compute(session, training, args.limit)
        return cls(args, session, features, training, camvid.shrunk_labels(every, args.limit))

    def run(self, row: str, seed: int) -> dict[str, Any]:
        """Train one row and evaluate it on ``val``."""
        args, words, every = self.args, self._words(camvid.UNSEEN), self._words(())
        bias = 0.0
        if row == "ceiling":
            head, words = self._train(self.everything, every, seed), every
        else:
            head = self._inductive(seed)
        if row == "transductive":
            labels = pseudo_labels(head, self.features, self.everything, self.training.seen, every)
            head, words = self._train(labels, every, seed), every
        if row == "calibrated":
            bias = self._choose_bias(words, seed)
        data = create_dataset("camvid", args.camvid, "val", unseen=camvid.UNSEEN)
        names = tuple(camvid.WORDS[name] for name in data.class_names)
        segmenter = BiasedSegmenter(head, words, self.session, names)
        segmenter.seen, segmenter.seen_bias = torch.tensor(data.seen), bias
        return evaluate(segmenter, data, limit=args.limit).to_json() | {"seen_bias": bias}

    def _inductive(self, seed: int) -> camvid.WordHead:
        """The head that knows the seen classes; rows of one seed share it."""
        if seed not in self._heads:
            words = self._words(camvid.UNSEEN)
            self._heads[seed] = self._train(self.features.labels, words, seed)
        return self._heads[seed]

    def _words(self, unseen: Sequence[str]) -> camvid.Words:
        args = self.args
        return camvid.Words.read(args.text_names, args.text_rows, args.encoder_rows, unseen)

    def _train(self, labels: Tensor, words: camvid.Words, seed: int) -> camvid.WordHead:
        features = replace(self.features, labels=labels)
        return camvid.train(features, words, seed=seed, epochs=self.args.epochs)

    def _choose_bias(self, words: camvid.Words, seed: int) -> float:
        """The bias that is best for two seen names a brief training was not shown."""
        count = len(words.seen)
        held = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: count // 4]
        judged = torch.arange(len(self.features.labels)) % EVERY == 0
        labels = self.features.labels.clone()
        labels[torch.isin(labels, held)] = IGNORED
        kept = [row for row in range(count) if row not in held.tolist()]
        table = torch.full((IGNORED + 1,), IGNORED, dtype=labels.dtype)
        table[kept] = torch.arange(len(kept), dtype=labels.dtype)
        part = {name: tensor[~judged] for name, tensor in self.features.tensors.items()}
        brief = camvid.Features(part, table[labels[~judged].long()])
        head = camvid.train(
            brief, replace(words, seen=words.seen[kept]), seed=seed, epochs=self.args.epochs / 4
        )
        shown = {name: tensor[judged] for name, tensor in self.features.tensors.items()}
        taught = [n for n in camvid.WORDS if n not in camvid.UNSEEN]
        rows = words.rows_of([camvid.WORDS[name] for name in taught])
        return best_bias(head, camvid.Features(shown, self.features.labels[judged]), rows, kept)


class BiasedSegmenter(camvid.HeadSegmenter):
    """The head with lowered probabilities of seen names, each of which is one word.

    Attributes:
        seen: Indices of the seen names.
        seen_bias: What they lose.
    """

    seen: Tensor
    seen_bias: float

    @torch.inference_mode()
    def segment(self, image: np.ndarray) -> np.ndarray:
        """Label every pixel."""
        embeds = self._head(**camvid.encode(self._session, image)).flatten(2).transpose(1, 2)
        logits = patch_text_similarity(embeds, self._embeds, logit_scale=camvid.LOGIT_SCALE)
        lowered = torch.isin(torch.arange(len(self._embeds)), self.seen)
        labels, _ = ops.upsample_argmax(
            logits.unflatten(2, (camvid.GRID, camvid.GRID)).detach().numpy(),
            image.shape[:2],
            activation="softmax",
            seen=lowered.numpy(),
            seen_bias=self.seen_bias,
        )
        return self._owners[np.asarray(labels[0])]


@torch.inference_mode()
def pseudo_labels(
    head: camvid.WordHead,
    features: camvid.Features,
    everything: Tensor,
    seen: Sequence[int],
    words: camvid.Words,
) -> Tensor:
    """Labels of seen classes as they are; elsewhere the nearest unseen word of each cell.

    Of ``everything`` at unseen classes only *whether* it is one of them is used.
    """
    unseen = torch.tensor([row for row in range(len(camvid.WORDS)) if row not in set(seen)])
    rows = words.rows_of([camvid.WORDS[name] for name in camvid.WORDS])[unseen]
    hidden = torch.isin(everything, unseen)
    found = everything.clone()
    for index in range(len(everything)):
        logits = _logits(head, features, index, rows)
        size = (camvid.LABEL_GRID, camvid.LABEL_GRID)
        nearest = F.interpolate(logits, size=size, mode="bilinear")[0].argmax(dim=0)
        found[index][hidden[index]] = unseen[nearest][hidden[index]].to(found.dtype)
    return found


@torch.inference_mode()
def best_bias(
    head: camvid.WordHead, features: camvid.Features, rows: Tensor, kept: Sequence[int]
) -> float:
    """The bias with the highest hIoU, the first of equals; names that were not kept are unseen."""
    seen = torch.zeros(len(rows), dtype=torch.bool)
    seen[list(kept)] = True
    counts = {bias: ConfusionMatrix(len(rows), ignore_label=IGNORED) for bias in BIASES}
    for index in range(len(features.labels)):
        logits = _logits(head, features, index, rows)
        truth = features.labels[index].numpy()
        for bias, confusion in counts.items():
            labels, _ = ops.upsample_argmax(
                logits.detach().numpy(),
                truth.shape,
                activation="softmax",
                seen=seen.numpy(),
                seen_bias=bias,
            )
            confusion.update(truth, np.asarray(labels[0]))
    figures = {bias: score(found.counts, kept).hiou for bias, found in counts.items()}
    return max(figures, key=lambda bias: (figures[bias] == figures[bias], figures[bias]))


def _logits(head: camvid.WordHead, features: camvid.Features, index: int, rows: Tensor) -> Tensor:
    """Of one photo's cells and some words, ``[1, words, GRID, GRID]``."""
    tensors = {name: tensor[index : index + 1].float() for name, tensor in features.tensors.items()}
    embeds = head(**tensors).flatten(2).transpose(1, 2)
    logits = patch_text_similarity(embeds, rows, logit_scale=camvid.LOGIT_SCALE)
    return logits.unflatten(2, (camvid.GRID, camvid.GRID))


if __name__ == "__main__":
    sys.exit(main())
