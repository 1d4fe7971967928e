"""Stream a video on a GPU: an overlay, a callback that reads images, and a threshold that changes.

Each sink must get each frame, however often frames are recorded meanwhile. Needs PyAV and OpenCV.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
from gpu_frames import STORED, inputs_of

from zsseg_rt import Engine, EngineConfig
from zsseg_rt.common.files import write_whole
from zsseg_rt.stream.runner import StreamParts

SIZE_HW = (240, 320)


def main(arguments: list[str] | None = None) -> int:
    """Stream once; 0 if every sink has every frame."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="few frames")
    parser.add_argument("--seconds", type=float, help="as other steps take it; one run is short")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(args, Path(folder), 12 if args.quick else 200)
    if args.json:
        write_whole(args.json, (json.dumps(outcome, indent=2) + "\n").encode())
    print(json.dumps(outcome), flush=True)
    return 0 if all(sink["written"] == outcome["frames"] for sink in outcome["sinks"]) else 1


def run(args: argparse.Namespace, folder: Path, count: int) -> dict[str, Any]:
    """Label a video of noise, with another threshold from its middle on."""
    write_video(folder / "in.mp4", count)
    seen: list[float] = []
    config = EngineConfig(device=args.device, backend=args.backend, precision="float32")
    with Engine(STORED / "descriptor.zsseg", config) as engine:
        names, embeddings, _ = inputs_of(STORED / "descriptor.zsseg")
        engine.set_classes(names, embeddings=embeddings)

        def segment(frame: Any) -> Any:
            return engine.segment(frame, unknown_below=0.2 if len(seen) > count // 2 else None)

        sinks = [str(folder / "out.mp4"), lambda seg: seen.append(float(seg.frame.image.mean()))]
        parts = StreamParts.open(folder / "in.mp4", "rgb", sinks=sinks)
        with parts.start(segment, None, engine.device) as stream:
            labelled = sum(1 for _ in stream)
        sinks = [
            {"written": sink.written, "painted": sink.painted, "error": sink.error}
            for sink in stream.sink_stats()
        ]
    return {"frames": count, "labelled": labelled, "sinks": sinks}


def write_video(path: Path, count: int) -> None:
    """Write noise in H.264."""
    noise = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.height, stream.width = SIZE_HW
        stream.pix_fmt = "yuv420p"
        for _ in range(count):
            image = noise.integers(0, 256, (*SIZE_HW, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    sys.exit(main())
