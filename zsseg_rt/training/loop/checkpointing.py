"""Checkpoints: one file of ``torch.save`` a step, which appears whole or not at all.

It is a zip file: its CRCs are checked before ``torch.load`` reads it, which builds tensors and
plain values and runs nothing.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsseg_rt.common.files import whole_file
from zsseg_rt.errors import CheckpointError, TrainingError
from zsseg_rt.training.loop import CHECKPOINT_MARK

FORMAT_VERSION = 4  # 1 to 3 were folders of safetensors and JSON
# Types of parts that are no dict, and of dicts' values
_KINDS: dict[str, type] = {"step": int, "num_processes": int, "batch_size": int, "random": list}
_VALUES = {"model": Tensor, "task": Tensor, "constants": Tensor, "losses": float, "left_out": str}
_NAME = re.compile(r"step-(\d{8,})\.pt")
_WHAT_TO_DO = "Copy the checkpoint again, or remove it to continue from the one before."


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that is saved."""

    step: int  # Optimizer steps done
    num_processes: int  # Processes that were training
    batch_size: int  # Images per optimizer step
    model: Mapping[str, Tensor]  # state_dict of the model
    # state_dict of the objective, without its model and what is left out
    task: dict[str, Tensor] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)  # state_dict of the optimizer
    # States of the generators of each process
    random: list[dict[str, Any]] = field(default_factory=list)
    # Tensors that go with the model but are not trained, such as class embeddings
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    # What the model is; see card
    model_card: Mapping[str, Any] = field(default_factory=dict)
    # State of float16's loss scaling; empty for other precisions
    scaler: Mapping[str, Any] = field(default_factory=dict)
    # Means of the loss terms at the end, as information only
    losses: Mapping[str, float] = field(default_factory=dict)
    # SHA-256 of the weights of each part of the task that is not saved, by its name
    left_out: Mapping[str, str] = field(default_factory=dict)


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending, even damaged ones."""
        names = (_NAME.fullmatch(path.name) for path in self.path.glob("step-*.pt"))
        return sorted(int(name[1]) for name in names if name)

    def at(self, step: int) -> Path:
        """File of the checkpoint of a step."""
        return self.path / f"step-{step:08d}.pt"

    def describe_last(self) -> str:
        """One sentence about the last checkpoint, for users."""
        steps = self.steps()
        if not steps:
            return "No checkpoint was saved before."
        return f"The last good checkpoint is {self.at(steps[-1])}; continue from it with --resume."

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint; the file gets its name once all of it is on the disk."""
        target = self.at(checkpoint.step)
        head = {"format": CHECKPOINT_MARK, "format_version": FORMAT_VERSION}
        with writing(target):
            self.path.mkdir(parents=True, exist_ok=True)
            with whole_file(target) as stream:
                torch.save(head | vars(checkpoint), stream)
        return target

    def prune(self, keep: int, protected: Collection[int | None] = ()) -> None:
        """Remove all but the last ``keep`` checkpoints and those of the ``protected`` steps."""
        for step in self.steps()[: -keep or None]:
            if step not in protected:
                self.at(step).unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Remove what an earlier process was writing when it was killed."""
        for entry in self.path.glob(".step-*.tmp"):
            entry.unlink(missing_ok=True)


def read_checkpoint(path: Path, *, mmap: bool = False) -> Checkpoint:
    """Read a checkpoint file, or say that it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # nothing may take more memory than its file
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("a file that torch.save did not write")
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"a damaged {damaged}: the file was changed after it was saved")
        raw = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise CheckpointError(
            f"{path}: expected a whole checkpoint, got {_reason(error)}. {_WHAT_TO_DO}"
        ) from error
    return _decode(raw, path)


def _decode(raw: Any, path: Path) -> Checkpoint:
    """Make a checkpoint of a file's content; refuses what saving never writes."""
    if not isinstance(raw, dict) or raw.pop("format", None) != CHECKPOINT_MARK:
        raise CheckpointError(
            f"{path}: expected a checkpoint of zsseg-rt train, got another file. Check the path."
        )
    version = raw.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {str(version)[:40]}. "
            "Use the version of zsseg_rt that wrote it."
        )
    names = [item.name for item in fields(Checkpoint)]
    wrong = [name for name in names if not _is_sound(name, raw.get(name))]
    if wrong or len(raw) != len(names):
        raise CheckpointError(
            f"{path}: expected {', '.join(names)}, got others: "
            f"{', '.join(map(str, wrong or raw))[:200]}. {_WHAT_TO_DO}"
        )
    return Checkpoint(**raw)


def _is_sound(name: str, value: Any) -> bool:
    if name in _KINDS:
        return isinstance(value, _KINDS[name])
    kind = _VALUES.get(name, object)
    return isinstance(value, dict) and all(isinstance(entry, kind) for entry in value.values())


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Write ``target`` inside; a failure is a :class:`TrainingError` that names it."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save hides what the file system said
        first = error if isinstance(error, OSError) else error.__context__ or error
        raise TrainingError(
            f"{target}: cannot be written: {_reason(first)}. Check its free space and permissions."
        ) from error


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "strerror", None) or error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
