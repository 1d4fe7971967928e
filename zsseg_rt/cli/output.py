"""Where commands print and write results, how signals stop them, and their exit codes."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from zsseg_rt.common.files import is_device, is_folder, why_not_made, why_unwritable
from zsseg_rt.common.schema import encode, json_text, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from zsseg_rt.engine import Engine

# Typer re-exports only a subclass of this, and which package defines both depends on its version.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
_TERMINAL = {"quiet": False, "stderr": False}

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_GATE, EXIT_ENVIRONMENT = 0, 1, 2, 3, 4


class UserInterrupt(Exception):  # noqa: N818 - it is no error
    """Ctrl-C, after what could be kept was kept; the message says what is done."""


def escape_unprintable() -> None:
    """Let output escape what its encoding lacks, such as file names that are not valid Unicode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Write what standard output still holds; what it does not take is dropped."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - else Python tries again at its end
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise


def is_output_error(error: OSError) -> bool:
    """Whether standard output is full or closed: our files say their names."""
    kinds = (errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EFBIG, errno.EDQUOT)
    return error.filename is None and error.errno in kinds


class LinesAboveStatus(logging.StreamHandler[TextIO]):
    """Logs to standard error; on a terminal a line goes above what moves there, not into it."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, unless a traceback follows it."""
        text = super().format(record)
        return text if record.exc_info else printable(text)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        if sys.stderr is None or self.stream.closed or not self.stream.isatty():
            super().emit(record)
            return
        sys.stderr.write(self.format(record) + "\n")  # rich stands in for it while it draws
        sys.stderr.flush()


def print_less(*, quiet: bool | None = None, to_stderr: bool | None = None) -> None:
    """Choose what :func:`terminal` returns, in this process; None leaves a choice as it is."""
    _TERMINAL.update({k: v for k, v in (("quiet", quiet), ("stderr", to_stderr)) if v is not None})


def terminal() -> Console:
    """A console that prints names and paths as they are, square brackets too, but on one line."""
    from rich.console import Console

    console = Console(markup=False, quiet=_TERMINAL["quiet"], stderr=_TERMINAL["stderr"])
    as_given = console.render_str  # of lines and of tables' cells alike

    def render_str(text: str, **options: Any) -> Any:
        return as_given(printable(text), **options)

    console.render_str = render_str  # type: ignore[method-assign]
    return console


def say(*lines: str | Table) -> None:
    """Print lines, however long, each in one piece and colour: people copy paths out of them."""
    for line in lines:
        terminal().print(line, highlight=False, soft_wrap=True)


def write_json(path: Path | None, content: Any) -> None:
    """Write dataclasses, paths and plain values as JSON in UTF-8, whole or not at all."""
    from zsseg_rt.results.visualize import save_file

    if path is not None:
        save_file(path, (json_text(encode(content), indent=2) + "\n").encode())


def check_file_place(option: str, file: Path | None) -> None:
    """Refuse a file that cannot be written, before any work is done for it."""
    if file is None or is_device(file):
        return
    absent = "" if is_folder(file.parent) else "it does not exist"
    _refuse_folder(option, file.parent, why_unwritable(file.parent) or absent)
    try:
        problem = "a folder" if stat.S_ISDIR(file.stat().st_mode) else ""
    except FileNotFoundError:
        return
    except (OSError, ValueError) as exc:  # a name too long, or with a NUL
        problem = getattr(exc, "strerror", None) or str(exc)
    if problem:
        raise UsageError(f"{option}: expected a file to write, got {problem}, {file}")


def check_folder_place(option: str, folder: Path) -> None:
    """Make the folder for results, or refuse it before any work is done."""
    _refuse_folder(option, folder, why_not_made(folder))


def _refuse_folder(option: str, folder: Path, problem: str) -> None:
    if problem:
        raise UsageError(
            f"{option}: expected a folder that can be written to, got {folder}: {problem}"
        )


def describe_engine(engine: Engine) -> dict[str, Any]:
    """The engine that ran, for a JSON report."""
    return {
        "bundle": engine.bundle.name,
        "backend": engine.backend,
        "device": engine.device,
        "precision": engine.precision,
        "names": [] if engine.vocabulary is None else list(engine.vocabulary.names),
        "background": [] if engine.vocabulary is None else list(engine.vocabulary.background),
    }


@contextmanager
def working(what: str) -> Iterator[None]:
    """Print a line about a step that takes long, and on a terminal that it goes on."""
    say(what)
    with terminal().status("working"):
        yield


class ProgressBar:
    """A bar on the terminal, of things or of bytes; nothing elsewhere."""

    def __init__(self, what: str = "images", in_bytes: bool = False, hidden: bool = False) -> None:
        from rich import progress

        figures = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
        columns = figures if in_bytes else [what, progress.MofNCompleteColumn()]
        self._bar = progress.Progress(
            progress.BarColumn(), *columns, progress.TimeRemainingColumn(),
            console=terminal(), disable=hidden, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, done: int, total: int | None) -> None:
        """Show how many of all are done."""
        self._bar.update(self._task, completed=done, total=total)


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call a function at SIGINT, SIGTERM or SIGHUP (unless ignored); a second one acts as usual."""
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, _: Any) -> None:
        signal.signal(number, before[signal.Signals(number)])
        stop()

    if threading.current_thread() is threading.main_thread():
        kinds = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            kinds.append(signal.SIGHUP)
        for kind in kinds:
            before[kind] = signal.signal(kind, handle)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
