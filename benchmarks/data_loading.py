"""Measure how many training images per second one core, and a loader with workers, prepares.

    python benchmarks/data_loading.py [--photos FOLDER] [--seconds 10] [--workers 2] [--json FILE]

Pictures are JPEG files of the usual sizes of VOC (500x375) and COCO (640x480), made at run time
from photos (or noise, without any), with masks of 21 classes as palette PNG. The timing covers all
that training does: reading, decoding, augmentation to 512x512, a batch of tensors. Files come from
the operating system's cache, so disks are not measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from zsseg_rt.profiling.worker import Stopwatch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder: its modules would hide others of the same name
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

SIZES = {"voc": (375, 500), "coco": (480, 640)}
PICTURES = 32
BATCH = 16


def main() -> int:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, default=ROOT.parent / "shared" / "data" / "photos")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run_all(args, Path(folder))
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def run_all(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure every augmentation on every image size."""
    import cv2
    import torch
    import torchvision

    from zsseg_rt.evaluation.provenance import describe_commit, describe_machine
    from zsseg_rt.training.data import FitInsideAugmentation, ShortEdgeAugmentation

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    recipes = {"fit_inside": FitInsideAugmentation(), "short_edge": ShortEdgeAugmentation()}
    rows = []
    for name, size_hw in SIZES.items():
        dataset = make_dataset(folder / name, args.photos, size_hw)
        for recipe, augmentation in recipes.items():
            row = measure(dataset, augmentation, args.seconds, args.workers)
            rows.append({"pictures": name, "size_hw": size_hw, "augmentation": recipe} | row)
    machine = describe_machine(cv2, torch, torchvision) | {"commit": describe_commit(ROOT)}
    return {"machine": machine, "workers": args.workers, "rows": rows}


def make_dataset(folder: Path, photos: Path, size_hw: tuple[int, int]) -> Any:
    """Write JPEG images and palette masks; return them as a data set."""
    import cv2
    import numpy as np
    from PIL import Image

    from zsseg_rt.evaluation.datasets import create_dataset

    rng = np.random.default_rng(0)
    sources = [
        picture
        for path in sorted(photos.glob("*.jpg"))
        if (picture := cv2.imread(str(path))) is not None
    ]
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index in range(PICTURES):
        if sources:
            picture = cv2.resize(
                sources[index % len(sources)], size_hw[::-1], interpolation=cv2.INTER_AREA
            )
        else:
            small = rng.integers(0, 256, (size_hw[0] // 4, size_hw[1] // 4, 3)).astype(np.uint8)
            picture = cv2.resize(small, size_hw[::-1], interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(
            str(folder / "images" / f"{index}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 92]
        )
        coarse = rng.integers(0, 21, (4, 5)).astype(np.uint8)
        labels = cv2.resize(coarse, size_hw[::-1], interpolation=cv2.INTER_NEAREST)
        mask = Image.fromarray(labels).convert("P")
        mask.putdata(labels.ravel().tolist())
        mask.save(folder / "masks" / f"{index}.png")
    names = [f"class {index}" for index in range(21)]
    return create_dataset("folder", folder, "all", class_names=names)


def measure(dataset: Any, augmentation: Any, seconds: float, workers: int) -> dict[str, float]:
    """Return images per second: reading alone, augmentation alone, both, and with workers."""
    import numpy as np

    from zsseg_rt.training.data import EpochSampler, TrainingSamples, make_loader

    held = [dataset[index] for index in range(len(dataset))]
    samples = TrainingSamples(dataset, augmentation, seed=0)
    sampler = EpochSampler(len(dataset), 0, batch_size=BATCH)
    generators = (np.random.default_rng(index) for index in itertools.count())
    return {
        "reading_per_second": rate(lambda i: dataset[i % PICTURES], seconds / 4),
        "augmentation_per_second": rate(
            lambda i: augmentation(held[i % PICTURES], next(generators)), seconds / 4
        ),
        "per_core_per_second": rate(lambda i: samples[i, i % PICTURES], seconds),
        "loader_per_second": loader_rate(
            make_loader(samples, sampler, num_workers=workers), seconds
        ),
    }


def rate(act: Any, seconds: float) -> float:
    """Calls per second of processor time, so that other processes on the machine count less."""
    act(0)
    start, count = time.process_time(), 0
    while (elapsed := time.process_time() - start) < seconds:
        count += 1
        act(count)
    return count / elapsed


def loader_rate(loader: Any, seconds: float) -> float:
    """Images per second of wall time, after the first batches."""
    batches = iter(loader)
    for _ in range(8):
        next(batches)
    watch, count = Stopwatch(), 0
    while (elapsed := watch.seconds) < seconds:
        count += len(next(batches).names)
    return count / elapsed


def print_report(report: dict[str, Any]) -> None:
    """Print a Markdown table; the goal is 250 images per second on 8 cores, 31 per core."""
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print()
    print("Images per second at 512x512; the first three use one core's processor time.")
    print()
    print(f"| images | augmentation | reading | augmenting | both | {report['workers']} workers |")
    print("|---|---|---|---|---|---|")
    for row in report["rows"]:
        height, width = row["size_hw"]
        print(
            f"| {width}x{height} | {row['augmentation']} | {row['reading_per_second']:.0f} "
            f"| {row['augmentation_per_second']:.0f} | {row['per_core_per_second']:.0f} "
            f"| {row['loader_per_second']:.0f} |"
        )


if __name__ == "__main__":
    raise SystemExit(main())
