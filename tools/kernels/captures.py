"""Time kernels without Python and without launches: capture many launches, time their replay.

Between two events around one call lie its launch and the Python before it, which take longer than
most kernels do. This file imports no torch; it is given the module.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

from zsseg_rt.errors import ZssegError

__all__ = ["LAUNCHES", "CaptureRefusedError", "capture_launches"]

LAUNCHES = 100


class CaptureRefusedError(ZssegError):
    """CUDA does not capture these launches, because they wait, or copy from the host."""


def capture_launches(
    torch: Any, calls: Sequence[Callable[[], Any]], *, stream: int, launches: int = LAUNCHES
) -> Callable[[], Any]:
    """Capture calls that take turns, and return what replays them all.

    Args:
        torch: The module, with CUDA.
        calls: The same work on buffers of their own, so that a replay does not find all its data
            in the GPU's cache. They enqueue on ``stream``.
        stream: Handle of the CUDA stream; the replay goes to torch's current one.
        launches: Calls in one replay.

    Raises:
        CaptureRefusedError: CUDA or a call refused; the calls work as before.
    """
    for call in calls:
        call()  # modules and handles that the first call loads
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.disable()  # memory freed meanwhile would be freed in every replay
    try:
        with torch.cuda.graph(
            captured,
            stream=torch.cuda.ExternalStream(stream),
            capture_error_mode="thread_local",
        ):
            for index in range(launches):
                calls[index % len(calls)]()
    except (RuntimeError, ZssegError) as exc:
        raise CaptureRefusedError(_first_line(exc)) from exc
    finally:
        if collecting:
            gc.enable()
    captured.replay()
    torch.cuda.synchronize()
    replay: Callable[[], Any] = captured.replay
    return replay


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0] if lines else type(exc).__name__
