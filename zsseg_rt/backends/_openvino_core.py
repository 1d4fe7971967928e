"""The process's one OpenVINO core."""

from __future__ import annotations

import threading
from typing import Any

from zsseg_rt.errors import BackendUnavailableError

__all__ = ["process_core"]

_lock = threading.Lock()
_core: Any = None


def process_core() -> Any:
    """The ``openvino.Core`` that every session shares; it lives as long as the process.

    The CPU plugin gives the thread that makes a core an alternate signal stack (``sigaltstack(2)``)
    and unmaps it together with the core.  Two cores that do not end in reverse order leave the
    thread with an unmapped one, and the next signal that has a handler, such as Python's for
    SIGCHLD or SIGINT, ends the process with SIGSEGV (seen with OpenVINO 2026.4).

    Raises:
        BackendUnavailableError: OpenVINO is not installed.
    """
    global _core
    try:
        import openvino
    except ImportError as exc:
        raise BackendUnavailableError(
            "backend: expected the package openvino, got nothing. Run: pip install openvino"
        ) from exc
    with _lock:
        if _core is None:
            _core = openvino.Core()
        return _core
