"""Segment many photos: label each, write images and a journal to resume from."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.batch.journal import JOURNAL, Journal, PhotoResult
from zsseg_rt.config import FAMILY_SETTINGS
from zsseg_rt.engine import Engine
from zsseg_rt.errors import BackendUnavailableError, SourceError, ZssegError
from zsseg_rt.photos import MASK_SUFFIX, OVERLAY_SUFFIX, decode_photo, load_photo
from zsseg_rt.picture_header import MAX_PIXELS
from zsseg_rt.result import Segmentation
from zsseg_rt.visualize import palette, save_file

__all__ = ["segment_photos"]


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
