"""Sinks that are not video: label pictures, lines of JSON, a caller's function."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from zsseg_rt.errors import SourceError
from zsseg_rt.files import is_folder
from zsseg_rt.result import Frame, Segmentation

__all__ = ["Callback", "JsonLines", "MaskFolder", "frame_of", "require_folder", "unwritable"]


class MaskFolder:
    """Writes ``FOLDER/INDEX.png``: palette pictures whose pixel values are the labels.

    The second source's pictures are ``FOLDER/2-INDEX.png``, and so on.

    Raises:
        SourceError: The folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise SourceError(f"{folder}: cannot be made: {exc.strerror}") from exc
        self.name = str(folder)
        self.files = [str(folder)]
        self._folder = folder
        self._sources: dict[str, int] = {}

    def write(self, seg: Segmentation) -> None:
        """Write one picture.

        Raises:
            SourceError: It cannot be written.
        """
        frame = frame_of(seg)
        number = self._sources.setdefault(frame.source, len(self._sources) + 1)
        prefix = "" if number == 1 else f"{number}-"
        seg.save(self._folder / f"{prefix}{frame.index:08d}.png")

    def close(self) -> None:
        """Nothing is left to finish."""


class JsonLines:
    """Writes one line of JSON per frame: its source, times, and the classes in it.

    Raises:
        SourceError: The file's folder is absent.
    """

    def __init__(self, path: Path) -> None:
        require_folder(path)
        self.name = str(path)
        self.files: list[str] = []
        self._path = path
        self._stream: IO[str] | None = None

    def write(self, seg: Segmentation) -> None:
        """Write one line, at once.

        Raises:
            SourceError: It cannot be written.
        """
        try:
            if self._stream is None:
                self._stream = self._path.open("w", encoding="utf-8")
                self.files.append(str(self._path))
            self._stream.write(json.dumps(describe(seg), ensure_ascii=False) + "\n")
            self._stream.flush()
        except OSError as exc:
            raise unwritable(self._path, exc) from exc

    def close(self) -> None:
        """Close the file.

        Raises:
            SourceError: The last lines cannot be written.
        """
        if self._stream is None:
            return
        try:
            self._stream.close()
        except OSError as exc:
            raise unwritable(self._path, exc) from exc


class Callback:
    """Calls a function with each result, in the sink's thread."""

    def __init__(self, function: Callable[[Segmentation], object]) -> None:
        self.name = getattr(function, "__qualname__", type(function).__name__)
        self.files: list[str] = []
        self._function = function

    def write(self, seg: Segmentation) -> None:
        """Call it."""
        self._function(seg)

    def close(self) -> None:
        """Nothing is left to finish."""


def describe(seg: Segmentation) -> dict[str, Any]:
    """What a line says of a frame; ``time`` is the capture in seconds since 1970."""
    frame, shares = frame_of(seg), seg.present()
    return {
        "source": frame.source,
        "index": frame.index,
        "time": round(time.time() - (time.monotonic() - frame.captured_at), 6),
        "clock": frame.clock,
        "pts_seconds": frame.pts_seconds,
        "dropped_before": frame.dropped_before,
        "size_hw": list(seg.labels.shape),
        "vocabulary_version": seg.vocabulary_version,
        "reused": seg.reused,
        "classes": [
            {"name": s.name, "index": s.index, "pixels": s.pixels, "share": round(s.share, 6)}
            for s in shares
        ],
        "unknown_share": round(1.0 - sum(s.share for s in shares), 6),
        "times": {stage: round(ms, 3) for stage, ms in seg.times.items()},
    }


def frame_of(seg: Segmentation) -> Frame:
    """The frame that a stream's result carries."""
    assert seg.frame is not None, "results of a stream carry their frame"
    return seg.frame


def require_folder(path: Path) -> None:
    """Refuse a file in a folder that does not exist, before the first frame is labelled.

    Raises:
        SourceError: There is no such folder.
    """
    if not is_folder(path.parent):
        raise SourceError(f"{path}: cannot be written: the folder {path.parent} does not exist")


def unwritable(path: Path, error: OSError | ValueError) -> SourceError:
    """An error of the system's in our words."""
    reason = getattr(error, "strerror", None) or error
    return SourceError(f"{path}: cannot be written: {reason}. What was written before stays.")
