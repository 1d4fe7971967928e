"""Let torch's launches be captured with ours, in memory that nothing else is given."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zsseg_rt.errors import BackendError

_one_at_a_time = threading.RLock()  # torch fails where threads use several pools at once


class TorchRecorder:
    """A memory pool of torch for one capture; see :class:`zsseg_rt.backends.base.Recorder`.

    torch launches on the stream that it is given, so a capture of that stream, begun by whoever
    calls, holds torch's launches and ours alike: no ``torch.cuda.CUDAGraph`` is needed. What
    ``CUDAGraph`` does beyond that is done here: what torch allocates meanwhile comes from a pool of
    its own. From the usual pool, memory would be given to others once the captured tensors are
    gone, and replays would write over it.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._pool: Any = None
        self._is_closed = False

    @property
    def takes_other_threads(self) -> bool:
        """Whether meanwhile other threads' tensors land in the pool: before torch 2.8.

        Source: pytorch/pytorch#152861, mended by #153356.
        """
        import torch.cuda.memory

        return not hasattr(torch.cuda.memory, "_cuda_beginAllocateCurrentThreadToPool")

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Allocate from the pool what the calling thread asks torch for."""
        import torch

        if self._is_closed:
            raise BackendError("recorder: expected an open one, got a closed one. Make another.")
        with _one_at_a_time, torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.MemPool()
            # Before the capture: once one is under way, torch looks for a graph of its own.
            with torch.cuda.use_mem_pool(self._pool, self._device):
                yield

    def close(self) -> None:
        """Give the memory back, after the capture is destroyed. Calling it twice is harmless."""
        self._is_closed = True
        self._pool = None
