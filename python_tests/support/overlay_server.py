"""A process whose RTSP sink serves frames: the left half red and unknown, the right half class 0.

    python overlay_server.py ADDRESS [--size HxW] [--order rgb] [--rate R] [--noise]
                             [--jetson [ELEMENT...]] [--nvenc FILE] [--bits-per-pixel N]
                             [--sources [=]NAME...] [--until-setup SECONDS]

It tells ``{"port": ..., "name": ...}``, or its error; ``=NAME`` is a given name. Lines on its
standard input are commands: ``facts`` tells what the sink did so far, ``size HxW`` goes on with
frames of that size, ``source NAME`` gives frames of one more source, ``close`` closes the sink and
ends the process.
"""

import argparse
import json
import logging
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.recordings import open_writer, result
from zsseg_rt.errors import ZssegError
from zsseg_rt.stream.gstreamer import rtsp_sink
from zsseg_rt.stream.painting import Painter
from zsseg_rt.stream.source import GivenName

FACTS = {"written": 0, "paint": 0, "configure": 0}


def counted(owner, name):
    method = getattr(owner, name)

    def call(*arguments):
        FACTS[name] += 1
        return method(*arguments)

    setattr(owner, name, call)


def tell(**facts):
    print(json.dumps(facts), flush=True)


def feed(writer, options, sources, is_over):
    noise = np.random.default_rng(0)
    while not is_over.wait(1 / options.rate):
        height, width = map(int, options.size.split("x"))
        for source in list(sources):
            index, now = FACTS["written"], time.monotonic()
            seg = result(index, (height, width), source, label=255, captured_at=now)
            seg.labels[:, width // 2 :] = 0
            seg.frame.image[...] = 0
            seg.frame.image[..., options.order.index("r")] = 250
            if options.noise:
                seg.frame.image[...] = noise.integers(0, 256, seg.frame.image.shape, np.uint8)
            writer.write(replace(seg, names=("thing",)))
        FACTS["written"] += 1


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--size", default="240x320")
    parser.add_argument("--order", default="rgb")
    parser.add_argument("--noise", action="store_true")
    parser.add_argument("--rate", type=float, default=20)
    parser.add_argument("--jetson", nargs="*")
    parser.add_argument("--nvenc", type=Path, default=rtsp_sink.NVENC)
    parser.add_argument("--bits-per-pixel", type=float, default=rtsp_sink.BITS_PER_PIXEL)
    parser.add_argument("--sources", nargs="*", default=())
    parser.add_argument("--until-setup", type=float, default=rtsp_sink.UNTIL_SETUP)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    rtsp_sink.BITS_PER_PIXEL, rtsp_sink.NVENC = options.bits_per_pixel, options.nvenc
    rtsp_sink.UNTIL_SETUP = options.until_setup
    if options.jetson is not None:
        from support import jetson_elements

        jetson_elements.register(*options.jetson)
    counted(Painter, "paint")
    counted(rtsp_sink.Channel, "configure")
    names = [GivenName(s[1:]) if s.startswith("=") else s for s in options.sources]
    try:
        writer = open_writer(options.address, 0.5, options.order, sources=names)
    except ZssegError as exc:
        tell(error=type(exc).__name__, message=str(exc))
        return
    tell(port=writer.port, name=writer.name)
    sources, is_over = ["first"], threading.Event()
    feeding = threading.Thread(target=feed, args=(writer, options, sources, is_over), daemon=True)
    feeding.start()
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "facts":
            tell(**FACTS)
        elif command == "size":
            options.size = argument
        elif command == "source":
            sources.append(argument)
        elif command == "close":
            is_over.set()
            feeding.join()
            writer.close()
            tell(closed=True)
            break
    if options.jetson is not None:
        sys.stderr.flush()
        os._exit(0)  # elements written in Python may be at work in a thread of GStreamer's


if __name__ == "__main__":
    main()
