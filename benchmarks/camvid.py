"""Zero-shot on real street photos: train a head on some of CamVid's classes, name the others.

    python benchmarks/camvid.py --camvid FOLDER --encoder ENCODER.onnx --encoder-rows ROWS.npy
        --text-names NAMES.txt --text-rows ROWS.npy [--epochs 40] [--seeds 3] [--json FILE]
        [--out NAME.zsseg] [--confusion FILE.csv]

ENCODER.onnx is DeepLabV3-MobileNetV2, trained on PASCAL VOC's 20 things and frozen here; its words'
embeddings are ``--encoder-rows``. ``--text-rows`` are CLIP ViT-B/16's embeddings of
``--text-names``. A small head learns, from the masks of the seen classes alone, which seen word
fits what the encoder calls background. A cell's embedding is the mean of all words, weighted by
both answers; class names are compared with it as with any dense encoder's, so words that nothing
was trained on can be asked for. The result is a dense bundle, evaluated through the engine.

Sources: Norouzi et al., "Zero-Shot Learning by Convex Combination of Semantic Embeddings",
ICLR 2014; Xian et al., "Semantic Projection Network for Zero- and Few-Label Semantic
Segmentation", CVPR 2019, for the protocol.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt import Engine, EngineConfig, ops
from zsseg_rt.backends import registry
from zsseg_rt.backends.base import BackendOptions, Session
from zsseg_rt.evaluation.datasets import create_dataset
from zsseg_rt.evaluation.datasets.base import Sample, SegmentationDataset
from zsseg_rt.evaluation.evaluate import EngineSegmenter, Evaluation, Segmenter, evaluate
from zsseg_rt.evaluation.metrics import confusion_csv
from zsseg_rt.export import export_dense_bundle
from zsseg_rt.models.functional import patch_text_similarity
from zsseg_rt.onnx.graph import Graph
from zsseg_rt.onnx.network import OPSET
from zsseg_rt.onnx.operations import Linear, Value
from zsseg_rt.onnx.writer import write_onnx
from zsseg_rt.profiling.worker import Stopwatch
from zsseg_rt.runtime.lane_pool import in_order
from zsseg_rt.text.class_names import rename_classes, split_synonyms
from zsseg_rt.torch_files.checkpoints import hash_weights

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIDE, GRID, LABEL_GRID, LOGIT_SCALE = 513, 65, 129, 100.0

# Fixed before anything was trained. CLIP's table has no word for a pole; any seen class can be
# learned under any word.
WORDS = {
    "sky": "sky-other",
    "building": "building-other",
    "pole": "metal",
    "road": "road",
    "pavement, sidewalk": "pavement",
    "tree": "tree",
    "sign symbol": "stop sign",
    "fence": "fence",
    "car": "car",
    "pedestrian": "person",
    "bicyclist": "bicycle",
}
# One unseen class of each kind. The encoder knows cars from VOC, as CLIP knows things from the web;
# of bicyclists it knows the parts; nothing was taught pavement, only the word is near "road".
UNSEEN = ("car", "bicyclist", "pavement, sidewalk")
# Words that neither head nor encoder was trained on, if the table has one of similar meaning.
OTHER_WORDS = {
    "sky-other": "clouds",
    "building-other": "house, skyscraper",
    "pavement": "floor-stone, floor-other, platform",
    "tree": "bush, leaves, branch",
    "fence": "railing, cage",
    "car": "truck",
}
# Tensors of the encoder: the backbone's last map (stride 16), one of stride 8, VOC's logits.
TAPS = {"deep": "Transpose_5818", "fine": "Transpose_4773", "logits": "logits"}


def main() -> int:
    """Parse arguments, train and evaluate every seed, print."""
    args = read_arguments()
    words = Words.read(args.text_names, args.text_rows, args.encoder_rows)
    training, validation = (
        create_dataset("camvid", args.camvid, split, unseen=UNSEEN) for split in ("train", "val")
    )
    with tempfile.TemporaryDirectory() as folder:
        encoder = tap_encoder(args.encoder, Path(folder) / "encoder.onnx")
        session = load_encoder(encoder, args.threads)
        features = Features.compute(session, training, args.limit)
        reports = []
        for seed in range(args.seeds):
            head = train(features, words, seed=seed, epochs=args.epochs)
            bundle = args.out if args.out and seed == 0 else Path(folder) / f"seed{seed}.zsseg"
            export(head, words, encoder, bundle)
            reports.append(measure(bundle, head, words, session, validation, args))
    report = summarise(reports) | {"epochs": args.epochs, "unseen": UNSEEN}
    print(json.dumps(report["summary"], indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def read_arguments(parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    parser = parser or argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--camvid", "--encoder", "--encoder-rows", "--text-names", "--text-rows"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=40.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0 = all")
    parser.add_argument("--limit", type=int, help="at most this many images of each split")
    parser.add_argument("--out", type=Path, help="keep the first seed's bundle here")
    parser.add_argument("--confusion", type=Path, help="the first seed's confusion matrix")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


@dataclass(frozen=True)
class Words:
    """Text embeddings.

    Attributes:
        names: Names of the table.
        rows: Their embeddings, float32 ``[C, D]``.
        encoder: The frozen encoder's words without background, float32 ``[K, D]``, centred.
        seen: The seen classes' words, float32 ``[S, D]``, centred.
    """

    names: list[str]
    rows: Tensor
    encoder: Tensor
    seen: Tensor

    @classmethod
    def read(
        cls, names_file: Path, rows_file: Path, encoder_rows: Path, unseen: Sequence[str] = UNSEEN
    ) -> Words:
        """Read the table and the encoder's rows, whose first is background."""
        names = names_file.read_text().split("\n")[: len(np.load(rows_file))]
        rows = torch.from_numpy(np.load(rows_file).astype(np.float32))
        known = torch.from_numpy(np.load(encoder_rows).astype(np.float32))[1:]
        # What all words share tells none apart; without it, mixtures of words stay distinct.
        shared = F.normalize(rows.mean(dim=0), dim=0)
        seen = [names.index(word) for name, word in WORDS.items() if name not in unseen]

        def centred(embeds: Tensor) -> Tensor:
            return F.normalize(embeds - (embeds @ shared)[:, None] * shared, dim=1)

        return cls(names, rows, centred(known), centred(rows[seen]))

    def rows_of(self, class_names: Sequence[str]) -> Tensor:
        """One row per phrase."""
        phrases = [phrase for synonyms in split_synonyms(class_names) for phrase in synonyms]
        return self.rows[[self.names.index(phrase) for phrase in phrases]]


