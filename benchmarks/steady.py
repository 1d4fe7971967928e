"""Measure what a memory of past frames does to flicker, accuracy, speed and work saved.

    python benchmarks/steady.py [--quick] [--tune] [--videos FOLDER] [--json FILE]

Clips are windows that pan over synthetic scenes at several speeds, labelled by the demo bundle once
frame by frame and once with ``FrameMemory``. Flicker is the share of pixels whose label changes
from one frame to the next although the same part of the same thing is there. Settings were chosen
on the ``train`` scenes (``--tune`` shows the choice); the report is on those of ``val``. Videos
are labelled with ``skip_still``: the share of frames that got labels again, and how many of their
pixels equal the labels that they would have got by themselves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from zsseg_rt import Bundle, Engine, EngineConfig, FrameMemory
from zsseg_rt.evaluation.metrics import ConfusionMatrix, score
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine
from zsseg_rt.profiling.worker import Stopwatch
from zsseg_rt.runtime.frame_memory import BlendSettings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from scene_clips import ClipFrame, SceneClip, flicker  # noqa: E402

from tools.scenes import CLASS_NAMES, IGNORE, world_of_split  # noqa: E402

SPEEDS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # pixels per frame, of windows of 128
LENGTH = 40
CANDIDATES = tuple(
    BlendSettings(most=most, per_blur=per_blur, least=least, lost_levels=lost)
    for most, per_blur, least, lost in [
        (0.7, 0.0, 0.0, 1e6),
        (0.8, 0.0, 0.0, 1e6),
        (0.8, 0.0, 0.0, 80.0),
        (0.84, 0.6, 0.65, 80.0),
        (0.84, 0.4, 0.75, 80.0),
        (0.86, 0.4, 0.75, 80.0),
        (0.86, 0.5, 0.72, 80.0),
        (0.88, 0.3, 0.8, 80.0),
        (0.9, 0.3, 0.8, 80.0),
    ]
)
# Goals of --steady, at every speed.
MOST_FLICKER, LEAST_MIOU, MOST_MS = 0.5, -0.3, 1.0


@dataclass
class Tally:
    """The results of one way of labelling on clips of one speed."""

    changed: int = 0
    compared: int = 0
    seconds: list[float] = field(default_factory=list)
    confusion: ConfusionMatrix = field(
        default_factory=lambda: ConfusionMatrix(len(CLASS_NAMES), ignore_label=IGNORE)
    )

    def result(self) -> dict[str, float]:
        """Flicker and mIoU in percent, median milliseconds per frame."""
        scores = score(self.confusion.counts, seen=range(len(CLASS_NAMES)))
        return {
            "flicker": 100.0 * self.changed / max(self.compared, 1),
            "miou": 100.0 * scores.miou,
            "ms": 1e3 * statistics.median(self.seconds),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only show that everything runs")
    parser.add_argument("--tune", action="store_true", help="compare settings on train scenes")
    parser.add_argument("--clips", type=int, default=24, help="clips per speed")
    parser.add_argument("--videos", type=Path, help="folder of .mp4 files for skip_still")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    clips, speeds = (1, (0.0, 4.0)) if args.quick else (args.clips, SPEEDS)
    config = EngineConfig(device="cpu", precision="float32", num_threads=args.threads)
    with Engine(Bundle.demo("scenes"), config) as engine:
        engine.set_classes(list(CLASS_NAMES))
        report: dict[str, Any] = {
            "machine": describe_machine(),
            "commit": describe_commit(ROOT),
            "clips_per_speed": clips,
            "frames_per_clip": LENGTH,
        }
        if args.tune:
            report["tuning"] = tune(engine, clips, speeds)
        else:
            report["steady"] = measure_steady(engine, clips, speeds)
            report["overhead_ms"] = measure_overhead(engine, 20 if args.quick else 400)
        if args.videos is not None:
            limit = 30 if args.quick else None
            paths = sorted(args.videos.glob("*.mp4"))
            report["skip_still"] = {p.name: measure_skipping(engine, p, limit) for p in paths}
            print_skipping(report["skip_still"])
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def measure_steady(engine: Engine, clips: int, speeds: Sequence[float]) -> dict[str, Any]:
    """Per frame against steadied, on scenes that played no part in choosing the settings."""
    print(f"{'speed':>6} {'flicker %':>17} {'ratio':>6} {'mIoU %':>15} {'change':>7}")
    results = {}
    for speed in speeds:
        plain, steady = compare(engine, "val", speed, clips, [None, BlendSettings()])
        ratio = steady["flicker"] / plain["flicker"]
        change = steady["miou"] - plain["miou"]
        holds = ratio <= MOST_FLICKER and change >= LEAST_MIOU
        print(
            f"{speed:6} {plain['flicker']:8.2f} {steady['flicker']:8.2f} {ratio:6.2f} "
            f"{plain['miou']:7.2f} {steady['miou']:7.2f} {change:+7.2f}"
            f"{'' if holds else '  misses the goal'}"
        )
        results[str(speed)] = {"per_frame": plain, "steady": steady}
    return results


def tune(engine: Engine, clips: int, speeds: Sequence[float]) -> list[dict[str, Any]]:
    """Flicker ratio and change of mIoU by settings and speed, on ``train`` scenes."""
    by_speed = {
        speed: compare(engine, "train", speed, clips, [None, *CANDIDATES]) for speed in speeds
    }
    rows = []
    for number, settings in enumerate(CANDIDATES, start=1):
        row = {}
        for speed, results in by_speed.items():
            plain, steady = results[0], results[number]
            row[str(speed)] = (steady["flicker"] / plain["flicker"], steady["miou"] - plain["miou"])
        shown = "  ".join(f"{s}: {ratio:.2f} {change:+.2f}" for s, (ratio, change) in row.items())
        print(f"{settings.most} - {settings.per_blur} blur, >= {settings.least}, "
              f"lost at {settings.lost_levels:g} | {shown}", flush=True)  # fmt: skip
        rows.append({"settings": asdict(settings), "by_speed": row})
    return rows


def compare(
    engine: Engine, split: str, speed: float, clips: int, ways: Sequence[BlendSettings | None]
) -> list[dict[str, float]]:
    """Label the same clips in several ways, frame by frame in turns; None: without a memory."""
    world = world_of_split(split, size=320)
    tallies = [Tally() for _ in ways]
    for index in range(clips):
        frames = list(SceneClip(world, index, speed=speed, length=LENGTH))
        for way, tally in zip(ways, tallies, strict=True):
            label_clip(engine, frames, way, tally)
    return [tally.result() for tally in tallies]


def label_clip(
    engine: Engine, frames: Sequence[ClipFrame], way: BlendSettings | None, tally: Tally
) -> None:
    """Label one clip and add to a tally."""
    memory = None if way is None else FrameMemory(blend=way)
    before = None
    for frame in frames:
        watch = Stopwatch()
        labels = engine.segment(frame.image, memory=memory).labels
        tally.seconds.append(watch.seconds)
        tally.confusion.update(frame.labels, labels)
        if before is not None:
            changed, compared = flicker(before, labels, frame)
            tally.changed += changed
            tally.compared += compared
        before = labels


def measure_overhead(engine: Engine, rounds: int) -> float:
    """Milliseconds that steadying adds to a 720p frame: medians of frames that take turns."""
    clip = SceneClip(world_of_split("val", size=320), 0, speed=4.0, length=2, side=256)
    frames = [cv2.resize(frame.image, (1280, 720)) for frame in clip]
    memory = FrameMemory()
    taken: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * rounds):
        frame = frames[number // 2 % 2]
        watch = Stopwatch()
        engine.segment(frame, memory=memory if number % 2 else None)
        taken[bool(number % 2)].append(watch.seconds)
    plain, steady = (1e3 * statistics.median(taken[way]) for way in (False, True))
    verdict = "" if steady - plain <= MOST_MS else "  misses the goal"
    print(f"1280x720: {plain:.2f} ms per frame, steadied {steady:.2f} ms, "
          f"{steady - plain:+.2f} ms{verdict} (on a quiet machine only)")  # fmt: skip
    return steady - plain


def measure_skipping(engine: Engine, path: Path, limit: int | None) -> dict[str, float]:
    """Label a video with and without ``skip_still``."""
    memory = FrameMemory(steady=False, skip_still=True)
    frames = reused = equal = pixels = 0
    for image, pts in pictures(path, limit):
        seg = engine.segment(image, memory=memory, captured_at=pts)
        frames += 1
        if seg.reused:
            reused += 1
            equal += int((seg.labels == engine.segment(image).labels).sum())
            pixels += seg.labels.size
    changes = pixels - equal
    all_pixels = max(frames, 1) * max(pixels // max(reused, 1), 1)
    return {
        "frames": frames,
        "reused_share": reused / max(frames, 1),
        "equal_share": 1.0 - changes / all_pixels,
        "equal_share_of_reused": equal / pixels if pixels else 1.0,
    }


def pictures(path: Path, limit: int | None) -> Iterator[tuple[np.ndarray, float]]:
    """Frames of a video in RGB and their times in seconds."""
    import av

    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if limit is not None and number >= limit:
                return
            yield np.ascontiguousarray(frame.to_ndarray(format="rgb24")), float(frame.time)


def print_skipping(results: dict[str, dict[str, float]]) -> None:
    """Print a line per video."""
    for name, result in results.items():
        print(
            f"{name}: {result['frames']} frames, {result['reused_share']:.1%} reused, "
            f"{result['equal_share']:.2%} of all pixels equal, of reused frames' "
            f"{result['equal_share_of_reused']:.2%}"
        )


if __name__ == "__main__":
    sys.exit(main())
