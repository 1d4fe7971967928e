"""Time work on a GPU by CUDA events."""

from __future__ import annotations

from zsseg_rt import ops

__all__ = ["EventTimer"]


class EventTimer:
    """Marks the begin and end of work on a stream; a :class:`DeviceTimer` of the sampler.

    Args:
        stream: Handle of the CUDA stream.
        device: The GPU's number.

    Raises:
        DeviceError: There is no such GPU.
    """

    def __init__(self, stream: int, device: int = 0) -> None:
        self._stream = stream
        self._begin, self._end = ops.Event(device), ops.Event(device)

    def begin(self) -> None:
        """Mark the begin of the work that is enqueued next."""
        self._begin.record(self._stream)

    def end_ms(self) -> float:
        """Wait for the work and return its milliseconds."""
        self._end.record(self._stream)
        self._end.synchronize()
        return self._begin.elapsed_ms(self._end)
