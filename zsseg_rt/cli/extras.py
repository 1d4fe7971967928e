"""What a command says when a package that it needs is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zsseg_rt.errors import BackendUnavailableError
from zsseg_rt.extras import install_command

__all__ = ["needs_extra"]


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Name the extra that installs a missing package; our own modules are never missing.

    Args:
        extra: Its name, as in :func:`zsseg_rt.extras.install_command`.
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
