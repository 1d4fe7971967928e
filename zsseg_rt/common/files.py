"""Read files without trusting them; write files, folders and caches whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_log = logging.getLogger(__name__)
_ABANDONED_SECONDS = 3600.0  # a temporary file so old has no writer
_LONGEST_HEAD = 64 << 20  # bytes
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}\.tmp")
_LONGEST_NPY_HEADER = 1024  # characters; NumPy writes 118, and fewer than 800 for 32 dimensions
_NPY_TYPES = ["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"]


def ensure_home() -> None:
    """Give libraries a home that cannot be written to, where the user has neither HOME nor name."""
    # else Path.home() fails in them; OpenVINO's telemetry calls it while it is imported
    if os.path.expanduser("~") == "~":  # noqa: PTH111 - Path's own raises
        os.environ["HOME"] = os.devnull


def default_cache_dir() -> Path:
    """Where derived data lives: ``$ZSSEG_HOME`` if set, otherwise the user's cache folder."""
    home = os.environ.get("ZSSEG_HOME")
    if home:
        return Path(home)
    ensure_home()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("zsseg_rt", appauthor=False))


def is_folder(path: Path) -> bool:
    """Whether there is a folder; False also where the system cannot look, as for names too long."""
    return os.path.isdir(path)  # noqa: PTH112 - Path's own raises


def is_file(path: Path) -> bool:
    """Whether there is a file; False also where the system cannot look, as for names too long."""
    return os.path.isfile(path)  # noqa: PTH113 - Path's own raises


def is_device(path: Path) -> bool:
    """Whether it is a pipe or device, which is written into as it is."""
    there = os.path.exists(path)  # noqa: PTH110 - Path's own raises
    return there and not is_file(path) and not is_folder(path)


def why_unwritable(folder: Path) -> str:
    """The reason why a folder cannot be made or written to; empty if it can."""
    for existing in (folder, *folder.parents):
        try:
            mode = existing.stat().st_mode
        except FileNotFoundError:
            if existing.is_symlink():
                return f"{existing} is a link to nothing"
            continue
        except OSError as exc:
            return exc.strerror or str(exc)
        if not stat.S_ISDIR(mode):
            return f"{existing} is not a folder"
        try:  # permissions do not tell all, least of all to root
            with tempfile.TemporaryFile(dir=existing):
                return ""
        except OSError as exc:
            return f"{existing} is not writable: {exc.strerror or exc}"
    return "no folder above it exists"


def why_not_made(folder: Path) -> str:
    """Make a folder to write to, if it is absent; the reason why that fails, or ""."""
    problem = why_unwritable(folder)
    try:
        if not problem:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        problem = exc.strerror or str(exc)
    return problem


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_limited(path: Path, *, max_bytes: int) -> bytes:
    """Read a small regular file; a pipe, for one, would keep its reader waiting."""
    with _regular_file(path, max_bytes) as stream:
        return stream.read(max_bytes)


@contextmanager
def _regular_file(path: Path, max_bytes: int) -> Iterator[BinaryIO]:
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > max_bytes:
            problem = f"expected at most {max_bytes} bytes, got {status.st_size}"
            raise OSError(errno.EFBIG, problem, str(path))
        yield file


