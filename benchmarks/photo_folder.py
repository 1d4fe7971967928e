"""Measure ``segment`` of a folder: photos per second, beside one lane and a plain loop.

    python benchmarks/photo_folder.py [--bundle NAME.zsseg | --real] [--photos N] [--size 640x480]
                                      [--rounds 8] [--json FILE]

The bundle is the demo's unless one is named; ``--real`` makes ViT-B/16 at 512x512 with random
weights, and takes fewer photos. A bundle without a text encoder gets random embeddings. Each
candidate is a process of its own that loads its engine, labels a folder once to warm up, then once
per round in turns with the others, in random order. "one by one" reads, labels and writes a photo
after the other. Goals: 1.6 times as fast as that with the demo's bundle, 1.15 times with a real
one. Files are compared. At most 6 minutes on 2 quiet cores that have bfloat16.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from engine import machine_and_commit
from engine_model import build_model, export

from zsseg_rt.demo import demo_bundle, demo_photos
from zsseg_rt.profiling.estimates import judge

ROOT = Path(__file__).resolve().parents[1]
PHOTOS, REAL_PHOTOS = 60, 24
THRESHOLD = 0.02
CHILD = """
import json, sys, time
from pathlib import Path
import numpy as np
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.demo import demo_classes
from zsseg_rt.integrations import batch

bundle, folder, lanes, out = sys.argv[1:]
photos, count = sorted(Path(folder).iterdir()), 1
if lanes == "serial":
    batch.in_order = lambda call, items, num_threads: (call(item) for item in items)
else:
    count = int(lanes) or batch.lanes_for(len(photos), EngineConfig(device="cpu"))
engine = Engine(bundle, EngineConfig(device="cpu", num_lanes=count))
if engine.bundle.graphs.get("text_encoder"):
    engine.set_classes(demo_classes("scenes"))
else:
    rows = np.random.default_rng(0).standard_normal((20, engine.bundle.text.embed_dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    engine.set_classes([f"class {i}" for i in range(20)], embeddings=rows.astype(np.float32))
for line in sys.stdin:
    begin = time.monotonic()
    results = batch.segment_photos(engine, photos, Path(out))
    assert not any(r.error for r in results), results
    print(json.dumps({"seconds": time.monotonic() - begin, "lanes": count}), flush=True)
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse arguments, run the rounds, print a report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    bundle = parser.add_mutually_exclusive_group()
    bundle.add_argument("--bundle", type=Path)
    bundle.add_argument("--real", action="store_true", help="ViT-B/16, random weights; needs torch")
    parser.add_argument("--photos", type=int, help=f"{PHOTOS}; with --real {REAL_PHOTOS}")
    parser.add_argument("--size", default="640x480")
    parser.add_argument("--rounds", type=int, default=8, help="6 and more give an interval")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    args.photos = args.photos or (REAL_PHOTOS if args.real else PHOTOS)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(args, bundle_of(args, Path(folder)), Path(folder))
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def bundle_of(args: argparse.Namespace, scratch: Path) -> Path:
    """The bundle that was named, a real one with random weights, or the demo's."""
    bundle: Path = args.bundle or demo_bundle("scenes")
    if args.real:
        bundle = scratch / "real.zsseg"
        export(build_model("real"), bundle)
    return bundle


def measure(args: argparse.Namespace, bundle: Path, scratch: Path) -> dict[str, Any]:
    """Photos per second of each candidate, and their ratios within the rounds."""
    photos = make_photos(scratch / "photos", args.photos, args.size)
    candidates = {"chosen lanes": "0", "one lane": "1", "one by one": "serial"}
    children = {
        name: start(bundle, photos, lanes, scratch / f"out {name}")
        for name, lanes in candidates.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in children}
    lanes_used = {}
    order = random.Random(0)
    try:
        for round_ in range(args.rounds + 1):
            for name in order.sample(list(children), len(children)):
                answer = ask(children[name])
                lanes_used[name] = answer["lanes"]
                if round_:
                    seconds[name].append(answer["seconds"])
    finally:
        for child in children.values():
            child.stdin.close()
            child.wait()
    digests = {name: digest(scratch / f"out {name}") for name in children}
    ours = seconds["chosen lanes"]
    faster = {
        name: vars(judge(ours, others, basis="wall", threshold=THRESHOLD))
        for name, others in seconds.items()
        if name != "chosen lanes"
    }
    return {
        "machine": machine_and_commit(),
        "bundle": bundle.name,
        "photos": args.photos,
        "size": args.size,
        "lanes": lanes_used,
        "seconds": seconds,
        "photos per second": {n: args.photos / statistics.median(s) for n, s in seconds.items()},
        "longer than chosen lanes": faster,
        "same files": len(set(digests.values())) == 1,
    }


def make_photos(folder: Path, count: int, size: str) -> Path:
    """JPEG photos cut from the demo's pictures."""
    folder.mkdir()
    width, height = map(int, size.split("x"))
    scenes = [cv2.imread(photo) for photo in demo_photos("scenes")]
    rng = np.random.default_rng(0)
    for index in range(count):
        scene = cv2.resize(scenes[index % len(scenes)], (width * 5 // 4, height * 5 // 4))
        top, left = rng.integers(0, height // 4), rng.integers(0, width // 4)
        cv2.imwrite(str(folder / f"{index:04}.jpg"), scene[top : top + height, left : left + width])
    return folder


def start(bundle: Path, photos: Path, lanes: str, out: Path) -> Any:
    """A process that labels the folder whenever it is asked."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-c", CHILD, str(bundle.resolve()), str(photos), lanes, str(out)]
    return subprocess.Popen(
        call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        cwd=photos.parent,
    )  # fmt: skip


def ask(child: Any) -> dict[str, Any]:
    """Let a process label the folder once."""
    child.stdin.write("go\n")
    child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"a candidate ended with {child.wait()}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def digest(folder: Path) -> str:
    """Of all images in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.png")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
