"""What became of each photo, and the journal that tells a later run which ones are done.

The journal says by what files to recognise finished photos: one line per photo, JSON of a record
and its SHA-256. A line counts only as long as the photo and both images are the files that it
describes; a damaged line is skipped and reported.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zsseg_rt.common import schema
from zsseg_rt.common.files import sha256_of
from zsseg_rt.errors import SourceError

_log = logging.getLogger(__name__)

JOURNAL = "zsseg_journal.jsonl"


@dataclass(frozen=True, kw_only=True)
class PhotoResult:
    """What became of one photo.

    Attributes:
        photo: Its path as given.
        size_hw: Height and width in pixels, None if it could not be read.
        classes: One ``{name, index, pixels, share, colour}`` per present class, largest first;
            ``colour`` is the overlay's, as ``#rrggbb``.
        unknown_share: Part of the photo that belongs to no class, in [0, 1].
        overlay: Path of the overlay image.
        mask: Path of the label image.
        times: Milliseconds per stage.
        error: One line on what went wrong, or None.
        resumed: True if an earlier run had done it.
    """

    photo: str
    size_hw: tuple[int, int] | None = None
    classes: tuple[dict[str, Any], ...] = ()
    unknown_share: float = 0.0
    overlay: str | None = None
    mask: str | None = None
    times: dict[str, float] | None = None
    error: str | None = None
    resumed: bool = False


@dataclass(frozen=True, kw_only=True)
class _File:
    """Size in bytes and SHA-256 (hex) of a file's content."""

    size: int
    sha256: str

    @classmethod
    def at(cls, path: Path) -> _File:
        return cls(size=path.stat().st_size, sha256=sha256_of(path))

    def is_at(self, path: Path) -> bool:
        """Whether the file there is the one that was described."""
        try:
            return path.stat().st_size == self.size and _File.at(path) == self
        except OSError:
            return False


@dataclass(frozen=True, kw_only=True)
class _Record:
    key: str
    photo: _File
    overlay: _File
    mask: _File
    result: PhotoResult


class Journal:
    """The file that lists finished photos; once read, safe to use in any thread."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._records: dict[str, _Record] = {}
        self._writing = threading.Lock()

    def read(self) -> None:
        """Read what earlier runs have finished; the log counts skipped lines."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return
        except OSError as exc:
            _log.warning("%s: cannot be read: %s; all photos are done again", self._path, exc)
            return
        damaged, old = 0, set()
        for line in filter(None, lines):
            try:
                record = _parse(line)
            except _OldLineError as exc:
                old.add(str(exc))
            except (ValueError, RecursionError):
                damaged += 1
            else:
                if record.key == self._key:
                    self._records[record.result.photo] = record
        if damaged:
            _log.warning("%s: damaged lines are skipped: %d", self._path, damaged)
        if redone := len(old - self._records.keys()):
            _log.warning(
                "%s: written by an older version, without hashes; photos done again: %d",
                self._path, redone)  # fmt: skip

    def finished(self, photo: Path) -> PhotoResult | None:
        """An earlier run's result, if the photo and both images are still the same files."""
        record = self._records.get(str(photo))
        if record is None:
            return None
        result = record.result
        same = (
            record.photo.is_at(photo)
            and record.mask.is_at(Path(result.mask or ""))
            and record.overlay.is_at(Path(result.overlay or ""))
        )
        return replace(result, resumed=True) if same else None

    def append(self, result: PhotoResult, photo: bytes) -> None:
        """Note that a photo is finished."""
        try:
            record = _Record(
                key=self._key,
                photo=_File(size=len(photo), sha256=hashlib.sha256(photo).hexdigest()),
                overlay=_File.at(Path(result.overlay or "")),
                mask=_File.at(Path(result.mask or "")),
                result=result,
            )
            with self._writing, self._path.open("a+b") as stream:
                # A line that an interrupted run left unfinished must not swallow this one.
                end = stream.seek(0, os.SEEK_END)
                stream.seek(max(end - 1, 0))
                begin = b"" if stream.read(1) in (b"", b"\n") else b"\n"
                stream.write(begin + _format(record))
        except OSError as exc:
            raise SourceError(
                f"{self._path}: cannot be written: {exc.strerror}. The images of {result.photo} "
                "were written, but --resume will not find them."
            ) from exc


class _OldLineError(Exception):
    """A line of version 0.1, which had no hashes; the message is its photo."""


def _format(record: _Record) -> bytes:
    """Format a line; names that are not valid Unicode are escaped, so the line always is."""
    raw = schema.encode(record)
    return json.dumps({"record": raw, "sha256": _digest(raw)}).encode("ascii") + b"\n"


def _parse(line: bytes) -> _Record:
    """Return the record of a line."""
    content = json.loads(line.decode("utf-8"))
    if isinstance(content, Mapping) and isinstance(content.get("photo"), str):
        raise _OldLineError(content["photo"])
    if not isinstance(content, Mapping) or content.keys() != {"record", "sha256"}:
        raise ValueError("expected a record and its SHA-256")
    if content["sha256"] != _digest(content["record"]):
        raise ValueError("expected the SHA-256 of the record")
    return schema.decode(_Record, content["record"], "record")


def _digest(raw: Any) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode("ascii")).hexdigest()
