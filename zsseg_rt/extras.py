"""How to install optional packages; the only place that says it."""

from __future__ import annotations

from typing import Any

from zsseg_rt.errors import BackendUnavailableError

__all__ = ["import_opencv", "install_command"]


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


def import_opencv(purpose: str) -> Any:
    """The module ``cv2``.

    Args:
        purpose: What it is for: "to read photos".

    Raises:
        BackendUnavailableError: It is not installed.
    """
    try:
        import cv2
    except ImportError as exc:
        raise BackendUnavailableError(
            f"cv2: expected OpenCV {purpose}, got nothing. "
            f"Run: {install_command('opencv')} (on a Jetson: apt install python3-opencv)"
        ) from exc
    return cv2
