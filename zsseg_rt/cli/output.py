"""Where commands print and write results, and what their exit codes mean."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from zsseg_rt.engine import Engine

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_GATE, EXIT_ENVIRONMENT = 0, 1, 2, 3, 4


def escape_unprintable() -> None:
    """Let output escape what its encoding lacks, such as file names that are not valid Unicode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def terminal() -> Console:
    """A console that prints names and paths as they are, square brackets too."""
    from rich.console import Console

    return Console(markup=False)


def write_json(path: Path, content: Any) -> None:
    """Write dataclasses and plain values as JSON, whole or not at all.

    The file is always UTF-8: bytes of a file name that are not valid UTF-8 stay escaped, as
    Python's ``surrogateescape`` writes them.
    """
    from zsseg_rt.schema import encode
    from zsseg_rt.visualize import save_file

    text = json.dumps(encode(content), indent=2, ensure_ascii=False)
    save_file(path, (text + "\n").encode("utf-8", "backslashreplace"))


def describe_engine(engine: Engine) -> dict[str, Any]:
    """What ran, for a JSON report."""
    return {
        "bundle": engine.bundle.name,
        "backend": engine.backend,
        "device": engine.device,
        "precision": engine.precision,
        "names": [] if engine.vocabulary is None else list(engine.vocabulary.names),
        "background": [] if engine.vocabulary is None else list(engine.vocabulary.background),
    }


class ProgressBar:
    """A bar on the terminal; nothing elsewhere."""

    def __init__(self) -> None:
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=terminal(), transient=True)
        self._task = self._bar.add_task("images", total=None)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, done: int, total: int) -> None:
        """Show how many of all images are done."""
        self._bar.update(self._task, completed=done, total=total)
