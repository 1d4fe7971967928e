"""Photos as a stream: one after the other, or as a camera that moves over them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zsseg_rt.demo import DEFAULT, demo_clip, demo_photos
from zsseg_rt.errors import SourceError
from zsseg_rt.photos import decode_photo, find_photos, read_photo
from zsseg_rt.stream.source import Picture, Reader

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PhotoSource:
    """Shows photos in order, one per second of the stream's own time."""

    name: str  # What it is called
    path: str  # A file, folder or glob pattern; see :func:`zsseg_rt.photos.find_photos`
    channel_order: str = "rgb"  # Of the frames
    live = False

    def pictures(self, reader: Reader) -> Generator[Picture, None, None]:
        photos, count = find_photos([self.path]), 0
        for path in photos:
            try:
                image = read_photo(path)
            except SourceError as exc:
                if len(photos) == 1:
                    raise
                _log.warning("%s; it is skipped", exc)
                reader.count_damaged()
                continue
            if self.channel_order == "bgr":
                image = image[..., ::-1].copy()
            yield Picture(
                image=image, captured_at=time.monotonic(), clock="file", pts_seconds=float(count)
            )
            count += 1
        if not count:
            raise SourceError(f"{self.name}: expected photos, {len(photos)} cannot be read")


DEFAULT_SIZES = {"photos": (360, 640), "scenes": (720, 720)}  # the clip's own; the network's

_CLIP_RATE = 10.0  # frames of the clip per second
_PER_IMAGE = 150  # frames
_ROOM = 1.1  # sides of the image that is wandered over, in sides of the window

_Pixels = npt.NDArray[np.uint8]
_Show = Callable[[int], _Pixels]


@dataclass(frozen=True, kw_only=True)
class DemoCamera:
    """Source ``test://``: a demo's clip, or a window that wanders over its images, in real time."""

    name: str  # The URI
    demo: str = DEFAULT  # Whose clip or pictures it shows
    size_hw: tuple[int, int] = DEFAULT_SIZES[DEFAULT]  # Height and width of the frames
    rate: float = 30.0  # Frames per second
    seed: int = 0  # Decides the window's way, or the clip's first frame
    num_frames: int | None = None  # Frames until it ends; None never ends
    channel_order: str = "rgb"  # Of the frames
    now: Callable[[], float] = time.monotonic  # The clock

    @property
    def live(self) -> bool:
        return self.num_frames is None

    def pictures(self, reader: Reader) -> Generator[Picture, None, None]:
        clip = demo_clip(self.demo)
        show = self._player(clip) if clip else self._wanderer()
        start, index = self.now(), 0
        while self.num_frames is None or index < self.num_frames:
            if reader.wait(start + index / self.rate - self.now()):
                return
            yield Picture(
                image=show(index),
                captured_at=self.now(),
                clock="arrival",
                pts_seconds=index / self.rate,
            )
            index += 1

    def _player(self, clip: list[bytes]) -> _Show:
        """Return a function that decodes the frame of an index when its time comes."""
        shown: tuple[int, _Pixels] | None = None

        def show(index: int) -> _Pixels:
            nonlocal shown
            place = (self.seed + int(index / self.rate * _CLIP_RATE + 1e-6)) % len(clip)
            if shown is None or shown[0] != place:
                image = decode_photo(clip[place], Path(f"{self.demo} {place}"))
                shown = place, self._cut(self._enlarged(image, 1.0), 0.5, 0.5)
            return shown[1].copy()

        return show

    def _wanderer(self) -> _Show:
        """Return a function that cuts the window of an index out of the pictures."""
        scenes = [self._enlarged(read_photo(photo), _ROOM) for photo in demo_photos(self.demo)]
        phases = np.random.default_rng(self.seed).uniform(0.0, 2.0 * math.pi, 2)

        def show(index: int) -> _Pixels:
            angles = phases + 2.0 * math.pi * index / np.array([211.0, 307.0])
            down, right = (np.sin(angles) + 1.0) / 2.0
            return self._cut(scenes[index // _PER_IMAGE % len(scenes)], down, right)

        return show

    def _enlarged(self, image: _Pixels, room: float) -> _Pixels:
        """The image, so large that frames fit into it with some room."""
        import cv2

        if self.channel_order == "bgr":
            image = image[..., ::-1]
        height, width = self.size_hw
        scale = room * max(height / image.shape[0], width / image.shape[1])
        sides = [max(math.ceil(side * scale - 1e-6), 1) for side in image.shape[1::-1]]
        return np.asarray(cv2.resize(np.ascontiguousarray(image), sides), np.uint8)

    def _cut(self, image: _Pixels, down: float, right: float) -> _Pixels:
        """A frame, at shares of the room above and left of it."""
        height, width = self.size_hw
        room = np.array([image.shape[0] - height, image.shape[1] - width])
        top, left = np.rint(np.array([down, right]) * room).astype(int)
        return np.ascontiguousarray(image[top : top + height, left : left + width])
