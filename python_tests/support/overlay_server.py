"""A process whose RTSP sink serves frames: the left half red and unknown, the right half class 0.

    python overlay_server.py ADDRESS [--size HxW] [--order rgb] [--rate R] [--noise]
                             [--jetson [ELEMENT...]] [--nvenc FILE] [--bits-per-pixel N]
                             [--until-setup SECONDS]

It tells ``{"port": ..., "name": ...}``, or its error. Lines on its standard input are commands:
``facts`` tells what the sink did so far, ``size HxW`` goes on with frames of that size, ``source
NAME`` gives frames of one more source, ``close`` closes the sink and ends the process.
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

from support.recordings import result
from zsseg_rt.errors import ZssegError
from zsseg_rt.stream.gstreamer import rtsp_sink
from zsseg_rt.stream.painting import Painter
from zsseg_rt.stream.sinks import open_writers
from zsseg_rt.stream.source import GivenName


def size(text):
    height, width = (int(side) for side in text.split("x"))
    return height, width


def counted(owner, name, counts):
    method = getattr(owner, name)

    def call(*arguments):
        counts[name] += 1
        return method(*arguments)

    setattr(owner, name, call)


class Feed(threading.Thread):
    def __init__(self, writer, options):
        super().__init__(daemon=True)
        self.writer, self.options = writer, options
        self.size, self.sources, self.stopped = options.size, ["first"], threading.Event()
        self.written = 0

    def run(self):
        noise = np.random.default_rng(0)
        while not self.stopped.wait(1 / self.options.rate):
            for source in list(self.sources):
                self.writer.write(self.result(source, noise))
            self.written += 1

    def result(self, source, noise):
        (height, width), now = self.size, time.monotonic()
        image = np.zeros((height, width, 3), np.uint8)
        image[..., self.options.order.index("r")] = 250
        if self.options.noise:
            image = noise.integers(0, 256, image.shape, np.uint8)
        seg = result(self.written, (height, width), source, label=255, captured_at=now)
        seg.labels[:, width // 2 :] = 0
        seg.frame.image[...] = image
        return replace(seg, names=("thing",))


def tell(**facts):
    print(json.dumps(facts), flush=True)


def facts_of(feed, counts):
    return {"written": feed.written, "painted": feed.writer.painter.painted} | counts


def obey(feed, counts):
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "facts":
            tell(**facts_of(feed, counts))
        elif command == "size":
            feed.size = size(argument)
        elif command == "source":
            feed.sources.append(argument)
        elif command == "close":
            feed.stopped.set()
            feed.join()
            feed.writer.close()
            tell(closed=facts_of(feed, counts))
            return


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--size", type=size, default=(240, 320))
    parser.add_argument("--order", default="rgb")
    parser.add_argument("--noise", action="store_true")
    parser.add_argument("--rate", type=float, default=20)
    parser.add_argument("--jetson", nargs="*")
    parser.add_argument("--nvenc", type=Path)
    parser.add_argument("--bits-per-pixel", type=float, default=rtsp_sink.BITS_PER_PIXEL)
    parser.add_argument("--sources", nargs="*", default=(), help="=NAME is a given name")
    parser.add_argument("--until-setup", type=float)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    rtsp_sink.BITS_PER_PIXEL = options.bits_per_pixel
    if options.until_setup is not None:
        rtsp_sink.UNTIL_SETUP = options.until_setup
    if options.jetson is not None:
        from support import jetson_elements

        jetson_elements.register(*options.jetson)
    if options.nvenc is not None:
        rtsp_sink.NVENC = options.nvenc
    counts = {"paint": 0, "configure": 0}
    counted(Painter, "paint", counts)
    counted(rtsp_sink.Channel, "configure", counts)
    try:
        (writer,) = open_writers(
            [options.address],
            channel_order=options.order,
            alpha=0.5,
            sources=[GivenName(s[1:]) if s.startswith("=") else s for s in options.sources],
        )
    except ZssegError as exc:
        tell(error=type(exc).__name__, message=str(exc))
        return
    tell(port=writer.port, name=writer.name)
    feed = Feed(writer, options)
    feed.start()
    obey(feed, counts)
    if options.jetson is not None:
        sys.stderr.flush()
        os._exit(0)  # elements written in Python may be at work in a thread of GStreamer's


if __name__ == "__main__":
    main()
