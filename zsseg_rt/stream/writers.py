"""Sinks that are not video: label pictures, lines of JSON, a caller's function."""

from __future__ import annotations

import os
import re
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from zsseg_rt.common.files import is_device, is_file, is_folder, why_unwritable
from zsseg_rt.common.recordings import Rotation, Series, claim
from zsseg_rt.common.schema import json_text
from zsseg_rt.errors import SourceError
from zsseg_rt.photos import MASK_SUFFIX, OVERLAY_SUFFIXES, SUFFIXES
from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.stream.source import GivenName

OVERLAY_MARK = "zsseg-rt overlay"  # the comment in videos that a sink writes
VIDEO_SUFFIXES = (
    ".264", ".265", ".3gp", ".avi", ".flv", ".h264", ".h265", ".hevc", ".m2ts", ".m4v", ".mjpeg",
    ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv",
)  # fmt: skip
_READ = (*SUFFIXES, *VIDEO_SUFFIXES)
_SHORTEST_VIDEO = 1024  # bytes; a power cut leaves fewer
_PICTURE = re.compile(r"(^|-)[0-9]{8}\.png$")
_LABELS = (b"\x08\x03", b"\x10\x00")  # bits and kind of a PNG: palette, 16-bit grey


class Tags:
    """The tag of each source in its files' names: its own name, or its number from 2 on."""

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self._tags: dict[str, str] = {}
        for source in sources:
            self.of(source)

    def of(self, source: str) -> str:
        if source not in self._tags:
            number = len(self._tags) + 1
            named = str(source) if isinstance(source, GivenName) else str(number)
            self._tags[source] = "" if named == "1" else named
        return self._tags[source]

    def join(self, stem: str, source: str) -> str:
        """``STEM-TAG``, or what there is of it."""
        return "-".join(part for part in (stem, self.of(source)) if part)


class Writer:
    """Writes for a sink; used by one thread at a time."""

    painter: Any = None  # the Painter of overlays, where there are any

    def __init__(self, name: str, *, folder: Path | None = None) -> None:
        self.name = name  # What messages call it
        self.folder = folder  # None if it cannot be tried again after an error
        self.files: list[str] = []  # Those that were begun
        self.whose: dict[str, str] = {}  # Files, patterns and addresses of one source, its name
        self._series: dict[str, Series] = {}  # per source

    def write(self, seg: Segmentation) -> None:
        """Write one labelled frame."""
        raise NotImplementedError

    def close(self) -> None:
        """Finish what was written."""

    def remove_old(self) -> None:
        """Remove what is not kept any more, where there is no space."""
        for series in self._series.values():
            series.remove_old()


class MaskFolder(Writer):
    """Writes ``[TAG-]INDEX.png``; with rotation and beside older ones, into ``[TAG-]STAMP/``."""

    def __init__(self, folder: Path, *, tags: Tags, rotation: Rotation) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise SourceError(f"{folder}: cannot be made: {exc.strerror}") from exc
        require_folder(folder / "INDEX.png", may_exist=False)
        super().__init__(str(folder), folder=folder)
        self.files.append(str(folder))
        self._folder, self._tags, self._rotation = folder, tags, rotation
        claimed = os.open(folder, os.O_RDONLY)
        self._release = weakref.finalize(self, os.close, claimed)
        claim(folder, claimed)
        self._begun: dict[str, _Pictures] = {}

    def write(self, seg: Segmentation) -> None:
        frame = frame_of(seg)
        pictures = self._begun.get(frame.source)
        age = 0.0 if pictures is None else time.monotonic() - pictures.begun
        if pictures is None or self._rotation.is_due(age, pictures.num_bytes):
            pictures = self._begun[frame.source] = self._begin(frame.source)
        path = Path(f"{pictures.start}{frame.index:08d}.png")
        seg.save(path)
        if self._rotation.is_on:
            pictures.num_bytes += path.stat().st_size

    def close(self) -> None:
        """Leave the folder to others; with rotation, a next frame begins a new one."""
        if self._rotation.is_on:
            self._begun.clear()
        self._release()

    def _begin(self, source: str) -> _Pictures:
        tag = self._tags.of(source)
        start = f"{self._folder}/{tag}{'-' if tag else ''}"
        try:
            if self._rotation.is_on or self._has_pictures(tag):
                series = Series(self._folder, tag, "", self._rotation)
                start = f"{self._series.setdefault(source, series).begin()}/"
        except OSError as exc:
            raise unwritable(self._folder, exc) from exc
        self.whose[f"{start}*.png"] = source
        return _Pictures(start)

    def _has_pictures(self, tag: str) -> bool:
        ours = re.compile(rf"{tag}{'-' if tag else ''}[0-9]{{8,}}\.png")
        with os.scandir(self._folder) as entries:
            return any(ours.fullmatch(entry.name) for entry in entries)


