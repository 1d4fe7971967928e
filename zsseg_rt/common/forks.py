"""What holds threads or a GPU belongs to the process that made it: a forked one has neither."""

from __future__ import annotations

import ctypes
import os
import weakref

from zsseg_rt.errors import DeviceError, EngineStateError

_owners: weakref.WeakSet[object] = weakref.WeakSet()
_on_gpu: set[int] = set()  # processes; a forked one knows its parents
_SPAWN = "CUDA does not outlive a fork: start the process by 'spawn'."


class OwnProcess:
    """The process that ``owner`` was made in, to run on ``device``.

    In a forked one it is never freed: that would wait for threads that do not exist there.
    """

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
            told = "engine: expected the process that made it, got one that was forked from it and "
            told += f"lacks its threads. Make the engine in this process. {self._advice}"
            raise EngineStateError(told.rstrip())


def refuse_gpu_after_fork(device: str) -> None:
    """Raise DeviceError where a GPU is asked for in a process whose parent had one open."""
    if device != "cpu" and _on_gpu - {os.getpid()}:
        raise DeviceError(f"device: expected 'cpu' in a forked process, got {device!r}. {_SPAWN}")


def _keep_for_ever() -> None:
    for owner in _owners:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


os.register_at_fork(after_in_child=_keep_for_ever)
