"""Labels along the picture's edges: what `refine` gains, and what it costs a frame.

    python benchmarks/refine.py [--photos FOLDER] [--camvid FOLDER] [--scenes 60] [--json FILE]

The demos' bundles label pictures with and without ``EngineConfig(refine="bilateral")``: photos
(``images/``, ``masks/`` and ``index.json`` with ``names``, the masks' values in order), CamVid
(``val/``, ``valannot/``) and drawn scenes. mIoU is over classes and background. The boundary F is
the mean, over pictures and the classes in their masks, of the harmonic mean of two shares: of the
found outline that has the true one near it, and of the true one that has the found one near it.
Near is 0.75 %, or 0.3 %, of the picture's diagonal. Times are medians of frames of 512x512 that
take turns on two threads.

Source: Csurka et al., "What is a good evaluation measure for semantic segmentation?", BMVC 2013.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.evaluation.datasets.registry import create_dataset
from zsseg_rt.evaluation.metrics import ConfusionMatrix, score
from zsseg_rt.profiling.meter import Stopwatch

Image = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.uint8]
Pictures = Iterator[tuple[Image, Labels]]

CAMVID = {"car": 8, "person": 9, "bicycle": 10}  # of its classes, those that the photo demo knows
CAMVID_VOID, CAMVID_CLASSES = 11, 12
BACKGROUND, IGNORED = 255, 254
TOLERANCES = (0.0075, 0.003)
THREADS, SIDE, ROUNDS = 2, 512, 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--photos", type=Path, help="folder of annotated photos")
    parser.add_argument("--camvid", type=Path, help="folder of CamVid")
    parser.add_argument("--scenes", type=int, default=60, help="how many scenes; 0: none")
    parser.add_argument("--quick", action="store_true", help="only show that everything runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    rounds = 2 if args.quick else ROUNDS
    report: dict[str, Any] = {"load": os.getloadavg(), "sets": {}}
    photos = Bundle.demo()
    things = list(photos.concepts.names)
    if args.photos:
        pictures = list(read_photos(args.photos, things))
        report["sets"]["photos"] = compare(photos, things, pictures)
    if args.camvid:
        report["sets"]["camvid"] = compare(photos, list(CAMVID), list(read_camvid(args.camvid)))
    if args.scenes:
        scenes = create_dataset("scenes", split="val")
        drawn = [(s.image, s.labels) for s in (scenes[i] for i in range(args.scenes))]
        names = list(scenes.class_names)
        report["sets"]["scenes"] = compare(Bundle.demo("scenes"), names, drawn)
    report["times_ms"] = {
        "photos, 20 names": frame_times(photos, things, rounds),
        "photos, 171 names": frame_times(photos, many_names(photos, 171), rounds),
    }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def read_photos(folder: Path, things: Sequence[str]) -> Pictures:
    """Photos and their masks as indices into ``things``; all else is background."""
    index = json.loads((folder / "index.json").read_text())
    table = np.full(256, BACKGROUND, np.uint8)
    for value, name in enumerate(index["names"]):
        table[value] = things.index(name) if name in things else BACKGROUND
    for entry in index["images"]:
        name = Path(entry["file"])
        mask = cv2.imread(str(folder / "masks" / f"{name.stem}.png"), cv2.IMREAD_GRAYSCALE)
        yield read_rgb(folder / "images" / name.name), table[mask]


def read_camvid(folder: Path) -> Pictures:
    """The validation pictures, with the three classes that the demo knows, and background."""
    table = np.full(256, BACKGROUND, np.uint8)
    table[list(CAMVID.values())] = range(len(CAMVID))
    table[CAMVID_VOID] = IGNORED
    for path in sorted((folder / "val").iterdir()):
        mask = cv2.imread(str(folder / "valannot" / f"{path.stem}.png"), cv2.IMREAD_GRAYSCALE)
        yield read_rgb(path), table[mask]


def read_rgb(path: Path) -> Image:
    """A picture, uint8 [H, W, 3]."""
    return np.ascontiguousarray(cv2.imread(str(path))[..., ::-1])


def compare(
    bundle: Bundle, names: Sequence[str], pictures: Sequence[tuple[Image, Labels]]
) -> dict[str, Any]:
    """Figures in percent, without and with refinement."""
    found: dict[str, Any] = {"pictures": len(pictures)}
    for refine in (None, "bilateral"):
        config = EngineConfig(device="cpu", num_threads=THREADS, resize="stretch", refine=refine)
        with Engine(bundle, config) as engine:
            set_classes(engine, names)
            labelled = [engine.segment(image).labels for image, _ in pictures]
        found[str(refine)] = figures(labelled, [truth for _, truth in pictures], len(names))
    return found


def set_classes(engine: Engine, names: Sequence[str]) -> None:
    """Name the classes, beside the background that the bundle knows."""
    concepts = engine.bundle.concepts
    engine.set_classes(list(names), background=concepts.background if concepts else ())


def figures(
    labelled: Sequence[Labels], truths: Sequence[Labels], num_classes: int
) -> dict[str, float]:
    """MIoU and boundary F, in percent."""
    confusion = ConfusionMatrix(num_classes + 1, ignore_label=IGNORED)
    fits: dict[float, list[float]] = {share: [] for share in TOLERANCES}
    for labels, truth in zip(labelled, truths, strict=True):
        as_class = [np.where(m == BACKGROUND, num_classes, m) for m in (truth, labels)]
        confusion.update(*as_class)
        for share, found in fits.items():
            found.extend(boundary_fits(labels, truth, share))
    scores = score(confusion.counts, range(num_classes + 1))
    result = {"mIoU": 100 * scores.miou, "pAcc": 100 * scores.pixel_accuracy}
    result |= {f"F {100 * share:g} %": 100 * float(np.mean(f)) for share, f in fits.items()}
    return {name: round(value, 2) for name, value in result.items()}


def boundary_fits(labels: Labels, truth: Labels, share: float) -> Iterator[float]:
    """The boundary F of each class in a picture's mask."""
    reach = max(1, round(share * float(np.hypot(*truth.shape))))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    known = truth != IGNORED
    for value in np.unique(truth):
        if value in (BACKGROUND, IGNORED):
            continue
        true, found = (outline((m == value) & known) for m in (truth, labels))
        if not true.any():
            continue
        near_true, near_found = (cv2.dilate(m.astype(np.uint8), disc) > 0 for m in (true, found))
        right = (found & near_true).sum() / max(found.sum(), 1)
        hit = (true & near_found).sum() / true.sum()
        yield 2 * right * hit / (right + hit) if right + hit else 0.0


def outline(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Pixels of which the one above or to the left is on the other side."""
    found = np.zeros_like(mask)
    found[1:] |= mask[1:] != mask[:-1]
    found[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    return found


def many_names(bundle: Bundle, count: int) -> list[str]:
    """So many names that the bundle's bank has."""
    bank = bundle.text_bank
    assert bank is not None, "the photo demo has one"
    return [name for name in bank.names if name not in bundle.concepts.background][:count]


def frame_times(bundle: Bundle, names: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of a frame and of its stages, engines taking turns."""
    frame = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    frame = cv2.GaussianBlur(frame, (0, 0), 6)
    engines = {}
    for refine in (None, "bilateral"):
        config = EngineConfig(
            device="cpu", num_threads=THREADS, resize="stretch", refine=refine, with_times=True
        )
        engines[str(refine)] = Engine(bundle, config)
        set_classes(engines[str(refine)], names)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            engine.segment(frame)
            watch = Stopwatch()
            seg = engine.segment(frame)
            times[name].append({**seg.times, "call": 1000 * watch.seconds})
    for engine in engines.values():
        engine.close()
    return {
        name: {stage: round(float(np.median([r[stage] for r in rows])), 3) for stage in rows[0]}
        for name, rows in times.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
