"""Hash files, read them without trusting them, and write them whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import math
import os
import re
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_NPY_MAGIC = b"\x93NUMPY"
_LONGEST_NPY_HEADER = 1024  # bytes; NumPy writes 118, and fewer than 800 for 32 dimensions
# Booleans, integers, real floats of 2 to 8 bytes, and text: no objects, records, dates or complex.
_NPY_HEADER = re.compile(
    rb"\{'descr': '(?P<descr>[<>|=]?(?:b1|[iu][1248]|f[248]|U[1-9][0-9]{0,6}))', "
    rb"'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>(?:[0-9]{1,18},|[0-9]{1,18}(?:, ?[0-9]{1,18}){1,31},?)?)\),? ?\} *\n"
)


def is_folder(path: Path) -> bool:
    """Whether there is a folder; False also where the system cannot look, as for names too long."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Whether there is a file; False also where the system cannot look, as for names too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_device(path: Path) -> bool:
    """Whether it is a pipe or device, which is written into as it is."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; on failure nothing is left.

    Where the file system can, the bytes go to a file without a name, which gets the name when it is
    whole: a process that is killed leaves nothing. To overwrite, it takes a temporary name beside
    the file, ``.NAME.0.tmp``, for the moment until the rename, and where the file system knows no
    nameless files, for all the time it writes. A process that is killed then leaves that file, and
    the next call for the same path removes it. Several threads and processes may write one file at
    the same time, each under a number of its own: the last to finish wins. A pipe or device is
    written into.
    """
    if is_device(path):
        path.write_bytes(data)
        return
    if not _write_nameless(path, data):
        _write_named(path, data)


def _write_nameless(path: Path, data: bytes) -> bool:
    """Write a file that has no name before it is whole; False where the system cannot."""
    try:
        number = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    except OSError:  # whatever it is: a file with a name works, or says why not
        return False
    with os.fdopen(number, "wb") as stream:
        _write_through(stream, data)
        try:
            if _link(number, path):
                return True
            _lock(number)
            temporary = next(name for name in _temporary_names(path) if _link(number, name))
        except OSError:
            return False
        _rename(temporary, path)
    return True


def _write_named(path: Path, data: bytes) -> None:
    for temporary in _temporary_names(path):
        stream = _create(temporary)
        if stream is None:
            continue
        with stream:
            try:
                _write_through(stream, data)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _rename(temporary, path)
        return


def _write_through(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)
    stream.flush()
    os.fsync(stream.fileno())


def _link(number: int, path: Path) -> bool:
    """Give an open file without a name this one; False where something has it."""
    try:
        # The folder's number makes Python follow the link to the open file.
        os.link(f"/proc/self/fd/{number}", path, src_dir_fd=0)
    except FileExistsError:
        return False
    return True


def _create(path: Path) -> BinaryIO | None:
    """A new file that its lock shows to be in use; None where something has the name."""
    try:
        stream = path.open("xb")
    except FileExistsError:
        return None
    _lock(stream.fileno())
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(stream.fileno()), path.lstat()):
            return stream
    stream.close()  # before it was locked, another writer took it for a dead one's
    return None


def _rename(temporary: Path, path: Path) -> None:
    try:
        os.replace(temporary, path)  # noqa: PTH105 - the tests make exactly this call fail
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _lock(number: int) -> None:
    """Show that the writer of an open file is alive, until it is closed."""
    with contextlib.suppress(OSError):  # without locks, nothing that is left is ever removed
        fcntl.flock(number, fcntl.LOCK_EX)


def _temporary_names(path: Path) -> Iterator[Path]:
    """Names to try in turn; a name that a dead writer's file had comes a second time."""
    for number in itertools.count():
        _remove_dead(path.with_name(f".{path.name}.{number + 1}.tmp"))
        temporary = path.with_name(f".{path.name}.{number}.tmp")
        yield temporary
        if _remove_dead(temporary):
            yield temporary


def _remove_dead(path: Path) -> bool:
    """Remove a temporary file whose writer is dead; whether the name is free now."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # With the lock held, nobody else removes this file, so the name cannot become another's.
        if os.path.samestat(os.fstat(number), path.lstat()):
            path.unlink()
    except FileNotFoundError:
        return True  # its writer has just renamed it
    except OSError:
        return False
    finally:
        os.close(number)
    return True


def read_npy(data: bytes, *, what: str, max_bytes: int) -> npt.NDArray[Any]:
    """Return the array in a ``.npy`` file's content, whose header is parsed and never evaluated.

    Returns:
        A new, writable array: booleans, integers, floats of 2 to 8 bytes, or text (``<U``).
    """
    header, start = _npy_header(data, what)
    dtype = np.dtype(header["descr"].decode("ascii"))
    shape = tuple(int(size) for size in header["shape"].replace(b" ", b"").split(b",") if size)
    num_bytes = math.prod(shape) * dtype.itemsize
    # A zero among huge sizes makes the array empty, yet overflows NumPy's strides.
    if math.prod(size or 1 for size in shape) * dtype.itemsize > max_bytes:
        raise ValueError(
            f"{what}: expected an array of at most {max_bytes} bytes, got {dtype} {list(shape)}"
        )
    if num_bytes != len(data) - start:
        raise ValueError(
            f"{what}: expected {num_bytes} bytes of {dtype} {list(shape)}, got {len(data) - start}"
        )
    values = np.frombuffer(data, dtype, offset=start)
    _check_text(values, what)
    return values.reshape(shape, order="F" if header["fortran"] == b"True" else "C").copy(order="K")


def _npy_header(data: bytes, what: str) -> tuple[dict[str, bytes], int]:
    """Return the parts of the header, and where the values start."""
    if data[:6] != _NPY_MAGIC or len(data) < 12:
        raise ValueError(f"{what}: expected a .npy file, got {len(data)} bytes of something else")
    version, length = (data[6], data[7]), "<H" if data[6] == 1 else "<I"
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"{what}: expected .npy format 1.0 to 3.0, got {data[6]}.{data[7]}")
    first = 8 + struct.calcsize(length)
    (size,) = struct.unpack(length, data[8:first])
    header = data[first : first + min(size, _LONGEST_NPY_HEADER)]
    found = _NPY_HEADER.fullmatch(header) if len(header) == size else None
    if found is None:
        raise ValueError(f"{what}: expected a .npy header of a plain array, got {header[:80]!r}")
    return found.groupdict(), first + size


def _check_text(values: npt.NDArray[Any], what: str) -> None:
    if values.dtype.kind != "U":
        return
    codes = values.view(np.dtype(np.uint32).newbyteorder(values.dtype.byteorder))
    if ((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes <= 0xDFFF))).any():
        raise ValueError(f"{what}: expected text, got a character that Unicode does not have")


def read_limited(path: Path, *, max_bytes: int) -> bytes:
    """Read a small regular file; a pipe, for one, would keep its reader waiting."""
    with open(path, "rb", opener=_open_without_waiting) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > max_bytes:
            problem = f"expected at most {max_bytes} bytes, got {status.st_size}"
            raise OSError(errno.EFBIG, problem, str(path))
        return stream.read(status.st_size)


def remove_entry(path: Path) -> None:
    """Remove what lies at a path of a cache: a file, a link, or a folder with its content.

    Links are removed, not followed. A path where nothing lies is not an error.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _open_without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)


def why_unwritable(folder: Path) -> str:
    """What keeps a folder from being made or written to; empty if nothing does."""
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
