"""Any folder of images, with masks and a list of classes or without: your own photos."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

import numpy as np

from zsseg_rt.common.files import is_file, is_folder
from zsseg_rt.errors import DatasetError
from zsseg_rt.evaluation.datasets.base import ClassTable, Sample, ignore_label
from zsseg_rt.evaluation.datasets.files import (
    FileDataset,
    FilePair,
    LabelTable,
    Layout,
    pairs_of_folders,
    pictures_below,
    read_colour_mask,
    read_mask,
    read_picture,
)
from zsseg_rt.photos import SUFFIXES
from zsseg_rt.text.name_lists import UNSEEN_MARK, NameList, read_lines, read_name_list

LAYOUT = Layout(
    title="a folder of images and masks",
    verb="Put",
    download="your own photos and masks there (docs/datasets.md)",
    tree=("images/", "masks/", "classes.txt"),
)

_MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")  # which lose nothing
_SAMPLED = 16  # masks that are looked at when a folder is opened
_ADVICE = (
    "Fix the mask, name the missing classes, or give --option (or data.options) values=[0,128]: "
    "the value of each class; zero_is_unlabelled=true if masks count from 1."
)
_log = logging.getLogger(__name__)


def folder(
    root: str | Path,
    split: str = "all",
    *,
    class_names: Sequence[str] | None = None,
    unseen: Sequence[str] | None = None,
    zero_is_unlabelled: bool = False,
    values: Sequence[int] | None = None,
) -> FileDataset:
    """Images in ``images/`` with masks of the same names in ``masks/``: PNG, TIFF or BMP.

    A mask holds the line number of a pixel's class in ``classes.txt``, from 0 (or the number in
    front of its name, or one of ``values``), and 255 (65535 in 16-bit masks) where nothing is
    annotated. With a file ``colours.txt`` (``R G B name`` on each
    line, as in CamVid's ``label_colors.txt``), masks hold colours instead; colours whose name is
    not a class mean not annotated.
    """
    place = LAYOUT.find(root)
    listed = _with_values(_listed(place, class_names), values, int(zero_is_unlabelled))
    table = _table(listed).with_unseen(unseen)
    pairs = LAYOUT.check_pairs(_pairs(place, split), split, place, partial=True)
    name = f"{place.resolve().name}/{split}"
    colours_file = place / "colours.txt"
    if listed.colours or colours_file.exists():
        by_colour = {rgb: name for name, rgb in listed.colours} or _read_colours(colours_file)
        return FileDataset(
            name, table, pairs, _colours(table, by_colour, colours_file), read_colour_mask
        )
    unlisted = {number for number in listed.ignored if number >= 0}
    ignored = ({255, 65535} - set(table.values)) | unlisted | ({0} if zero_is_unlabelled else set())
    _remark_on_binary_masks(name, table, pairs)
    indices = {value: index for index, value in enumerate(table.values)}
    labels_of = LabelTable(indices, len(table.names), sorted(ignored), advice=_ADVICE)
    return FileDataset(name, table, pairs, labels_of)


def _pairs(place: Path, split: str) -> list[FilePair]:
    images, masks = place / "images", place / "masks"
    if split != "all" and is_folder(images / split):
        return pairs_of_folders(LAYOUT, images / split, masks / split, _MASK_SUFFIXES)
    pairs = pairs_of_folders(LAYOUT, images, masks, _MASK_SUFFIXES)
    if split == "all":
        return pairs
    list_file = place / f"{split}.txt"
    if not is_file(list_file):
        raise DatasetError(
            f"split: expected 'all', a folder {images / split} or a list {list_file}, got "
            f"{split!r} with neither. Write the names of its images there, one per line."
        )
    by_name = {pair.name: pair for pair in pairs} | {
        normalize("NFC", pair.image.relative_to(images).as_posix()): pair for pair in pairs
    }
    names = [normalize("NFC", line) for line in read_lines(list_file, DatasetError) if line]
    missing = [name for name in names if name not in by_name]
    if missing:
        raise DatasetError(
            f"{list_file}: expected names of images in {images}, got {missing[0]!r} "
            f"({len(missing)} such). Fix the list or add the images."
        )
    return [by_name[name] for name in names]


def _listed(place: Path, class_names: Sequence[str] | None) -> NameList:
    if class_names is None:
        return read_name_list(LAYOUT.require(place / "classes.txt"), DatasetError, with_ids=True)
    names = tuple(name.removesuffix(UNSEEN_MARK).strip() for name in class_names)
    unseen = tuple(i for i, name in enumerate(class_names) if name.endswith(UNSEEN_MARK))
    return NameList(names=names, ids=tuple(range(len(names))), unseen=unseen)


def _with_values(listed: NameList, values: Sequence[int] | None, first_value: int) -> NameList:
    if values is None and listed.is_numbered:
        return listed
    if values is None:
        ids, ignored = ([n + first_value for n in ns] for ns in (listed.ids, listed.ignored))
        return replace(listed, ids=tuple(ids), ignored=tuple(ignored))
    is_right = len(set(values)) == len(values) and all(0 <= value < 1 << 16 for value in values)
    if len(values) != len(listed.names) or not is_right:
        raise DatasetError(
            f"values: expected {len(listed.names)} different numbers from 0 to 65535, one for each "
            f"of {', '.join(listed.names[:5])}, got {list(values)[:8]}."
        )
    return replace(listed, ids=tuple(values), ignored=(), is_numbered=True)


def _remark_on_binary_masks(name: str, table: ClassTable, pairs: Sequence[FilePair]) -> None:
    """Say that 255 is not annotated where masks hold nothing but 0 and 255."""
    values: set[int] = set()
    for pair in pairs[:: -(-len(pairs) // _SAMPLED)]:
        try:
            values |= set(np.unique(read_mask(pair.mask)).tolist())
        except DatasetError:  # which whoever reads it is told
            continue
    top = max(values, default=0)
    if top in (255, 65535) and values <= {0, top} and top not in table.values:
        _log.warning(
            "%s: masks hold nothing but 0 and %d, and %d is not annotated, so that all pixels are "
            "of %r. If both are classes, give --option (or data.options) values=[0,%d]",
            name, top, top, table.names[0], top,
        )  # fmt: skip


def _table(listed: NameList) -> ClassTable:
    names: set[str] = set()
    for name in listed.names:
        if not name or name in names:
            what = "an empty one" if not name else f"{name!r} twice"
            raise DatasetError(f"class_names: expected different names, got {what}.")
        names.add(name)
    seen = tuple(sorted(set(range(len(listed.names))) - set(listed.unseen)))
    if not seen:
        raise DatasetError("class_names: expected at least one seen class, got none.")
    return ClassTable(listed.names, listed.ids, seen)


def _read_colours(path: Path) -> dict[tuple[int, int, int], str]:
    colours: dict[tuple[int, int, int], str] = {}
    for line in filter(None, read_lines(path, DatasetError)):
        parts = line.split(maxsplit=3)
        values = [int(part) for part in parts[:3] if part.isdecimal() and int(part) < 256]
        if len(parts) != 4 or len(values) != 3:
            raise DatasetError(
                f"{path}: expected lines 'R G B name' with 0..255, got {line!r}. Fix it."
            )
        colours[values[0], values[1], values[2]] = parts[3].strip()
    return colours


def _colours(table: ClassTable, colours: dict[tuple[int, int, int], str], path: Path) -> LabelTable:
    """The labels of colours; those whose name is not a class are not annotated."""
    codes = {red << 16 | green << 8 | blue: name for (red, green, blue), name in colours.items()}
    places = {name: index for index, name in enumerate(table.names)}
    if without := places.keys() - codes.values():
        raise DatasetError(
            f"{path}: expected a colour for every class, got none for {min(without)!r}. Add it."
        )
    return LabelTable(
        {code: places[name] for code, name in codes.items() if name in places},
        len(table.names),
        [code for code, name in codes.items() if name not in places],
        colours=True,
        advice=f"Fix the mask, or name the missing colours in {path.name}.",
    )


class PhotoDataset:
    """All images below a folder, for objectives that need no annotation; there are no classes."""

    def __init__(self, root: str | Path, split: str = "all") -> None:
        place = Path(root).expanduser()
        folder = place if split == "all" else place / split
        if not is_folder(folder):
            raise DatasetError(
                f"{folder}: expected a folder of photos, got none. Check data.root, or set "
                "data.split to 'all' to take everything below it."
            )
        self._paths = pictures_below(folder)
        if not self._paths:
            raise DatasetError(
                f"{folder}: expected photos ({', '.join(SUFFIXES)}) in it or in folders "
                "below it, got none. Check the folder."
            )
        self._folder = folder
        self.name = f"{place.resolve().name}/{split}"
        self.class_names: tuple[str, ...] = ()
        self.seen: tuple[int, ...] = ()
        self.ignore_label = ignore_label(0)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        """Read one image; all its labels are ``ignore_label``."""
        relative = self._paths[index]
        image = read_picture(self._folder / relative)
        labels = np.full(image.shape[:2], self.ignore_label, np.uint8)
        return Sample(image=image, labels=labels, name=relative)
