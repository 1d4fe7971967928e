"""Long lists of names: what names in no picture cost, and what `max_candidates` gives back.

    python -m tools.studies.long_lists [--photos FOLDER] [--scenes 60] [--seeds 0 1 2] [--json FILE]

The demos' bundles label drawn scenes with their 28 names, and photos (``images/``, ``masks/`` and
``index.json`` with ``names``, the masks' values in order) with the 20 things of VOC, beside further
names that are drawn at random: of all names of the drawn world, or of the bundle's bank. A pixel
with one of these names counts as wrong, a synonym of the right one included. mIoU is over the 28
names, or over the 20 and background.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from tools.scenes import SceneDataset
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.evaluation.metrics import ConfusionMatrix, score

Pictures = list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]
SCENES, PHOTOS = (28, 60, 150, 353), (20, 80, 171, 1000)
CANDIDATES = (None, 8, 16, 32)
IGNORED, WRONG = 255, 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photos", type=Path, help="folder of annotated photos")
    parser.add_argument("--scenes", type=int, default=60, help="how many scenes; 0: none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="only show that everything runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    rows = []
    if args.scenes:
        data = SceneDataset("val", length=args.scenes)
        samples = [data[index] for index in range(len(data))]
        pictures = [(sample.image, sample.labels.astype(np.int64)) for sample in samples]
        world = SceneDataset("val", annotated="all").class_names
        names = list(data.class_names)
        sizes = SCENES[:2] if args.quick else SCENES
        rows += measure("scenes", Bundle.demo("scenes"), names, world, pictures, sizes, args.seeds)
    if args.photos:
        bundle = Bundle.demo()
        assert bundle.concepts is not None
        assert bundle.text_bank is not None
        names, bank = list(bundle.concepts.names), bundle.text_bank.names
        sizes = PHOTOS[:2] if args.quick else PHOTOS
        pictures = read_photos(args.photos, names)
        rows += measure("photos", bundle, names, bank, pictures, sizes, args.seeds)
    print("| set | names | candidates | pAcc | mIoU |\n|---|---|---|---|---|")
    for row in rows:
        figures = " | ".join(_spread(row[name]) for name in ("pAcc", "mIoU"))
        print(f"| {row['set']} | {row['names']} | {row['candidates'] or 'all'} | {figures} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def read_photos(folder: Path, things: Sequence[str]) -> Pictures:
    """RGB pictures and the indices of their things; what is none of them is ``len(things)``."""
    index = json.loads((folder / "index.json").read_text())
    table = np.full(256, len(things), np.int64)
    for value, name in enumerate(index["names"]):
        table[value] = things.index(name) if name in things else len(things)
    found = []
    for entry in index["images"]:
        image = cv2.imread(str(folder / "images" / entry["file"]))
        mask = cv2.imread(str(folder / "masks" / Path(entry["file"]).with_suffix(".png")), 0)
        assert image is not None
        assert mask is not None
        found.append((np.ascontiguousarray(image[..., ::-1]), table[mask]))
    return found


def measure(
    title: str,
    bundle: Bundle,
    names: Sequence[str],
    pool: Sequence[str],
    pictures: Pictures,
    sizes: Sequence[int],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """A row for each number of names and of candidates, with figures per seed."""
    others = sorted(set(pool) - set(names))
    rows = []
    for most in CANDIDATES:
        with Engine(
            bundle, EngineConfig(device="cpu", resize="stretch", max_candidates=most)
        ) as engine:
            for size in sizes:
                row: dict[str, Any] = {"set": title, "names": size, "candidates": most}
                row |= {"pAcc": [], "mIoU": []}
                drawn = seeds if len(names) < size < len(names) + len(others) else seeds[:1]
                for seed in drawn:
                    rng = np.random.default_rng(seed)
                    count = min(size - len(names), len(others))
                    more = [others[i] for i in rng.choice(len(others), count, replace=False)]
                    background = "auto" if title == "photos" else ()
                    engine.set_classes([*names, *more], background=background)
                    for name, value in _figures(engine, len(names), pictures).items():
                        row[name].append(value)
                rows.append(row)
    return rows


def _figures(engine: Engine, count: int, pictures: Pictures) -> dict[str, float]:
    """In percent; unknown is the class after the first names, if the truth has it."""
    confusion = ConfusionMatrix(count + 1, ignore_label=IGNORED)
    for image, truth in pictures:
        found = engine.segment(image)
        labels = found.labels.astype(np.int64)
        further = (labels >= count) & (labels < len(found.names))
        labels = np.where(labels >= len(found.names), count, labels)
        labels[further] = WRONG
        confusion.update(truth, labels)
    scores = score(confusion.counts, range(count))
    return {"pAcc": 100 * scores.pixel_accuracy, "mIoU": 100 * scores.miou}


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
