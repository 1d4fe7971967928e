"""Label photos with the photo demo: all its names, few, synonyms, and names of stuff beside them.

    python -m benchmarks.photo_demo --photos FOLDER [--resize stretch] [--json FILE]

FOLDER holds ``images/``, ``masks/`` and ``index.json`` with ``names`` (mask values in order) and
``images``; masks of anything but the 20 things count as background. mIoU is over the classes that
the masks show. Synonyms are drawn from the lists below: in each of five draws, 16 of the 20 names
are replaced. In a draw of few names, one, three or six of the 20 are named, by their names or by
synonyms, or names for several things; whatever is not named is background.
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
ANIMALS = ("bird", "cat", "cow", "dog", "horse", "sheep")
VEHICLES = ("airplane", "bicycle", "boat", "bus", "car", "motorcycle", "train")
FURNITURE = ("chair", "couch", "dining table")
KINDS = [
    (["animal"], [ANIMALS]),
    (["vehicle"], [VEHICLES]),
    (["furniture"], [FURNITURE]),
    (["animal", "vehicle", "person"], [ANIMALS, VEHICLES, ("person",)]),
]


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


def compare(
    photos: Path, *, resize: str | None = None, draws: int = 5, few: bool = True
) -> list[dict[str, Any]]:
    """Pixel accuracy and mIoU, in percent, for each list of names."""
    config = EngineConfig(device="cpu", precision="float32", resize=resize)
    with Engine(Bundle.demo(), config) as engine:
        assert engine.bundle.concepts is not None
        assert engine.bundle.text_bank is not None
        things, vocabulary = engine.bundle.concepts.names, set(engine.bundle.text_bank.names)
        lists = [("the 20 things", list(things))]
        lists += [(f"draw {n} of synonyms", synonyms(things, vocabulary, n)) for n in range(draws)]
        lists.append(("with stuff", [*things, *STUFF]))
        alone = [(thing,) for thing in things]
        meant = [(title, names, alone) for title, names in lists]
        if few:
            further = [*few_names(things, vocabulary, draws), *KINDS]
            meant += [(f"few: {', '.join(names)}", names, groups) for names, groups in further]
        return [{"names": title, "list": names} | label(engine, photos, names, groups)
                for title, names, groups in meant]  # fmt: skip


def few_names(
    things: Sequence[str], vocabulary: set[str], draws: int
) -> list[tuple[list[str], list[tuple[str, ...]]]]:
    """Draws of one, three and six names, each also in synonyms, with the things that they mean."""
    lists = []
    for count in (1, 3, 6):
        for draw in range(draws):
            rng = np.random.default_rng((count, draw))
            named = [things[index] for index in rng.permutation(len(things))[:count]]
            other = [
                str(rng.choice([n for n in SYNONYMS[name] if n in vocabulary])) for name in named
            ]
            lists += [(names, [(name,) for name in named]) for names in (named, other)]
    return lists


def synonyms(things: Sequence[str], vocabulary: set[str], seed: int) -> list[str]:
    """The names with 16 of them replaced by synonyms that the bank has."""
    rng, names = np.random.default_rng(seed), list(things)
    for index in rng.permutation(len(names))[:16]:
        names[index] = str(rng.choice([n for n in SYNONYMS[names[index]] if n in vocabulary]))
    return names


def label(
    engine: Engine, photos: Path, names: list[str], meant: Sequence[tuple[str, ...]]
) -> dict[str, float]:
    """Label all photos with names, the first of which mean the given things."""
    assert engine.bundle.concepts is not None
    engine.set_classes(names, background="auto")
    index = json.loads((photos / "index.json").read_text())
    classes = [BACKGROUND, *engine.bundle.concepts.names]
    wanted = np.zeros(256, np.uint8)
    wanted[255] = 255
    for place, group in enumerate(meant, 1):
        wanted[[classes.index(thing) for thing in group]] = place
    got = np.zeros(256, np.uint8)
    got[: len(meant)] = np.arange(1, len(meant) + 1)  # all else, and unknown, is background
    confusion = ConfusionMatrix(len(meant) + 1, ignore_label=255)
    for entry in index["images"]:
        truth = read_mask(photos / "masks", entry["file"], index["names"], classes)
        labels: npt.NDArray[Any] = engine.segment(
            read_photo(photos / "images" / entry["file"])
        ).labels
        confusion.update(wanted[truth], got[labels])
    scores = score(confusion.counts, seen=range(len(meant) + 1))
    miou = float(scores.iou[scores.true_pixels > 0].mean())
    return {"pixel_accuracy": round(100 * scores.pixel_accuracy, 2), "miou": round(100 * miou, 2)}


if __name__ == "__main__":
    sys.exit(main())
