"""Tasks and data small enough to train for real in a test."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from zsseg_rt.training.config import LoopConfig
from zsseg_rt.training.loop.checkpointing import Checkpoint
from zsseg_rt.training.loop.loop import run_loop


@dataclass(frozen=True)
class ToyBatch:
    """Points and targets; what the loop asks of a batch and no more."""

    points: Tensor
    targets: Tensor
    names: tuple[str, ...]

    def to(self, device):
        return ToyBatch(self.points.to(device), self.targets.to(device), self.names)


class ToyTask(nn.Module):
    """A small network; ``dropout`` makes it depend on the state of torch's generator."""

    def __init__(self, dropout=0.0, bad_picture=None, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = nn.Sequential(
                nn.Linear(4, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 1)
            )
            self.extra = nn.Parameter(torch.ones(1))
        self.bad_picture = bad_picture

    def forward(self, batch):
        error = (self.model(batch.points).squeeze(1) * self.extra - batch.targets).square().mean()
        if self.bad_picture in batch.names:
            error = error * float("nan")
        size = sum(parameter.square().sum() for parameter in self.model.parameters())
        return {"error": error, "size": 1e-3 * size}

    def parameter_groups(self):
        return [
            {"params": list(self.model.parameters()), "lr": 1e-2, "weight_decay": 0.01},
            {"params": [self.extra], "lr": 1e-3, "weight_decay": 0.0},
        ]


def toy_batches(*, start_position, process_index, num_processes, batch_size):
    """Every position has its own point; the order of positions is the order of the run."""
    position = start_position
    while True:
        first = position + process_index * batch_size
        rows = [
            np.random.default_rng(place).normal(size=5)
            for place in range(first, first + batch_size)
        ]
        rows = torch.tensor(np.array(rows), dtype=torch.float32)
        names = tuple(f"picture-{place}" for place in range(first, first + batch_size))
        yield ToyBatch(rows[:, :4], rows[:, :4].sum(dim=1) + 0.1 * rows[:, 4], names)
        position += num_processes * batch_size


def toy_schedule(step):
    return 1.0 / (1 + 0.1 * step)


def config(**changes):
    settings = {
        "iterations": 6,
        "batch_size": 4,
        "checkpoint_interval": 3,
        "log_interval": 1,
        "deterministic": True,
        "device": "cpu",
        "best_metric": "score",
    }
    return LoopConfig(**settings | changes)


def train(folder, task=None, *, source=toy_batches, schedule=toy_schedule, **arguments):
    arguments.setdefault("config", config())
    return run_loop(task or ToyTask(), source, run_folder=folder, schedule=schedule, **arguments)


def alike(one, other):
    """Whether two checkpoints, or parts of them, are the same to the bit."""
    if isinstance(one, Checkpoint):
        return alike(vars(one), vars(other))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other
