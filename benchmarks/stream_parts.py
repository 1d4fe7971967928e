"""Parts that the sections of stream.py share."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

SIZE, RATE = "1280x720", 30


def demo_engine(config: Any = None) -> Any:
    """The demo's engine with its classes."""
    from zsseg_rt import Bundle, Engine
    from zsseg_rt.demo import demo_classes

    engine = Engine(Bundle.demo("scenes"), config)
    engine.set_classes(demo_classes("scenes"))
    return engine


def demo_frames(count: int) -> Iterator[Any]:
    """The demo camera's first frames, without waiting."""
    from zsseg_rt.stream.photo_folder import DemoCamera

    class Hurry:
        def wait(self, seconds: float) -> bool:
            return False

        def count_damaged(self) -> None:
            raise AssertionError("a drawn frame is never damaged")

    width, height = map(int, SIZE.split("x"))
    camera = DemoCamera(
        name="test://", demo="scenes", size_hw=(height, width), rate=RATE, num_frames=count
    )
    return (picture.image for picture in camera.pictures(Hurry()))


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
