"""The evaluations of a run, and which of them is the best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zsseg_rt.common.files import write_whole
from zsseg_rt.errors import ArgumentError, CheckpointError

EVALUATIONS_FILE = "evaluations.json"


class EvaluationLog:
    """``RUN/evaluations.json``: figures by step."""

    def __init__(self, folder: Path, best_metric: str, best_is: str) -> None:
        self._path = folder / EVALUATIONS_FILE
        self._metric, self._best_is = best_metric, best_is
        self._entries: dict[int, dict[str, float]] = {}

    @classmethod
    def read(cls, folder: Path) -> EvaluationLog:
        """Read the evaluations of a finished run, with the figure that decided there."""
        log = cls(folder, "", "highest")
        content = log._read()
        log._metric, log._best_is = content["best_metric"], content["best_is"]
        log._entries = content["evaluations"]
        return log

    def load(self, last_step: int) -> None:
        """Read the existing evaluations, without steps after the last one."""
        entries = self._read()["evaluations"]
        self._entries = {step: found for step, found in entries.items() if step <= last_step}

    def has(self, step: int) -> bool:
        """Whether a step was evaluated."""
        return step in self._entries

    def of(self, step: int) -> dict[str, float]:
        """The figures of a step; empty if it was not evaluated."""
        return self._entries.get(step, {})

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add figures that are numbers; the file has either the old content or the new."""
        if self._metric not in metrics:
            raise ArgumentError(
                f"best_metric: expected one of {', '.join(metrics)}, got {self._metric!r}. "
                "Set loop.best_metric."
            )
        self._entries[step] = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        content = {
            "best_metric": self._metric,
            "best_is": self._best_is,
            "evaluations": {str(s): found for s, found in sorted(self._entries.items())},
        }
        write_whole(self._path, (json.dumps(content, indent=1) + "\n").encode())

    @property
    def best_step(self) -> int | None:
        """The step with the best figure, the first of equals; None if there is none."""
        sign = 1.0 if self._best_is == "highest" else -1.0
        ranked = {
            step: sign * metrics[self._metric]
            for step, metrics in sorted(self._entries.items())
            if self._metric in metrics
        }
        return max(ranked, key=lambda step: ranked[step]) if ranked else None

    @property
    def best_metrics(self) -> dict[str, float]:
        """Figures of the best step; empty if there is none."""
        best = self.best_step
        return {} if best is None else self._entries[best]

    def _read(self) -> dict[str, Any]:
        if not self._path.is_file():
            return {"best_metric": self._metric, "best_is": self._best_is, "evaluations": {}}
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8"))
            entries = {
                int(step): {name: float(value) for name, value in found.items()}
                for step, found in raw["evaluations"].items()
            }
            decides = {name: str(raw[name]) for name in ("best_metric", "best_is")}
            return decides | {"evaluations": entries}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{self._path}: expected figures by step, got a damaged file. Remove it."
            ) from error
