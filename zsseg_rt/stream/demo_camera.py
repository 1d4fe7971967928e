"""A camera that needs no hardware: a window that wanders over the demo's pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zsseg_rt.demo import demo_photos
from zsseg_rt.photos import read_photo
from zsseg_rt.stream.source import Picture, Reader

_PER_PICTURE = 150  # frames
_ROOM = 1.3  # sides of the picture that is wandered over, in sides of the window


@dataclass(frozen=True, kw_only=True)
class DemoCamera:
    """Source ``test://``: the same frames for the same seed, in real time.

    Attributes:
        name: The URI.
        size_hw: Height and width of the frames.
        rate: Frames per second.
        seed: Decides the window's way.
        num_frames: Frames until it ends; None never ends.
        channel_order: Of the frames.
        now: The clock.
    """

    name: str
    size_hw: tuple[int, int] = (720, 1280)
    rate: float = 30.0
    seed: int = 0
    num_frames: int | None = None
    channel_order: str = "rgb"
    now: Callable[[], float] = time.monotonic

    @property
    def live(self) -> bool:
        """It is a camera, unless its frames are counted."""
        return self.num_frames is None

    def pictures(self, reader: Reader) -> Generator[Picture, None, None]:
        """Give the frames, each at its time; a frame that comes late delays none after it."""
        scenes = [self._scene(photo) for photo in demo_photos()]
        phases = np.random.default_rng(self.seed).uniform(0.0, 2.0 * math.pi, 2)
        start, index = self.now(), 0
        while self.num_frames is None or index < self.num_frames:
            if reader.wait(start + index / self.rate - self.now()):
                return
            scene = scenes[index // _PER_PICTURE % len(scenes)]
            image = self._window(scene, index, phases)
            yield Picture(
                image=image,
                captured_at=self.now(),
                clock="arrival",
                pts_seconds=index / self.rate,
            )
            index += 1

    def _scene(self, photo: str) -> npt.NDArray[np.uint8]:
        import cv2

        picture = read_photo(photo)
        if self.channel_order == "bgr":
            picture = picture[..., ::-1]
        height, width = self.size_hw
        scale = _ROOM * max(height / picture.shape[0], width / picture.shape[1])
        sides = [max(math.ceil(side * scale), 1) for side in picture.shape[1::-1]]
        return np.asarray(cv2.resize(np.ascontiguousarray(picture), sides), np.uint8)

    def _window(
        self, scene: npt.NDArray[np.uint8], index: int, phases: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.uint8]:
        height, width = self.size_hw
        angles = phases + 2.0 * math.pi * index / np.array([211.0, 307.0])
        room = np.array([scene.shape[0] - height, scene.shape[1] - width])
        top, left = np.rint((np.sin(angles) + 1.0) / 2.0 * room).astype(int)
        return np.ascontiguousarray(scene[top : top + height, left : left + width])
