"""How to install optional packages; the only place that says it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from zsseg_rt.common.interrupts import held_interrupts
from zsseg_rt.errors import BackendUnavailableError


def install_command(*extras: str) -> str:
    """The command that installs optional packages, from a checkout of this package's source.

    Example:
        >>> install_command("train")
        "pip install '.[train]' in a checkout of zsseg_rt"
    """
    commands = " or ".join(f"pip install '.[{extra}]'" for extra in extras)
    return f"{commands} in a checkout of zsseg_rt"


def import_opencv(purpose: str, *, argument: str = "cv2", needs: str = "imread") -> Any:
    """The module ``cv2``.

    An interrupt waits for it: in NumPy's part of the import it would become an ImportError.
    """
    try:
        with held_interrupts():
            cv2: Any = import_module("cv2")
    except ImportError:
        cv2 = None
    if not hasattr(cv2, needs):
        raise BackendUnavailableError(
            f"{argument}: expected OpenCV {purpose}, got nothing. "
            f"Run: {install_command('opencv')} (on a Jetson: apt install python3-opencv)"
        )
    return cv2


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Name the extra that installs a missing package; our own modules are never missing."""
    try:
        yield
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.startswith("zsseg_rt"):
            raise
        raise BackendUnavailableError(
            f"{exc.name}: expected to be installed {purpose}, got nothing. "
            f"Run: {install_command(extra)}"
        ) from exc
