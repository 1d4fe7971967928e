"""Find the files of a data set below a folder, and say what to download if they are missing."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zsseg_rt.common.files import is_folder
from zsseg_rt.errors import DatasetError
from zsseg_rt.evaluation.datasets.file_dataset import FilePair
from zsseg_rt.photos import SUFFIXES


@dataclass(frozen=True)
class Layout:
    """Where a data set comes from and how it is laid out in its folder.

    Attributes:
        title: Its name in messages.
        download: What to download, and from where.
        tree: Paths that belong in the root.
        folders: Where below a given folder the root may be, besides the folder itself.
        counts: Number of images of each split, as published.
        verb: What to do with ``download``.
    """

    title: str
    download: str
    tree: tuple[str, ...]
    folders: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    verb: str = "Download"

    def find(self, root: str | Path, first: str | None = None) -> Path:
        """The data set's root: the given folder, or one of ``folders`` below it."""
        given = Path(root).expanduser()
        first = first or self.tree[0].split("/")[0]
        for candidate in (given, *(given / folder for folder in self.folders)):
            if is_folder(candidate / first):
                return candidate
        state = f"no folder {first}/ in it" if is_folder(given) else "no such folder"
        raise DatasetError(
            f"root: expected {self.title} in {given}, got {state}. {self.instructions}"
        )

    def require(self, path: Path) -> Path:
        """Return a path that must exist."""
        if not path.exists():
            raise DatasetError(
                f"{path}: expected this part of {self.title}, got nothing. {self.instructions}"
            )
        return path

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
        """What to do if files are missing."""
        return f"{self.verb} {self.download}; the root holds {', '.join(self.tree)}."


def pairs_of_list(layout: Layout, list_file: Path, images: Path, masks: Path) -> list[FilePair]:
    """The images a list names, JPEG files; masks are PNG files of the same names."""
    lines = layout.require(list_file).read_text(encoding="utf-8").split("\n")
    names = [line.split()[0] for line in lines if line.strip()]
    found_images = _file_names(layout.require(images))
    found_masks = _file_names(layout.require(masks))
    for kind, folder, found, suffix in (
        ("images", images, found_images, ".jpg"),
        ("masks", masks, found_masks, ".png"),
    ):
        missing = [name + suffix for name in names if name + suffix not in found]
        if missing:
            raise DatasetError(
                f"{folder}: expected the {len(names)} {kind} that {list_file.name} lists, got all "
                f"but {_some(missing)}. {layout.instructions}"
            )
    return [FilePair(name, images / f"{name}.jpg", masks / f"{name}.png") for name in names]


def pairs_of_folders(
    layout: Layout,
    images: Path,
    masks: Path,
    *,
    image_suffix: str = "",
    mask_suffix: str | tuple[str, ...] = ".png",
    recursive: bool = False,
) -> list[FilePair]:
    """All images of a folder, by composed name (NFC), and the masks of the same names."""
    suffixes = (image_suffix.lower(),) if image_suffix else SUFFIXES
    found_images = _by_stem(layout.require(images), suffixes, recursive)
    endings = (mask_suffix,) if isinstance(mask_suffix, str) else mask_suffix
    found_masks = _by_stem(layout.require(masks), tuple(map(str.lower, endings)), recursive)
    for kind, folder, other, there, here in (
        ("image", images, f"mask (*{', *'.join(endings)})", found_masks, found_images),
        ("mask", masks, "image", found_images, found_masks),
    ):
        alone = sorted(here.keys() - there.keys())
        if alone:
            raise DatasetError(
                f"{folder}: expected one {other} for every {kind}, got none for {_some(alone)}. "
                f"{layout.instructions}"
            )
    return [FilePair(stem, found_images[stem], found_masks[stem]) for stem in sorted(found_images)]


def pictures_below(folder: Path) -> list[str]:
    """Paths of all images in a folder and its subfolders, relative to it, sorted."""
    names = _files_below(str(folder), recursive=True)
    return sorted(name for name in names if name.lower().endswith(SUFFIXES))


def _file_names(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}


def _by_stem(folder: Path, suffixes: tuple[str, ...], recursive: bool) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for relative in _files_below(str(folder), recursive):
        suffix = next((suffix for suffix in suffixes if relative.lower().endswith(suffix)), None)
        if suffix is None:
            continue
        stem = unicodedata.normalize("NFC", relative[: -len(suffix)])
        if stem in found:
            raise DatasetError(
                f"{folder}: expected one image called {stem}, got {found[stem].name} and "
                f"{relative}. Remove one."
            )
        found[stem] = folder / relative
    return found


def _files_below(folder: str, recursive: bool, prefix: str = "") -> Iterator[str]:
    """Paths of the files that are not hidden, relative to the first folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                yield prefix + entry.name
            elif recursive:
                yield from _files_below(entry.path, True, f"{prefix}{entry.name}/")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
