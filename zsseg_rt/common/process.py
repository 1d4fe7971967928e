"""This process: its CPUs within affinity and quota, what a fork leaves of it, Ctrl-C that waits."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zsseg_rt.errors import DeviceError, EngineStateError


def usable_cpus() -> int:
    """The CPUs that the process may run on, or its quota, rounded up, if that is less."""
    return threads_in_quota() or len(os.sched_getaffinity(0))


def threads_in_quota() -> int:
    """The quota of CPU time in whole CPUs, rounded up; 0 if it leaves all that may be run on."""
    quota = cpu_quota()
    return math.ceil(quota) if quota <= len(os.sched_getaffinity(0)) - 1 else 0


def cpu_quota(root: Path = Path("/")) -> float:
    """CPU seconds per second that the process's control groups allow; infinite without a limit."""
    # Every group above the process's own limits it too. In a container without a namespace for
    # groups, its own path is the host's and absent; the container's group is then the root.
    groups, limits = root / "sys/fs/cgroup", [math.inf]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "?", ""][:3]
        if controllers == "":  # version 2
            mounts, files = {groups}, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            mounts = {groups / controllers, groups / "cpu"}
            files = ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        above = [m.joinpath(*parts[:n]) for m in mounts for n in range(len(parts) + 1)]
        limits += [_ratio(" ".join(_read(group / file) for file in files)) for group in above]
    return min(limits)


def free_memory() -> None:
    """Give memory that was freed back to the system, which glibc by itself does late."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # absent in other C libraries
        trim(0)


def _ratio(text: str) -> float:
    """Quota by period; infinite where there is none: ``max`` or -1."""
    try:
        quota, period = map(int, text.split())
    except ValueError:
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):  # as without control groups
        return ""


_owners: weakref.WeakSet[object] = weakref.WeakSet()
_on_gpu: set[int] = set()  # processes; a forked one knows its parents
_SPAWN = "CUDA does not outlive a fork: start the process by 'spawn'."


class OwnProcess:
    """The process that ``owner`` was made in; a forked one never frees it, lacking its threads."""

    def __init__(self, owner: object, device: str = "cpu") -> None:
        self._id, self._advice = os.getpid(), _SPAWN if device != "cpu" else ""
        _owners.add(owner)
        _on_gpu.update([self._id] if device != "cpu" else [])

    @property
    def is_here(self) -> bool:
        """Whether this is the process."""
        return os.getpid() == self._id

    def require(self) -> None:
        """Raise EngineStateError in a process that was forked."""
        if not self.is_here:
            text = "engine: expected the process that made it, got one that was forked from it and "
            text += f"lacks its threads. Make the engine in this process. {self._advice}"
            raise EngineStateError(text.rstrip())


def refuse_gpu_after_fork(device: str) -> None:
    """Raise DeviceError where a GPU is asked for in a process whose parent had one open."""
    if device != "cpu" and _on_gpu - {os.getpid()}:
        raise DeviceError(f"device: expected 'cpu' in a forked process, got {device!r}. {_SPAWN}")


def _keep_for_ever() -> None:
    for owner in _owners:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


os.register_at_fork(after_in_child=_keep_for_ever)


_KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP wait for the block's end; only the main thread handles any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[int, Any] = {k: signal.getsignal(k) for k in _KINDS}
    handlers = {kind: handler for kind, handler in before.items() if callable(handler)}
    for kind in handlers:
        signal.signal(kind, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)
        for number in came[:1]:
            signal.raise_signal(number)
