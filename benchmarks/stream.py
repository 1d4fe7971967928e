"""Measure streams: ages, rivals, recordings, reconnections and the preview on a slow link.

    python benchmarks/stream.py [SECTION...] [--rounds 5] [--seconds 16] [--json FILE]

Sections: latency, backlog, recording, rtsp, preview; all of them if none is named. What
is compared takes turns, so that a busy moment affects every candidate. RTSP sections need the
system packages that tools/test.sh installs; a section that cannot run is reported as missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from engine import machine_and_commit
from stream_parts import RATE, SIZE, demo_engine, demo_frames, spread
from stream_recording import measure_recording

from zsseg_rt.profiling.worker import Stopwatch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python_tests"))

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "grey")
SLOW_RATE = 18  # frames per second of an engine that is slower than its camera


def main() -> int:
    """Parse arguments, run the sections, print a report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=16.0, help="per candidate and round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    unknown = sorted(set(args.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"expected sections among {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    report: dict[str, Any] = {"machine": machine_and_commit()}
    for name in args.sections or SECTIONS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            report[name] = SECTIONS[name](args)
        except MissingError as exc:
            report[name] = {"missing": str(exc)}
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


class MissingError(Exception):
    """A section cannot run on this machine."""


def measure_latency(args: argparse.Namespace) -> dict[str, Any]:
    """Age of labels from a 30 frames per second camera, beside the engine alone at that rate."""
    frames = max(int(args.seconds * RATE), RATE)
    ages: dict[str, list[float]] = {"engine": [], "stream": []}
    with demo_engine() as engine:
        for _ in range(args.rounds):
            ages["engine"] += paced_engine_ms(engine, frames)
            with engine.stream(f"test://?demo=scenes&size={SIZE}&rate={RATE}") as stream:
                ages["stream"] += [
                    (time.monotonic() - seg.frame.captured_at) * 1e3
                    for seg in itertools.islice(stream, frames)
                ]
    figures = {name: percentiles(values) for name, values in ages.items()}
    return figures | {
        "p50 above the engine's, ms": figures["stream"]["p50"] - figures["engine"]["p50"],
        "p95 / engine's p95": figures["stream"]["p95"] / figures["engine"]["p95"],
    }


def paced_engine_ms(engine: Any, frames: int) -> list[float]:
    """Milliseconds of ``segment`` for frames that fall due as a camera's do."""
    camera = demo_frames(frames)
    times, start = [], time.monotonic()
    for index, image in enumerate(camera):
        time.sleep(max(start + index / RATE - time.monotonic(), 0.0))
        watch = Stopwatch()
        engine.segment(image)
        times.append(watch.seconds * 1e3)
    return times


def measure_rtsp(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds from open to the first labels, and from a camera's return to its first labels."""
    first, back = [], []
    with demo_engine() as engine, rtsp_camera() as camera:
        for _ in range(args.rounds):
            begin = time.monotonic()
            with engine.stream(camera.url) as stream:
                next(stream)
                first.append(time.monotonic() - begin)
                camera.kill()
                (name,) = stream.stats()
                time.sleep(2.0)
                camera.start()
                restarted = time.monotonic()
                while stream.stats()[name].reconnects == 0:
                    next(stream)
                back.append(time.monotonic() - restarted)
    return {"first labels, s": spread(first), "back after restart, s": spread(back)}


def measure_backlog(args: argparse.Namespace) -> dict[str, Any]:
    """Age of labels from a camera that is faster than the engine: the stream and a plain loop.

    Both label 18 of a camera's 30 frames per second and read the time that each frame shows. The
    loop, whose age grows by 0.4 s each second, gets 20 s at most.
    """
    runs: dict[str, list[dict[str, Any]]] = {"cv2 loop": [], "stream": []}
    with demo_engine() as engine, rtsp_camera() as camera:
        for _ in range(args.rounds):
            seconds = min(args.seconds, 20.0)
            runs["cv2 loop"].append(ages_of_a_loop(engine, camera.url, seconds))
            runs["stream"].append(ages_of_a_stream(engine, camera.url, args.seconds))
    return dict(runs)


def ages_of_a_loop(engine: Any, url: str, seconds: float) -> dict[str, Any]:
    """The loop that one writes first: read, label, read."""
    import cv2

    capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise MissingError("this OpenCV cannot open RTSP")

    def frames() -> Iterator[Any]:
        while True:
            ok, image = capture.read()
            if not ok:
                raise RuntimeError("the camera ended")
            engine.segment(image)
            yield image

    try:
        return slow_ages(frames(), seconds)
    finally:
        capture.release()


def ages_of_a_stream(engine: Any, url: str, seconds: float) -> dict[str, Any]:
    """The same through the stream, whose policy for cameras is ``latest``."""
    with engine.stream(url) as stream:
        report = slow_ages((seg.frame.image for seg in stream), seconds)
        (stats,) = stream.stats().values()
    return report | {"dropped": stats.dropped, "reconnects": stats.reconnects}


def slow_ages(frames: Iterator[Any], seconds: float) -> dict[str, Any]:
    """Ages while 18 frames per second are labelled, and whether they grow."""
    from support.gstreamer import shown_time

    rows, start, due, unread = [], time.monotonic(), 0.0, 0
    for image in frames:
        due = max(due + 1 / SLOW_RATE, time.monotonic())
        time.sleep(max(due - time.monotonic(), 0.0))
        now, shown = time.monotonic(), shown_time(image)
        if shown is None:
            unread += 1
        else:
            rows.append((now - start, now - shown))
        if now - start > seconds:
            break
    return ages_report(np.array(rows)) | {"frames without a readable time": unread}


def ages_report(rows: Any) -> dict[str, Any]:
    """Median ages of the first and last second, of each minute, and the growth per minute.

    The growth is the Theil-Sen slope over the medians of twenty equal parts (the first, in which
    the connection is made, left out), with Kendall's interval of 95 %. Flat means that even its
    upper end comes to less than a camera's frame over the run; short runs cannot show that.

    Args:
        rows: Seconds since the start, and age in seconds; float64 [N, 2], in order.
    """
    from scipy.stats import theilslopes

    if len(rows) < 40:
        raise MissingError(f"{len(rows)} frames are too few to tell; give more --seconds")
    at, ages = rows.T
    parts = np.array_split(np.arange(len(at)), 20)[1:]
    middles = [statistics.median(at[part]) / 60.0 for part in parts]
    medians = [statistics.median(ages[part]) for part in parts]
    slope, _, least, most = theilslopes(medians, middles, alpha=0.95)
    minutes = (at // 60.0).astype(int)
    return {
        "seconds": float(at[-1]),
        "frames": len(at),
        "first second's median, s": statistics.median(ages[at < 1.0 + at[0]]),
        "last second's median, s": statistics.median(ages[at > at[-1] - 1.0]),
        "most, s": float(ages.max()),
        "each minute's median, s": [
            round(statistics.median(ages[minutes == minute]), 4) for minute in np.unique(minutes)
        ],
        "growth, s per minute": {"slope": slope, "least": least, "most": most},
        "flat": bool(most * at[-1] / 60.0 < 1.0 / RATE),
    }


def rtsp_camera() -> Any:
    """The tests' network camera, 1280x720 at 30 frames per second."""
    import _pytest.outcomes

    from support.gstreamer import RtspCamera

    try:
        return RtspCamera(sizes=("1280x720",), rate=RATE)
    except _pytest.outcomes.Skipped as exc:
        raise MissingError(str(exc)) from None


def measure_preview(args: argparse.Namespace) -> dict[str, Any]:
    """Age of what a viewer sees on a slow link after half a minute, and of its new words.

    The link passes 400 kB/s through a buffer of 2 MB. The viewer acknowledges each frame, as the
    page does, and names other classes once per round.
    """
    from support.live_server import ask, viewer
    from support.throttle import SlowLink
    from zsseg_rt.server import LiveServer, ServerSettings

    def next_frame(watching: Any) -> tuple[dict[str, Any], float]:
        """The next frame's header and its age in seconds; the clock is the server's."""
        frame = watching.frame()
        age = time.monotonic() - frame.header["captured_ms"] / 1e3
        watching.acknowledge(frame)
        return frame.header, age

    source, ages, words = f"test://?demo=scenes&size={SIZE}&rate={RATE}", [], []
    with demo_engine() as engine, LiveServer(engine, source, ServerSettings(port=0)) as server:
        for round_ in range(args.rounds):
            link = SlowLink(server.port, bytes_per_second=400_000, buffer_bytes=2_000_000)
            with link, viewer(link) as watching:
                start = time.monotonic()
                while time.monotonic() - start < min(30.0, 2.0 * args.seconds):
                    _, age = next_frame(watching)
                ages.append(age)
                asked = time.monotonic()
                names = ["red striped ball", "sky", f"{COLOURS[round_ % 8]} box"]
                _, answer = ask(link, "PUT", "/v1/vocabulary", {"classes": names})
                while next_frame(watching)[0]["vocabulary_version"] != answer["version"]:
                    pass
                words.append(time.monotonic() - asked)
    return {"age after 30 s, s": spread(ages), "new words seen after, s": spread(words)}


def percentiles(values: list[float]) -> dict[str, float]:
    """Milliseconds at the 50th, 95th and 99th percentile."""
    return {f"p{p}": float(np.percentile(values, p)) for p in (50, 95, 99)}


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "latency": measure_latency,
    "recording": measure_recording,
    "rtsp": measure_rtsp,
    "backlog": measure_backlog,
    "preview": measure_preview,
}

if __name__ == "__main__":
    sys.exit(main())
