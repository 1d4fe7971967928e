"""Say an error in the words of the person who made it: by the option, not by our argument."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from zsseg_rt.errors import ZssegError

__all__ = ["arguments_called"]


@contextmanager
def arguments_called(
    names: Mapping[str, str], table: str = "", fields: Collection[str] = ()
) -> Iterator[None]:
    """Begin messages with what arguments are called where they were given.

    A message reads *argument: expected X, got Y*; of other messages nothing is changed.

    Args:
        names: By argument: an option such as ``"--rename"``, or a key such as ``"text.clip"``.
        table: A configuration's table, such as ``"model.options"``.
        fields: Arguments that are keys of that table.

    Raises:
        ZssegError: What the block raises, of the same class.
    """
    try:
        yield
    except ZssegError as error:
        argument, colon, rest = str(error).partition(":")
        known = names.get(argument, f"{table}.{argument}" if argument in fields else "")
        if not colon or not known:
            raise
        raise type(error)(f"{known}:{rest}") from error
