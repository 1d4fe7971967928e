"""Images and masks in files: find them below a folder, read them, and say what is wrong."""

from __future__ import annotations

import io
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.common.extras import needs_extra
from zsseg_rt.common.files import is_folder
from zsseg_rt.errors import DatasetError, SourceError
from zsseg_rt.evaluation.datasets.base import (
    ClassTable,
    LabelMap,
    Sample,
    Verification,
    ignore_label,
    verify_dataset,
)
from zsseg_rt.photos import SUFFIXES, check_picture, load_photo, read_photo

Mask = NDArray[np.uint8] | NDArray[np.uint16]

_UNKNOWN = 65534
_MASK_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B", "I;16L", "I")


def read_picture(path: Path) -> NDArray[np.uint8]:
    """Read a photo, rotated as its EXIF data says: RGB, uint8 [H, W, 3]."""
    try:
        return read_photo(path)
    except SourceError as error:
        raise DatasetError(str(error)) from error


def read_mask(path: Path) -> Mask:
    """Read a mask of one channel, or of equal ones, without its palette: uint8 or uint16 [H, W]."""
    values, mode = _read(path)
    greys = 1 if mode == "LA" else 3  # and no alpha
    if mode not in _MASK_MODES or (values.ndim == 3 and np.ptp(values[..., :greys], axis=-1).any()):
        raise DatasetError(
            f"{path}: expected a mask with one channel (grey or palette, 8 or 16 bits), got mode "
            f"{mode}. Save class indices; for colours, a folder takes a colours.txt."
        )
    values = values[..., 0] if values.ndim == 3 else values
    if values.dtype == bool:  # one bit per pixel
        return values.astype(np.uint8)
    if values.dtype in (np.uint8, np.uint16):
        return values
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise DatasetError(
            f"{path}: expected 16-bit values, got {values.min()}..{values.max()}. "
            "Save the mask with class indices."
        )
    return values.astype(np.uint16)


def read_colour_mask(path: Path) -> NDArray[np.uint8]:
    """Read a mask of colours: RGB, uint8 [H, W, 3]."""
    return _read(path, "RGB")[0]


def _read(path: Path, mode: str | None = None) -> tuple[NDArray[Any], str]:
    """Pixels of an image and Pillow's word for what they are; None takes them as they are."""
    with needs_extra("data", "to read masks"):
        from PIL import Image
    try:
        data = load_photo(path)
        check_picture(data)
        image: Any = Image.open(io.BytesIO(data))
        return np.array(image if mode in (None, image.mode) else image.convert(mode)), image.mode
    except SourceError as error:
        raise DatasetError(str(error)) from error
    except (ValueError, Image.DecompressionBombError) as error:  # Pillow's limit is below ours
        raise DatasetError(f"{path}: {error}") from error
    except (OSError, SyntaxError) as error:
        raise DatasetError(
            f"{path}: expected a whole file, got one that is cut off or damaged. Download it again."
        ) from error