def tap_encoder(path: Path, out: Path) -> Path:
    """Write the encoder with the tensors the head reads as its outputs."""
    graph = onnx.load(path)
    cut = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(graph))
    onnx.save(cut.extract_model([graph.graph.input[0].name], list(TAPS.values())), out)
    return out


def load_encoder(path: Path, threads: int) -> Session:
    options = BackendOptions(num_threads=threads)
    backend = registry.get_backend("openvino")
    return backend.load(path, device="cpu", precision="float32", options=options).session()


def encode(session: Session, image: np.ndarray) -> dict[str, Tensor]:
    """The encoder's tensors for an image, prepared as the engine does."""
    planes = ops.preprocess(image, size_hw=(SIDE, SIDE), mean=CLIP_MEAN, std=CLIP_STD)
    outputs = session.run({session.inputs[0].name: np.asarray(planes)[None]})
    return {name: torch.from_numpy(np.array(outputs[tap])) for name, tap in TAPS.items()}


@dataclass(frozen=True)
class Features:
    """The frozen encoder's tensors for all training images, float16, and their labels.

    Labels are ``[N, LABEL_GRID, LABEL_GRID]``: the class if it is seen, or the ignore label.
    """

    tensors: dict[str, Tensor]
    labels: Tensor

    @classmethod
    def compute(cls, session: Session, data: SegmentationDataset, limit: int | None) -> Features:
        """Run the encoder once over the images."""
        parts_of: dict[str, list[Tensor]] = {name: [] for name in TAPS}
        for sample in read_all(data, limit):
            for name, tensor in encode(session, sample.image).items():
                parts_of[name].append(tensor.half())
        tensors = {name: torch.cat(parts) for name, parts in parts_of.items()}
        return cls(tensors, shrunk_labels(data, limit))

    def batches(self, seed: int, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Endless random batches, each mirrored or not."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for indices in torch.randperm(len(self.labels), generator=generator).split(size):
                mirror = [-1] if torch.rand((), generator=generator) < 0.5 else []
                tensors = {n: t[indices].float().flip(mirror) for n, t in self.tensors.items()}
                yield tensors, self.labels[indices].long().flip(mirror)


def read_all(data: SegmentationDataset, limit: int | None) -> Iterator[Sample]:
    """The first images, read ahead in a thread."""
    return in_order(data.__getitem__, range(min(len(data), limit or len(data))), num_threads=1)


def shrunk_labels(data: SegmentationDataset, limit: int | None) -> Tensor:
    """Labels of the images as :class:`Features` has them, uint8 ``[N, LABEL_GRID, LABEL_GRID]``."""
    table = torch.full((256,), 255)
    table[list(data.seen)] = torch.arange(len(data.seen))
    masks = []
    for sample in read_all(data, limit):
        seen = table[torch.from_numpy(sample.labels).long()][None, None].float()
        small = F.interpolate(seen, size=(LABEL_GRID, LABEL_GRID), mode="nearest-exact")
        masks.append(small[0].to(torch.uint8))
    return torch.cat(masks)


class WordHead(nn.Module):
    """Which seen word fits a cell that the encoder calls background, and the cell's embedding.

    Args:
        words: The encoder's words and the seen ones.
        width: Channels.
    """

    words: Tensor

    def __init__(self, words: Words, width: int = 128) -> None:
        super().__init__()
        self.deep = nn.Sequential(nn.BatchNorm2d(341, affine=False), nn.Conv2d(341, width, 1))
        self.fine = nn.Sequential(nn.BatchNorm2d(32, affine=False), nn.Conv2d(32, width // 2, 1))
        self.mix = nn.Conv2d(width + width // 2, width, 3, padding=1)
        self.out = nn.Conv2d(width, len(words.seen), 1)
        self.register_buffer("words", torch.cat([words.encoder, words.seen]))

    def word_logits(self, deep: Tensor, fine: Tensor, logits: Tensor) -> Tensor:
        """Logits of the seen words, ``[B, S, GRID, GRID]``."""
        coarse = _to_grid(self.deep(torch.cat([deep, logits], dim=1)).relu())
        mixed = self.mix(torch.cat([coarse, self.fine(fine).relu()], dim=1)).relu()
        return self.out(mixed)  # type: ignore[no-any-return]

    def forward(self, deep: Tensor, fine: Tensor, logits: Tensor) -> Tensor:
        """Embed every cell, ``[B, D, GRID, GRID]``."""
        own = self.word_logits(deep, fine, logits).softmax(dim=1)
        known = _to_grid(logits).softmax(dim=1)
        shares = torch.cat([known[:, 1:], known[:, :1] * own], dim=1)
        return F.conv2d(shares, self.words.T[:, :, None, None])


def _to_grid(x: Tensor) -> Tensor:
    """Stride 16 to stride 8 at an odd size: corners coincide."""
    return F.interpolate(x, size=(GRID, GRID), mode="bilinear", align_corners=True)


def train(features: Features, words: Words, *, seed: int, epochs: float) -> WordHead:
    """Train with cross-entropy over seen words; pixels of unseen classes are ignored.

    Rare classes weigh more, by the inverse square root of their share of pixels.
    """
    torch.manual_seed(seed)
    head, batch_size = WordHead(words), 8
    steps = max(round(epochs * len(features.labels) / batch_size), 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    counts = features.labels.flatten().long().bincount(minlength=256)[: len(words.seen)]
    weight = counts.clamp(min=1).float().rsqrt()
    size, watch = (LABEL_GRID, LABEL_GRID), Stopwatch()
    for step, (tensors, labels) in enumerate(features.batches(seed, batch_size), start=1):
        logits = F.interpolate(head.word_logits(**tensors), size=size, mode="bilinear")
        loss = F.cross_entropy(logits, labels, weight=weight, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            loss_now, seconds = loss.item(), watch.seconds
            print(f"seed {seed}: step {step}/{steps}, loss {loss_now:.3f}, {seconds:.0f} s")
        if step == steps:
            break
    return head.eval()


def written(head: WordHead) -> onnx.ModelProto:
    """The head's graph, from taps to ``dense_words`` [1, D, GRID, GRID]."""
    graph = Graph()
    deep = graph.input("deep", (1, 320, 33, 33))
    fine = graph.input("fine", (1, 32, GRID, GRID))
    logits = graph.input("logits", (1, 21, 33, 33))

    def to_grid(x: Value) -> Value:
        at_cells = torch.eye(33)[None]
        rows = F.interpolate(at_cells, GRID, mode="linear", align_corners=True)[0].T.numpy()
        return graph.matmul(rows, graph.matmul(x, np.ascontiguousarray(rows.T)))

    def softmax(x: Value) -> Value:
        return graph.transpose(graph.softmax(graph.transpose(x, (0, 2, 3, 1))), (0, 3, 1, 2))

    joined = graph.concat((deep, logits), 1)
    coarse = to_grid(graph.relu(graph.conv(joined, _folded(head.deep))))
    near = graph.relu(graph.conv(fine, _folded(head.fine)))
    mixed = graph.conv(graph.concat((coarse, near), 1), _linear(head.mix), pad=1)
    own = softmax(graph.conv(graph.relu(mixed), _linear(head.out)))
    known = softmax(to_grid(logits))
    background = graph.mul(graph.slice(known, 1, 0, 1), own)
    shares = graph.concat((graph.slice(known, 1, 1, 21), background), 1)
    kernel = np.ascontiguousarray(head.words.T.numpy()[:, :, None, None])
    graph.output("dense_words", graph.conv(shares, Linear(kernel)))
    stream = BytesIO()
    write_onnx(graph.network(), "head", stream)
    return onnx.load_model_from_string(stream.getvalue())


def _linear(conv: nn.Module) -> Linear:
    return Linear(*(conv.get_parameter(name).detach().numpy() for name in ("weight", "bias")))


def _folded(layers: nn.Sequential) -> Linear:
    """A batch norm without scale and the convolution behind it."""
    norm, (weight, bias) = layers[0], _linear(layers[1])
    mean, variance = norm.running_mean.numpy(), norm.running_var.numpy()
    weight = weight / np.sqrt(variance + norm.eps)[:, None, None]
    return Linear(weight, bias - weight[:, :, 0, 0] @ mean)


def export(head: WordHead, words: Words, encoder: Path, out: Path) -> Path:
    """Join encoder and head into one graph and wrap it as a dense bundle with all words."""
    front = onnx.version_converter.convert_version(onnx.load(encoder), OPSET)
    back = onnx.compose.add_prefix(written(head), "head_")
    front.ir_version = back.ir_version
    links = [(tap, f"head_{name}") for name, tap in TAPS.items()]
    joined = onnx.compose.merge_models(front, back, links)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "joined.onnx"
        onnx.save(joined, path)
        return export_dense_bundle(
            path,
            out,
            image_size=SIDE,
            mean=CLIP_MEAN,
            std=CLIP_STD,
            embed_output="head_dense_words",
            text_bank=(words.names, words.rows.numpy()),
            logit_scale=LOGIT_SCALE,
            space="OpenAI CLIP ViT-B/16",
            source="trained on CamVid",
            licence="research only (CamVid)",
            overwrite=True,
        )


class HeadSegmenter:
    """The head in torch, which labels by the torch definitions of the kernels."""

    def __init__(
        self, head: WordHead, words: Words, session: Session, class_names: Sequence[str]
    ) -> None:
        self.class_names = tuple(class_names)
        self._head, self._session = head, session
        self._embeds = words.rows_of(class_names)
        classes = split_synonyms(class_names)
        self._owners = np.array([i for i, c in enumerate(classes) for _ in c], np.uint8)

    @torch.inference_mode()
    def segment(self, image: np.ndarray) -> np.ndarray:
        """Label every pixel."""
        embeds = self._head(**encode(self._session, image)).flatten(2).transpose(1, 2)
        logits = patch_text_similarity(embeds, self._embeds, logit_scale=LOGIT_SCALE)
        grid = logits.unflatten(2, (GRID, GRID)).detach().numpy()
        labels, _ = ops.upsample_argmax(grid, image.shape[:2])
        return self._owners[np.asarray(labels[0])]

    def describe(self) -> dict[str, Any]:
        """Describe what labelled."""
        return {"kind": "torch", "name": "camvid head", "sha256": hash_weights(self._head)}


class Beside:
    """One segmenter, and how many of its labels another one's equal."""

    def __init__(self, one: Segmenter, other: Segmenter) -> None:
        self.class_names, self.describe = one.class_names, one.describe
        self._one, self._other = one, other
        self._equal = self._pixels = 0

    def segment(self, image: np.ndarray) -> np.ndarray:
        """Label every pixel."""
        labels = self._one.segment(image)
        self._equal += int((labels == self._other.segment(image)).sum())
        self._pixels += labels.size
        return labels

    @property
    def agreement(self) -> float:
        """Share of all pixels with equal labels."""
        return self._equal / self._pixels


def measure(
    bundle: Path,
    head: WordHead,
    words: Words,
    session: Session,
    data: SegmentationDataset,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Evaluate the bundle with the training words, against torch, and with other words."""
    names = tuple(WORDS[name] for name in data.class_names)
    others = rename_classes(names, OTHER_WORDS)
    config = EngineConfig(
        device="cpu", precision="float32", use_cache=False, num_threads=args.threads
    )
    with Engine(bundle, config) as engine:
        beside = Beside(EngineSegmenter(engine, names), HeadSegmenter(head, words, session, names))
        same = evaluate(beside, data, limit=args.limit)
        other = evaluate(EngineSegmenter(engine, others), data, limit=args.limit)
    if args.confusion and not args.confusion.exists():
        args.confusion.write_text(confusion_csv(same.counts, data.class_names))
    _print("words of training", same)
    _print("other words", other)
    print(f"labels equal to torch's: {beside.agreement:.4%}")
    return {
        "words_of_training": same.to_json() | {"agreement": beside.agreement},
        "other_words": other.to_json(),
    }


def _print(title: str, shown: Evaluation) -> None:
    print(f"{title}: " + "  ".join(f"{k} {v:.2f}" for k, v in shown.scores.as_reported().items()))
    for row in shown.class_table():
        seen = "seen" if row["seen"] else "unseen"
        print(f"  {row['asked_as']:36} {seen:7} IoU {row['iou_percent']}")


def summarise(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every figure."""
    summary: dict[str, Any] = {}
    for title in ("words_of_training", "other_words"):
        runs = [report[title] for report in reports]
        figures = {name: [run["metrics_percent"][name] for run in runs]
                   for name in runs[0]["metrics_percent"]}  # fmt: skip
        for row, entry in enumerate(runs[0]["classes"]):
            name = f"IoU {entry['asked_as']}"
            figures[name] = [run["classes"][row]["iou_percent"] for run in runs]
        summary[title] = {name: _mean_and_std(values) for name, values in figures.items()}
    return {"summary": summary, "seeds": reports}


def _mean_and_std(values: list[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    return f"{np.mean(numbers):.2f} +- {np.std(numbers, ddof=1) if len(numbers) > 1 else 0:.2f}"


if __name__ == "__main__":
    sys.exit(main())
