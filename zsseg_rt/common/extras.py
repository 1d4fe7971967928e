"""How to install optional packages; the only place that says it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from zsseg_rt.errors import BackendUnavailableError


def install_command(*extras: str) -> str:
    """The command that installs optional packages, from a checkout of this package's source.

    Args:
        extras: Names of extras; any one of several is enough.

    Example:
        >>> install_command("train")
        "pip install '.[train]' in a checkout of zsseg_rt"
    """
    commands = " or ".join(f"pip install '.[{extra}]'" for extra in extras)
    return f"{commands} in a checkout of zsseg_rt"


def import_opencv(purpose: str, *, argument: str = "cv2", needs: str = "imread") -> Any:
    """The module ``cv2``.

    Args:
        purpose: What it is for: "to read photos".
        argument: What asks for it.
        needs: A function that it must have.

    Raises:
        BackendUnavailableError: It is not installed, or lacks the function.
    """
    try:
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
    """Name the extra that installs a missing package; our own modules are never missing.

    Args:
        extra: Its name, as in :func:`install_command`.
        purpose: What the package is for: "to train".

    Raises:
        BackendUnavailableError: A third-party package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.startswith("zsseg_rt"):
            raise
        raise BackendUnavailableError(
            f"{exc.name}: expected to be installed {purpose}, got nothing. "
            f"Run: {install_command(extra)}"
        ) from exc
