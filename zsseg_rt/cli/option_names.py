"""Say errors in the words of the command line: options, not arguments of Python functions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from zsseg_rt.errors import ZssegError

__all__ = ["in_options", "options_of"]

_CALLED = {
    "class_names": "--classes",
    "cache_dir": "ZSSEG_HOME",
    "num_lanes": "--lanes",
    "num_threads": "--threads",
    "out_dir": "--out",
    "size_hw": "--size",
    "templates": "--template",
}


def in_options(error: Exception, options: Collection[str]) -> str:
    """The message, with the option that the argument stands for, where the command has it.

    Example:
        >>> in_options(ArgumentError("unknown_below: expected a score"), {"--unknown-below"})
        '--unknown-below: expected a score'
    """
    if not isinstance(error, ZssegError) or error.argument is None:
        return str(error)
    option = _CALLED.get(error.argument, "--" + error.argument.replace("_", "-"))
    known = option in options or not option.startswith("--")
    return str(error.renamed(option) if known else error)


def options_of(command: Any, words: Sequence[str]) -> set[str]:
    """The options of the command that was called, with their dashes.

    Args:
        command: The group of all commands, of click's kind.
        words: What was typed.
    """
    options: set[str] = set()
    for word in words:
        inner = getattr(command, "commands", {}).get(word)
        if inner is not None:
            command = inner
            options = {name for param in command.params for name in param.opts}
    return options
