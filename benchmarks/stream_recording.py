"""Section "recording" of stream.py: a video file to an overlay video."""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from stream_parts import RATE, SIZE, demo_engine, demo_frames, spread

from zsseg_rt.profiling.worker import Stopwatch


def measure_recording(args: argparse.Namespace) -> dict[str, Any]:
    """Video file to overlay video: the stream beside the same steps in one loop.

    The stream runs as ``zsseg-rt stream`` runs it, with a lane per core. The loop runs with the
    engine that labels one frame fastest, with one thread, and with the threads of the encoder that
    the stream takes; the best of the three is what the stream is compared with. Only the stream
    writes names on its pictures.
    """
    from zsseg_rt.config import MAX_LANES, EngineConfig
    from zsseg_rt.integrations.batch import lanes_for

    engines = {
        "loop": EngineConfig(),
        "loop, 1 thread": EngineConfig(num_threads=1),
        "loop, whole frames": EngineConfig(),
        "stream": EngineConfig(num_lanes=lanes_for(MAX_LANES, EngineConfig())),
    }
    recordings_by = {name: Recordings() for name in engines}
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        clip = folder / "clip.mp4"
        frames = make_clip(clip, max(int(args.seconds * RATE), RATE))
        engine_of = {name: opened.enter_context(demo_engine(c)) for name, c in engines.items()}
        for round_ in range(args.rounds + 1):
            for name, engine in engine_of.items():
                out = folder / f"{name}.mp4"
                run = RECORDERS.get(name, record_in_a_loop)
                recordings_by[name].time(
                    lambda r=run, e=engine, o=out: r(e, clip, o), keep=round_ > 0
                )
        for name, recordings in recordings_by.items():
            recordings.judge(
                folder / f"{name}.mp4", clip, engine_of[name], is_named=name == "stream"
            )
    best = min(
        (n for n in recordings_by if n != "stream"),
        key=lambda n: statistics.median(recordings_by[n].seconds),
    )
    pairs = zip(recordings_by[best].seconds, recordings_by["stream"].seconds, strict=True)
    return {
        "frames": frames,
        **{name: recordings.report() for name, recordings in recordings_by.items()},
        "best loop": best,
        "best loop / stream": spread([loop / stream for loop, stream in pairs]),
    }


class Recordings:
    """The times and results of one way of recording."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._cpu: list[float] = []
        self._written = 0
        self._file: dict[str, float] = {}

    def time(self, run: Callable[[], int], *, keep: bool) -> None:
        """Record once."""
        cpu, watch = time.process_time(), Stopwatch()
        self._written = run()
        if keep:
            self.seconds.append(watch.seconds)
            self._cpu.append(time.process_time() - cpu)

    def judge(self, path: Path, clip: Path, engine: Any, *, is_named: bool) -> None:
        """Look at the file: its size, and how close pictures without names are to painted ones."""
        self._file = {"MB": path.stat().st_size / 1e6}
        if not is_named:
            self._file["PSNR, dB"] = psnr(path, clip, engine)

    def report(self) -> dict[str, Any]:
        """Medians."""
        return {
            "frames per second": self._written / statistics.median(self.seconds),
            "CPU ms per frame": statistics.median(self._cpu) / self._written * 1e3,
            **self._file,
        }


def make_clip(path: Path, frames: int) -> int:
    """Write the demo camera's frames as H.264."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "18"})
        stream.width, stream.height = map(int, SIZE.split("x"))
        stream.pix_fmt = "yuv420p"
        for image in demo_frames(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return frames


X264 = {"preset": "veryfast", "tune": "zerolatency", "crf": "23"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}


def record_in_a_loop(engine: Any, clip: Path, out: Path, *, whole_frames: bool = False) -> int:
    """The loop that one writes first: decode, label, blend and encode one frame after the other.

    Encoder, quality, key frames and file are those of the stream's recorder.
    """
    import av

    from zsseg_rt import ops
    from zsseg_rt.results.visualize import palette

    options = {**X264, **({"x264-params": "sliced-threads=0"} if whole_frames else {})}
    count = 0
    with av.open(str(clip)) as source, av.open(str(out), "w", options=FRAGMENTS) as target:
        source.streams.video[0].thread_type = "AUTO"
        stream = target.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height = map(int, SIZE.split("x"))
        stream.pix_fmt = "yuv420p"
        if whole_frames:
            stream.codec_context.thread_count = len(os.sched_getaffinity(0)) + 1
        for frame in source.decode(video=0):
            image = frame.to_ndarray(format="rgb24")
            seg = engine.segment(image)
            painted = ops.overlay(image, seg.labels, palette(seg.names), alpha=0.5)
            video = av.VideoFrame.from_ndarray(painted, format="rgb24")
            video.pts = count
            if count % RATE == 0:
                video.pict_type = av.video.frame.PictureType.I
            target.mux(stream.encode(video))
            count += 1
        target.mux(stream.encode())
    return count


def record_by_stream(engine: Any, clip: Path, out: Path) -> int:
    """The same by the stream and its video sink."""
    with engine.stream(clip, sinks=[out]) as stream:
        for _ in stream:
            pass
    return int(stream.sink_stats()[0].written)


RECORDERS: dict[str, Callable[[Any, Path, Path], int]] = {
    "loop, whole frames": functools.partial(record_in_a_loop, whole_frames=True),
    "stream": record_by_stream,
}


def psnr(path: Path, clip: Path, engine: Any) -> float:
    """Peak signal-to-noise ratio in dB of a recording's pictures, beside the painted ones.

    Of every tenth picture, in RGB.
    """
    import av

    from zsseg_rt import ops
    from zsseg_rt.results.visualize import palette

    errors = []
    with av.open(str(path)) as recorded, av.open(str(clip)) as source:
        pairs = zip(recorded.decode(video=0), source.decode(video=0), strict=True)
        for read, frame in itertools.islice(pairs, 0, None, 10):
            image = frame.to_ndarray(format="rgb24")
            seg = engine.segment(image)
            painted = ops.overlay(image, seg.labels, palette(seg.names), alpha=0.5)
            difference = read.to_ndarray(format="rgb24").astype(np.float32) - painted
            errors.append(float(np.mean(np.square(difference))))
    return float(10.0 * np.log10(255.0**2 / np.mean(errors)))
