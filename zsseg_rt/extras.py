"""How to install optional packages; the only place that says it."""

from __future__ import annotations

__all__ = ["install_command"]


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
