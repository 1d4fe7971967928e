"""Measure what carrying labels along the motion is worth, against the last labels held.

    python -m benchmarks.follow [--quick] [--videos FOLDER] [--live] [--json FILE]
    python -m benchmarks.follow --tune --photos FOLDER

Every K-th frame is labelled by the photo demo (videos) or the scenes demo (drawn clips of ``val``,
against true labels). The frames between take the last labels as they are (hold), moved from the
last labelled frame (past, as policy ``latest`` does) or from the nearer one (near, as policy
``all``); places where motion fails are unknown, or hold their label. Foreground is what either side
names. ``--tune`` shows the choice of gain and lost, on windows that move over photographs with a
cut-out thing before them and on drawn clips of ``train``; none of them is reported. ``--live``: a
camera of 30 frames per second and a ViT-B/16 of random weights; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.demo import demo_classes
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine
from zsseg_rt.photos import find_photos, read_photo
from zsseg_rt.profiling.worker import Stopwatch
from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.runtime.frame_memory import Glance, LabelMover, Way, follow_size
from zsseg_rt.stream.follow import Following, KeyFrames

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from scene_clips import SceneClip  # noqa: E402

from tools.scenes import CLASS_NAMES, world_of_split  # noqa: E402

EVERY = (2, 4, 8, 16)
SPEEDS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # pixels per frame, of windows of 128
LENGTH = 33
UNKNOWN = 255
GAINS, LOSTS = (0, 1, 2, 4), (20, 30, 40, 45, 50, 60, 70, 80, 255)

Labels = npt.NDArray[np.uint8]
Image = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames, the network's labels of each, and what they are compared with."""

    images: Sequence[Image]
    own: Sequence[Labels]
    truth: Sequence[Labels]


@dataclass
class Tally:
    """How labels of frames between labelled ones compare with what they should be."""

    differ: int = 0
    pixels: int = 0
    same: int = 0
    either: int = 0

    def add(self, labels: Labels, truth: Labels, *, is_drawn: bool) -> None:
        """Count a frame; drawn ones have no class where their truth is unknown."""
        counted = truth != UNKNOWN if is_drawn else np.ones(truth.shape, bool)
        named = counted & ((labels != UNKNOWN) | (truth != UNKNOWN))
        self.differ += int((labels != truth)[counted].sum())
        self.pixels += int(counted.sum())
        self.same += int((labels == truth)[named].sum())
        self.either += int(named.sum())

    @property
    def result(self) -> dict[str, float]:
        """Percent."""
        return {
            "differ": 100.0 * self.differ / max(self.pixels, 1),
            "foreground": 100.0 * self.same / max(self.either, 1),
        }


