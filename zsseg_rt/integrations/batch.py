"""Many photos at once: images and other programs' files of each, a journal to resume from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends import registry
from zsseg_rt.common import schema
from zsseg_rt.common.checks import check_choice
from zsseg_rt.common.files import remove_abandoned, sha256_of
from zsseg_rt.common.process import usable_cpus
from zsseg_rt.common.schema import json_text
from zsseg_rt.config import EngineConfig
from zsseg_rt.engine import Engine
from zsseg_rt.errors import BackendUnavailableError, SourceError, ZssegError
from zsseg_rt.photos import (
    MASK_SUFFIX,
    MAX_PIXELS,
    OVERLAY_SUFFIXES,
    decode_photo,
    load_photo,
    pixels_of,
)
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.results.visualize import palette, read_label_png, save_file
from zsseg_rt.runtime.lane_pool import LanePool, in_order

_log = logging.getLogger(__name__)

OverlayFormat = Literal["png", "jpg"]

_MOST_LANES = 4  # each holds a frame's activations
_JPEG_QUALITY = 90
# Settings that leave output images as they are; any other is part of the journal's key.
NOT_IN_KEY = (
    "device", "backend", "precision", "num_threads", "num_lanes", "wait", "with_times",
    "with_node_times", "with_nvtx", "cache_dir", "use_cache", "keep_text_encoder", "max_memory",
    "max_pixels",
)  # fmt: skip
_AHEAD = 2  # photos that are read or written while every lane is busy


@dataclass(frozen=True, kw_only=True)
class PhotoSettings:
    """How photos are read and their overlays are drawn."""

    alpha: float = 0.5  # Weight of the colours in the overlay, in [0, 1]
    # "png", or "jpg" (quality 90), which takes less time to write
    overlay_format: OverlayFormat = "png"
    legend: bool = False  # Whether overlays have class names on them and a legend below
    # Photos with more pixels are not decoded; their result says so. As many are decoded at any one
    # time, however many photos that is
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        check_choice("overlay_format", self.overlay_format, OVERLAY_SUFFIXES)


def segment_photos(
    engine: Engine,
    photos: Sequence[Path],
    out_dir: Path,
    *,
    resume: bool = False,
    on_done: Callable[[PhotoResult, Segmentation | None], None] | None = None,
    **settings: Any,
) -> list[PhotoResult]:
    """Segment photos and write ``STEM.overlay.png`` (or ``.jpg``) and ``STEM.mask.png`` for each.

    A photo that cannot be read, labelled or written is reported in its result and does not stop the
    others. Photos are labelled at the same time in all lanes of the engine, while others are
    decoded and written; results come in the photos' order. Every finished photo is one line in
    ``zsseg_journal.jsonl``; with ``resume``, photos that this file lists with the same bundle,
    classes and settings are skipped, if they and their output images are still the same files, byte
    for byte.
    """
    work = _Work(engine, PhotoSettings(**settings), out_dir)
    if resume:
        work.journal.read()
    targets = [out_dir / stem for stem in _stems(photos)]
    results = []
    with engine.open_lanes() as lanes:
        done = in_order(
            partial(work.segment, lanes), zip(photos, targets, strict=True),
            num_threads=min(lanes.num_lanes + _AHEAD, len(photos)) or 1,
        )  # fmt: skip
        with closing(done):
            for result, seg in done:
                results.append(result)
                if on_done is not None:
                    on_done(result, seg)
    return results


def lanes_for(num_photos: int, config: EngineConfig) -> int:
    """The number of lanes that labels photos fastest: on a CPU with OpenVINO one per thread."""
    placement = registry.choose(config)
    if placement.backend != "openvino" or placement.device != "cpu":
        return 1
    return max(min(num_photos, config.num_threads or usable_cpus(), _MOST_LANES), 1)


class _Work:
    """Labels photos, several at the same time, and journals them."""

    def __init__(self, engine: Engine, settings: PhotoSettings, out_dir: Path) -> None:
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            remove_abandoned(out_dir)
        except OSError as exc:
            raise SourceError(f"{out_dir}: cannot be created: {exc.strerror}") from exc
        self.journal = Journal(out_dir / JOURNAL, settings_key(engine, settings))
        self._settings, self._is_bgr = settings, engine.config.channel_order == "bgr"
        self._pixels = Budget(settings.max_pixels)

    def segment(
        self, lanes: LanePool, job: tuple[Path, Path]
    ) -> tuple[PhotoResult, Segmentation | None]:
        """Label a photo unless that is done; the result says what went wrong."""
        photo, target = job
        try:
            done_earlier = self.journal.finished(photo)
            return (done_earlier, None) if done_earlier else self._segment(lanes, photo, target)
        except BackendUnavailableError:
            raise
        except ZssegError as exc:
            message = str(exc) if str(exc).startswith(str(photo)) else f"{photo}: {exc}"
        except Exception as exc:  # noqa: BLE001 - whatever it is, the other photos are done
            message = f"{photo}: {type(exc).__name__}: {exc}"
            _log.debug("%s", photo, exc_info=True)
        return PhotoResult(photo=str(photo), error=message), None

    def _segment(
        self, lanes: LanePool, photo: Path, target: Path
    ) -> tuple[PhotoResult, Segmentation]:
        settings = self._settings
        data = load_photo(photo, max_pixels=settings.max_pixels)
        with self._pixels.taken(pixels_of(data, photo)):
            frame = decode_photo(data, photo, max_pixels=settings.max_pixels)
            if self._is_bgr:
                frame = _swapped(frame)
            seg = lanes.segment(frame)
            suffix = OVERLAY_SUFFIXES[settings.overlay_format]
            overlay = target.with_name(f"{target.name}{suffix}")
            mask = target.with_name(f"{target.name}{MASK_SUFFIX}")
            draw = seg.plot if settings.legend else seg.overlay
            image = draw(frame, alpha=settings.alpha)
            _write_bgr(overlay, image if self._is_bgr else _swapped(image))
            seg.save(mask)
        result = PhotoResult(
            photo=str(photo),
            size_hw=(frame.shape[0], frame.shape[1]),
            classes=describe_classes(seg),
            unknown_share=round(float((seg.labels == seg.unknown).mean()), 6),
            overlay=str(overlay),
            mask=str(mask),
            times={stage: round(ms, 3) for stage, ms in seg.times.items()},
        )
        self.journal.append(result, data)
        return result, seg


def describe_classes(seg: Segmentation) -> tuple[dict[str, Any], ...]:
    """The classes that are present as a report lists them, largest first."""
    colours = palette(seg.names)
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


def _swapped(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The image with its first and last channel swapped in place."""
    import cv2

    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2BGR, dst=image), np.uint8)


