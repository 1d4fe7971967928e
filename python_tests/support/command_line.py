"""Run commands of ``zsseg-rt`` in the test's own process."""

from __future__ import annotations

from zsseg_rt import cli


def run(*arguments: object) -> int:
    """The exit code of a command whose arguments may be paths and numbers."""
    return cli.main([str(argument) for argument in arguments])
