"""The evaluations of a run, and which of them is the best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.files import write_atomically

__all__ = ["EVALUATIONS_FILE", "EvaluationLog"]

EVALUATIONS_FILE = "evaluations.json"


class EvaluationLog:
    """``RUN/evaluations.json``: figures by step.

    Args:
        folder: Of the run.
        best_metric: Name of the figure that decides.
        best_is: ``"highest"`` or ``"lowest"``.
    """

    def __init__(self, folder: Path, best_metric: str, best_is: str) -> None:
        self._path = folder / EVALUATIONS_FILE
        self._metric, self._sign = best_metric, 1.0 if best_is == "highest" else -1.0
        self._entries: dict[int, dict[str, float]] = {}

    def load(self, last_step: int) -> None:
        """Read what is there, without steps after the last one.

        Raises:
            CheckpointError: The file is damaged.
        """
        if not self._path.is_file():
            return
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8"))
            entries = {int(step): dict(metrics) for step, metrics in raw.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self._path}: expected figures by step, got a damaged file. Remove it."
            ) from error
        self._entries = {step: found for step, found in entries.items() if step <= last_step}

    def has(self, step: int) -> bool:
        """Whether a step was evaluated."""
        return step in self._entries

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note figures; the file has the old content or the new.

        Raises:
            ArgumentError: The deciding figure is not among them.
        """
        if self._metric not in metrics:
            raise ArgumentError(
                f"best_metric: expected one of {', '.join(metrics)}, got {self._metric!r}. "
                "Set loop.best_metric."
            )
        self._entries[step] = dict(metrics)
        text = json.dumps({str(s): m for s, m in sorted(self._entries.items())}, indent=1)
        write_atomically(self._path, (text + "\n").encode())

    @property
    def best_step(self) -> int | None:
        """The step with the best figure, the first of equals; None without one."""
        ranked = {
            step: self._sign * metrics[self._metric]
            for step, metrics in sorted(self._entries.items())
            if not math.isnan(metrics.get(self._metric, math.nan))
        }
        return max(ranked, key=lambda step: ranked[step]) if ranked else None

    @property
    def best_metrics(self) -> dict[str, float]:
        """Figures of the best step; empty without one."""
        best = self.best_step
        return {} if best is None else self._entries[best]
