"""Devices, processes and precision, through Hugging Face Accelerate."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from zsseg_rt.common.extras import needs_extra
from zsseg_rt.errors import DeviceError, PrecisionNotApplied, TrainingError
from zsseg_rt.training.loop.config import LoopConfig

_MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
_PATIENCE = timedelta(hours=6)  # how long other processes wait for the main one's evaluation


def start_accelerator(config: LoopConfig) -> Any:
    """Join the processes that torchrun or ``accelerate launch`` started, or be the only one.

    The configuration decides, whatever Accelerate's own settings are.

    Returns:
        An ``accelerate.Accelerator``.
    """
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


class Agreement:
    """What all processes know about one step, read when the device is done with it.

    The values are means over processes. Reading them a step later keeps a GPU busy meanwhile.

    Shapes:
        values: This process's, float32 ``[n]``; the same n everywhere.
    """

    def __init__(self, accelerator: Any, values: Tensor) -> None:
        mean = accelerator.reduce(values, reduction="mean")
        self._values: Tensor = mean.to("cpu", non_blocking=True)
        self._ready = None
        if mean.is_cuda:
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()

    def read(self) -> list[float]:
        """Wait for the values."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._values.tolist()


def gather_states(accelerator: Any, state: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all processes in their order, complete on every process."""
    if accelerator.num_processes == 1:
        return [state]
    from accelerate.utils import gather_object

    states: list[dict[str, Any]] = gather_object([state])
    return states


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
