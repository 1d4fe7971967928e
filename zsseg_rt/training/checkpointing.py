"""Checkpoints: folders that appear whole or not at all, in safetensors and JSON.

``RUN/checkpoints/step-00001000/`` holds ``model.safetensors`` (what evaluation and export take),
``model.json`` (what the model is), ``task.safetensors`` (what else learns, if anything),
``constants.safetensors`` (class embeddings), ``optimizer.safetensors``, ``random.safetensors`` and
``state.json`` (everything that is no tensor).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zsseg_rt import schema
from zsseg_rt.errors import CheckpointError, TrainingError
from zsseg_rt.training.optimizer_state import OptimizerState

__all__ = ["Checkpoint", "CheckpointFolder", "CheckpointState", "first_non_finite"]
__all__ += ["read_json", "read_tensors", "writing"]

FORMAT_VERSION = 2  # 1 has no left_out: it held every weight of the task
MODEL_CARD, STATE_FILE = "model.json", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_PARTS = ("model", "task", "optimizer", "random", "constants")
_WHAT_TO_DO = "Copy the checkpoint again, or remove its folder to go on from the one before."


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What a run needs besides tensors to continue.

    Attributes:
        step: Optimizer steps done.
        num_processes: Processes that were training.
        batch_size: Pictures an optimizer step.
        optimizer: The optimizer's state without its tensors.
        scaler: State of the loss scaling of float16, else empty.
        losses: Means of the loss terms at the end, for people.
        left_out: SHA-256 of the weights of each part of the task that is not saved, by its name.
    """

    step: int
    num_processes: int
    batch_size: int
    optimizer: OptimizerState = field(default_factory=OptimizerState)
    scaler: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _StateFile:
    """``state.json``; ``files`` are sizes in bytes by name."""

    format_version: int
    files: Mapping[str, int]
    state: CheckpointState


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that is saved.

    Attributes:
        state: What is no tensor.
        model: ``state_dict`` of the model.
        task: ``state_dict`` of the objective without its model and what is left out.
        optimizer: Tensors of the optimizer's state.
        random: States of the generators, by ``<process>.<generator>``.
        constants: Tensors that go with the model but are not trained, such as class embeddings.
        model_card: What the model is; see :mod:`zsseg_rt.training.trained`.
    """

    state: CheckpointState
    model: Mapping[str, Tensor]
    task: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    random: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    model_card: Mapping[str, Any]


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: The folder; made when the first checkpoint is saved.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending; damaged ones too, which :meth:`load` refuses."""
        if not self.path.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.path.iterdir() if entry.is_dir())
        return sorted(int(name[1]) for name in names if name)

    def at(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.path / f"step-{step:08d}"

    def describe_last(self) -> str:
        """What to tell a user of the last checkpoint."""
        steps = self.steps()
        if not steps:
            return "No checkpoint was saved before."
        return f"The last good checkpoint is {self.at(steps[-1])}; continue from it with --resume."

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint; the folder appears under its name once all of it is on the disk.

        Returns:
            The folder.

        Raises:
            TrainingError: The disk is full or cannot be written; earlier checkpoints are whole.
        """
        target = self.at(checkpoint.state.step)
        with writing(target), self._new_folder(target) as folder:
            _write_parts(folder, checkpoint)
        return target

    def load(self, step: int) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            CheckpointError: A file is missing, damaged or of a newer format.
        """
        folder = self.at(step)
        content = _read_state(folder)
        if content.state.step != step:
            raise CheckpointError(
                f"{folder / STATE_FILE}: expected step {step}, got {content.state.step}. "
                f"{_WHAT_TO_DO}"
            )
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        for name in content.files:
            parts[Path(name).stem] = _read_tensors(folder / name)
        return Checkpoint(state=content.state, model_card=read_json(folder / MODEL_CARD), **parts)

    def prune(self, keep: int, protected: Collection[int | None] = ()) -> None:
        """Remove all but the last ``keep`` checkpoints and those of the ``protected`` steps."""
        for step in self.steps()[: -keep or None]:
            if step not in protected:
                self._discard(self.at(step))

    def remove_leftovers(self) -> None:
        """Remove what an earlier process was writing when it was killed."""
        if self.path.is_dir():
            for entry in self.path.glob(".step-*"):
                shutil.rmtree(entry, ignore_errors=True)

    def _discard(self, folder: Path) -> None:
        """Remove a checkpoint so that no half of it is ever seen under its name."""
        if folder.exists():
            hidden = self.path / f".{folder.name}.{os.getpid()}.old"
            folder.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    @contextmanager
    def _new_folder(self, target: Path) -> Iterator[Path]:
        """Give a folder that becomes ``target`` if nothing fails."""
        self.path.mkdir(parents=True, exist_ok=True)
        folder = self.path / f".{target.name}.{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir()
            yield folder
            sync_folder(folder)
            self._discard(target)  # of the same step, by a run that was resumed before it
            folder.rename(target)
            sync_folder(self.path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Write ``target`` inside; what is written appears whole or not at all.

    Raises:
        TrainingError: The disk is full or cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{target}: cannot be written: {_reason(error)}. Free space or permissions?"
        ) from error


def read_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """Tensors of one part of a checkpoint folder, ``"model"`` or ``"constants"``.

    Returns:
        Tensors by name; none if the checkpoint does not have the part.

    Raises:
        CheckpointError: A file is missing, damaged or of a newer format.
    """
    name = f"{part}.safetensors"
    return _read_tensors(folder / name) if name in _read_state(folder).files else {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a file of a training checkpoint, got {_reason(error)}. {_WHAT_TO_DO}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, got {type(content).__name__}. {_WHAT_TO_DO}"
        )
    return content


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_parts(folder: Path, checkpoint: Checkpoint) -> None:
    _write_json(folder / MODEL_CARD, checkpoint.model_card)
    sizes = {}
    for part in _PARTS:
        tensors = getattr(checkpoint, part)
        if tensors or part == "model":
            path = folder / f"{part}.safetensors"
            save_file(_separate(tensors), path)
            path.chmod(0o644)  # safetensors writes for the owner only
            _sync_file(path)
            sizes[path.name] = path.stat().st_size
    state: dict[str, Any] = schema.encode(checkpoint.state)
    _write_json(folder / STATE_FILE, state | {"files": sizes, "format_version": FORMAT_VERSION})


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, which safetensors asks for."""
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().to("cpu").contiguous()
        if own.untyped_storage().data_ptr() in storages and own.numel():
            own = own.clone()
        storages.add(own.untyped_storage().data_ptr())
        separate[name] = own
    return separate


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _read_state(folder: Path) -> _StateFile:
    """``state.json``, every key and type of it checked, and the sizes of the files it lists."""
    path = folder / STATE_FILE
    raw = read_json(path)
    version = raw.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise CheckpointError(
            f"{path}: expected format_version 1 to {FORMAT_VERSION}, got {version!r}. "
            "Use the version of zsseg_rt that wrote it."
        )
    outer = {key: raw.pop(key) for key in ("format_version", "files") if key in raw}
    try:
        content = schema.decode(_StateFile, outer | {"state": raw}, str(path))
        _check_state(content, path)
    except ValueError as error:
        raise CheckpointError(f"{error}. {_WHAT_TO_DO}") from error
    for name, size in content.files.items():
        _check_size(folder / name, size)
    return content


def _check_state(content: _StateFile, path: Path) -> None:
    """Refuse what no save writes although its type is right."""
    state = content.state
    for name, least in (("step", 0), ("num_processes", 1), ("batch_size", 1)):
        value = getattr(state, name)
        if value < least:
            raise ValueError(f"{path}.{name}: expected at least {least}, got {value}")
    known = {f"{part}.safetensors" for part in _PARTS}
    if not {"model.safetensors"} <= content.files.keys() <= known:
        raise ValueError(
            f"{path}.files: expected model.safetensors and some of "
            f"{', '.join(sorted(known))}, got {', '.join(content.files) or 'none'}"
        )


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise CheckpointError(
            f"{path}: expected {size} bytes, got {'no file' if found is None else found}. "
            f"{_WHAT_TO_DO}"
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: expected tensors, got {_reason(error)}. {_WHAT_TO_DO}"
        ) from error
    return tensors


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return str(text).strip().splitlines()[0][:200] if str(text).strip() else type(error).__name__


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None
