"""Names in the user's terms: an option instead of our argument, and names of earlier versions."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from zsseg_rt.errors import ZssegError

_log = logging.getLogger(__name__)
_RENAMED = {"dense_baseline": "cosine_head"}


@contextmanager
def arguments_called(
    names: Mapping[str, str], table: str = "", fields: Collection[str] = ()
) -> Iterator[None]:
    """Raise errors of the block under the name by which the user gave the argument.

    ``names`` maps arguments to options (``"--rename"``) or keys (``"text.clip"``); arguments among
    ``fields`` are keys of ``table``, such as ``"model.options"``. Other errors pass unchanged.
    """
    try:
        yield
    except ZssegError as error:
        argument = error.argument or ""
        known = names.get(argument, f"{table}.{argument}" if argument in fields else "")
        if not known:
            raise
        raise error.renamed(known) from error


def current_name(architecture: str) -> str:
    """What an architecture is called today; a warning tells if it was renamed."""
    name = _RENAMED.get(architecture, architecture)
    if name != architecture:
        _log.warning("architecture: %r is called %r now", architecture, name)
    return name
