"""Label frames in two threads; both lanes share the weights and follow the same classes."""

from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from zsseg_rt import Bundle, Engine, EngineConfig, Lane
from zsseg_rt.demo import demo_classes, demo_photos
from zsseg_rt.photos import read_photo


def camera(lane: Lane, frame: np.ndarray) -> list[str]:
    """Label four frames, each the one before turned upside down."""
    labelled = [lane.segment(frame if turn % 2 else frame[::-1].copy()) for turn in range(4)]
    return [entry.name for entry in labelled[-1].present()]


ArgumentParser(description=__doc__).parse_args()
frames = [read_photo(photo) for photo in demo_photos()]
with Engine(Bundle.demo(), EngineConfig(num_lanes=3)) as engine:  # the engine's own is the third
    engine.set_classes(demo_classes(), background="auto")
    with engine.lane() as left, engine.lane() as right, ThreadPoolExecutor(2) as threads:
        for names in threads.map(camera, (left, right), frames):
            print(names)