@dataclass(frozen=True)
class FilePair:
    """An image, its mask, and what both are called."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Layout:
    """Where a data set comes from and how it is laid out in its folder."""

    title: str  # in messages
    download: str  # what, and from where
    tree: tuple[str, ...]  # paths that belong in the root
    folders: tuple[str, ...] = ()  # where below a given folder the root may be, besides itself
    counts: Mapping[str, int] = field(default_factory=dict)  # images of each split, as published
    splits: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """Folder of images, folder of masks and, if only some count, list of names; one or several."""
    image_suffix: str = ""  # empty: any image's
    mask_suffixes: tuple[str, ...] = (".png",)  # the first is taken where there is one
    ignored: tuple[int, ...] = ()  # values of pixels without annotation, unless a class's
    verb: str = "Download"  # what to do with ``download``

    def find(self, root: str | Path, first: str | None = None) -> Path:
        """The data set's root: the given folder, or one of ``folders`` below it."""
        place = Path(root).expanduser()
        first = first or self.tree[0].split("/")[0]
        for candidate in (place, *(place / folder for folder in self.folders)):
            if is_folder(candidate / first):
                return candidate
        state = f"no folder {first}/ in it" if is_folder(place) else "no such folder"
        raise DatasetError(
            f"root: expected {self.title} in {place}, got {state}. {self.instructions}"
        )

    def require(self, path: Path) -> Path:
        """Return a path that must exist."""
        if not path.exists():
            raise DatasetError(
                f"{path}: expected this part of {self.title}, got nothing. {self.instructions}"
            )
        return path

    def pairs(self, folder: Path, split: str, partial: bool) -> Sequence[FilePair]:
        """The images and masks of a split below the root."""
        pairs: list[FilePair] = []
        for images, masks, *listed in self.splits[split]:
            places = folder / images, folder / masks
            if listed:
                pairs += pairs_of_list(self, folder / listed[0], *places)
                continue
            preferred, *other = self.mask_suffixes
            if other and not any(self.require(places[1]).glob(f"*{preferred}")):
                preferred = other[0]
            pairs += pairs_of_folders(self, *places, (preferred,))
        return self.check_pairs(pairs, split, folder, partial)

    def check_pairs(
        self, pairs: Sequence[FilePair], split: str, where: Path, partial: bool
    ) -> Sequence[FilePair]:
        """Refuse an empty or half-downloaded split."""
        expected = self.counts.get(split, 0)
        if not pairs or (len(pairs) < expected and not partial):
            hint = "To use only these, pass partial=True (--option partial=true). " if pairs else ""
            raise DatasetError(
                f"{where}: expected {expected or 'some'} images of {self.title} {split}, got "
                f"{len(pairs)}. {hint}{self.instructions}"
            )
        return pairs

    @property
    def instructions(self) -> str:
        """Advice if files are missing."""
        return f"{self.verb} {self.download}; the root holds {', '.join(self.tree)}."


def pairs_of_list(layout: Layout, list_file: Path, images: Path, masks: Path) -> list[FilePair]:
    """The images a list names, JPEG files; masks are PNG files of the same names."""
    lines = layout.require(list_file).read_text(encoding="utf-8").split("\n")
    names = [line.split()[0] for line in lines if line.strip()]
    for kind, folder, suffix in (("images", images, ".jpg"), ("masks", masks, ".png")):
        there = set(os.listdir(layout.require(folder)))  # noqa: PTH208 - names suffice
        missing = [name + suffix for name in names if name + suffix not in there]
        if missing:
            raise DatasetError(
                f"{folder}: expected the {len(names)} {kind} that {list_file.name} lists, got all "
                f"but {_some(missing)}. {layout.instructions}"
            )
    return [FilePair(name, images / f"{name}.jpg", masks / f"{name}.png") for name in names]


def pairs_of_folders(
    layout: Layout, images: Path, masks: Path, mask_suffixes: tuple[str, ...]
) -> list[FilePair]:
    """All images of a folder, by composed name (NFC), and the masks of the same names."""
    suffixes = (layout.image_suffix.lower(),) if layout.image_suffix else SUFFIXES
    photos = _by_stem(layout.require(images), suffixes)
    endings = tuple(map(str.lower, mask_suffixes))
    labels = _by_stem(layout.require(masks), endings)
    for kind, folder, other, alone in (
        ("image", images, f"mask (*{', *'.join(mask_suffixes)})", photos.keys() - labels.keys()),
        ("mask", masks, "image", labels.keys() - photos.keys()),
    ):
        if alone:
            raise DatasetError(
                f"{folder}: expected one {other} for every {kind}, got none for "
                f"{_some(sorted(alone))}. {layout.instructions}"
            )
    return [FilePair(stem, photos[stem], labels[stem]) for stem in sorted(photos)]