def _write_bgr(path: Path, image: npt.NDArray[np.uint8]) -> None:
    import cv2

    settings = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if path.suffix == ".jpg" else []
    try:
        _, encoded = cv2.imencode(path.suffix, image, settings)
    except cv2.error as exc:
        raise SourceError(f"{path}: cannot be encoded: {exc.err}") from exc
    save_file(path, encoded.tobytes())


def _stems(photos: Sequence[Path]) -> Iterator[str]:
    """File stems; for photos that share one, folder and suffix are added to the name."""
    counts = Counter(photo.stem for photo in photos)
    names: set[str] = set()
    for photo in photos:
        stem = photo.stem if counts[photo.stem] == 1 else f"{photo.parent.name}_{photo.name}"
        if stem in names:
            digest = hashlib.sha256(os.fsencode(photo.resolve())).hexdigest()[:8]
            stem = f"{stem}_{digest}"
        names.add(stem)
        yield stem


def settings_key(engine: Engine, photos: PhotoSettings) -> str:
    """A key of everything but the photo that decides its output images."""
    vocabulary, config = engine.vocabulary, vars(engine.config)
    settings: list[Any] = [
        engine.bundle.to_manifest(),  # with the hash of every file
        engine.backend,
        engine.precision,
        {name: v for name, v in {**vars(photos), **config}.items() if name not in NOT_IN_KEY},
    ]
    if vocabulary is not None:
        settings += [vocabulary.names, vocabulary.phrases, vocabulary.phrase_classes.tolist()]
        for embeds in (vocabulary.embeds, *vocabulary.prompt_embeds.values()):
            settings.append(hashlib.sha256(embeds.tobytes()).hexdigest())
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Budget:
    """An amount that is shared by threads; who needs more than is left waits."""

    def __init__(self, amount: int) -> None:
        self._amount = self._left = amount
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, needed: int) -> Iterator[None]:
        """Hold so much for the time of a ``with`` block."""
        share = min(needed, self._amount)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= share)
            self._left -= share
        try:
            yield
        finally:
            with self._changed:
                self._left += share
                self._changed.notify_all()


JOURNAL = "zsseg_journal.jsonl"


@dataclass(frozen=True, kw_only=True)
class PhotoResult:
    """The outcome of one photo."""

    photo: str  # Its path as given
    # Height and width in pixels, None if it could not be read
    size_hw: tuple[int, int] | None = None
    # One {name, index, pixels, share, colour} per present class, largest first; colour is the
    # overlay's, as #rrggbb
    classes: tuple[dict[str, Any], ...] = ()
    unknown_share: float = 0.0  # Part of the photo that belongs to no class, in [0, 1]
    overlay: str | None = None  # Path of the overlay image
    mask: str | None = None  # Path of the label image
    times: dict[str, float] | None = None  # Milliseconds per stage
    error: str | None = None  # One line on what went wrong, or None
    resumed: bool = False  # True if an earlier run had done it


