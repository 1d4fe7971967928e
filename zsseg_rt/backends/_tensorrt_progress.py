"""Turn TensorRT's nested build phases into (step name, fraction)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SMALLEST_RISE = 0.005  # of the fraction; TensorRT reports every graph node


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class BuildProgress:
    """Follows phases, from any thread, and reports a fraction that never falls.

    Args:
        callback: Called with (phase name, fraction in [0, 1]); None reports nothing. An exception
            it raises cancels the build and is raised again by :meth:`finish`.
    """

    def __init__(self, callback: Callable[[str, float], None] | None) -> None:
        self._callback = callback
        self._phases: dict[str, _Phase] = {}
        self._fraction = 0.0
        self._told = -1.0
        self._raised: BaseException | None = None
        self._lock = threading.RLock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Note that a phase begins."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))
            self._tell(name)

    def step(self, name: str, step: int) -> bool:
        """Note that a step of a phase ended; False asks the build to stop."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
            self._tell(name)
            return self._raised is None

    def end(self, name: str) -> None:
        """Note that a phase ended."""
        with self._lock:
            phase = self._phases.pop(name, None)
            if phase is not None and phase.parent is None:
                self._fraction = 1.0
                self._tell(name)

    def finish(self) -> None:
        """Raise what the callback raised during the build, if anything."""
        if self._raised is not None:
            raise self._raised

    def _overall(self) -> float:
        roots = (name for name, phase in self._phases.items() if phase.parent is None)
        return max((self._within(name) for name in roots), default=self._fraction)

    def _within(self, name: str) -> float:
        phase = self._phases[name]
        children = [child for child, other in self._phases.items() if other.parent == name]
        inner = max((self._within(child) for child in children), default=0.0)
        return min((phase.done + inner) / phase.steps, 1.0)

    def _tell(self, name: str) -> None:
        self._fraction = max(self._fraction, self._overall())
        if self._callback is None or self._raised is not None:
            return
        if self._fraction < min(self._told + SMALLEST_RISE, 1.0) or self._told == 1.0:
            return
        self._told = self._fraction
        try:
            self._callback(name, self._fraction)
        except BaseException as exc:  # noqa: BLE001 - must not cross TensorRT's C++; see finish()
            self._raised = exc


def make_monitor(trt: Any, progress: BuildProgress) -> Any:
    """Make the object TensorRT reports to."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progress.end(phase_name)

    return Monitor()
