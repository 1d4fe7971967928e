"""Run commands of ``zsseg-rt`` in the test's own process, and Python in others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def run(*arguments: object) -> int:
    """The exit code of a command whose arguments may be paths and numbers."""
    from zsseg_rt import cli  # what needs no command may have no typer

    return cli.main([str(argument) for argument in arguments])


def python(*arguments: object, timeout=600, more_env=None, **settings):
    """A finished child of this interpreter, output as text; ``more_env`` joins its variables."""
    settings.setdefault("env", os.environ | (more_env or {}))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=timeout, **settings,
    )  # fmt: skip


@contextmanager
def ctrl_c_once(condition: Callable[[], bool]) -> Iterator[None]:
    """Interrupts the block as soon as a condition holds, also where tests ignore SIGINT."""
    usual, ended = signal.signal(signal.SIGINT, signal.default_int_handler), threading.Event()

    def interrupt() -> None:
        while not condition() and not ended.wait(0.02):
            pass
        if not ended.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        yield
    finally:
        ended.set()
        signal.signal(signal.SIGINT, usual)


# Prints by how many MB the peak of a process's memory grew in a call, and the error that ended it.
MEASURE = """
import re, sys
from pathlib import Path
from zsseg_rt.errors import ZssegError
{setup}
def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1024
before = peak()
try:
    {call}
except ZssegError as error:
    print(peak() - before, error)
"""


def memory_of_refusal(setup: str, call: str, path: Path) -> tuple[float, str]:
    """Megabytes that a refused call took in a process of its own, and the error's text."""
    done = python("-c", MEASURE.format(setup=setup, call=call), path)
    assert done.returncode == 0, done.stderr
    grown, _, message = done.stdout.partition(" ")
    return float(grown), message


def run_with_other(variable: str, package: str, major: str, file: str, *, skipped: str) -> None:
    """Run a file of tests with the version of a package that lies in a folder of the environment's.

    Tests whose names hold ``skipped`` are left out, as the one that calls this must be.
    """
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"needs {variable}, a folder that {package} {major} is in; see tools/test.sh")
    path = os.pathsep.join(p for p in (folder, os.environ.get("PYTHONPATH")) if p)
    code = f"import {package}, sys; print({package}.__version__, {package}.__file__); import pytest"
    code += "; sys.exit(pytest.main(sys.argv[1:]))"
    options = ("-n", "0", "-q", "-p", "no:cacheprovider", "-k", f"not {skipped}", file)
    root = Path(__file__).parents[2]
    done = python("-c", code, *options, more_env={"PYTHONPATH": path}, cwd=root)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.startswith(f"{major}."), done.stdout[:200]
    assert folder in done.stdout.splitlines()[0]