def pictures_below(folder: Path) -> list[str]:
    """Paths of all images in a folder and its subfolders, relative to it, sorted."""
    names = _files_below(folder)
    return sorted(name for name in names if name.lower().endswith(SUFFIXES))


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for relative in _files_below(folder):
        suffix = next((suffix for suffix in suffixes if relative.lower().endswith(suffix)), None)
        if suffix is None:
            continue
        stem = unicodedata.normalize("NFC", relative[: -len(suffix)])
        if stem in paths:
            raise DatasetError(
                f"{folder}: expected one image called {stem}, got {paths[stem].name} and "
                f"{relative}. Remove one."
            )
        paths[stem] = folder / relative
    return paths


def _files_below(folder: Path) -> list[str]:
    """Paths of the files that are not hidden, nor in hidden folders, relative to the folder."""
    paths = []
    for place, folders, names in os.walk(folder, followlinks=True):
        inner = Path(place).relative_to(folder).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        paths += [prefix + name for name in names if not name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith(".")]
    return paths


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


class LabelTable:
    """Turns values of a mask, or RGB colours as numbers of 24 bits, into class indices."""

    def __init__(
        self,
        indices: Mapping[int, int],  # by value; several may be of one class
        num_classes: int,
        ignored: Iterable[int] = (),  # values of pixels without annotation, but for a class's
        *,
        colours: bool = False,
        advice: str = "Fix the mask, or name the missing classes.",
    ) -> None:
        ignored, self._colours, self._advice = tuple(ignored), colours, advice
        self._expected = f"colours of the {num_classes} classes"
        if not colours:
            self._expected = (
                f"values {_ranges(indices)} for the {num_classes} classes and {_ranges(ignored)} "
                "for unannotated pixels"
            )
        self._dtype = label_dtype(num_classes)
        self._table = np.full(1 << (24 if colours else 16), _UNKNOWN, np.uint16)
        self._table[list(ignored)] = ignore_label(num_classes)
        self._table[list(indices)] = list(indices.values())

    def __call__(self, mask: Mask, path: Path) -> LabelMap:
        """The class indices of a mask."""
        values: NDArray[Any] = mask
        if self._colours:
            red, green, blue = np.moveaxis(mask.astype(np.int32), 2, 0)
            values = red << 16 | green << 8 | blue
        labels: NDArray[Any] = self._table[values]
        if labels.size and labels.max() >= _UNKNOWN:
            unknown = np.unique(values[labels == _UNKNOWN])[:8].tolist()
            if self._colours:
                unknown = [f"{n >> 16} {n >> 8 & 255} {n & 255}" for n in unknown]
            if unknown:
                raise DatasetError(
                    f"{path}: expected {self._expected}, got {', '.join(map(str, unknown))}. "
                    f"{self._advice}"
                )
        return labels.astype(self._dtype, copy=False)


class FileDataset:
    """Images and masks in files; a :class:`~zsseg_rt.evaluation.datasets.SegmentationDataset`."""

    def __init__(
        self,
        name: str,
        table: ClassTable,
        pairs: Sequence[FilePair],
        labels_of: Callable[[Mask, Path], LabelMap],
        read: Callable[[Path], Mask] = read_mask,
    ) -> None:
        self.name = name
        self.table = table
        self.class_names = table.names
        self.seen = table.seen
        self.ignore_label = ignore_label(len(table.names))
        self.pairs = tuple(pairs)
        self._labels_of = labels_of
        self._read = read

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Read one image and its labels."""
        pair = self.pairs[index]
        image = read_picture(pair.image)
        mask = self._read(pair.mask)
        if mask.shape[:2] != image.shape[:2]:
            raise DatasetError(
                f"{pair.mask}: expected the {image.shape[1]}x{image.shape[0]} pixels of "
                f"{pair.image.name}, got {mask.shape[1]}x{mask.shape[0]}. Make both the same size; "
                "a photo with an EXIF rotation counts as rotated."
            )
        return Sample(image=image, labels=self._labels_of(mask, pair.mask), name=pair.name)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> Verification:
        """Read every image and count every class."""
        return verify_dataset(self, progress)


def _ranges(values: Iterable[int]) -> str:
    """``0..3, 7`` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    shown = [str(low) if low == high else f"{low}..{high}" for low, high in runs[:6]]
    return ", ".join(shown + ["..."] * (len(runs) > 6)) or "none"