Tallies = dict[int, dict[str, Tally]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only show that everything runs")
    parser.add_argument("--videos", type=Path, help="folder of .mp4 files")
    parser.add_argument("--clips", type=int, default=4, help="drawn clips per speed")
    parser.add_argument("--tune", action="store_true", help="compare settings on other clips")
    parser.add_argument("--photos", type=Path, help="folder of photos for --tune")
    parser.add_argument("--live", action="store_true", help="the camera and the slow network alone")
    parser.add_argument("--seconds", type=float, default=10.0, help="per way and round of --live")
    parser.add_argument("--rounds", type=int, default=5, help="of --live")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    report: dict[str, Any] = {"machine": describe_machine(), "commit": describe_commit(ROOT)}
    if args.live:
        rounds, size = (1, "tiny") if args.quick else (args.rounds, "full")
        report["live"] = measure_live(args.seconds, rounds, size)
    elif args.tune:
        report["tuning"] = tune(args)
    else:
        report |= measure(args)
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every clip that is reported, and the time that carrying takes."""
    report: dict[str, Any] = {}
    for path in sorted(args.videos.glob("*.mp4")) if args.videos else ():
        tallies: Tallies = defaultdict(lambda: defaultdict(Tally))
        with demo_engine("photos") as engine:
            images = list(itertools.islice(read_video(path), 20 if args.quick else None))
            own = [engine.segment(image).labels for image in images]
        compare(Clip(images=images, own=own, truth=own), tallies, is_drawn=False)
        report[path.stem] = shown(path.stem, tallies)
    for speed in (2.0,) if args.quick else SPEEDS:
        tallies = defaultdict(lambda: defaultdict(Tally))
        for clip in drawn_clips("val", speed, 1 if args.quick else args.clips):
            compare(clip, tallies, is_drawn=True)
        report[f"drawn, {speed:g}"] = shown(f"drawn, {speed:g}", tallies)
    report["ms per 1280x720 frame, one core"] = measure_cost(8 if args.quick else 200)
    return report


def demo_engine(name: str) -> Engine:
    """The engine of a demo with its classes, on one thread."""
    engine = Engine(Bundle.demo(name), EngineConfig(device="cpu", num_threads=1))
    engine.set_classes(list(CLASS_NAMES) if name == "scenes" else demo_classes(name))
    return engine


def read_video(path: Path) -> Iterator[Image]:
    """Frames in RGB."""
    import av

    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield np.ascontiguousarray(frame.to_ndarray(format="rgb24"))


def drawn_clips(split: str, speed: float, count: int) -> Iterator[Clip]:
    """Windows that pan over scenes in which things move."""
    world = world_of_split(split, size=320)
    with demo_engine("scenes") as engine:
        for index in range(count):
            frames = list(SceneClip(world, index, speed=speed, length=LENGTH))
            own = [engine.segment(frame.image).labels for frame in frames]
            images = [frame.image for frame in frames]
            yield Clip(images=images, own=own, truth=[frame.labels for frame in frames])


def compare(clip: Clip, tallies: Tallies, *, is_drawn: bool) -> None:
    """Add a clip to the tallies, by K and way."""
    glances = [look(image) for image in clip.images]
    for every in EVERY:
        ways: dict[str, Sequence[Labels]] = {
            "hold": [clip.own[i - i % every] for i in range(len(clip.images))],
            "past": moved_from_past(clip, glances, every, LabelMover()),
            "past, held": moved_from_past(clip, glances, every, LabelMover(holds=True)),
            "near": moved_from_nearer(clip, every, holds=False),
            "near, held": moved_from_nearer(clip, every, holds=True),
        }
        for way, labels in ways.items():
            for index, (one, truth) in enumerate(zip(labels, clip.truth, strict=True)):
                if index % every:
                    tallies[every][way].add(one, truth, is_drawn=is_drawn)


def look(image: Image) -> Glance:
    """The small picture of a frame."""
    return Glance.at(image, "rgb", follow_size(image.shape[:2]))


def moved_from_past(
    clip: Clip, glances: Sequence[Glance], every: int, mover: LabelMover
) -> list[Labels]:
    """Labels of every frame, from the last one that was labelled."""
    moved: list[Labels] = []
    for index, glance in enumerate(glances):
        if index % every == 0:
            way, labels = Way.begin(glance), clip.own[index]
            moved.append(labels)
            continue
        mover.extend(glances[index - 1], glance, way)
        moved.append(mover.move(labels, way, glance))
    return moved


def moved_from_nearer(clip: Clip, every: int, *, holds: bool) -> list[Labels]:
    """Labels of every frame, as a stream with policy ``all`` gives them."""
    keys = KeyFrames(
        lambda frame: segmentation(frame, clip.own[frame.index]),
        Following(every=every, holds=holds),
    )
    frames = iter([
        Frame(source="clip", index=i, image=image, captured_at=i / 30, clock="arrival")
        for i, image in enumerate(clip.images)
    ])  # fmt: skip
    return [keys.next(frames.__next__).labels for _ in clip.images]


def segmentation(frame: Frame, labels: Labels) -> Segmentation:
    """Labels as a network gives them."""
    return Segmentation(labels=labels, names=("a",) * 254, vocabulary_version=1, frame=frame)


def shown(name: str, tallies: Tallies) -> dict[str, Any]:
    """Results in percent, printed beside those of holding."""
    results = {k: {way: one.result for way, one in ways.items()} for k, ways in tallies.items()}
    for every, ways in results.items():
        hold = ways["hold"]
        line = [f"{name:24} K={every:2} hold {hold['differ']:6.2f} ({hold['foreground']:5.1f})"]
        for way, one in ways.items():
            if way != "hold":
                ratio = one["differ"] / max(hold["differ"], 1e-9)
                line.append(f"{way} {one['differ']:6.2f} x{ratio:.2f} ({one['foreground']:5.1f})")
        print(" | ".join(line), file=sys.stderr, flush=True)
    return {str(every): ways for every, ways in results.items()}


def measure_cost(rounds: int) -> dict[str, float]:
    """Milliseconds of one core per 1280x720 frame, while the network has another frame."""
    cv2.setNumThreads(1)
    images = [cv2.resize(image, (1280, 720)) for image in demo_images(9)]
    labels = np.tile(np.repeat(np.arange(16, dtype=np.uint8), 80), (720, 1))
    mover, flows, moves = LabelMover(), [], []
    for _ in range(max(rounds // 8, 1)):
        before = look(images[0])
        ways = [Way.begin(before), Way.begin(before)]
        for image in images[1:]:
            start = time.thread_time()
            glance = look(image)
            mover.extend(before, glance, *ways)
            flows.append(1e3 * (time.thread_time() - start))
            start = time.thread_time()
            mover.move(labels, ways[0], glance)
            moves.append(1e3 * (time.thread_time() - start))
            before = glance
    both = np.add(flows, moves)
    return {
        "flow, median": float(np.median(flows)),
        "moving, median": float(np.median(moves)),
        "both, median": float(np.median(both)),
        "both, least": float(both.min()),
    }


def demo_images(count: int) -> list[Image]:
    """The first frames of the clip that ships."""
    from zsseg_rt.demo import demo_clip
    from zsseg_rt.photos import decode_photo

    return [decode_photo(data, Path("clip")) for data in demo_clip()[:count]]


# ---------------------------------------------------------------- the choice of settings


def tune(args: argparse.Namespace) -> dict[str, Any]:
    """Disagreement by gain, and how many labels are wrong by lost."""
    groups: dict[str, list[Clip]] = {}
    if args.photos:
        groups["photos"] = list(moved_photos(args.photos, 2 if args.quick else 12))
    for speed in (2.0,) if args.quick else SPEEDS:
        groups[f"drawn, {speed:g}"] = list(drawn_clips("train", speed, 1 if args.quick else 4))
    report: dict[str, Any] = {
        "chosen": {"gain": LabelMover.gain, "lost": LabelMover.lost},
        "by gain": {},
    }
    wrong = np.zeros((len(LOSTS), 2))
    for name, clips in groups.items():
        for every in (2, 8):
            tallies: dict[int, Tally] = defaultdict(Tally)
            for clip in clips:
                glances = [look(image) for image in clip.images]
                for gain in GAINS:
                    mover = LabelMover(holds=True, gain=gain)
                    moved = moved_from_past(clip, glances, every, mover)
                    for index, labels in enumerate(moved):
                        if index % every:
                            tallies[gain].add(labels, clip.own[index], is_drawn=False)
                if every == 8:
                    wrong += wrong_by_lost(clip, glances)
            report["by gain"][f"{name}, K={every}"] = {
                str(gain): round(tally.result["differ"], 3) for gain, tally in tallies.items()
            }
    shares = wrong[:, 0] / np.maximum(wrong[:, 1], 1)
    steps = zip(LOSTS, (*LOSTS[1:], None), shares, strict=True)
    report["wrong labels where the difference is"] = {
        f"{low} to {high}": round(share, 3) for low, high, share in steps if high
    }
    return report


def wrong_by_lost(clip: Clip, glances: Sequence[Glance]) -> npt.NDArray[np.float64]:
    """Pixels that become unknown between one lost and the next: wrong ones, and all."""
    moved = [moved_from_past(clip, glances, 8, LabelMover(lost=lost)) for lost in LOSTS]
    counts = np.zeros((len(LOSTS), 2))
    for index, truth in enumerate(clip.own):
        for step in range(len(LOSTS) - 1 if index % 8 else 0):
            now = moved[step + 1][index]
            lost = (moved[step][index] == UNKNOWN) & (now != UNKNOWN)
            counts[step] += (now != truth)[lost].sum(), lost.sum()
    return counts


def moved_photos(folder: Path, count: int) -> Iterator[Clip]:
    """Windows that move, turn and zoom over photos, with a thing from another one before them."""
    images = [read_photo(path) for path in find_photos([str(folder)])[:count]]
    with demo_engine("photos") as engine:
        things = []
        for image in images:
            for part in engine.segment(image).components(min_area=image[..., 0].size // 60)[:1]:
                left, top, right, bottom = part.box
                things.append((image[top:bottom, left:right], part.mask.astype(np.float32)))
        for seed, image in enumerate(images):
            frames = list(moved_photo(image, *things[(seed + 3) % len(things)], seed))
            own = [engine.segment(frame).labels for frame in frames]
            yield Clip(images=frames, own=own, truth=own)


def moved_photo(photo: Image, thing: Image, mask: Any, seed: int) -> Iterator[Image]:
    """640x360 frames; the camera shakes, the light changes a little, the thing bends."""
    height, width = 360, 640
    rng = np.random.default_rng(seed)
    scale = 1.35 * max(height / photo.shape[0], width / photo.shape[1])
    photo = cv2.resize(photo, None, fx=scale, fy=scale)
    scale = 0.45 * height / max(thing.shape[:2])
    thing = cv2.resize(thing, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    mask = cv2.resize(mask, thing.shape[1::-1], interpolation=cv2.INTER_AREA)
    speed, angle = (0.5, 1.5, 3.0, 6.0)[seed % 4], rng.uniform(0, 2 * math.pi)
    phases = rng.uniform(0, 2 * math.pi, 6)
    own_speed = rng.uniform(1, 6) * (-1) ** seed
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    for t in range(LENGTH):
        u = t - LENGTH / 2
        centre = (
            photo.shape[1] / 2 + speed * u * math.cos(angle) + 1.5 * math.sin(0.9 * t + phases[0]),
            photo.shape[0] / 2 + speed * u * math.sin(angle) + 1.5 * math.sin(0.7 * t + phases[1]),
        )
        turn, zoom = 2.5 * math.sin(0.08 * t + phases[3]), 1 + 0.1 * math.sin(0.06 * t + phases[2])
        window = cv2.getRotationMatrix2D(centre, turn, zoom)
        window[:, 2] += width / 2 - centre[0], height / 2 - centre[1]
        edge = cv2.BORDER_REFLECT
        frame = cv2.warpAffine(photo, window, (width, height), borderMode=edge).astype(np.float32)
        size, rows = 1 + 0.12 * math.sin(0.07 * t + phases[5]), thing.shape[0]
        left = (width - thing.shape[1]) / 2 + own_speed * u
        top = 0.6 * height - rows / 2 + 3 * math.sin(0.5 * t + phases[4])
        bend = 6 * np.sin(0.02 * y + 0.45 * t + phases[0]) * (y - top) / rows
        places = ((x - left) / size + bend).astype(np.float32), (y - top) / np.float32(size)
        alpha = cv2.remap(mask, *places, cv2.INTER_LINEAR)[..., None]
        frame += alpha * (cv2.remap(thing, *places, cv2.INTER_LINEAR).astype(np.float32) - frame)
        frame *= 1 + 0.02 * math.sin(0.3 * t)
        noise = np.random.default_rng([seed, t]).standard_normal(frame.shape, dtype=np.float32)
        yield np.clip(np.rint(frame + 3 * noise), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------- live


def measure_live(seconds: float, rounds: int, size: str) -> dict[str, Any]:
    """A camera of 30 frames per second and a ViT-B/16: as ever, and with labels carried, in turns.

    Medians of all rounds.
    """
    import engine_model

    source = "test://?size=1280x720&rate=30"
    with TemporaryDirectory() as folder:
        bundle = Path(folder) / "vit.zsseg"
        engine_model.export(engine_model.build_model(size), bundle)
        with Engine(bundle, EngineConfig(device="cpu")) as engine:
            rows = np.random.default_rng(0).normal(size=(20, engine.bundle.text.embed_dim))
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            names = engine_model.class_names(20)
            engine.set_classes(names, embeddings=rows.astype(np.float32))
            frame = cv2.resize(demo_images(1)[0], (1280, 720))
            alone = [time_of(lambda: engine.segment(frame)) for _ in range(12)][2:]
            figures: dict[str, Any] = {"network alone, ms": float(np.median(alone))}
            runs: dict[str, list[dict[str, float]]] = {"today": [], "followed": []}
            for number in range(rounds):
                for way in list(runs)[:: -1 if number % 2 else 1]:
                    begun = time.process_time()
                    with engine.stream(source, follow=way == "followed") as stream:
                        ages = live_ages(stream, seconds)
                        (stats,) = stream.stats().values()
                        busy = time.process_time() - begun
                    counts = {"captured": stats.captured, "dropped": stats.dropped}
                    rate = {"labelled per second": stats.fps, "CPU seconds": busy}
                    runs[way].append(ages | rate | counts)
            for way, turns in runs.items():
                figures[way] = {key: float(np.median([t[key] for t in turns])) for key in turns[0]}
            rates = [[t["labelled per second"] for t in turns] for turns in runs.values()]
            figures["labelled per second, followed / today, by round"] = [
                followed / today for today, followed in zip(*rates, strict=True)
            ]
            figures["labelled per second, followed / today"] = float(
                np.median(figures["labelled per second, followed / today, by round"])
            )
            figures["ms per 1280x720 frame, one core"] = measure_cost(200)
    return figures


def live_ages(stream: Any, seconds: float) -> dict[str, float]:
    """Results per second and their ages in ms, without the first second."""
    begin, times = time.monotonic(), deque[float]()
    ages: list[float] = []
    labelled: list[float] = []
    for seg in stream:
        now = time.monotonic()
        if now - begin > seconds + 1.0:
            break
        if now - begin > 1.0:
            times.append(now)
            ages.append(1e3 * (now - seg.frame.captured_at))
            labelled.append(1e3 * seg.labelled_age)
    figures = {"given out per second": (len(times) - 1) / (times[-1] - times[0])}
    for name, values in (("age", ages), ("labelled age", labelled)):
        for percent in (50, 95):
            figures[f"{name} p{percent}, ms"] = float(np.percentile(values, percent))
    return figures


def time_of(work: Callable[[], object]) -> float:
    """Milliseconds."""
    watch = Stopwatch()
    work()
    return 1e3 * watch.seconds


if __name__ == "__main__":
    sys.exit(main())
