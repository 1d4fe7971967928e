"""A process that encodes overlays of frames on the GPU as the page's JPEGs do.

    python gpu_jpegs.py SIZE... [--nvidia LIBRARY] [--elements NAME...] [--fails-at INDEX]
                        [--longest N]

With ``--nvidia``, libraries and elements are stand-ins. It tells one line of JSON per frame of a
size, HxW: how far the picture is from OpenCV's of the CPU, and what is held.
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import nvidia_stand_in
from support.extension import use_extension

if os.environ.get("ZSSEG_EXTENSION"):
    use_extension(os.environ["ZSSEG_EXTENSION"])

import cv2
import numpy as np

from support import jetson_elements
from support.cuda_counts import counts_reader
from zsseg_rt import ops
from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.server import preview
from zsseg_rt.stream.painting import GpuPainter

HELD = ("copies", "memories", "surfaces", "images", "resources")


def labelled(size):
    height, width = (int(side) for side in size.split("x"))
    colours = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255], [20, 200, 60]])
    image = np.empty((height, width, 3), np.uint8)
    image[:] = colours[np.arange(width) * len(colours) // width]
    labels = np.full((height, width), 255, np.uint8)
    labels[height // 2 :] = 0
    on_gpu = ops.DeviceArray.from_numpy(image, 0)
    frame = Frame(source="a", index=0, captured_at=0.0, clock="arrival", image=image, on_gpu=on_gpu)
    return Segmentation(labels=labels, names=("thing",), vocabulary_version=1, frame=frame)


def decoded(data):
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).astype(int)


def pictures(seg, encode, overlays, frames):
    """The overlay for /stream.mjpg, and the frame for the page."""
    message = preview.encode_message(1, seg, "rgb", encode, frames)
    overlay = preview.encode_preview_overlay(seg, "rgb", encode, overlays)
    return decoded(overlay), decoded(message.image)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", nargs="+")
    parser.add_argument("--nvidia", type=Path)
    parser.add_argument("--elements", nargs="+")
    parser.add_argument("--fails-at", type=int)
    parser.add_argument("--longest", type=int, default=preview.LONGEST_SIDE)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    stands_in = options.nvidia is not None
    if stands_in:
        jetson_elements.register(*options.elements)
        nvidia_stand_in.use_libraries(options.nvidia, 0, in_blocks=False)
    preview.LONGEST_SIDE = options.longest
    encode, on_cpu = preview.JpegEncoder("cuda:0"), preview.JpegEncoder("cpu")
    counts = counts_reader() if stands_in else lambda: {"copies_to_host": 0}
    overlays, frames = GpuPainter("rgb", 0.5), GpuPainter("rgb", 0.0)
    for index, size in enumerate(options.sizes):
        if stands_in:
            nvidia_stand_in.fail(3 if index == options.fails_at else 0)
        seg, before = labelled(size), counts()["copies_to_host"]
        found = pictures(seg, encode, overlays, frames)
        fetched = counts()["copies_to_host"] - before
        seg.frame.leave_gpu()
        expected = pictures(seg, on_cpu, overlays, frames)
        away = max(np.abs(a - b).mean() for a, b in zip(found, expected, strict=True))
        held = nvidia_stand_in.facts(*HELD) if stands_in else {}
        print(json.dumps({"shape": found[0].shape, "away": away, "fetched": fetched, **held}))


if __name__ == "__main__":
    main()
