"""Worker processes that load data: started without OpenCV's threads, one thread each."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import torch


@contextmanager
def one_opencv_thread() -> Iterator[None]:
    """Fork workers without OpenCV's threads: a child that stops them waits forever."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def prepare_worker(worker: int) -> None:
    """Use one thread, and leave Ctrl-C to the main process, which can always end its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if cv2.getNumThreads() != 1:  # a fresh process; a forked one has inherited this
        cv2.setNumThreads(1)
    torch.set_num_threads(1)
