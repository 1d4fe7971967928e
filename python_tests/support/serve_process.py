"""``zsseg-rt serve --demo`` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

SOURCE = "test://?demo=scenes&size=160x120&rate=30"


@dataclass(kw_only=True)
class ServeProcess:
    """A server, and what it has printed."""

    process: subprocess.Popen
    address: str
    log: Path

    @property
    def port(self):
        return urlsplit(self.address).port

    @property
    def pid(self):
        return self.process.pid


@contextlib.contextmanager
def serve_process(folder, *arguments, before=(), env=None, source=SOURCE):
    """A server on a free port; killed at the end if it still runs."""
    log = Path(folder) / "serve.log"
    call = [sys.executable, "-m", "zsseg_rt", *before, "serve", "--demo", "scenes", "--port", "0"]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*call, "--source", source, "--device", "cpu", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "ZSSEG_HOME": str(folder), **(env or {})},
        )
        try:
            line = process.stdout.readline().decode()
            assert line.startswith("Open http://"), log.read_text()
            yield ServeProcess(process=process, address=line.split()[1], log=log)
        finally:
            process.kill()
            process.communicate()
