"""Say errors in the words of the command line: options, not arguments of Python functions."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

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
_ARGUMENT = re.compile(r"([a-z_]+)(?=(?:\[[^\]]*\])?: )")


def in_options(message: str, options: Collection[str]) -> str:
    """Begin a message with the option that an argument stands for, where the command has it.

    Args:
        message: It reads *argument: expected X, got Y*; others stay unchanged.
        options: The command's options, with their dashes.

    Example:
        >>> in_options("unknown_below: expected a score", {"--unknown-below"})
        '--unknown-below: expected a score'
    """
    found = _ARGUMENT.match(message)
    if found is None:
        return message
    called = _CALLED.get(found[1], "--" + found[1].replace("_", "-"))
    if called not in options and called.startswith("--"):
        return message
    return called + message[found.end() :]


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
