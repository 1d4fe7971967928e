"""Measure what Triton Inference Server adds to the engine's time for a frame.

    bash tools/machines/triton_check.sh python benchmarks/triton_latency.py
        [--size 640x480] [--frames 300] [--threads 0] [--json FILE]

An engine in this process and a server with the same bundle and as many threads label one frame in
turns: the engine, then the server over HTTP, over gRPC and over gRPC with the frame and the labels
in shared memory. What Triton adds is the median of the differences within the rounds. While one
works the others wait, so a busy machine widens the spread more than it moves the median.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.profiling.meter import Stopwatch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder: its modules would hide others of the same name

WARM_UP = 20  # rounds
Call = Callable[[], npt.NDArray[np.uint8]]


def main() -> int:
    """Parse arguments, run the rounds, print a report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="640x480")
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--threads", type=int, default=0, help="of either engine; 0: all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with ExitStack() as stack:
        calls = prepare(stack, frame_of(args.size), args.threads)
        report = describe(args, take_turns(calls, args.frames))
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def frame_of(size: str) -> npt.NDArray[np.uint8]:
    """One of the demo's pictures at that size."""
    import cv2

    from zsseg_rt.demo import demo_photos
    from zsseg_rt.photos import read_photo

    width, height = map(int, size.split("x"))
    resized: npt.NDArray[np.uint8] = cv2.resize(
        read_photo(demo_photos("scenes")[0]), (width, height)
    )
    return resized


def prepare(stack: ExitStack, frame: npt.NDArray[np.uint8], num_threads: int) -> dict[str, Call]:
    """The ways to label the frame; all give the same labels."""
    sys.path.insert(0, str(ROOT / "python_tests"))
    import tritonclient.grpc
    import tritonclient.http

    from support.triton_server import serving
    from zsseg_rt import Bundle, Engine, EngineConfig
    from zsseg_rt.demo import demo_classes
    from zsseg_rt.integrations.triton import write_triton_model

    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    write_triton_model(
        Bundle.demo("scenes"), scratch / "models", name="demo", classes=demo_classes("scenes"),
        engine={"num_threads": num_threads},
    )  # fmt: skip
    server = stack.enter_context(serving(scratch / "models", scratch / "log.txt"))
    engine = stack.enter_context(
        Engine(Bundle.demo("scenes"), EngineConfig(device="cpu", num_threads=num_threads))
    )
    engine.set_classes(demo_classes("scenes"))
    http = stack.enter_context(tritonclient.http.InferenceServerClient(server.http))
    grpc = stack.enter_context(tritonclient.grpc.InferenceServerClient(server.grpc))
    calls: dict[str, Call] = {
        "engine": lambda: engine.segment(frame).labels,
        "HTTP": lambda: infer(tritonclient.http, http, frame),
        "gRPC": lambda: infer(tritonclient.grpc, grpc, frame),
        "gRPC, shared memory": shared_memory(stack, tritonclient.grpc, grpc, frame),
    }
    for call in calls.values():
        np.testing.assert_array_equal(call(), engine.segment(frame).labels)
    return calls


def infer(client: Any, connection: Any, frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Labels over the network."""
    tensor = client.InferInput("frame", frame.shape, "UINT8")
    tensor.set_data_from_numpy(frame)
    wanted = [client.InferRequestedOutput("labels")]
    labels: npt.NDArray[np.uint8] = connection.infer("demo", [tensor], outputs=wanted).as_numpy(
        "labels"
    )
    return labels


def shared_memory(
    stack: ExitStack, client: Any, connection: Any, frame: npt.NDArray[np.uint8]
) -> Call:
    """A call whose frame and labels lie in memory that both processes see."""
    from tritonclient.utils import shared_memory as memory

    size = frame.shape[0] * frame.shape[1]
    regions = {}
    for name, count in (("frame", frame.nbytes), ("labels", size)):
        region = memory.create_shared_memory_region(name, f"/zsseg_{os.getpid()}_{name}", count)
        stack.callback(memory.destroy_shared_memory_region, region)
        connection.register_system_shared_memory(name, f"/zsseg_{os.getpid()}_{name}", count)
        stack.callback(connection.unregister_system_shared_memory, name)
        regions[name] = region
    tensor = client.InferInput("frame", frame.shape, "UINT8")
    tensor.set_shared_memory("frame", frame.nbytes)
    wanted = client.InferRequestedOutput("labels")
    wanted.set_shared_memory("labels", size)

    def call() -> npt.NDArray[np.uint8]:
        memory.set_shared_memory_region(regions["frame"], [frame])
        connection.infer("demo", [tensor], outputs=[wanted])
        labels: npt.NDArray[np.uint8] = memory.get_contents_as_numpy(
            regions["labels"], np.uint8, frame.shape[:2]
        ).copy()
        return labels

    return call


def take_turns(calls: dict[str, Call], rounds: int) -> dict[str, npt.NDArray[np.float64]]:
    """Milliseconds of each call in each round, in an order of its own per round."""
    rng = np.random.default_rng(0)
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(WARM_UP + rounds):
        for name in rng.permutation(names):
            watch = Stopwatch()
            calls[name]()
            if round_ >= WARM_UP:
                times[name].append(watch.seconds * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def describe(args: argparse.Namespace, times: dict[str, npt.NDArray[np.float64]]) -> dict[str, Any]:
    """Medians, and the median of what each way adds to the engine's time."""
    from benchmarks.photo_folder import machine_and_commit

    return {
        "machine": machine_and_commit(),
        "load average": os.getloadavg(),
        "bundle": "scenes.zsseg",
        "size": args.size,
        "rounds": args.frames,
        "threads": args.threads,
        "p50 ms": {name: round(float(np.median(values)), 3) for name, values in times.items()},
        "added ms": {
            name: {
                "median": round(float(np.median(values - times["engine"])), 3),
                "p90": round(float(np.quantile(values - times["engine"], 0.9)), 3),
            }
            for name, values in times.items()
            if name != "engine"
        },
    }


if __name__ == "__main__":
    sys.exit(main())
