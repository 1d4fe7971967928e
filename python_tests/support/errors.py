"""Expects an error that names what was wrong, without pinning its words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from zsseg_rt.errors import ZssegError


@contextmanager
def refused(
    kind: type[ZssegError], argument: str | None, *named: str
) -> Iterator[pytest.ExceptionInfo[ZssegError]]:
    """The block raises such an error of this argument, whose message names some more.

    ``argument`` may have a place, as in ``class_names[1]``; it is None where a file is wrong.
    ``named`` are keys, files and figures: no words.
    """
    assert not any(" " in name for name in named)
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.argument == (argument and argument.partition("[")[0])
    assert str(caught.value).startswith(argument or "")
    for name in named:
        assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", str(caught.value)), caught.value
