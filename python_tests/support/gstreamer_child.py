"""A process that reads sources through GStreamer and tells what it saw, one line of JSON each.

    python gstreamer_child.py URI... [--count N] [--order rgb] [--jetson [ELEMENT...]]
                              [--slow S] [--most-pixels N] [--on-gpu]

A crash of GStreamer, or a thread that it leaves behind, harms no test but its own.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.gstreamer import shown_time
from support.host_arrays import host_core
from support.streams import ReaderNow
from zsseg_rt import ops
from zsseg_rt.errors import ZssegError
from zsseg_rt.stream import source as stream_source
from zsseg_rt.stream.gstreamer import pipelines
from zsseg_rt.stream.gstreamer.library import load
from zsseg_rt.stream.runner import on_device
from zsseg_rt.stream.uris import open_sources

PATIENCE = 60.0  # seconds; a busy machine is no dead camera


def tell(**facts):
    print(json.dumps(facts), flush=True)


class Patient(ReaderNow):
    def wait(self, seconds):
        return time.monotonic() > self.ends_at


def read(source, count, slow):
    """Tell of so many pictures, and how it ended."""
    reader, end = Patient(), {"ended": False}
    reader.ends_at = time.monotonic() + PATIENCE
    pictures = source.pictures(reader)
    try:
        for _ in range(count):
            picture = next(pictures)
            image = picture.image() if callable(picture.image) else picture.image
            half, on_gpu = image.shape[1] // 2, picture.on_gpu
            planes = [on_gpu.luma, on_gpu.chroma] if hasattr(on_gpu, "luma") else []
            tell(
                shape=image.shape,
                left=image[:, : half - 8].mean(axis=(0, 1)).tolist(),
                right=image[:, half + 8 :].mean(axis=(0, 1)).tolist(),
                captured_at=picture.captured_at,
                taken_at=time.monotonic(),
                clock=picture.clock,
                pts=picture.pts_seconds,
                shown=shown_time(image),
                writable=image.flags.writeable,
                late=picture.late,
                dropped=picture.dropped_before,
                planes=[plane.shape for plane in planes],
            )
            time.sleep(slow)
    except ZssegError as exc:
        end = {"error": type(exc).__name__, "message": str(exc)}
    except StopIteration:
        end = {"ended": True}
    tell(name=source.name, **end)
    pictures.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("uris", nargs="+")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--order", default="rgb")
    parser.add_argument("--jetson", nargs="*")
    parser.add_argument("--most-pixels", type=int, default=stream_source.MOST_PIXELS)
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--on-gpu", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    if options.jetson is not None:
        from support import jetson_elements

        jetson_elements.register(*options.jetson)
    if options.on_gpu:
        ops.core = host_core()
        video = load().GstVideo
        convert = video.video_convert_sample
        video.video_convert_sample = lambda *sample: logging.info("by sample") or convert(*sample)
    pipelines.ANSWERS_WITHIN = PATIENCE
    stream_source.MOST_PIXELS = options.most_pixels
    for uri in options.uris:
        sources = open_sources(uri, options.order)
        if options.on_gpu:
            sources = on_device(sources, "cuda:0")
        read(*sources, options.count, options.slow)


if __name__ == "__main__":
    main()
