"""Give back the memory of files that a library keeps mapped."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from pathlib import Path

_log = logging.getLogger(__name__)
_MADV_PAGEOUT = 21  # Linux 5.4 and later, madvise(2)


def page_out(folder: Path) -> None:
    """Drop from memory what this process holds of mapped files under ``folder``.

    Nothing is lost: a page that is touched again is read again. If the system cannot do it, the
    pages stay until memory runs short, as they would without this call.
    """
    if sys.platform != "linux":
        return
    prefix = str(folder.resolve()) + os.sep
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        # address range, permissions, offset, device, inode, path
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or not fields[5].startswith(prefix):
            continue
        start, end = (int(address, 16) for address in fields[0].split("-"))
        if libc.madvise(start, end - start, _MADV_PAGEOUT):
            problem = os.strerror(ctypes.get_errno())
            _log.debug("%s: pages stay in memory: %s", fields[5], problem)
            return
