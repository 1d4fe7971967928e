"""Where this package keeps what it can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """Where derived data lives: ``$ZSSEG_HOME`` if set, otherwise the user's cache folder."""
    home = os.environ.get("ZSSEG_HOME")
    if home:
        return Path(home)
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("zsseg_rt", appauthor=False))