def remove_entry(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; see :func:`whole_file`."""
    with whole_file(path) as stream:
        stream.write(data)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write that becomes ``path`` if nothing fails, and else is removed.

    It is ``.NAME.XXXXXXXX.tmp`` beside it until it is on the disk; :func:`remove_abandoned` takes
    away what a killed process left. The last of several writers wins. A pipe or device is written
    into.
    """
    if is_device(path):
        with path.open("wb") as stream:
            yield stream
        return
    temporary = path.with_name(f".{path.name[:40]}.{os.urandom(8).hex()}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_abandoned(folder: Path) -> None:
    """Remove what killed writers of files left in a folder more than an hour ago."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            age = time.time() - path.lstat().st_mtime
            if _TEMPORARY.fullmatch(path.name) and age > _ABANDONED_SECONDS:
                path.unlink()


@contextmanager
def whole_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder to fill that becomes ``path`` if nothing fails.

    It lies in a hidden folder beside its place, ``.NAME.writing-XXXXXXXX``, until all of it is on
    the disk; so does an old one for the moment between two renames.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=_hidden_prefix(path)))
    new, old = work / path.name, work / "old"
    try:
        new.mkdir()
        yield new
        _sync(new)
        if path.exists():
            if not overwrite:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            path.rename(old)
        new.rename(path)
        _sync(path.parent, inside=False)
    finally:
        if old.exists():  # half removed it must never be put back, so it is renamed first
            old.rename(work / "replaced" if path.exists() else path)
        shutil.rmtree(work, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Put back a folder that a killed writer left aside; remove what is over an hour old."""
    pattern = re.compile(re.escape(_hidden_prefix(path)) + "[a-z0-9_]{8}")
    for work in path.parent.iterdir() if path.parent.is_dir() else ():
        with contextlib.suppress(OSError):
            if not pattern.fullmatch(work.name):
                continue
            age = time.time() - work.stat().st_mtime
            if (work / "old").exists() and not path.exists():
                (work / "old").rename(path)
            if age > _ABANDONED_SECONDS:
                shutil.rmtree(work)


def _hidden_prefix(path: Path) -> str:
    return f".{path.name}.writing-"


def _sync(folder: Path, *, inside: bool = True) -> None:
    """Wait until a folder, and everything in it, is on the disk."""
    for entry in folder.iterdir() if inside else ():
        if entry.is_dir():
            _sync(entry)
        else:
            with entry.open("rb") as stream:
                os.fsync(stream.fileno())
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as exc:  # some file systems sync files only
        if exc.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(number)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which is created with its folder and never removed."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.info("waiting for another process that is working on %s", path.stem)
        lock.acquire()
    except NotImplementedError as exc:
        raise OSError(errno.ENOSYS, "this file system has no locks", str(path)) from exc
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Entry:
    """An entry of a cache: bytes, a description of them in JSON's types, and their checksum."""

    data: bytes
    about: Any = None
    sha256: str = field(default="", compare=False)


class Cache:
    """Data that can be made again, in files that say what they hold; processes may share a folder.

    A file begins with a line of JSON: the ``key``, what is said about the data, and a SHA-256 over
    both, its name and the data. One that is damaged or does not fit is removed with one warning.
    """

    def __init__(self, folder: Path, key: Any) -> None:
        self.folder, self._key = folder, json.loads(json.dumps(key))

    def read(self, name: str, *, max_bytes: int) -> Entry | None:
        """The entry in a file of this name; None if there is none that can be used."""
        path = self.folder / name
        try:
            with _regular_file(path, max_bytes + _LONGEST_HEAD) as stream:
                head, data = stream.readline(_LONGEST_HEAD), stream.read()
            fields = json.loads(head)
            if fields["key"] != self._key:
                reason = "was made from something else"
            elif fields["sha256"] != self._sha256(name, fields["about"], data):
                reason = "was damaged (its sha256 differs)"
            else:
                return Entry(data, fields["about"], fields["sha256"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
            reason = f"cannot be read ({exc})"
        self.discard(name, reason)
        return None

    def write(self, name: str, data: bytes, about: Any = None) -> str:
        """Store an entry and return its checksum; raises OSError where that fails."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = self._sha256(name, about, data)
        head = {"key": self._key, "about": about, "sha256": digest}
        with whole_file(path) as stream:
            stream.write(json.dumps(head).encode() + b"\n")
            stream.write(data)
        return digest

    def keep(self, name: str, data: bytes, about: Any = None, *, else_: str) -> str:
        """Store an entry; where that fails, warn of what follows and return an empty checksum."""
        try:
            return self.write(name, data, about)
        except OSError as exc:
            _log.warning("%s: cannot be written: %s. %s", self.folder / name, exc, else_)
            return ""

    def discard(self, name: str, reason: str) -> None:
        """Remove an entry with a warning that gives the reason."""
        path = self.folder / name
        _log.warning("%s: this file of the cache %s; it is made again", path, reason)
        with contextlib.suppress(OSError):  # writing it again will report the cause
            remove_entry(path)

    def _sha256(self, name: str, about: Any, data: bytes) -> str:
        digest = hashlib.sha256(json.dumps([self._key, name, about], sort_keys=True).encode())
        digest.update(data)
        return digest.hexdigest()


def read_npy(data: bytes, *, what: str, max_bytes: int) -> npt.NDArray[Any]:
    """The array of a ``.npy`` file, new and writable: booleans, plain numbers, or text (``<U``)."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"format {version[0]}.{version[1]} instead of 1.0")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(
            stream, max_header_size=_LONGEST_NPY_HEADER
        )
        if not ((dtype.kind == "U" and dtype.itemsize) or dtype.str[1:] in _NPY_TYPES):
            raise ValueError(f"elements of {dtype}")
        if min(shape, default=0) < 0:
            raise ValueError(f"sizes {shape}")
    except Exception as exc:  # a literal can be damaged in any way
        raise ValueError(
            f"{what}: expected a .npy file of plain numbers, got {exc!s:.200}"
        ) from exc
    # a zero among huge sizes makes the array empty, yet overflows NumPy's strides
    if math.prod(size or 1 for size in shape) * dtype.itemsize > max_bytes:
        raise ValueError(
            f"{what}: expected an array of at most {max_bytes} bytes, got {dtype} {list(shape)}"
        )
    values, num_bytes = data[stream.tell() :], math.prod(shape) * dtype.itemsize
    if len(values) != num_bytes:
        raise ValueError(
            f"{what}: expected {num_bytes} bytes of {dtype} {list(shape)}, got {len(values)}"
        )
    array = np.frombuffer(values, dtype)
    if dtype.kind == "U":
        codes = array.view(np.dtype(np.uint32).newbyteorder(dtype.byteorder))
        if ((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes <= 0xDFFF))).any():
            raise ValueError(f"{what}: expected text, got a character that Unicode does not have")
    return array.reshape(shape, order="F" if is_fortran else "C").copy(order="K")
