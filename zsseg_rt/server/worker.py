"""A thread that does jobs one after the other, for callers in an asyncio loop."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

_Value = TypeVar("_Value")


class Busy(Exception):  # noqa: N818 - what a client is told, not an error of ours
    """As many requests of a kind are under way as may be."""


class Worker:
    """Does jobs in a thread of its own, which never keeps the process from ending."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def run(self, job: Callable[[], _Value]) -> _Value:
        future: Future[_Value] = Future()
        self._jobs.put((future, job))
        return await asyncio.wrap_future(future)

    def _work(self) -> None:
        while True:
            future, job = self._jobs.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except Exception as exc:  # noqa: BLE001 - it is raised where the job was ordered
                    future.set_exception(exc)
            del future, job  # or the last frame lives on until the next job


class Desk(Worker):
    """A worker for requests that take room, of which only so many may be under way."""

    def __init__(self, name: str, *, most: int) -> None:
        super().__init__(name)
        self._free = most

    @contextmanager
    def place(self) -> Iterator[None]:
        if not self._free:
            raise Busy("engine: expected fewer requests at a time. Try again after a second.")
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1
