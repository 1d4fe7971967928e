"""Segment many photos: find them, label each, write pictures, tables and a journal to resume by."""

from __future__ import annotations

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.engine import Engine
from zsseg_rt.errors import BackendUnavailableError, SourceError, ZssegError
from zsseg_rt.extras import install_command
from zsseg_rt.result import Segmentation
from zsseg_rt.visualize import palette, save_file

__all__ = ["PhotoResult", "find_photos", "read_photo", "segment_photos"]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
JOURNAL = "zsseg_journal.jsonl"


@dataclass(frozen=True, kw_only=True)
class PhotoResult:
    """What became of one photo.

    Attributes:
        photo: Its path as given.
        size_hw: Height and width in pixels, None if it could not be read.
        classes: One ``{name, index, pixels, share, colour}`` a present class, largest first;
            ``colour`` is the overlay's as ``#rrggbb``.
        unknown_share: Part of the photo that belongs to no class, in [0, 1].
        overlay: Path of the overlay picture.
        mask: Path of the label picture.
        times: Milliseconds a stage.
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


def find_photos(arguments: Sequence[str]) -> list[Path]:
    """Expand files, folders (not deeper) and glob patterns to photos, each once, in order.

    Raises:
        SourceError: An argument names nothing, or a folder without photos.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise SourceError(
                    f"{path}: expected photos ({', '.join(SUFFIXES)}) in the folder, found none"
                )
            found.update(dict.fromkeys(inside))
        elif path.is_file():
            found[path] = None
        else:
            matches = sorted(Path(p) for p in glob.glob(argument, recursive=True))  # noqa: PTH207
            if not matches:
                raise SourceError(f"{argument}: expected a photo, folder or pattern, found nothing")
            found.update(dict.fromkeys(p for p in matches if p.is_file()))
    return list(found)


def read_photo(path: Path) -> npt.NDArray[np.uint8]:
    """Read a photo as uint8 RGB [H, W, 3]; EXIF orientation is applied.

    Raises:
        SourceError: The file cannot be read or is no picture.
        BackendUnavailableError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as exc:
        raise BackendUnavailableError(
            "cv2: expected OpenCV to read photos, found none. "
            f"Run: {install_command('opencv')} (on a Jetson: apt install python3-opencv)"
        ) from exc
    try:
        raw = np.fromfile(path, np.uint8)
    except OSError as exc:
        raise SourceError(f"{path}: cannot be read: {exc.strerror}") from exc
    try:
        picture = cv2.imdecode(raw, cv2.IMREAD_COLOR) if raw.size else None
    except cv2.error as exc:
        raise SourceError(f"{path}: cannot be decoded: {exc.err}") from exc
    if picture is None:
        raise SourceError(f"{path}: expected a picture, got {raw.size} bytes that are none")
    return np.ascontiguousarray(picture[:, :, ::-1]).astype(np.uint8, copy=False)


def segment_photos(
    engine: Engine,
    photos: Sequence[Path],
    out_dir: Path,
    *,
    alpha: float = 0.5,
    resume: bool = False,
    on_done: Callable[[PhotoResult, Segmentation | None], None] | None = None,
) -> list[PhotoResult]:
    """Segment photos and write ``STEM.overlay.png`` and ``STEM.mask.png`` for each.

    A photo that cannot be read is reported in its result and does not stop the others. Every
    finished photo is one line in ``zsseg_journal.jsonl``; with ``resume``, photos that this file
    lists with the same bundle, classes and settings, and whose pictures are there, are skipped.

    Args:
        engine: An engine with classes; its channel order must be RGB.
        photos: Files to segment.
        out_dir: Folder to write to; made if absent.
        alpha: Weight of the colours in the overlay, in [0, 1].
        resume: Whether to skip what an earlier run has finished.
        on_done: Called after each photo.

    Raises:
        SourceError: The folder cannot be made or written.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise SourceError(f"{out_dir}: cannot be made: {exc.strerror}") from exc
    key = _settings_key(engine, alpha)
    finished = _read_journal(out_dir / JOURNAL, key) if resume else {}
    results = []
    for photo, stem in zip(photos, _stems(photos), strict=True):
        earlier = finished.get(str(photo))
        if earlier is not None:
            result, seg = earlier, None
        else:
            result, seg = _segment_one(engine, photo, out_dir / stem, alpha)
            if result.error is None:
                _append_journal(out_dir / JOURNAL, key, result)
        results.append(result)
        if on_done is not None:
            on_done(result, seg)
    return results


def _segment_one(
    engine: Engine, photo: Path, target: Path, alpha: float
) -> tuple[PhotoResult, Segmentation | None]:
    try:
        frame = read_photo(photo)
        seg = engine.segment(frame)
        overlay = target.with_name(f"{target.name}.overlay.png")
        mask = target.with_name(f"{target.name}.mask.png")
        _write_rgb_png(overlay, seg.overlay(frame, alpha=alpha))
        seg.save(mask)
    except BackendUnavailableError:
        raise
    except ZssegError as exc:
        return PhotoResult(photo=str(photo), error=str(exc)), None
    result = PhotoResult(
        photo=str(photo),
        size_hw=(frame.shape[0], frame.shape[1]),
        classes=_describe_classes(seg),
        unknown_share=round(float((seg.labels == seg.unknown).mean()), 6),
        overlay=str(overlay),
        mask=str(mask),
        times={stage: round(ms, 3) for stage, ms in seg.times.items()},
    )
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
    import cv2

    ok, encoded = cv2.imencode(".png", picture[:, :, ::-1])
    if not ok:
        raise SourceError(f"{path}: the picture cannot be encoded as PNG")
    save_file(path, encoded.tobytes())


def _stems(photos: Sequence[Path]) -> Iterator[str]:
    """File stems; photos that share one get their folder and suffix into the name."""
    counts = Counter(photo.stem for photo in photos)
    taken: set[str] = set()
    for photo in photos:
        stem = photo.stem if counts[photo.stem] == 1 else f"{photo.parent.name}_{photo.name}"
        if stem in taken:
            digest = hashlib.sha256(str(photo.resolve()).encode()).hexdigest()[:8]
            stem = f"{stem}_{digest}"
        taken.add(stem)
        yield stem


def _settings_key(engine: Engine, alpha: float) -> str:
    vocabulary = engine.vocabulary
    graphs = [entry.sha256 for entry in engine.bundle.files()]
    text = json.dumps(
        [
            graphs,
            engine.precision,
            engine.backend,
            engine.config.unknown_below,
            alpha,
            None if vocabulary is None else [vocabulary.names, vocabulary.phrases],
            None if vocabulary is None else vocabulary.phrase_classes.tolist(),
            None if vocabulary is None else hashlib.sha256(vocabulary.embeds.tobytes()).hexdigest(),
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_journal(path: Path, key: str) -> dict[str, PhotoResult]:
    if not path.is_file():
        return {}
    finished = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the line that an interrupted run was writing
        if entry.pop("key", None) != key:
            continue
        result = PhotoResult(**entry | {"resumed": True})
        if all(p is not None and Path(p).is_file() for p in (result.overlay, result.mask)):
            finished[result.photo] = result
    return finished


def _append_journal(path: Path, key: str, result: PhotoResult) -> None:
    line = json.dumps({"key": key} | result.__dict__, ensure_ascii=False)
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
    except OSError as exc:
        raise SourceError(f"{path}: cannot be written: {exc.strerror}") from exc
