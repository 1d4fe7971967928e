"""Frames as captures: what a lane enqueues for a part of a frame is recorded once, then replayed.

Where the host looks at nothing before the end, a frame is one part.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from zsseg_rt.backends.base import Recorder, Session
from zsseg_rt.common.arrays import gpu_index
from zsseg_rt.errors import ConfigError, ZssegError
from zsseg_rt.ops import core
from zsseg_rt.runtime.workspace import Workspace

MOST_CAPTURES = 8
TRIES_AFTER = (30, 300)  # plain frames between a refused capture and the next try
_SETTING = "ZSSEG_CUDA_GRAPHS"
_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


def captures_wanted() -> bool:
    """Whether ``$ZSSEG_CUDA_GRAPHS`` allows captures: not if it is 0."""
    value = os.environ.get(_SETTING) or "1"
    if value not in ("0", "1"):
        raise ConfigError(
            f"{_SETTING}: expected 0 or 1, got {value!r}. Unset it to record frames as CUDA graphs."
        )
    return value == "1"


@dataclass(kw_only=True, eq=False)
class _Kind(Generic[_Result]):
    """A kind of part: what its memory was when it last ran, and its capture once there is one."""

    state: Hashable
    refusals: int = 0
    rest: float = -1  # plain runs until it may be recorded: when this is below 0
    capture: core.Capture | None = None
    result: _Result | None = None
    marks: list[tuple[str, Any]] = field(default_factory=list)
    recorders: list[Recorder] = field(default_factory=list)  # what replays need of the sessions

    def close(self) -> None:
        """Destroy the capture, then give back what it needed."""
        self.capture = self.result = None
        for recorder in self.recorders:
            recorder.close()
        self.recorders.clear()


class FrameCaptures:
    """One lane's captures, by kind of part; the least used are dropped beyond eight.

    A kind's first run is plain, which allocates what it needs. The second is recorded and launched,
    later ones are only launched. A capture holds addresses: once a buffer has moved or a session
    has changed, its kind begins anew. Where CUDA refuses, two more tries are made later.
    """

    def __init__(
        self,
        sessions: Mapping[str, Session],
        workspace: Workspace,
        *,
        wanted: bool,
    ) -> None:
        self._sessions, self._workspace = tuple(sessions.values()), workspace
        self._kinds: dict[Hashable, _Kind[Any]] = {}  # least used first
        self._has_warned = False
        # .has_run: the calling thread has, plainly. Libraries such as cuBLAS make a handle in a
        # thread's first call, which no capture allows (pytorch/pytorch#99397).
        self._thread = threading.local()
        self._index = gpu_index(workspace.device)
        self.is_on = wanted and workspace.device != "cpu"

    def run(self, key: Hashable, enqueue: Callable[[], _Result]) -> _Result:
        """Enqueue a part's work; a ``PartRunner``."""
        state = self._state()
        if self.is_on and state is None:
            _log.info("Frames are not captured as a whole: the backend's sessions do not allow it.")
            self.is_on = False
        if not self.is_on:
            return enqueue()
        kind: _Kind[_Result] | None = self._kinds.pop(key, None)
        if kind is None or kind.state != state:
            if kind is not None:
                kind.close()
            result = enqueue()
            self._thread.has_run = True
            self._keep(key, _Kind(state=self._state()))
            return result
        self._keep(key, kind)
        if kind.capture is None and hasattr(self._thread, "has_run") and kind.rest < 0:
            self._record(kind, enqueue)
        if kind.capture is None:
            kind.rest -= 1
            result = enqueue()
            self._thread.has_run = True
            return result
        kind.capture.launch(self._workspace.stream)
        self._workspace.clock.marks.extend(kind.marks)
        assert kind.result is not None
        return kind.result

    def clear(self) -> None:
        """Drop every capture."""
        for kind in self._kinds.values():
            kind.close()
        self._kinds.clear()

    def _record(self, kind: _Kind[_Result], enqueue: Callable[[], _Result]) -> None:
        capture, marks = core.Capture(self._index), self._workspace.clock.marks
        before = len(marks)
        try:
            with ExitStack() as recording:
                every = (session.recorder() for session in self._sessions)
                kind.recorders += [recorder for recorder in every if recorder is not None]
                for recorder in kind.recorders:
                    recording.enter_context(recorder.recording())
                recording.callback(capture.cancel)  # before the recorders are left
                capture.begin(self._workspace.stream)
                result = enqueue()
                capture.end()
        except (ZssegError, RuntimeError) as exc:  # RuntimeError: torch's
            kind.close()
            kind.rest = (*TRIES_AFTER, math.inf)[kind.refusals]
            kind.refusals += 1
            if not self._has_warned:
                self._has_warned = True
                _log.warning(
                    "Frames run without a capture, which takes more CPU time: %s. "
                    "Set %s=0 to leave captures out.",
                    str(exc).rstrip("."),
                    _SETTING,
                )
        else:
            kind.capture, kind.result = capture, result
            kind.marks = marks[before:]
        finally:
            del marks[before:]

    def _state(self) -> Hashable | None:
        """The state that captures depend on; None where one of the sessions cannot be captured."""
        states: list[Hashable] = [self._workspace.generation]
        for session in self._sessions:
            state = session.capture_state()
            if state is None:
                return None
            states.append(state)
        return tuple(states)

    def _keep(self, key: Hashable, kind: _Kind[Any]) -> None:
        self._kinds[key] = kind
        for oldest in list(self._kinds)[: max(0, len(self._kinds) - MOST_CAPTURES)]:
            self._kinds.pop(oldest).close()
