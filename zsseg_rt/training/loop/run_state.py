"""What changes while a run trains, and how it is saved to a checkpoint and restored."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zsseg_rt.errors import ArgumentError, CheckpointError, TrainingError
from zsseg_rt.training.loop.checkpointing import Checkpoint
from zsseg_rt.training.loop.config import LoopConfig, OptimizerConfig
from zsseg_rt.training.loop.processes import gather_states, start_accelerator
from zsseg_rt.training.loop.random_state import (
    capture_random_state,
    restore_random_state,
    seed_everything,
)
from zsseg_rt.training.segmenters.torch_phrases import hash_weights
from zsseg_rt.training.tasks.task import TrainingTask

_log = logging.getLogger(__name__)
_PREFIX = "model."


class RunState:
    """Weights, optimizer, random numbers and the step, on this process's device.

    Attributes:
        accelerator: The run's accelerator.
        part_size: Images this process computes at a time.
        plain_task: The task, not wrapped.
        task: The task as called, perhaps wrapped.
        optimizer: AdamW.
        step: Optimizer steps done.
    """

    def __init__(self, task: Any, config: LoopConfig, optimizer: OptimizerConfig) -> None:
        self._config = config
        self._max_grad_norm = optimizer.max_grad_norm
        self.accelerator = start_accelerator(config)
        self.part_size = config.part_size(self.accelerator.num_processes)
        seed_everything(config.seed, self.accelerator.process_index)
        self.plain_task = task
        groups: list[dict[str, Any]] = self.plain_task.parameter_groups()
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        adamw = torch.optim.AdamW(groups, betas=optimizer.betas, eps=optimizer.eps)
        self.task, self.optimizer = self.accelerator.prepare(task, adamw)
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.step = 0

    def scale_learning_rates(self, factor: float) -> None:
        """Set every group's rate to its own times ``factor``."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def backward(self, batch: Any) -> dict[str, Tensor]:
        """Compute a part's loss terms and add its gradients; with the last part, update.

        Returns:
            The terms, float32 scalars without gradients.
        """
        with self.accelerator.accumulate(self.task):
            terms: dict[str, Tensor] = self.task(batch)
            self.accelerator.backward(torch.stack(list(terms.values())).sum())
            if self.accelerator.sync_gradients and self._max_grad_norm is not None:
                self.accelerator.clip_grad_norm_(self._parameters, self._max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {name: value.detach().float() for name, value in terms.items()}

    def capture(
        self,
        losses: Mapping[str, float],
        model_card: Mapping[str, Any],
        constants: Mapping[str, Tensor],
    ) -> Checkpoint:
        """Collect everything a checkpoint holds; all processes must call it."""
        weights, _ = self._weights()
        broken = first_non_finite(weights)
        if broken is not None:
            raise TrainingError(
                f"weights: expected finite values, got NaN or infinity in {broken} after step "
                f"{self.step}, which is not saved. Lower the learning rate or set "
                "optimizer.max_grad_norm."
            )
        scaler = self.accelerator.scaler
        return Checkpoint(
            step=self.step,
            num_processes=self.accelerator.num_processes,
            batch_size=self._config.batch_size,
            model={k.removeprefix(_PREFIX): v for k, v in weights.items() if k.startswith(_PREFIX)},
            task={k: v for k, v in weights.items() if not k.startswith(_PREFIX)},
            optimizer=self.optimizer.state_dict(),
            random=gather_states(self.accelerator, capture_random_state()),
            constants=constants,
            model_card=model_card,
            scaler={} if scaler is None else scaler.state_dict(),
            losses=losses,
            left_out=self._left_out_hashes,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint."""
        if checkpoint.batch_size != self._config.batch_size:
            raise ArgumentError(
                f"batch_size: expected {checkpoint.batch_size}, which the run to resume was "
                f"started with, got {self._config.batch_size}. Set it back, or start a new run."
            )
        self._restore_weights(checkpoint)
        self._restore_optimizer(checkpoint)
        self._restore_random(checkpoint.random)
        self.step = checkpoint.step

    def _restore_optimizer(self, checkpoint: Checkpoint) -> None:
        scaler = self.accelerator.scaler
        try:
            self.optimizer.load_state_dict(checkpoint.optimizer)
            if scaler is not None and checkpoint.scaler:
                scaler.load_state_dict(checkpoint.scaler)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                "optimizer: expected the parameter groups of this task, got others "
                f"({type(error).__name__}: {error}). Resume with the run's own configuration, or "
                "remove the checkpoint if it is damaged."
            ) from error

    @cached_property
    def _left_out_hashes(self) -> dict[str, str]:
        if not isinstance(self.plain_task, TrainingTask):
            return {}
        return {name: hash_weights(part) for name, part in self.plain_task.left_out().items()}

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The task's tensors: those that are saved, and those that are left out."""
        prefixes = tuple(f"{name}." for name in self._left_out_hashes)
        saved: dict[str, Tensor] = {}
        left_out: dict[str, Tensor] = {}
        for key, value in self.plain_task.state_dict().items():
            (left_out if key.startswith(prefixes) else saved)[key] = value
        return saved, left_out

    def _check_left_out(self, checkpoint: Checkpoint) -> None:
        """Refuse to continue with another teacher than the run was trained with."""
        own, wanted = self._left_out_hashes, checkpoint.left_out
        for name in sorted(own.keys() | wanted.keys()):
            if own.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"{name}: expected the weights that the run was trained with, "
                    f"{_short(wanted.get(name))}, got {_short(own.get(name))}. Checkpoints leave "
                    "them out: give the run the same file again, or start a new run from "
                    "this one's model with model.start_from."
                )

    def _restore_weights(self, checkpoint: Checkpoint) -> None:
        self._check_left_out(checkpoint)
        _, left_out = self._weights()
        model = {_PREFIX + key: value for key, value in checkpoint.model.items()}
        try:
            self.plain_task.load_state_dict(left_out | model | dict(checkpoint.task))
        except RuntimeError as error:
            raise CheckpointError(
                f"checkpoint: expected the weights of this model, got others: "
                f"{str(error).splitlines()[-1].strip()[:200]}. "
                "Resume with the run's own configuration."
            ) from error

    def _restore_random(self, random: Sequence[dict[str, Any]]) -> None:
        index = self.accelerator.process_index
        if index >= len(random):
            _log.warning(
                "resume: the checkpoint has no random state of process %d; it draws new numbers",
                index,
            )
            return
        try:
            restore_random_state(random[index])
        except (ValueError, TypeError, LookupError, RuntimeError, OverflowError) as error:
            raise CheckpointError(
                f"random: expected the states of process {index}'s generators, got others "
                f"({type(error).__name__}: {error}). Copy the checkpoint again, or remove it to "
                "continue from the one before."
            ) from error


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def _short(sha256: str | None) -> str:
    return "none" if sha256 is None else f"SHA-256 {sha256[:12]}"
