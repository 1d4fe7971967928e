"""Real parts that some machines lack: their tests skip there, or fail where all must run."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def without_streams(reason: str) -> NoReturn:
    """Skip a test of streams; fail it where ZSSEG_REQUIRE_STREAMS=1 says that all must run."""
    if os.environ.get("ZSSEG_REQUIRE_STREAMS") == "1":
        pytest.fail(f"ZSSEG_REQUIRE_STREAMS=1, but {reason}")
    pytest.skip(reason)
