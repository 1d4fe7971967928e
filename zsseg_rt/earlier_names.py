"""Today's names for what earlier versions called otherwise."""

from __future__ import annotations

import logging

__all__ = ["current_name"]

_log = logging.getLogger(__name__)
_RENAMED = {"dense_baseline": "cosine_head"}


def current_name(architecture: str) -> str:
    """What an architecture is called today; a warning tells if it was renamed.

    Args:
        architecture: As a user, a run or a configuration of an earlier version names it.
    """
    name = _RENAMED.get(architecture, architecture)
    if name != architecture:
        _log.warning("architecture: %r is called %r now", architecture, name)
    return name
