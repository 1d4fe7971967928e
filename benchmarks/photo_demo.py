"""Label photos with the photo demo: its 20 names, synonyms of them, and names of stuff beside them.

    python -m benchmarks.photo_demo --photos FOLDER [--resize stretch] [--json FILE]

FOLDER holds ``images/``, ``masks/`` and ``index.json`` with ``names`` (mask values in order) and
``images``; masks of anything but the 20 things count as background. mIoU is over the classes that
the masks show. Synonyms are drawn from the lists below: in each of five draws, 16 of the 20 names
are replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.real_photos import read_mask
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.evaluation.metrics import ConfusionMatrix, score
from zsseg_rt.photos import read_photo

SYNONYMS = {
    "airplane": ("fighter jet", "jet plane", "seaplane"),
    "bicycle": ("mountain bike", "tricycle"),
    "bird": ("duck", "parrot", "pigeon", "seagull", "sparrow"),
    "boat": ("canoe", "sailboat", "ship", "yacht"),
    "bottle": ("beer bottle", "water bottle", "wine bottle"),
    "bus": ("minibus", "school bus"),
    "car": ("cab", "minivan", "race car", "sports car", "suv", "taxi", "van"),
    "cat": ("kitten",),
    "chair": ("armchair", "rocking chair", "stool"),
    "cow": ("bull", "calf", "cattle"),
    "dining table": ("coffee table", "kitchen table", "table"),
    "dog": ("bulldog", "puppy", "shepherd dog"),
    "horse": ("foal", "pony"),
    "motorcycle": ("motor scooter", "motor vehicle"),
    "person": ("boy", "child", "girl", "man", "woman"),
    "potted plant": ("flowerpot", "houseplant"),
    "sheep": ("lamb", "ram"),
    "couch": ("loveseat", "sofa", "sofa bed", "studio couch"),
    "train": ("bullet train", "passenger car", "subway"),
    "tv": ("monitor", "television", "television set"),
}
STUFF = (
    "blanket", "building", "carpet", "curtain", "door", "fireplace", "flower", "house", "mirror",
    "pillow", "shelf", "stairs", "street sign", "swimming pool", "towel", "tower", "tree", "window",
)  # fmt: skip
BACKGROUND = "background"


def main() -> int:
    """Parse arguments, label, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--resize", choices=("stretch", "letterbox"), help="default: windows")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = compare(args.photos, resize=args.resize)
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def compare(photos: Path, *, resize: str | None = None, draws: int = 5) -> list[dict[str, Any]]:
    """Pixel accuracy and mIoU, in percent, for each list of names."""
    config = EngineConfig(device="cpu", precision="float32", resize=resize)
    with Engine(Bundle.demo(), config) as engine:
        assert engine.bundle.concepts is not None
        assert engine.bundle.text_bank is not None
        things, known = engine.bundle.concepts.names, set(engine.bundle.text_bank.names)
        lists = [("the 20 things", list(things))]
        lists += [(f"draw {n} of synonyms", synonyms(things, known, n)) for n in range(draws)]
        lists.append(("with stuff", [*things, *STUFF]))
        return [{"names": title, "list": names} | label(engine, photos, names, things)
                for title, names in lists]  # fmt: skip


def synonyms(things: Sequence[str], known: set[str], seed: int) -> list[str]:
    """The names with 16 of them replaced by synonyms that the bank has."""
    rng, names = np.random.default_rng(seed), list(things)
    for index in rng.permutation(len(names))[:16]:
        names[index] = str(rng.choice([n for n in SYNONYMS[names[index]] if n in known]))
    return names


def label(
    engine: Engine, photos: Path, names: list[str], things: Sequence[str]
) -> dict[str, float]:
    """Label all photos with names whose first 20 stand for the things."""
    engine.set_classes(names, background="auto")
    index, classes = json.loads((photos / "index.json").read_text()), [BACKGROUND, *things]
    confusion = ConfusionMatrix(len(classes), ignore_label=255)
    place = np.zeros(256, np.uint8)
    place[: len(things)] = np.arange(1, len(classes))  # all else, and unknown, is background
    for entry in index["images"]:
        truth = read_mask(photos / "masks", entry["file"], index["names"], classes)
        found: npt.NDArray[Any] = engine.segment(
            read_photo(photos / "images" / entry["file"])
        ).labels
        confusion.update(truth, place[found])
    scores = score(confusion.counts, seen=range(len(classes)))
    miou = float(scores.iou[scores.true_pixels > 0].mean())
    return {"pixel_accuracy": round(100 * scores.pixel_accuracy, 2), "miou": round(100 * miou, 2)}


if __name__ == "__main__":
    sys.exit(main())
