"""Losses of steps that the device may still be computing, agreed on by all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zsseg_rt.errors import TrainingError
from zsseg_rt.training.loop.processes import Agreement


class StepLosses:
    """Collects loss terms and checks that they are finite.

    A step's losses are read after the next step has been started, so that a GPU never waits for
    them; :meth:`drain` reads what is left.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._pending: _Pending | None = None
        self._window: dict[str, list[float]] = {}

    def add(self, step: int, means: Mapping[str, Tensor], names: Sequence[str], stop: bool) -> None:
        """Add a step, and read the one before; all processes must call it alike."""
        losses = torch.stack(list(means.values()))
        bad = (~torch.isfinite(losses).all()).float()
        values = torch.cat([losses, torch.stack([bad, torch.full_like(bad, float(stop))])])
        agreement = Agreement(self._accelerator, values)
        previous, self._pending = (
            self._pending,
            _Pending(step, tuple(means), tuple(names), values, agreement),
        )
        if previous is not None:
            self._read(previous)

    def stop_is_agreed(self) -> bool:
        """Whether some process was asked to stop at the last step; the same on all processes."""
        return self._pending is not None and self._pending.agreement.read()[-1] > 0

    def drain(self) -> None:
        """Read the outcome of every step so far."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(pending)

    def take_means(self) -> dict[str, float]:
        """Means over the steps since the last call, by term; empty without steps."""
        means = {name: sum(values) / len(values) for name, values in self._window.items()}
        self._window = {}
        return means

    def _read(self, pending: _Pending) -> None:
        *means, bad, _ = pending.agreement.read()
        if bad > 0:
            raise self._not_finite(pending)
        for name, mean in zip(pending.terms, means, strict=True):
            self._window.setdefault(name, []).append(mean)

    def _not_finite(self, pending: _Pending) -> TrainingError:
        own = pending.values.tolist()
        names, losses = pending.names, own[: len(pending.terms)]
        if self._accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            everyone = gather_object([(own[-2] > 0, names, losses)])
            _, names, losses = next(entry for entry in everyone if entry[0])
        terms = ", ".join(
            f"{term} = {loss:.4g}" for term, loss in zip(pending.terms, losses, strict=True)
        )
        return TrainingError(
            f"loss: expected finite terms, got {terms} in step {pending.step} for the images "
            f"{', '.join(names)}. Look at these images and their masks, or lower the learning "
            "rate."
        )


@dataclass(frozen=True)
class _Pending:
    """A step that was started.

    Attributes:
        step: Its number, from 1.
        terms: Names of the loss terms.
        names: Names of this process's images.
        values: This process's terms, whether one is not finite, whether to stop.
        agreement: Their means over processes.
    """

    step: int
    terms: tuple[str, ...]
    names: tuple[str, ...]
    values: Tensor
    agreement: Agreement
