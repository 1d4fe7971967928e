"""Where this package keeps what it can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path


def ensure_home() -> None:
    """Give libraries a home that cannot be written to, where the user has neither HOME nor a name.

    Else ``Path.home()`` fails in them; OpenVINO's telemetry calls it while it is imported.
    """
    if os.path.expanduser("~") == "~":  # noqa: PTH111 - Path's own raises
        os.environ["HOME"] = os.devnull


def default_cache_dir() -> Path:
    """Where derived data lives: ``$ZSSEG_HOME`` if set, otherwise the user's cache folder."""
    home = os.environ.get("ZSSEG_HOME")
    if home:
        return Path(home)
    ensure_home()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("zsseg_rt", appauthor=False))
