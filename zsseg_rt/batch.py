"""Segment many photos: label each, write images, tables and a journal to resume from.

The journal says which photos are done, and by what files to recognise them: one line per photo,
JSON of a record and its SHA-256. A line counts only as long as the photo and both images are the
files that it describes; a damaged line is skipped and reported.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt import schema
from zsseg_rt.config import FAMILY_SETTINGS
from zsseg_rt.engine import Engine
from zsseg_rt.errors import BackendUnavailableError, SourceError, ZssegError
from zsseg_rt.files import sha256_of
from zsseg_rt.photos import MASK_SUFFIX, OVERLAY_SUFFIX, decode_photo, load_photo
from zsseg_rt.picture_header import MAX_PIXELS
from zsseg_rt.result import Segmentation
from zsseg_rt.visualize import palette, save_file

__all__ = ["JOURNAL", "Journal", "PhotoResult", "segment_photos"]

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


def segment_photos(
    engine: Engine,
    photos: Sequence[Path],
    out_dir: Path,
    *,
    alpha: float = 0.5,
    resume: bool = False,
    max_pixels: int = MAX_PIXELS,
    on_done: Callable[[PhotoResult, Segmentation | None], None] | None = None,
) -> list[PhotoResult]:
    """Segment photos and write ``STEM.overlay.png`` and ``STEM.mask.png`` for each.

    A photo that cannot be read, labelled or written is reported in its result and does not stop the
    others. Every finished photo is one line in ``zsseg_journal.jsonl``; with ``resume``, photos
    that this file lists with the same bundle, classes and settings are skipped, if they and their
    output images are still the same files, byte for byte.

    Args:
        engine: An engine with classes; its channel order must be RGB.
        photos: Files to segment.
        out_dir: Folder to write to; created if absent.
        alpha: Weight of the colours in the overlay, in [0, 1].
        resume: Whether to skip what an earlier run has finished.
        max_pixels: Photos with more pixels are not decoded; their result says so.
        on_done: Called after each photo.

    Raises:
        SourceError: The folder cannot be created.
        BackendUnavailableError: OpenCV is not installed.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise SourceError(f"{out_dir}: cannot be created: {exc.strerror}") from exc
    journal = Journal(out_dir / JOURNAL, _settings_key(engine, alpha))
    if resume:
        journal.read()
    work = _Work(engine=engine, journal=journal, alpha=alpha, max_pixels=max_pixels)
    results = []
    for photo, stem in zip(photos, _stems(photos), strict=True):
        result, seg = journal.finished(photo), None
        if result is None:
            result, seg = work.segment(photo, out_dir / stem)
        results.append(result)
        if on_done is not None:
            on_done(result, seg)
    return results


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is done to each photo."""

    engine: Engine
    journal: Journal
    alpha: float
    max_pixels: int

    def segment(self, photo: Path, target: Path) -> tuple[PhotoResult, Segmentation | None]:
        """Label a photo, write its images and journal it; its result says what went wrong."""
        try:
            return self._segment(photo, target)
        except BackendUnavailableError:
            raise
        except ZssegError as exc:
            message = str(exc)
        except (OSError, MemoryError) as exc:
            message = f"{photo}: {type(exc).__name__}: {exc}"
        return PhotoResult(photo=str(photo), error=message), None

    def _segment(self, photo: Path, target: Path) -> tuple[PhotoResult, Segmentation]:
        data = load_photo(photo, max_pixels=self.max_pixels)
        frame = decode_photo(data, photo, max_pixels=self.max_pixels)
        seg = self.engine.segment(frame)
        overlay = target.with_name(f"{target.name}{OVERLAY_SUFFIX}")
        mask = target.with_name(f"{target.name}{MASK_SUFFIX}")
        _write_rgb_png(overlay, seg.overlay(frame, alpha=self.alpha))
        seg.save(mask)
        result = PhotoResult(
            photo=str(photo),
            size_hw=(frame.shape[0], frame.shape[1]),
            classes=_describe_classes(seg),
            unknown_share=round(float((seg.labels == seg.unknown).mean()), 6),
            overlay=str(overlay),
            mask=str(mask),
            times={stage: round(ms, 3) for stage, ms in seg.times.items()},
        )
        self.journal.append(result, data)
        return result, seg


def _describe_classes(seg: Segmentation) -> tuple[dict[str, Any], ...]:
    colours = palette(len(seg.names))
    return tuple(
        {
            "name": s.name,
            "index": s.index,
            "pixels": s.pixels,
            "share": round(s.share, 6),
            "colour": "#" + bytes(colours[s.index]).hex(),
        }
        for s in seg.present()
    )


def _write_rgb_png(path: Path, picture: npt.NDArray[np.uint8]) -> None:
    """Write an RGB image, whose channels are swapped in place."""
    import cv2

    try:
        _, encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR, dst=picture))
    except cv2.error as exc:
        raise SourceError(f"{path}: cannot be encoded as PNG: {exc.err}") from exc
    save_file(path, encoded.tobytes())


def _stems(photos: Sequence[Path]) -> Iterator[str]:
    """File stems; for photos that share one, folder and suffix are added to the name."""
    counts = Counter(photo.stem for photo in photos)
    taken: set[str] = set()
    for photo in photos:
        stem = photo.stem if counts[photo.stem] == 1 else f"{photo.parent.name}_{photo.name}"
        if stem in taken:
            digest = hashlib.sha256(os.fsencode(photo.resolve())).hexdigest()[:8]
            stem = f"{stem}_{digest}"
        taken.add(stem)
        yield stem


def _settings_key(engine: Engine, alpha: float) -> str:
    """A key of everything but the photo that decides its output images."""
    vocabulary, config = engine.vocabulary, engine.config
    settings: list[Any] = [
        engine.bundle.to_manifest(),  # the hash of every file, the calibration
        [engine.backend, engine.precision, config.channel_order, config.unknown_below, alpha],
        [getattr(config, name) for name in FAMILY_SETTINGS],
    ]
    if vocabulary is not None:
        settings += [vocabulary.names, vocabulary.phrases, vocabulary.phrase_classes.tolist()]
        for embeds in (vocabulary.embeds, *vocabulary.prompt_embeds.values()):
            settings.append(hashlib.sha256(embeds.tobytes()).hexdigest())
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


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
    """The file that lists finished photos.

    Args:
        path: Where it is, or will be.
        key: Stands for everything but the photo that decides the images.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._records: dict[str, _Record] = {}

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
        """Note that a photo is finished.

        Args:
            result: What became of it; its images are on disk.
            photo: The content of its file.

        Raises:
            SourceError: The journal cannot be written.
        """
        try:
            record = _Record(
                key=self._key,
                photo=_File(size=len(photo), sha256=hashlib.sha256(photo).hexdigest()),
                overlay=_File.at(Path(result.overlay or "")),
                mask=_File.at(Path(result.mask or "")),
                result=result,
            )
            with self._path.open("a+b") as stream:
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
    """Return the record of a line.

    Raises:
        _OldLineError: An older version wrote the line.
        ValueError: It is damaged.
        RecursionError: It is damaged.
    """
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
