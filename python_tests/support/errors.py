"""Expects an error that names what was wrong, without pinning its words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from zsseg_rt.errors import ZssegError


@contextmanager
def refused(kind: type[ZssegError], argument: str) -> Iterator[pytest.ExceptionInfo[ZssegError]]:
    """The block raises such an error, and its ``argument`` is this one."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.argument == argument
