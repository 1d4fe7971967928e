"""Several frames in several lanes."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from zsseg_rt.lane import Lane
from zsseg_rt.result import Segmentation

__all__ = ["segment_in_lanes"]

Frame = npt.NDArray[np.uint8]


def segment_in_lanes(
    frames: Iterable[Frame],
    segment: Callable[[Frame], Segmentation],
    open_lane: Callable[[], Lane],
    num_lanes: int,
) -> list[Segmentation]:
    """Label frames in the engine's own lane and in further ones, which are closed at the end.

    Args:
        frames: The frames; at most twice as many as lanes are held at a time.
        segment: Labels a frame in the engine's own lane.
        open_lane: Opens a further lane.
        num_lanes: Lanes in all.

    Returns:
        The results, in the order of the frames.
    """
    if num_lanes == 1:
        return [segment(frame) for frame in frames]
    free: queue.SimpleQueue[Callable[[Frame], Segmentation]] = queue.SimpleQueue()
    free.put(segment)

    def work(frame: Frame) -> Segmentation:
        lane = free.get()
        try:
            return lane(frame)
        finally:
            free.put(lane)

    results: list[Segmentation] = []
    with ExitStack() as opened:
        for _ in range(num_lanes - 1):
            free.put(opened.enter_context(open_lane()).segment)
        pool = opened.enter_context(ThreadPoolExecutor(num_lanes))
        waiting: deque[Future[Segmentation]] = deque()
        try:
            for frame in frames:
                waiting.append(pool.submit(work, frame))
                if len(waiting) == 2 * num_lanes:
                    results.append(waiting.popleft().result())
            results += [future.result() for future in waiting]
        finally:
            for future in waiting:
                future.cancel()
    return results