@dataclass(frozen=True, kw_only=True)
class _Record:
    key: str  # of the settings
    sha256: dict[str, str]  # of the files by their paths: the photo, its overlay and its mask
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
        damaged = 0
        for line in filter(None, lines):
            try:
                record = _parse(line)
            except (ValueError, RecursionError):
                damaged += 1
            else:
                if record.key == self._key:
                    self._records[record.result.photo] = record
        if damaged:
            _log.warning("%s: damaged lines are skipped: %d", self._path, damaged)

    def finished(self, photo: Path) -> PhotoResult | None:
        """An earlier run's result, if the photo and both images are still the same files."""
        record = self._records.get(str(photo))
        if record is None:
            return None
        try:
            same = all(sha256_of(Path(path)) == sha256 for path, sha256 in record.sha256.items())
        except OSError:
            return None
        return replace(record.result, resumed=True) if same else None

    def append(self, result: PhotoResult, photo: bytes) -> None:
        """Note that a photo is finished."""
        try:
            images = filter(None, (result.overlay, result.mask))
            sha256 = {path: sha256_of(Path(path)) for path in images}
            sha256[result.photo] = hashlib.sha256(photo).hexdigest()
            raw = schema.encode(_Record(key=self._key, sha256=sha256, result=result))
            # Names that are not valid Unicode are escaped, so the line always is.
            line = json.dumps({"record": raw, "sha256": _digest(raw)}).encode("ascii")
            with self._writing, self._path.open("a+b") as stream:
                # A line that an interrupted run left unfinished must not swallow this one.
                end = stream.seek(0, os.SEEK_END)
                stream.seek(max(end - 1, 0))
                begin = b"" if stream.read(1) in (b"", b"\n") else b"\n"
                stream.write(begin + line + b"\n")
        except OSError as exc:
            raise SourceError(
                f"{self._path}: cannot be written: {exc.strerror}. The images of {result.photo} "
                "were written, but --resume will not find them."
            ) from exc


def _parse(line: bytes) -> _Record:
    content = json.loads(line.decode("utf-8"))
    if not isinstance(content, Mapping) or content.get("sha256") != _digest(content.get("record")):
        raise ValueError("expected a record and its SHA-256")
    return schema.decode(_Record, content["record"], "record")


def _digest(raw: Any) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode("ascii")).hexdigest()


KINDS = ("coco", "geojson", "labelme")
COCO_FILE = "coco.json"
_TOLERANCE = 1.5  # pixels, of labelme's outlines, which are meant to be corrected by hand


class AnnotationFiles:
    """Writes ``STEM.geojson`` or labelme's ``STEM.json`` per photo, or one ``coco.json``."""

    def __init__(self, kind: str, out_dir: Path, names: Sequence[str]) -> None:
        check_choice("kind", kind, KINDS)
        self._kind, self._out_dir, self._names = kind, out_dir, tuple(names)
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, result: PhotoResult, seg: Segmentation | None) -> Path | None:
        """Take a photo's labels; those of an earlier one are read from its label image."""
        if result.mask is None:
            return None
        if seg is None:
            labels = read_label_png(result.mask)
            seg = Segmentation(labels=labels, names=self._names, vocabulary_version=0)
        stem = Path(result.mask.removesuffix(MASK_SUFFIX))
        if self._kind == "coco":
            number, (height, width) = len(self._images) + 1, seg.labels.shape
            image = {"id": number, "file_name": result.photo, "width": width, "height": height}
            self._images.append(image)
            for annotation in seg.to_coco_rle(image_id=number):
                self._annotations.append({**annotation, "id": len(self._annotations) + 1})
            return None
        if self._kind == "geojson":
            return _write(stem.with_name(f"{stem.name}.geojson"), seg.to_geojson())
        photo = os.path.relpath(result.photo, stem.parent)
        return _write(
            stem.with_name(f"{stem.name}.json"), seg.to_labelme(photo, tolerance=_TOLERANCE)
        )

    def finish(self) -> Path | None:
        """Write what belongs to all photos together; returns its path, if any."""
        if self._kind != "coco":
            return None
        categories = [{"id": number, "name": name} for number, name in enumerate(self._names, 1)]
        photos = [Path(image["file_name"]).absolute() for image in self._images]
        folder = os.path.commonpath([photo.parent for photo in photos]) if photos else ""
        for image, photo in zip(self._images, photos, strict=True):
            image["file_name"] = photo.relative_to(folder).as_posix()
        content: dict[str, Any] = {"info": {}, "licenses": [], "categories": categories}
        content |= {"images": self._images, "annotations": self._annotations}
        return _write(self._out_dir / COCO_FILE, content)


def _write(path: Path, content: Any) -> Path:
    save_file(path, (json_text(content) + "\n").encode())
    return path
