"""Let one process at a time work on an entry of a cache."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zsseg_rt.common.files import remove_entry

_log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which is created with its folder and never removed.

    A folder or link in its place cannot be locked: it is removed with a warning.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        _log.warning("%s: expected a lock file, got something else; it is replaced", path)
        remove_entry(path)
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
