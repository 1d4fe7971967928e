"""Label a camera: ``python webcam.py 0``, ``/dev/video0``, ``rtsp://...`` or a video.

Cameras and videos need ``pip install '.[stream]'``; ``test://`` is a camera that needs nothing.
Once a second, ``webcam.jpg`` is the newest frame with names. Ctrl-C ends it.
"""

import signal
import time
from argparse import ArgumentParser

import cv2

from zsseg_rt import Bundle, Engine
from zsseg_rt.demo import demo_classes

parser = ArgumentParser(description=__doc__)
parser.add_argument("source", nargs="?", default="test://?frames=60")
source = parser.parse_args().source

with Engine(Bundle.demo()) as engine:
    engine.set_classes(demo_classes(), background="auto")
    shown = float("-inf")
    with engine.stream(source, policy="latest") as stream:  # the newest frame, never a backlog
        signal.signal(signal.SIGINT, lambda *_: stream.stop())
        for seg in stream:
            if time.monotonic() - shown < 1:
                continue
            shown = time.monotonic()
            cv2.imwrite("webcam.jpg", cv2.cvtColor(seg.plot(), cv2.COLOR_RGB2BGR))
            age = shown - seg.frame.captured_at
            names = [entry.name for entry in seg.present()[:3]]
            print(f"frame {seg.frame.index}, {age * 1000:.0f} ms old: {', '.join(names)}")
        for name, stats in stream.stats().items():
            print(f"{name}: {stats.labelled} labelled, {stats.dropped} dropped")
