"""Run a real Triton Inference Server; tools/machines/triton_check.sh installs one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_LIMIT, STOP_LIMIT = 120.0, 60.0  # seconds


@dataclass(frozen=True)
class Server:
    """Where a server answers: host and port for HTTP and for gRPC, and its process."""

    http: str
    grpc: str
    process: subprocess.Popen


@contextmanager
def serving(repository: Path, log: Path) -> Iterator[Server]:
    """A server that has loaded every model of a repository; stopped afterwards.

    ``ZSSEG_TRITON_SERVER`` names its program; ``ZSSEG_TRITON_BACKENDS`` and
    ``ZSSEG_TRITON_LIBRARIES`` its folders, where it does not find them itself.
    """
    ports = free_ports(2)
    call = [os.environ["ZSSEG_TRITON_SERVER"], f"--model-repository={repository}"]
    call += [f"--http-port={ports[0]}", f"--grpc-port={ports[1]}", "--allow-metrics=false"]
    call += ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1"]
    if backends := os.environ.get("ZSSEG_TRITON_BACKENDS"):
        call.append(f"--backend-directory={backends}")
    environment = dict(os.environ)
    if libraries := os.environ.get("ZSSEG_TRITON_LIBRARIES"):
        environment["LD_LIBRARY_PATH"] = libraries
    with log.open("wb") as stream:
        process = subprocess.Popen(
            call, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        wait_until_ready(f"http://127.0.0.1:{ports[0]}/v2/health/ready", process, log)
        yield Server(f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", process)
    finally:
        stop(process)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_until_ready(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_LIMIT
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"tritonserver is not ready: {process.poll()}\n{log.read_text()[-6000:]}")


def stop(process: subprocess.Popen) -> None:
    """End a server and the processes of its models."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_LIMIT)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
