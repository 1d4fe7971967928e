"""A thread that does jobs one after the other, for callers in an asyncio loop."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["Worker"]

_Value = TypeVar("_Value")


class Worker:
    """Does jobs in a thread of its own, which never keeps the process from ending.

    Args:
        name: The thread's name.
        most_waiting: Jobs that may wait.
    """

    def __init__(self, name: str, *, most_waiting: int) -> None:
        self._jobs: queue.Queue[tuple[Future[Any], Callable[[], Any]]] = queue.Queue(most_waiting)
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def run(self, job: Callable[[], _Value]) -> _Value:
        """Do a job and wait for its result.

        Raises:
            queue.Full: As many jobs wait as may.
        """
        future: Future[_Value] = Future()
        self._jobs.put_nowait((future, job))
        return await asyncio.wrap_future(future)

    def _work(self) -> None:
        while True:
            future, job = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = job()
            except Exception as exc:  # noqa: BLE001 - it is raised where the job was ordered
                future.set_exception(exc)
            else:
                future.set_result(result)
            del future, job  # or the last frame lives on until the next job
