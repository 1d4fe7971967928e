"""A frame of a stream, as its result carries it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One frame of a stream, and where it came from.

    Attributes:
        source: The source's URI, without its password.
        index: Position among the frames that the source has given, from 0; reconnecting does not
            begin anew, and gaps are frames that were dropped.
        captured_at: Seconds of ``time.monotonic()``.
        clock: Whose time that is: ``"driver"``, the camera's driver, at capture; ``"pipeline"``,
            the GStreamer element's that the frame came from; ``"arrival"``, ours, when the frame
            arrived; ``"file"``, ours, when it was read from a file.
        pts_seconds: The stream's own time stamp in seconds, or None.
        dropped_before: Frames of this source that were dropped since the one handed out before.
        image: uint8 [H, W, 3], in the engine's channel order. Of a frame that lies on a GPU it is
            made when it is first asked for.
        on_gpu: The frame on the engine's GPU, as ``segment_device`` takes it, or None. Of frames
            that are kept, a stream's 32 newest stay there.
    """

    source: str
    index: int
    captured_at: float
    clock: Literal["driver", "pipeline", "arrival", "file"]
    pts_seconds: float | None = None
    dropped_before: int = 0
    image: npt.NDArray[np.uint8] = field(repr=False)
    on_gpu: Any = field(default=None, repr=False, compare=False)

    def leave_gpu(self) -> None:
        """Make ``image``, and hold no memory of the GPU any more: ``on_gpu`` becomes None."""
        vars(self).update(image=self.image, on_gpu=None)


class _Image:
    """The attribute ``image``: an array, or what makes it when it is asked for."""

    def __get__(self, frame: Frame, kind: type[Frame]) -> npt.NDArray[np.uint8]:
        image = vars(frame)["image"]
        if callable(image):
            image = vars(frame)["image"] = image()
        found: npt.NDArray[np.uint8] = image
        return found

    def __set__(self, frame: Frame, image: object) -> None:
        vars(frame)["image"] = image


Frame.image = _Image()  # type: ignore[assignment]  # no default, which it would be inside
