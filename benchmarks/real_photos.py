"""Label real photos with real names and compare with their masks; classes change between photos.

Their folder holds ``images/``, ``masks/`` and ``index.json`` with ``names`` (mask values in order)
and ``images``. Every photo gets the class list in another order; labels are mapped back by name, so
mixed-up labels and names would show here. Mask classes without a text row count as
background.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt import Engine, EngineConfig
from zsseg_rt.evaluation.metrics import ConfusionMatrix, score
from zsseg_rt.photos import read_photo

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def export(encoder: Path, text_rows: Path, text_names: Path, out: Path) -> Path:
    """Wrap the encoder as a dense bundle whose text bank holds the given rows."""
    from zsseg_rt.export import export_dense_bundle

    names = json.loads(text_names.read_text())
    names[0] = "background"
    return export_dense_bundle(
        encoder,
        out,
        image_size=513,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        embed_output="dense_embedding",
        text_bank=(names, np.load(text_rows).astype(np.float32)),
        space="OpenAI CLIP ViT-B/16",
        precisions=("float32", "float16"),
    )


def evaluate(bundle: Path, photos: Path, *, precision: str = "float32") -> dict[str, Any]:
    """Segment every photo and sum a confusion matrix, rows truth, columns prediction."""
    index = json.loads((photos / "index.json").read_text())
    config = EngineConfig(device="cpu", precision=precision, use_cache=False)
    with Engine(bundle, config) as engine:
        assert engine.bundle.text_bank is not None
        names = list(engine.bundle.text_bank.names)
        confusion = ConfusionMatrix(len(names), ignore_label=255)
        for number, entry in enumerate(index["images"]):
            order = np.random.default_rng(number).permutation(len(names))
            engine.set_classes([names[i] for i in order])
            seg = engine.segment(read_photo(photos / "images" / entry["file"]))
            truth = read_mask(photos / "masks", entry["file"], index["names"], names)
            confusion.update(truth, order[seg.labels])
    return summarise(confusion, names, len(index["images"]))


def read_mask(folder: Path, file: str, mask_names: list[str], names: list[str]) -> np.ndarray:
    """Read a mask and express it as indices into ``names``; other classes are background."""
    import cv2

    table = np.array([names.index(n) if n in names else 0 for n in mask_names], np.uint8)
    mask = cv2.imread(str(folder / f"{Path(file).stem}.png"), cv2.IMREAD_UNCHANGED)
    if mask is None:
        raise FileNotFoundError(folder / f"{Path(file).stem}.png")
    mapped: np.ndarray = table[mask]
    return mapped


def summarise(confusion: ConfusionMatrix, names: list[str], photos: int) -> dict[str, Any]:
    """Pixel accuracy, mIoU over classes in truth or prediction, and IoU per class."""
    scores = score(confusion.counts, seen=range(len(names)))
    return {
        "photos": photos,
        "pixel_accuracy": scores.pixel_accuracy,
        "miou_classes_in_truth": float(scores.iou[scores.true_pixels > 0].mean()),
        "miou_all_seen_or_predicted": scores.miou,
        "iou": {n: float(x) for n, x in zip(names, scores.iou, strict=True) if not np.isnan(x)},
    }