@dataclass
class _Pictures:
    """Where a source's pictures go: what their paths begin with."""

    start: str
    begun: float = field(default_factory=time.monotonic)
    num_bytes: int = 0


class JsonLines(Writer):
    """Writes one line of JSON per frame; continues the file, or the newest one until it is due."""

    def __init__(self, path: Path, *, rotation: Rotation) -> None:
        require_folder(path, may_exist=not rotation.is_on)
        super().__init__(str(path), folder=path.parent)
        self._path = path
        self._files = self._series[""] = Series(path.parent, path.stem, path.suffix, rotation)
        self._stream: FileIO | None = None
        self._begun = 0.0
        self._num_bytes = 0

    def write(self, seg: Segmentation) -> None:
        line = (json_text(describe(seg)) + "\n").encode()
        try:
            age = time.monotonic() - self._begun
            if self._stream is None or self._files.rotation.is_due(age, self._num_bytes):
                self._open(is_due=self._stream is not None)
            self._append(line)
        except OSError as exc:
            self._drop()
            raise unwritable(self._path, exc) from exc

    def close(self) -> None:
        try:
            self._drop()
        except OSError as exc:
            raise unwritable(self._path, exc) from exc

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        super().close()
        if stream is not None:
            stream.close()

    def _open(self, *, is_due: bool) -> None:
        self._drop()
        path, age = self._path, 0.0
        if is_due:
            path = self._files.begin()
        elif self._files.rotation.is_on:
            path, age = self._files.resume()
        self._begun = time.monotonic() - age
        self._stream = FileIO(path, "ab")
        if not is_device(path):
            claim(path, self._stream)
        self._num_bytes = 0 if is_device(path) else path.stat().st_size
        if str(path) not in self.files:
            self.files.append(str(path))
        if self._num_bytes and not _ends_a_line(path):
            self._append(b"\n")  # a power cut tore the last line: it stays, on a line of its own

    def _append(self, line: bytes) -> None:
        assert self._stream is not None, "opened before"
        self._num_bytes += len(line)
        while line:  # a disk that fills up takes a part
            line = line[self._stream.write(line) :]


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"


class Callback(Writer):
    """Calls a function with each result, in the sink's thread."""

    def __init__(self, function: Callable[[Segmentation], object]) -> None:
        super().__init__(getattr(function, "__qualname__", type(function).__name__))
        self._function = function

    def write(self, seg: Segmentation) -> None:
        self._function(seg)


def describe(seg: Segmentation) -> dict[str, Any]:
    """The line of a frame; ``time`` is the capture in seconds since 1970."""
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
        "moved_from": seg.moved_from,
        "labelled_age": seg.labelled_age and round(seg.labelled_age, 6),
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


def require_folder(path: Path, *, may_exist: bool) -> None:
    """Refuse a file that cannot be written, before the first frame is labelled."""
    if not is_folder(path.parent):
        raise SourceError(f"{path}: cannot be written: the folder {path.parent} does not exist")
    is_there = is_device(path) or (may_exist and is_file(path))
    if is_there:
        problem = "" if os.access(path, os.W_OK) else f"{path} is not writable"
    else:
        problem = why_unwritable(path.parent)
    if problem:
        raise SourceError(f"{path}: cannot be written: {problem}. Choose another place.")


def unwritable(path: Path, error: OSError | ValueError) -> SourceError:
    """An error of the system's in our words."""
    reason = getattr(error, "strerror", None) or error
    return SourceError(f"{path}: cannot be written: {reason}. What was written before stays.")


def what_is_not_ours(path: Path) -> str:
    """Name what a place holds that no sink wrote, such as a second recording; empty if nothing."""
    with suppress(OSError):  # whoever reads or writes it says so
        return _not_ours(path)
    return ""


def _not_ours(path: Path) -> str:
    if is_folder(path):
        inside = [p for p in sorted(path.iterdir()) if p.suffix.lower() in _READ]
        pictures = [p for p in inside if _PICTURE.search(p.name)][:1]  # one tells of all
        others = [p for p in inside if p.name[0] != "." and not _PICTURE.search(p.name)]
        some = pictures + others
        return next((f"{path} with {p.name}" for p in some if _not_ours(p)), "")
    if not is_file(path) or path.name.endswith((MASK_SUFFIX, *OVERLAY_SUFFIXES.values())):
        return ""
    with path.open("rb") as stream:
        head = stream.read(4096)
    if path.suffix.lower() == ".jsonl":
        is_torn = b"\n" not in head
        is_ours = head.startswith(b'{"source": ') and (is_torn or b'"pts_seconds": ' in head)
    elif path.suffix.lower() == ".png":
        is_ours = head[24:26] in _LABELS and _PICTURE.search(path.name) is not None
    else:
        is_ours = OVERLAY_MARK.encode() in head or len(head) < _SHORTEST_VIDEO
    return "" if is_ours or not head else str(path)
