"""Read a list of class names from a file: one reader for every file of names."""

from __future__ import annotations

import codecs
import itertools
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.schema import check_plain_text
from zsseg_rt.errors import ZssegError
from zsseg_rt.text.class_names import split_synonyms

_log = logging.getLogger(__name__)

UNSEEN_MARK = "[unseen]"
# What tools call pixels that are of no class: labelme, Cityscapes, CamVid, CVAT.
NO_CLASS = frozenset(
    {"__ignore__", "_background_", "dontcare", "don't care", "ignore", "ignored", "unlabeled",
     "unlabelled", "void"}
)  # fmt: skip
_NUMBERED = re.compile(r"(\d{1,6})(?:\s*[:;,.)=\t]\s*|\s+)(.+)")
_CVAT = re.compile(r"(.+?):(\d{1,3}),(\d{1,3}),(\d{1,3}):[^:]*:[^:]*")


@dataclass(frozen=True, kw_only=True)
class NameList:
    """The classes that a file names."""

    names: tuple[str, ...]  # One text per class; commas separate synonyms
    # What masks call each class, or the row of a table: its line from 0, or its number
    ids: tuple[int, ...]
    ignored: tuple[int, ...] = ()  # Ids of lines that name no class, such as void
    unseen: tuple[int, ...] = ()  # Which names end with [unseen], indices
    is_numbered: bool = False  # Whether ids stand in the file
    # Name and RGB of every line of CVAT's labelmap.txt; else empty
    colours: tuple[tuple[str, tuple[int, int, int]], ...] = ()

    @property
    def groups(self) -> list[str | list[str]]:
        """The classes as ``Engine.set_classes`` takes them."""
        return [group if len(group) > 1 else group[0] for group in split_synonyms(self.names)]

    def pick(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The classes' rows of a table [N, D] with a row for every line of the list."""
        ids = sorted((*self.ids, *self.ignored))
        if ids != list(range(ids[0], ids[0] + len(rows))):
            raise ValueError(f"expected a row for each of {len(ids)} names, got {len(rows)} rows")
        return np.take(rows, np.array(self.ids, int) - ids[0], axis=0)


def read_name_list(path: Path, error: type[ZssegError], *, with_ids: bool) -> NameList:
    """Read a file of class names: lines, a JSON list, or CVAT's; docs/classes.md has the rules."""
    lines = [re.split(r"\s#", line)[0].rstrip() for line in read_lines(path, error)]
    if lines and lines[0].startswith("["):
        lines = _json_lines("\n".join(lines), path, error)
    entries = [(number, line) for number, line in enumerate(lines, 1) if line and line[0] != "#"]
    if not entries:
        raise error(f"{path}: expected one class name per line, got none. Write them there.")
    for number, line in entries:
        check_plain_text(line.replace("\t", " "), f"{path}: line {number}")
    if all(_CVAT.fullmatch(line) for _, line in entries):
        return _cvat_list(path, [line for _, line in entries])
    numbers, texts = _numbers(entries, path, error)
    if with_ids and not numbers and len(entries) < len(lines):
        odd = next(n for n, line in enumerate(lines, 1) if not line or line[0] == "#")
        what = f"the comment {lines[odd - 1]!r}" if lines[odd - 1] else "an empty line"
        raise error(
            f"{path}: line {odd}: expected a class name, because ids count lines, got {what}. "
            "Remove it, or write each class's id in front of its name."
        )
    ids = numbers or list(range(len(texts)))
    if texts[0] == "__ignore__" and not numbers:  # as labelme counts
        ids = [number - 1 for number in ids]
    return _name_list(path, texts, ids, is_numbered=bool(numbers))


def read_lines(path: Path, error: type[ZssegError]) -> list[str]:
    """The lines of a text file, without spaces around them and without empty ones at the end."""
    try:
        data = path.read_bytes()
        is_wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        text = data.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as exc:
        raise error(
            f"{path}: expected UTF-8, got a bad byte at position {exc.start}. Save it as UTF-8."
        ) from exc
    except (OSError, ValueError) as exc:  # also a name that no file can have
        reason = getattr(exc, "strerror", None) or str(exc)
        raise error(f"{path}: expected a text file, cannot read it: {reason}. Check it.") from exc
    # not splitlines, which also ends lines at characters that are none's end anywhere else
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text.rstrip())] if text.strip() else []


def _json_lines(text: str, path: Path, error: type[ZssegError]) -> list[str]:
    try:
        names = [", ".join(n) if isinstance(n, list) else str(n) for n in json.loads(text)]
    except (ValueError, TypeError, RecursionError) as exc:
        raise error(f"{path}: expected a JSON list of names, got {exc}. Fix it.") from exc
    return [name.strip() for name in names]


def _numbers(
    lines: Sequence[tuple[int, str]], path: Path, error: type[ZssegError]
) -> tuple[list[int], list[str]]:
    """The numbers in front of all names, if there are any, and the names."""
    matches = [_NUMBERED.fullmatch(line) for _, line in lines]
    numbers = [int(match[1]) for match in matches if match]
    rising = all(one < other < 1 << 16 for one, other in itertools.pairwise(numbers))
    if not rising or not numbers or (len(numbers) == 1 and numbers[0] > 1):
        return [], [line for _, line in lines]
    if len(numbers) == len(lines):
        return numbers, [match[2] for match in matches if match]
    if 2 * len(numbers) > len(lines) and len(numbers) == numbers[-1] - numbers[0] + 1:
        number, line = next(at for at, match in zip(lines, matches, strict=True) if not match)
        raise error(
            f"{path}: line {number}: expected a number and a name, as most lines have, got "
            f"{line!r}. Number all names or none."
        )
    return [], [line for _, line in lines]


def _cvat_list(path: Path, lines: Sequence[str]) -> NameList:
    parts = [match for line in lines if (match := _CVAT.fullmatch(line))]
    colours = [(p[1].strip(), (int(p[2]), int(p[3]), int(p[4]))) for p in parts]
    # CVAT's own name for what nobody annotated
    texts = ["_background_" if name == "background" else name for name, _ in colours]
    named = _name_list(path, texts, list(range(len(texts))))
    return NameList(**{**vars(named), "colours": tuple(colours)})


def _name_list(
    path: Path, texts: Sequence[str], ids: Sequence[int], *, is_numbered: bool = False
) -> NameList:
    bare = [text.removesuffix(UNSEEN_MARK).strip() for text in texts]
    left_out = {i: name for i, name in enumerate(bare) if name.casefold() in NO_CLASS}
    if left_out:
        listed = ", ".join(left_out.values())
        _log.warning("%s: these name no class and are left out: %s", path, listed)
    places = [place for place in range(len(bare)) if place not in left_out]
    return NameList(
        names=tuple(bare[place] for place in places),
        ids=tuple(ids[place] for place in places),
        ignored=tuple(ids[place] for place in left_out),
        unseen=tuple(i for i, place in enumerate(places) if texts[place].endswith(UNSEEN_MARK)),
        is_numbered=is_numbered,
    )
