"""Any folder of images and masks with a list of classes: your own photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.common.files import is_file, is_folder
from zsseg_rt.errors import DatasetError
from zsseg_rt.evaluation.datasets.base import LabelMap, ignore_label
from zsseg_rt.evaluation.datasets.file_dataset import FileDataset, FilePair, ValueTable
from zsseg_rt.evaluation.datasets.layout import Layout, pairs_of_folders
from zsseg_rt.evaluation.datasets.reading import Mask, read_colour_mask
from zsseg_rt.evaluation.datasets.splits import ClassTable

LAYOUT = Layout(
    title="a folder of images and masks",
    verb="Put",
    download="your own photos and masks there (docs/datasets.md)",
    tree=("images/", "masks/", "classes.txt"),
)

UNSEEN_MARK = "[unseen]"


def folder(
    root: str | Path,
    split: str = "all",
    *,
    class_names: Sequence[str] | None = None,
    unseen: Sequence[str] | None = None,
    zero_is_unlabelled: bool = False,
) -> FileDataset:
    """Pictures in ``images/`` with masks of the same names in ``masks/`` (PNG).

    A mask holds the line number of a pixel's class in ``classes.txt``, from 0, and 255 (65535 in
    16-bit masks) where nothing is annotated. With a file ``colours.txt`` (``R G B name`` on each
    line, as in CamVid's ``label_colors.txt``), masks hold colours instead; colours whose name is
    not a class mean not annotated.
    """
    place = LAYOUT.find(root)
    table = _table(place, class_names, int(zero_is_unlabelled)).with_unseen(unseen)
    pairs = LAYOUT.check_pairs(_pairs(place, split), split, place, partial=True)
    name = f"{place.resolve().name}/{split}"
    colours_file = place / "colours.txt"
    if colours_file.exists():
        colours = _ColourTable(table.names, _read_colours(colours_file), colours_file)
        return FileDataset(name, table, pairs, colours, read_colour_mask)
    ignored = {255, 65535} - set(table.values) | ({0} if zero_is_unlabelled else set())
    return FileDataset(name, table, pairs, ValueTable(table.values, sorted(ignored)))


def _pairs(place: Path, split: str) -> list[FilePair]:
    images, masks = place / "images", place / "masks"
    if split != "all" and is_folder(images / split):
        return pairs_of_folders(LAYOUT, images / split, masks / split, recursive=True)
    pairs = pairs_of_folders(LAYOUT, images, masks, recursive=True)
    if split == "all":
        return pairs
    list_file = place / f"{split}.txt"
    if not is_file(list_file):
        raise DatasetError(
            f"split: expected 'all', a folder {images / split} or a list {list_file}, got "
            f"{split!r} with neither. Write the names of its images there, one per line."
        )
    by_name = {pair.name: pair for pair in pairs} | {
        pair.image.relative_to(images).as_posix(): pair for pair in pairs
    }
    names = _lines(list_file)
    missing = [name for name in names if name not in by_name]
    if missing:
        raise DatasetError(
            f"{list_file}: expected names of images in {images}, got {missing[0]!r} "
            f"({len(missing)} such). Fix the list or add the images."
        )
    return [by_name[name] for name in names]


def _table(place: Path, class_names: Sequence[str] | None, first_value: int) -> ClassTable:
    lines = _lines(LAYOUT.require(place / "classes.txt")) if class_names is None else class_names
    names = tuple(line.removesuffix(UNSEEN_MARK).strip() for line in lines)
    for index, name in enumerate(names):
        if not name or name in names[:index]:
            what = "an empty one" if not name else f"{name!r} twice"
            raise DatasetError(f"class_names: expected different names, got {what}.")
    seen = tuple(i for i, line in enumerate(lines) if not line.endswith(UNSEEN_MARK))
    if not seen:
        raise DatasetError("class_names: expected at least one seen class, got none.")
    values = tuple(range(first_value, first_value + len(names)))
    return ClassTable(names, values, seen, source=str(place))


def _lines(path: Path) -> list[str]:
    """Lines that are not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: expected UTF-8, got a bad byte at position {error.start}. Save it as UTF-8."
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _read_colours(path: Path) -> dict[tuple[int, int, int], str]:
    colours: dict[tuple[int, int, int], str] = {}
    for line in _lines(path):
        parts = line.split(maxsplit=3)
        values = [int(part) for part in parts[:3] if part.isdecimal() and int(part) < 256]
        if len(parts) != 4 or len(values) != 3:
            raise DatasetError(
                f"{path}: expected lines 'R G B name' with 0..255, got {line!r}. Fix it."
            )
        colours[values[0], values[1], values[2]] = parts[3].strip()
    return colours


class _ColourTable:
    """Turns colours into class indices."""

    def __init__(
        self, names: Sequence[str], colours: dict[tuple[int, int, int], str], path: Path
    ) -> None:
        indices = {name: index for index, name in enumerate(names)}
        without = [name for name in names if name not in colours.values()]
        if without:
            raise DatasetError(
                f"{path}: expected a colour for every class, got none for {without[0]!r}. Add it."
            )
        self._ignore = ignore_label(len(names))
        codes = np.array([(r << 16) | (g << 8) | b for r, g, b in colours], np.int64)
        labels = np.array([indices.get(name, self._ignore) for name in colours.values()])
        order = np.argsort(codes)
        self._codes = codes[order]
        self._labels: NDArray[Any] = labels[order].astype(label_dtype(len(names)))
        self._path = path

    def __call__(self, mask: Mask, path: Path) -> LabelMap:
        wide = mask.astype(np.int64)
        codes: NDArray[np.int64] = (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]
        places = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        unknown = np.unique(codes[self._codes[places] != codes])
        if len(unknown):
            shown = ", ".join(f"{c >> 16} {c >> 8 & 255} {c & 255}" for c in unknown[:8].tolist())
            raise DatasetError(
                f"{path}: expected colours of {self._path.name}, got {shown}. Fix the mask, or "
                "name the missing colours."
            )
        labels: LabelMap = self._labels[places]
        return labels
