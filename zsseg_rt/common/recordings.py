"""The files that a recorder writes one after the other: their names, and how long they are kept."""

from __future__ import annotations

import calendar
import fcntl
import logging
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from zsseg_rt.common.files import is_device
from zsseg_rt.errors import ArgumentError, SourceError

_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_AMOUNT = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?) ?([a-z]+)")
_STAMP = "%Y%m%dT%H%M%SZ"
_STAMP_FORM = r"(?P<stamp>[0-9]{8}T[0-9]{6}Z)(?:_[0-9]+)?"
_IMAGE = re.compile(r"[0-9]{8,}\.png")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rotation:
    """When a sink begins a new file, and which of its old ones it keeps."""

    seconds: float = math.inf  # A file that is this old is followed by a new one
    num_bytes: float = math.inf  # So is one of this size
    # Files last written longer ago are removed, and those begun before them
    keep_seconds: float = math.inf
    # The first that were begun are removed while all together are larger
    keep_bytes: float = math.inf

    @staticmethod
    def parse(rotate: str | None, keep: str | None = None) -> Rotation:
        """Read ``"10min"``, ``"500MB"`` or both with a comma; None never begins, removes none."""
        if keep is not None and rotate is None:
            raise ArgumentError(
                f"keep: expected rotate beside it, got keep={keep!r} alone. Only files that "
                "rotation made are removed: add rotate, for example 1h."
            )
        return Rotation(*_amounts("rotate", rotate), *_amounts("keep", keep))

    @property
    def is_on(self) -> bool:
        """Whether files are rotated at all."""
        return min(self.seconds, self.num_bytes) < math.inf

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever removed."""
        return self.keep_seconds == self.keep_bytes == math.inf

    def is_due(self, seconds: float, num_bytes: float) -> bool:
        """Whether a file of this age and size is followed by a new one."""
        return seconds >= self.seconds or num_bytes >= self.num_bytes


def _amounts(argument: str, text: str | None) -> tuple[float, float]:
    """Seconds and bytes of a text such as ``10min,500MB``; infinite where it names none."""
    amounts = {}
    for part in [] if text is None else text.lower().split(","):
        amount = _AMOUNT.fullmatch(part.strip())
        units = next((u for u in (_SECONDS, _BYTES) if amount and amount[2] in u), None)
        if amount is None or units is None or not float(amount[1]) or id(units) in amounts:
            raise ArgumentError(
                f"{argument}: expected a time above 0 (s, min, h, d), a size above 0 (kB, MB, GB, "
                f"TB) or both, such as 10min,500MB; got {text!r}"
            )
        amounts[id(units)] = float(amount[1]) * units[amount[2]]
    return amounts.get(id(_SECONDS), math.inf), amounts.get(id(_BYTES), math.inf)


class Series:
    """Files or folders that follow each other; each is made here, so none is ever replaced.

    The first is ``STEM.SUFFIX`` if nothing has that name and there is no rotation, all others
    ``STEM-STAMP.SUFFIX``, where STAMP is the time in UTC at which they begin; ``_2``, ``_3`` and so
    on follow a second that is taken. What is removed has a name of that form.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        suffix: str,
        rotation: Rotation,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.rotation = rotation
        self.base = folder / f"{stem}{suffix}"
        self._folder, self._suffix, self._now = folder, suffix, now
        self._prefix = f"{stem}-" if stem else ""
        self._own = re.compile(re.escape(self._prefix) + _STAMP_FORM + re.escape(suffix))
        self._refused = False
        self._made: list[Path] = []  # here, in their order, whatever the clock said

    def begin(self) -> Path:
        """Remove what is not kept any more, then make the next one, empty."""
        takes_base = bool(self._suffix) and not self._made and not self.rotation.is_on
        if takes_base and is_device(self.base):
            return self.base
        self.remove_old()
        new = next(path for path in self._names(takes_base) if self._make(path))
        self._made.append(new)
        return new

    def resume(self) -> tuple[Path, float]:
        """The newest one and its age in seconds; a new one if that is full, old or absent."""
        ages = {path: self._now() - self._begun_at(path) for path in self._found()}
        past = [path for path, age in ages.items() if age >= 0]  # a clock may be set back
        newest = max(past, key=lambda path: path.name, default=None)
        if newest is None or self.rotation.is_due(ages[newest], newest.lstat().st_size):
            return self.begin(), 0.0
        self.remove_old(but=newest)
        return newest, ages[newest]

    def remove_old(self, but: Path | None = None) -> None:
        """Remove what is not kept any more; what cannot be removed is logged once."""
        rotation = self.rotation
        if rotation.keeps_all:
            return
        try:
            # What was begun before an old one is old, also where a clock that was ahead dated it.
            total, is_old, there = 0, False, set(self._found())
            ours = [path for path in self._made if path in there]
            begun = sorted(there.difference(ours)) + ours
            for path in (path for path in reversed(begun) if path != but):
                total += 0 if rotation.keep_bytes == math.inf else _size(path)
                is_old = is_old or self._now() - path.lstat().st_mtime > rotation.keep_seconds
                if is_old or total > rotation.keep_bytes:
                    _remove(path)
        except OSError as exc:
            if not self._refused:
                _log.warning("%s: old files cannot be removed: %s", self.base, exc.strerror)
            self._refused = True

    def _names(self, takes_base: bool) -> Iterator[Path]:
        if takes_base:
            yield self.base
        stamp = time.strftime(_STAMP, time.gmtime(self._now()))
        number = 1
        while True:
            again = "" if number == 1 else f"_{number}"
            yield self._folder / f"{self._prefix}{stamp}{again}{self._suffix}"
            number += 1

    def _make(self, path: Path) -> bool:
        try:
            if self._suffix:
                path.open("xb").close()
            else:
                path.mkdir()
        except FileExistsError:
            return False
        return True

    def _found(self) -> list[Path]:
        """The files and folders whose names have this series' form."""
        is_kind = stat.S_ISREG if self._suffix else stat.S_ISDIR
        with os.scandir(self._folder) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if self._own.fullmatch(entry.name)
                and is_kind(entry.stat(follow_symlinks=False).st_mode)
            ]

    def _begun_at(self, path: Path) -> float:
        match = self._own.fullmatch(path.name)
        try:
            return calendar.timegm(time.strptime(match["stamp"], _STAMP)) if match else math.inf
        except ValueError:  # no such day
            return math.inf


def claim(path: Path, stream: FileIO | int) -> None:
    """Show other processes that an open file or folder is written to, until it is closed."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SourceError(
            f"{path}: expected to write here alone, another process does. Choose another name."
        ) from None
    except OSError:  # no locks on this file system
        return


def is_empty(path: Path) -> bool:
    """Whether it is a file without content."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == 0


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    with os.scandir(path) as entries:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)


def _remove(path: Path) -> None:
    """Remove a file, or the label images of a folder; one that holds anything else stays."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for image in list(path.iterdir()):
        if _IMAGE.fullmatch(image.name):
            image.unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()
