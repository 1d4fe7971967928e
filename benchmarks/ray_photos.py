"""Measure a folder of photos with Ray Data beside the batch command, and what starting Ray costs.

    python benchmarks/ray_photos.py [--bundle NAME.zsseg | --real] [--photos N] [--size 640x480]
                                    [--batch-size N] [--calls N] [--rounds 3] [--json FILE]

Needs the extra ``ray``; ``--real``, ViT-B/16 at 512x512 with random weights, torch and onnx too.
Both label the same photos with the same number of threads and write masks and overlays as PNG: the
batch command as files, Ray as Parquet. Each is a process of its own per round; they take turns.
Ray's workers get the same priority as the batch command (Ray's default is nice 15) and ``--calls``
batches at a time. Ray keeps idle workers (``RAY_num_workers_soft_limit``): by default it ends all
but as many as CPUs are free, and starts a new process to write each batch. Ray's rate is that of
its last photos: between the moment when a quarter of them was done and the end. All that comes
before, less the time of that quarter at that rate, is its start-up. Processes that Ray starts
later, to write, count for its rate: take photos enough for half a minute. The report says from how
many photos Ray is faster on several machines like this one.
A bundle without a text encoder gets random classes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZE = 32
sys.path[0] = str(ROOT)  # not this folder: its modules would hide others of the same name
sys.path.append(str(ROOT / "benchmarks"))  # for photo_folder

BATCH = """
import json, sys, time
from pathlib import Path

begin = time.monotonic()
from zsseg_rt import Engine, EngineConfig
from benchmarks.ray_photos import classes_for
from zsseg_rt.integrations.batch import lanes_for, segment_photos

bundle, folder, out = sys.argv[1:]
photos, done = sorted(Path(folder).iterdir()), []
config = EngineConfig(device="cpu")
config = EngineConfig(device="cpu", num_lanes=lanes_for(len(photos), config))
with Engine(bundle, config) as engine:
    engine.set_classes(classes_for(bundle))
    results = segment_photos(
        engine, photos, Path(out), on_done=lambda *_: done.append(time.monotonic() - begin)
    )
assert not any(result.error for result in results), results
print(json.dumps({"done": done}))
"""

RAY = """
import json, sys, time

begin = time.monotonic()
import os

import ray
from benchmarks.ray_photos import classes_for, pool
from zsseg_rt.integrations.ray import PhotoSegmenter

bundle, folder, out, batch_size, calls = sys.argv[1:]
settings = {"bundle": bundle, "classes": classes_for(bundle)}
cpus = len(os.sched_getaffinity(0))
ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
started = time.monotonic() - begin


class Timed(PhotoSegmenter):
    def __call__(self, batch):
        table = super().__call__(batch)
        times = [time.monotonic() - begin] * table.num_rows  # one clock for all processes
        return table.append_column("done", [times])


photos = ray.data.read_binary_files(folder, include_paths=True, num_cpus=0.1)
photos.map_batches(
    Timed,
    fn_constructor_kwargs=settings, batch_size=int(batch_size), num_cpus=cpus - 0.5,
    compute=pool(int(calls)),
).write_parquet(out, ray_remote_args={"num_cpus": 0.1})
total = time.monotonic() - begin
import pyarrow.parquet as pq

rows = pq.read_table(out).to_pylist()
assert not any(row["error"] for row in rows), rows[0]["error"]
print(json.dumps({"done": sorted(row["done"] for row in rows), "cluster": started, "total": total}))
"""


def main() -> int:
    """Parse arguments, run the rounds, print a report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bundle = parser.add_mutually_exclusive_group()
    bundle.add_argument("--bundle", type=Path, help="default: the demo's")
    bundle.add_argument("--real", action="store_true", help="ViT-B/16, random weights")
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--calls", type=int, default=2, help="batches at a time in Ray's actor")
    parser.add_argument("--size", default="640x480")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from benchmarks.photo_folder import bundle_of

    with tempfile.TemporaryDirectory() as folder:
        report = measure(args, bundle_of(args, Path(folder)).resolve(), Path(folder))
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def measure(args: argparse.Namespace, bundle: Path, scratch: Path) -> dict[str, Any]:
    """Photos per second of both, and Ray's start-up in seconds."""
    from benchmarks.photo_folder import machine_and_commit, make_photos

    photos = make_photos(scratch / "photos", args.photos, args.size)
    settings = [str(args.batch_size), str(args.calls)]
    runs: dict[str, list[dict[str, Any]]] = {"batch": [], "ray": []}
    for round_ in range(args.rounds):
        for name, child, more in (("batch", BATCH, []), ("ray", RAY, settings)):
            out = scratch / f"{name} {round_}"
            runs[name].append(run(child, [str(bundle), str(photos), str(out), *more]))
    rates = {name: [rate(one["done"]) for one in each] for name, each in runs.items()}
    ratios = [ray / batch for ray, batch in zip(rates["ray"], rates["batch"], strict=True)]
    startups = {name: [startup(one["done"]) for one in each] for name, each in runs.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    extra = statistics.median(startups["ray"]) - statistics.median(startups["batch"])
    return {
        "machine": machine_and_commit(),
        "load average": os.getloadavg(),
        "bundle": bundle.name,
        "photos": args.photos,
        "size": args.size,
        "batch size": args.batch_size,
        "calls": args.calls,
        "photos per second": medians,
        "ray / batch": {
            "median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)
        },
        "start-up in seconds": {n: statistics.median(s) for n, s in startups.items()},
        "of it the cluster": statistics.median(one["cluster"] for one in runs["ray"]),
        "pays from photos": {
            f"{machines} machines": pays_from(machines, extra, medians) for machines in (2, 4, 8)
        },
    }  # fmt: skip


def pool(calls: int) -> Any:
    """One actor that has so many batches under way."""
    from ray.data import ActorPoolStrategy

    return ActorPoolStrategy(
        size=1, max_concurrent_calls_per_actor=calls, enable_true_multi_threading=calls > 1
    )


def classes_for(bundle: str) -> Any:
    """The demo's classes, or random ones for a bundle that has no text encoder."""
    import numpy as np

    from zsseg_rt import Bundle, Vocabulary
    from zsseg_rt.demo import demo_classes

    opened = Bundle.load(bundle)
    if opened.graphs.get("text_encoder"):
        return demo_classes("scenes")
    names = tuple(f"class {i}" for i in range(20))
    rows = np.random.default_rng(0).standard_normal((20, opened.text.embed_dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    index = np.arange(20, dtype=np.int32)
    return Vocabulary(
        names=names, phrases=names, phrase_classes=index, embeds=rows.astype(np.float32), version=1
    )


def run(code: str, arguments: list[str]) -> dict[str, Any]:
    """What a process of one candidate reports."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        ),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_num_workers_soft_limit": "16",
    }
    call = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        call,
        env=environment,
        cwd=Path(arguments[1]).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def rate(done: list[float]) -> float:
    """Photos per second after the first quarter."""
    first = len(done) // 4
    start = done[first]
    later = [moment for moment in done if moment > start]
    return len(later) / (done[-1] - start)


def startup(done: list[float]) -> float:
    """Seconds before the first photo was begun."""
    first = done[len(done) // 4]
    return first - sum(moment <= first for moment in done) / rate(done)


def pays_from(machines: int, extra: float, rates: dict[str, float]) -> int | None:
    """Photos from which Ray on so many machines is faster than the batch command on one."""
    saved = 1 / rates["batch"] - 1 / (rates["ray"] * machines)  # seconds per photo
    return round(extra / saved) if saved > 0 else None


if __name__ == "__main__":
    sys.exit(main())
