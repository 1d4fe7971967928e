"""Where commands print and write results, and what their exit codes mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_GATE, EXIT_ENVIRONMENT = 0, 1, 2, 3, 4


def terminal() -> Console:
    """A console that prints names and paths as they are, square brackets too."""
    from rich.console import Console

    return Console(markup=False)


def write_json(path: Path, content: Any) -> None:
    """Write dataclasses and plain values as JSON, whole or not at all."""
    from zsseg_rt.schema import encode
    from zsseg_rt.visualize import save_file

    text = json.dumps(encode(content), indent=2, ensure_ascii=False)
    save_file(path, (text + "\n").encode())


class ProgressBar:
    """A bar on the terminal; nothing elsewhere."""

    def __init__(self) -> None:
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=terminal(), transient=True)
        self._task = self._bar.add_task("pictures", total=None)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, done: int, total: int) -> None:
        """So many of all pictures are done."""
        self._bar.update(self._task, completed=done, total=total)
