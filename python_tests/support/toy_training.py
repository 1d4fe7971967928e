"""Tasks and data small enough to train for real in a test; run alone, what processes do."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zsseg_rt.errors import TrainingError
from zsseg_rt.training.config import LoopConfig
from zsseg_rt.training.loop.checkpointing import Checkpoint
from zsseg_rt.training.loop.loop import run_loop
from zsseg_rt.training.loop.run_state import leave_processes


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

    def __init__(self, dropout=0.0, bad_image=None, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = nn.Sequential(
                nn.Linear(4, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 1)
            )
            self.extra = nn.Parameter(torch.ones(1))
        self.bad_image = bad_image

    def forward(self, batch):
        error = (self.model(batch.points).squeeze(1) * self.extra - batch.targets).square().mean()
        if self.bad_image in batch.names:
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


def train(folder, task=None, *, source=toy_batches, **arguments):
    arguments = {"config": config(), "schedule": lambda step: 1 / (1 + 0.1 * step)} | arguments
    return run_loop(task or ToyTask(), source, run_folder=folder, **arguments)


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


def losses_of(part):
    """Of some of four images, which have very different shares of labelled pixels and classes."""
    from zsseg_rt.models.zegformer.decoder import Segments
    from zsseg_rt.training.tasks import losses, zegformer

    num_classes, generator = 5, torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, num_classes, 6, 6, generator=generator)
    labels = torch.full((4, 6, 6), 255)
    labels[0] = torch.arange(36).view(6, 6) % num_classes
    labels[1, :2], labels[3, 0, 0] = 3, 1
    logits, labels = logits[part], labels[part]
    segments = Segments(logits.flatten(2)[:, :, : num_classes + 1], logits)
    targets = zegformer.class_masks(labels, num_classes)
    matches = zegformer.match_segments(segments, targets, zegformer.SegmentWeights())
    terms = zegformer.segment_losses(segments, targets, matches, no_object=0.1)
    pixels = (*losses.mask_losses(logits, labels), losses.cross_entropy(logits, labels))
    return [term.item() for term in (*pixels, terms["focal"], terms["dice"])]


def work_in_two_processes(folder):
    """Train, save the losses of a half of a batch, and train into a loss that is not finite."""
    train(folder / "run")
    rank = torch.distributed.get_rank()
    torch.save(losses_of(slice(2 * rank, 2 * rank + 2)), folder / f"{rank}.pt")
    try:
        train(folder / "bad", ToyTask(bad_image="picture-18"))
    except TrainingError as error:
        print(error, flush=True)
    leave_processes()


def train_and_die_in_save(folder):
    """Train until the second checkpoint is half written."""

    def save(content, stream, *arguments, **more):
        if isinstance(content, dict) and content.get("step") == 6:
            stream.write(b"half a file")
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(content, stream, *arguments, **more)

    write, torch.save = torch.save, save
    train(folder)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
