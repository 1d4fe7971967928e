"""The state of a run, and how it is saved to a checkpoint and restored."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsseg_rt.common.extras import needs_extra
from zsseg_rt.errors import (
    ArgumentError,
    CheckpointError,
    DeviceError,
    PrecisionNotApplied,
    TrainingError,
)
from zsseg_rt.torch_files.checkpoints import hash_weights
from zsseg_rt.training.config import LoopConfig, OptimizerConfig
from zsseg_rt.training.loop.checkpointing import Checkpoint

_MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
_PATIENCE = timedelta(hours=6)  # how long other processes wait for the main one's evaluation
# What torch, NumPy and Python say of a state that is another's.
_MISFITS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError)
_PREFIX = "model."
_log = logging.getLogger(__name__)


def seed_everything(seed: int, process_index: int = 0) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    own = (seed + process_index) % 2**32
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


def capture_random_state() -> dict[str, Any]:
    """The state of every global generator of this process by name, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue from what :func:`capture_random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave all generators as they were, whatever the block draws."""
    state = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(state)


@contextmanager
def determinism(enabled: bool) -> Iterator[None]:
    """Use algorithms that give the same bits every time, and undo that afterwards.

    Otherwise cuDNN picks the fastest convolution for each shape.
    """
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.deterministic
    if enabled:  # read by cuBLAS when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    cudnn.benchmark, cudnn.deterministic = not enabled, enabled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.benchmark, cudnn.deterministic = before[1:]


def start_accelerator(config: LoopConfig) -> Any:
    """Join the processes that torchrun or ``accelerate launch`` started, or be the only one."""
    with needs_extra("train", "for training"):
        import accelerate
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
    on_cpu = _is_on_cpu(config)
    # Its state outlives an Accelerator; a second run in this process may want another device.
    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    AcceleratorState._reset_state()
    if alone:
        PartialState._reset_state()
    ddp = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
    return accelerate.Accelerator(
        cpu=on_cpu,
        mixed_precision=_MIXED[config.precision],
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.accumulation_steps, sync_with_dataloader=False
        ),
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=_PATIENCE)],
    )


def leave_processes() -> None:
    """End the work with other processes, whose threads may not outlive the interpreter."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _is_on_cpu(config: LoopConfig) -> bool:
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise DeviceError(
            "device: expected a CUDA GPU, got none that torch can use. "
            "Set loop.device to 'auto' or 'cpu', or install torch with CUDA."
        )
    on_cpu = config.device == "cpu" or not has_gpu
    if on_cpu and config.precision == "float16":
        raise PrecisionNotApplied(
            "precision: expected float32 or bfloat16 on the CPU, got float16, whose gradients "
            "underflow there. Set loop.precision to 'bfloat16'."
        )
    return on_cpu


def raise_together(accelerator: Any, error: TrainingError | None) -> None:
    """Fail on every process if one failed, so that no process waits for it."""
    if accelerator.num_processes > 1:
        flag = torch.full((1,), float(error is not None), device=accelerator.device)
        failed = accelerator.reduce(flag, reduction="sum").item() > 0
        if failed and error is None:
            error = TrainingError(
                "checkpoint: expected to be saved, got an error on another process."
            )
    if error is not None:
        raise error


def gather(value: Any) -> list[Any]:
    """The values of all processes in their order, complete on every process."""
    from accelerate.utils import gather_object

    values: list[Any] = gather_object([value])
    return values


class RunState:
    """Weights, optimizer, random numbers and the step, on this process's device."""

    def __init__(self, task: Any, config: LoopConfig, optimizer: OptimizerConfig) -> None:
        self._config = config
        self._max_grad_norm = optimizer.max_grad_norm
        self.accelerator = start_accelerator(config)
        self.part_size = config.part_size(self.accelerator.num_processes)  # images at a time
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
        """Compute a part's loss terms and add its gradients; with the last part, update."""
        with self.accelerator.accumulate(self.task):
            terms: dict[str, Tensor] = self.task(batch)
            self.accelerator.backward(torch.stack(list(terms.values())).sum())
            if self.accelerator.sync_gradients and self._max_grad_norm is not None:
                self.accelerator.clip_grad_norm_(self._parameters, self._max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {name: value.detach().float() for name, value in terms.items()}

    def share_losses(
        self, terms: Mapping[str, Tensor], names: Sequence[str], stop: bool
    ) -> tuple[dict[str, float], bool]:
        """The means of a step's loss terms over all processes, and whether one of these is to stop.

        Where a term is not finite, all processes fail, and name the images of the first with one.
        """
        own = torch.stack(list(terms.values()))
        flags = own.new_tensor([0.0, float(stop)])
        flags[0] = ~torch.isfinite(own).all()
        shared = self.accelerator.reduce(torch.cat([own, flags]), reduction="mean")
        *means, bad, stopped = shared.tolist()
        if bad > 0:
            entries = gather((bool(flags[0]), names, own.tolist()))
            _, images, losses = next(entry for entry in entries if entry[0])
            pairs = (f"{n} = {x:.4g}" for n, x in zip(terms, losses, strict=True))
            raise TrainingError(
                f"loss: expected finite terms, got {', '.join(pairs)} in step {self.step} for the "
                f"images {', '.join(images)}. Look at these images and their masks, or lower the "
                "learning rate."
            )
        return dict(zip(terms, means, strict=True)), stopped > 0

    def capture(
        self,
        losses: Mapping[str, float],
        model_card: Mapping[str, Any],
        constants: Mapping[str, Tensor],
    ) -> Checkpoint:
        """Collect everything a checkpoint holds; all processes must call it."""
        weights, _ = self._weights()
        floats = {key: value for key, value in weights.items() if value.is_floating_point()}
        broken = [key for key, value in floats.items() if not bool(torch.isfinite(value).all())]
        if broken:
            raise TrainingError(
                f"weights: expected finite values, got NaN or infinity in {broken[0]} after step "
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
            random=gather(capture_random_state()),
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
        scaler, index = self.accelerator.scaler, self.accelerator.process_index
        try:
            self.optimizer.load_state_dict(checkpoint.optimizer)
            if scaler is not None and checkpoint.scaler:
                scaler.load_state_dict(checkpoint.scaler)
            if index < len(checkpoint.random):
                restore_random_state(checkpoint.random[index])
            else:
                _log.warning("resume: no random state of process %d; it draws new numbers", index)
        except _MISFITS as error:
            raise CheckpointError(
                "checkpoint: expected states of this task's optimizer and of torch's, NumPy's and "
                f"Python's generators, got others ({type(error).__name__}: {error}). Resume with "
                "the run's own configuration, or remove the checkpoint if it is damaged."
            ) from error
        self.step = checkpoint.step

    @cached_property
    def _left_out_hashes(self) -> dict[str, str]:
        """Hashes of the frozen parts that no checkpoint stores, by name."""
        left_out: Mapping[str, torch.nn.Module] = getattr(self.plain_task, "left_out", dict)()
        return {name: hash_weights(part) for name, part in left_out.items()}

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The task's tensors: those that are saved, and those that are left out."""
        prefixes = tuple(f"{name}." for name in self._left_out_hashes)
        saved: dict[str, Tensor] = {}
        left_out: dict[str, Tensor] = {}
        for key, value in self.plain_task.state_dict().items():
            (left_out if key.startswith(prefixes) else saved)[key] = value
        return saved, left_out

    def _restore_weights(self, checkpoint: Checkpoint) -> None:
        own, wanted = self._left_out_hashes, checkpoint.left_out
        for name in sorted(own.keys() | wanted.keys()):
            if own.get(name) != wanted.get(name):  # such as another teacher
                raise CheckpointError(
                    f"{name}: expected the weights that the run was trained with, "
                    f"{_short(wanted.get(name))}, got {_short(own.get(name))}. Checkpoints leave "
                    "them out: give the run the same file again, or start a new run from "
                    "this one's model with model.start_from."
                )
        try:
            model = {_PREFIX + key: value for key, value in checkpoint.model.items()}
            self.plain_task.load_state_dict(self._weights()[1] | model | checkpoint.task)
        except _MISFITS as error:
            raise CheckpointError(
                f"checkpoint: expected the weights of this model, got others: "
                f"{str(error).splitlines()[-1].strip()[:200]}. "
                "Resume with the run's own configuration."
            ) from error


def _short(sha256: str | None) -> str:
    return "none" if sha256 is None else f"SHA-256 {sha256[:12]}"
