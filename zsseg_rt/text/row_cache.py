"""Phrase embeddings on disk: one small file each, whose checksum says what it is."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.files import Cache, remove_abandoned, remove_entry

_log = logging.getLogger(__name__)
KEPT_ROWS = 65_536
"""Embeddings on disk of all encoders, 256 MB in blocks of 4 KB; the least recently used go.

Each process counts them when it first writes, and again whenever it wrote an eighth of that. If
there are more, they are cut to seven eighths.
"""


class RowCache:
    """Embeddings under ``folder/text``; several processes may share it.

    The checksum in each file covers encoder, templates, phrase and row, so neither an altered file
    nor one made for another phrase is mistaken for the embedding. A file's time of change is that
    of its last use.
    """

    def __init__(
        self, folder: Path, encoder: str, embed_dim: int, *, max_rows: int = KEPT_ROWS
    ) -> None:
        self._max_rows = max_rows
        self._until_check = 0  # files to write before they are counted again
        self._folder, self._encoder, self._embed_dim = folder / "text", encoder, embed_dim

    def path(self, templates: str, phrase: str) -> Path:
        """Where the embedding of a phrase with the templates of that key is or would be stored."""
        return self._rows(templates).folder / _name(phrase)

    def read(self, templates: str, phrase: str) -> npt.NDArray[np.float32] | None:
        """A stored embedding, float32 [D]; None if it is missing or damaged.

        A damaged file is removed and reported as a warning.
        """
        rows, name = self._rows(templates), _name(phrase)
        entry = rows.read(name, max_bytes=4 * self._embed_dim)
        if entry is None:
            return None
        row = np.frombuffer(entry.data, "<f4").astype(np.float32)
        if not abs(float(np.linalg.norm(row.astype(np.float64))) - 1.0) < 1e-4:
            rows.discard(name, "is not of unit length")
            return None
        with suppress(OSError):  # a folder that may only be read still serves
            os.utime(rows.folder / name)
        return row

    def write(self, templates: str, rows: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Store the embeddings of some phrases; if that fails, warn once."""
        cache, told = self._rows(templates), "Text embeddings are kept in memory only."
        for phrase, row in rows.items():
            if not cache.keep(_name(phrase), row.astype("<f4").tobytes(), else_=told):
                return
        self._until_check -= len(rows)
        if self._until_check <= 0:
            self._until_check = self._max_rows // 8
            self._drop_oldest()

    def _rows(self, templates: str) -> Cache:
        space = _sha256(self._encoder, templates)
        return Cache(self._folder / space, space)

    def _drop_oldest(self) -> None:
        try:
            used = sorted(_last_uses(self._folder))
            if len(used) <= self._max_rows:
                return
            for _, path in used[: len(used) - self._max_rows * 7 // 8]:
                remove_entry(path)
        except OSError as exc:
            _log.warning("%s: old text embeddings cannot be removed: %s", self._folder, exc)


def _last_uses(folder: Path) -> Iterator[tuple[int, Path]]:
    """When each file of the cache was last used, in ns; files that others remove are left out."""
    for space in folder.iterdir():
        if space.is_symlink() or not space.is_dir():
            continue
        remove_abandoned(space)
        with suppress(FileNotFoundError), os.scandir(space) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.name.endswith(".row"):
                        yield entry.stat(follow_symlinks=False).st_mtime_ns, Path(entry.path)


def _name(phrase: str) -> str:
    return f"{_sha256(phrase)}.row"


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
