"""Age of a network camera's frames, and the time to the first one, through GStreamer and PyAV.

    python benchmarks/rtsp_libraries.py [--rounds 10] [--seconds 10] [--size 1280x720] [--json FILE]

The camera is the tests' RTSP server in a process of its own; its pictures show when they were made,
so an age runs from before the encoder to the decoded frame in RGB. Rounds take turns between the
libraries. Printed are medians over the rounds and their range.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests"))

from support.rtsp_camera import RtspCamera, shown_time
from support.streams import ReaderNow
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine
from zsseg_rt.stream.rtsp import RtspSettings, RtspSource

LIBRARIES = ("gstreamer", "pyav")


def watch(url: str, library: str, seconds: float) -> dict[str, float]:
    """One round: seconds to the first frame; ages in ms once the first second has passed."""
    source = RtspSource(name=library, url=url, settings=RtspSettings(library=library))
    ages, begun, first = [], time.monotonic(), 0.0
    pictures = source.pictures(ReaderNow())
    for picture in pictures:
        now = time.monotonic()
        first = first or now - begun
        made = shown_time(picture.image)
        if made is not None and now - begun > first + 1.0:
            ages.append(1000.0 * (now - made))
        if now - begun > first + 1.0 + seconds:
            break
    pictures.close()
    fifty, ninety_five = (statistics.quantiles(ages, n=20)[place] for place in (9, 18))
    return {"first frame, s": first, "age p50, ms": fifty, "age p95, ms": ninety_five}


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    names = ("median", "least", "most")
    found = (statistics.median(values), min(values), max(values))
    return {name: round(value, 3) for name, value in zip(names, found, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
    with RtspCamera(sizes=(options.size,)) as camera:
        for _ in range(options.rounds):
            for library in LIBRARIES:
                found[library].append(watch(camera.url, library, options.seconds))
    report = {
        "machine": describe_machine(),
        "commit": describe_commit(Path(__file__).parent),
        "size": options.size,
        "rounds": options.rounds,
        **{
            library: {what: spread([r[what] for r in rounds]) for what in rounds[0]}
            for library, rounds in found.items()
        },
    }
    print(json.dumps(report, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
