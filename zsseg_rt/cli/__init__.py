"""The command line, ``zsseg-rt``, put together; the work is in the package."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from zsseg_rt import __version__
from zsseg_rt.cli.evaluate import evaluate
from zsseg_rt.cli.export import export_app
from zsseg_rt.cli.import_checkpoint import fetch, import_app
from zsseg_rt.cli.info import doctor, info
from zsseg_rt.cli.options import DemoCommand
from zsseg_rt.cli.output import (
    EXIT_ENVIRONMENT,
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_USAGE,
    LinesAboveStatus,
    UsageError,
    UserInterrupt,
    escape_unprintable,
    flush_output,
    is_output_error,
    print_less,
)
from zsseg_rt.cli.profile import profile
from zsseg_rt.cli.quantize import build, quantize
from zsseg_rt.cli.segment import segment
from zsseg_rt.cli.stream import serve, stream
from zsseg_rt.cli.train import train
from zsseg_rt.common.extras import package_of, unavailable
from zsseg_rt.common.schema import printable
from zsseg_rt.errors import (
    BackendUnavailableError,
    ConfigError,
    DeviceError,
    PrecisionNotApplied,
    ZssegError,
)

__all__ = ["app", "main"]

_ANYWHERE = ("--debug", "--verbose", "-v", "--quiet", "-q")
_CALLED = {
    "class_names": "--classes",
    "cache_dir": "ZSSEG_HOME",
    "num_lanes": "--lanes",
    "num_threads": "--threads",
    "out_dir": "--out",
    "image_size": "--size",
    "size_hw": "--size",
    "templates": "--template",
}  # arguments whose option has another name
_EXIT_CODES: dict[type[BaseException], int] = {
    UsageError: EXIT_USAGE,
    ConfigError: EXIT_USAGE,
    DeviceError: EXIT_ENVIRONMENT,
    BackendUnavailableError: EXIT_ENVIRONMENT,
    PrecisionNotApplied: EXIT_ENVIRONMENT,
    ZssegError: EXIT_FAILURE,
    ValueError: EXIT_USAGE,
    UserInterrupt: EXIT_FAILURE,
    typer.Abort: EXIT_FAILURE,
    KeyboardInterrupt: EXIT_FAILURE,
}  # fmt: skip - by the first that an error is an instance of

app = typer.Typer(
    name="zsseg-rt",
    help="Zero-shot semantic segmentation: name classes at run time, label every pixel.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(import_app, name="import-checkpoint")
app.add_typer(export_app, name="export")
for command in (segment, stream, serve, profile):
    app.command(cls=DemoCommand)(command)
for command in (fetch, train, evaluate, quantize, build, info, doctor):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zsseg-rt {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show debug logs and tracebacks.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also show informational logs.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version."),
    ] = False,
) -> None:
    plain = logging.ERROR if quiet else logging.WARNING
    level = logging.DEBUG if debug else logging.INFO if verbose else plain
    print_less(quiet=quiet, to_stderr=False)
    logging.basicConfig(
        level=level,
        format="%(levelname)s %(name)s: %(message)s",
        handlers=[LinesAboveStatus(sys.stderr)],
        force=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; what the console script calls."""
    try:
        try:
            return _run(arguments)
        finally:
            flush_output()
    except OSError as exc:
        if not is_output_error(exc):
            raise
        with contextlib.suppress(OSError):  # of a full disk for both
            _fail(EXIT_FAILURE, f"standard output: cannot be written: {exc.strerror}")
        return EXIT_FAILURE


def _run(arguments: Sequence[str] | None) -> int:
    escape_unprintable()
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Also after a command's name, where people add them to a call that failed.
    options = words[: words.index("--")] if "--" in words else words
    first = [word for word in options if word in _ANYWHERE]
    debug = "--debug" in first
    if not debug:
        os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # our errors say what it would add
    words = [*first, *(word for word in options if word not in first), *words[len(options) :]]
    try:
        _refuse_early(words[: words.index("--")] if "--" in words else words)
        return int(app(args=words, prog_name="zsseg-rt", standalone_mode=False) or EXIT_OK)
    except tuple(_EXIT_CODES) as exc:
        code = next(code for kinds, code in _EXIT_CODES.items() if isinstance(exc, kinds))
        return _fail(code, _message(exc, words), debug)
    except ImportError as exc:
        package = package_of(exc)
        if package == "zsseg_rt":
            raise
        expected, command = f"{package}: expected to be installed", f"pip install {package}"
        return _fail(EXIT_ENVIRONMENT, str(unavailable(exc, package, expected, command)), debug)


def _refuse_early(options: Sequence[str]) -> None:
    """Refuse a second ``--classes``: the parser would drop the first."""
    times = sum(word.partition("=")[0] == "--classes" for word in options)
    if times > 1:
        raise UsageError(
            f"--classes: expected it once, got it {times} times. Put all names into one, 'a,b', "
            "or give each its own --class."
        )


def _message(error: BaseException, words: Sequence[str]) -> str:
    """The text of an error, with the option that its argument stands for."""
    if isinstance(error, (typer.Abort, KeyboardInterrupt)):
        return "interrupted"
    if isinstance(error, UsageError):
        text = str(error.format_message()) if hasattr(error, "format_message") else str(error)
        # An error that only showed the help has no text of its own.
        return text or "expected a command or arguments; see --help"
    if not isinstance(error, ZssegError) or error.argument is None:
        return str(error)
    option = _CALLED.get(error.argument, "--" + error.argument.replace("_", "-"))
    has_option = option in _options_of(words) or not option.startswith("--")
    return str(error.renamed(option) if has_option else error)


def _options_of(words: Sequence[str]) -> set[str]:
    """The options of the command that was called, with their dashes."""
    command: Any = typer.main.get_command(app)
    options: set[str] = set()
    for word in words:
        inner = getattr(command, "commands", {}).get(word)
        if inner is not None:
            command = inner
            options = {name for param in command.params for name in param.opts}
    return options


def _fail(code: int, message: str, debug: bool = False) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    typer.echo(f"zsseg-rt: {printable(' '.join(message.split()))}", err=True)
    return code
