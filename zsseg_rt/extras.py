"""How to get packages that are not installed; the one place that says it."""

from __future__ import annotations

__all__ = ["install_command"]


def install_command(*extras: str) -> str:
    """What to run for optional packages; this package is installed from a checkout of its source.

    Args:
        extras: Names of extras; of several, any is enough.

    Example:
        >>> install_command("train")
        "pip install '.[train]' in a checkout of zsseg_rt"
    """
    commands = " or ".join(f"pip install '.[{extra}]'" for extra in extras)
    return f"{commands} in a checkout of zsseg_rt"
