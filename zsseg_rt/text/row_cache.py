"""Phrase embeddings on disk: one small file each, whose checksum says what it is."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.files import read_limited, remove_entry, write_atomically

_log = logging.getLogger(__name__)
KEPT_ROWS = 65_536
"""Embeddings on disk of all encoders, 256 MB in blocks of 4 KB; the least recently used go.

Each process counts them when it first writes, and again whenever it wrote an eighth of that. If
there are more, they are cut to seven eighths.
"""
_ABANDONED_NS = 3600 * 10**9  # a temporary file so old has no writer
_DIGEST_BYTES = hashlib.sha256().digest_size


class RowCache:
    """Embeddings under ``folder/text``; several processes may share it.

    A file holds a SHA-256 and then the row, float32 little-endian [D]. The SHA-256 covers encoder,
    templates, phrase and row, so neither an altered file nor one made for another phrase is
    mistaken for the embedding. A file's time of change is that of its last use.
    """

    def __init__(
        self, folder: Path, encoder: str, embed_dim: int, *, max_rows: int = KEPT_ROWS
    ) -> None:
        self._max_rows = max_rows
        self._until_check = 0  # files to write before they are counted again
        self._folder, self._encoder, self._embed_dim = folder / "text", encoder, embed_dim

    def path(self, templates: str, phrase: str) -> Path:
        """Where the embedding of a phrase with the templates of that key is or would be stored."""
        space = _sha256(self._encoder, templates).hex()[:32]
        return self._folder / space / f"{_sha256(phrase).hex()[:32]}.row"

    def read(self, templates: str, phrase: str) -> npt.NDArray[np.float32] | None:
        """A stored embedding, float32 [D]; None if it is missing or damaged.

        A damaged file is removed and reported as a warning.
        """
        path = self.path(templates, phrase)
        try:
            content = read_limited(path, max_bytes=_DIGEST_BYTES + 4 * self._embed_dim)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            _discard(path, f"cannot be read ({exc})")
            return None
        data = content[_DIGEST_BYTES:]
        if content[:_DIGEST_BYTES] != self._checksum(templates, phrase, data):
            _discard(path, "was damaged (its checksum differs)")
            return None
        with suppress(OSError):  # a folder that may only be read still serves
            os.utime(path)
        row = np.frombuffer(data, "<f4").astype(np.float32)
        if not abs(float(np.linalg.norm(row.astype(np.float64))) - 1.0) < 1e-4:
            _discard(path, "is not of unit length")
            return None
        return row

    def write(self, templates: str, rows: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Store the embeddings of some phrases; if that fails, warn once."""
        for phrase, row in rows.items():
            path, data = self.path(templates, phrase), row.astype("<f4").tobytes()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, self._checksum(templates, phrase, data) + data)
            except OSError as exc:
                _log.warning(
                    "text embeddings are kept in memory only, %s cannot be written: %s", path, exc
                )
                return
        self._until_check -= len(rows)
        if self._until_check <= 0:
            self._until_check = self._max_rows // 8
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        try:
            used = sorted(_last_uses(self._folder))
            if len(used) <= self._max_rows:
                return
            for _, path in used[: len(used) - self._max_rows * 7 // 8]:
                remove_entry(path)
        except OSError as exc:
            _log.warning("%s: old text embeddings cannot be removed: %s", self._folder, exc)

    def _checksum(self, templates: str, phrase: str, data: bytes) -> bytes:
        return hashlib.sha256(_sha256(self._encoder, templates, phrase) + data).digest()


def _last_uses(folder: Path) -> Iterator[tuple[int, Path]]:
    """When each file of the cache was last used, in ns; files that others remove are left out."""
    for space in folder.iterdir():
        if space.is_symlink() or not space.is_dir():
            continue
        with suppress(FileNotFoundError), os.scandir(space) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    used = entry.stat(follow_symlinks=False).st_mtime_ns
                    if entry.name.endswith(".row") or time.time_ns() - used > _ABANDONED_NS:
                        yield used, Path(entry.path)


def _sha256(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode()).digest()


def _discard(path: Path, reason: str) -> None:
    _log.warning("%s: the cached embedding %s; embedding the phrase again", path, reason)
    with suppress(OSError):  # writing it again will report the cause
        remove_entry(path)
