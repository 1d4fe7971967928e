"""Write a folder whole or not at all: in a hidden folder beside its place, then moved there.

The hidden folder, ``.NAME.writing-XXXXXXXX``, holds the new folder, a file that its writer keeps
locked and, where the old folder cannot be exchanged with the new one in one step, for a moment the
old one. So at every moment the old or the new one is whole, and the next writer of the same folder
can tell what a killed process left behind from what a living one is writing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_LOCK, _OLD = "lock", "old-{}"
_TRIES = 10  # at most this many other writers of the same folder may interfere
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_CAME_IN_BETWEEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)


@contextmanager
def new_folder(path: Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder to fill that becomes ``path`` if nothing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work, lock = _hidden_folder(path)
    with lock:
        in_place = False
        try:
            new = work / path.name
            new.mkdir()
            yield new
            _sync(new)
            _put_in_place(new, path, replace=replace)
            in_place = True
            _sync_folder(path.parent)
        finally:
            _settle(work, path, restore=not in_place)


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of ``path`` left behind; restore an old folder first."""
    pattern = re.compile(re.escape(_prefix(path)) + "[a-z0-9_]{8}")
    if not path.parent.is_dir():
        return
    for work in path.parent.iterdir():
        if not pattern.fullmatch(work.name):
            continue
        try:
            lock = _take_lock(work)
        except OSError:  # another user's, or a file system without locks: it may be in use
            continue
        if lock:
            with lock:
                _settle(work, path, restore=True)


def _prefix(path: Path) -> str:
    return f".{path.name}.writing-"


def _hidden_folder(path: Path) -> tuple[Path, IO[bytes]]:
    """A new hidden folder and its lock; retries if it was removed before it was locked."""
    for _ in range(_TRIES):
        work = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path)))
        try:
            lock = _take_lock(work, or_go_without=True)
        except OSError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        if lock:
            return work, lock
    raise OSError(errno.EAGAIN, "its hidden folder was removed while it was made", str(path))


def _take_lock(work: Path, *, or_go_without: bool = False) -> IO[bytes] | None:
    """The open lock file of a hidden folder; None if a writer holds it, or the folder is gone.

    Where the file system has no locks, a writer goes on without one, and no leftover is removed.
    """
    try:
        lock = (work / _LOCK).open("ab")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), (work / _LOCK).stat()):
            return lock  # and it was not removed between open and flock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as exc:
        if or_go_without and exc.errno in _NO_LOCKS:
            return lock
        lock.close()
        raise
    lock.close()
    return None


def _put_in_place(new: Path, path: Path, *, replace: bool) -> None:
    """Move ``new`` to ``path``; what was there is then in the hidden folder."""
    for attempt in range(_TRIES):
        if path.exists() and not replace:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        try:
            if not path.exists():
                new.rename(path)
            elif not _exchange(new, path):
                path.rename(new.with_name(_OLD.format(attempt)))
                new.rename(path)
        except OSError as exc:
            if exc.errno not in _CAME_IN_BETWEEN or attempt == _TRIES - 1:
                raise
        else:
            return


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where kernel, C library or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_OFFERED:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _settle(work: Path, path: Path, *, restore: bool) -> None:
    """Remove a hidden folder. To restore, the old folder first goes back to a missing ``path``.

    A folder that was put in place may be missing again because another writer is about to replace
    it: then nothing may be restored, or the older folder would follow the newer one.
    """
    for old in sorted(work.glob(_OLD.format("*")), reverse=True):
        if not (restore and _moved_back(old, path)):
            # A half-removed folder must never be restored: it is renamed first.
            old.rename(old.with_name(f"replaced-{old.name}"))
    shutil.rmtree(work, ignore_errors=True)


def _moved_back(old: Path, path: Path) -> bool:
    """Move ``old`` to ``path``; False if a folder is there, also one that came in between."""
    if path.exists():
        return False
    try:
        old.rename(path)
    except OSError as exc:
        if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _sync(folder: Path) -> None:
    """Wait until a folder and everything in it are on the disk."""
    for entry in folder.iterdir():
        if entry.is_dir():
            _sync(entry)
        else:
            with entry.open("rb") as stream:
                os.fsync(stream.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in _NOT_OFFERED:  # some file systems sync files only
            raise
    finally:
        os.close(descriptor)
