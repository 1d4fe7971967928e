"""Checkpoints: folders that appear whole or not at all, in safetensors and JSON.

``RUN/checkpoints/step-00001000/`` holds ``model.safetensors`` (what evaluation and export take),
``model.json`` (what the model is), ``task.safetensors`` (what else learns, if anything),
``constants.safetensors`` (class embeddings), ``optimizer.safetensors``, ``random.safetensors`` and
``state.json`` (everything that is not a tensor, and size and SHA-256 of each of these files).
"""

from __future__ import annotations

import hashlib
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

from zsseg_rt.common import schema
from zsseg_rt.common.files import sha256_of
from zsseg_rt.common.files.whole_folder import new_folder, remove_leftovers
from zsseg_rt.errors import CheckpointError, TrainingError
from zsseg_rt.training.loop.optimizer_state import OptimizerState

# 1 has no left_out: it held every weight of the task; 1 and 2 have no sha256
FORMAT_VERSION = 3
MODEL_CARD, STATE_FILE = "model.json", "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_PARTS = ("model", "task", "optimizer", "random", "constants")
_WHAT_TO_DO = "Copy the checkpoint again, or remove its folder to continue from the one before."


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What a run needs besides tensors to continue.

    Attributes:
        step: Optimizer steps done.
        num_processes: Processes that were training.
        batch_size: Images per optimizer step.
        optimizer: The optimizer's state without its tensors.
        scaler: State of float16's loss scaling; empty for other precisions.
        losses: Means of the loss terms at the end, as information only.
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
    """``state.json``; ``files`` are sizes in bytes by name, ``sha256`` of these and both JSONs."""

    format_version: int
    files: Mapping[str, int]
    state: CheckpointState
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that is saved.

    Attributes:
        state: Everything that is not a tensor.
        model: ``state_dict`` of the model.
        task: ``state_dict`` of the objective, without its model and what is left out.
        optimizer: Tensors of the optimizer's state.
        random: States of the generators, by ``<process>.<generator>``.
        constants: Tensors that go with the model but are not trained, such as class embeddings.
        model_card: What the model is; see :mod:`zsseg_rt.training.trained.card`.
    """

    state: CheckpointState
    model: Mapping[str, Tensor]
    task: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    random: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    model_card: Mapping[str, Any]


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending, even damaged ones, which :meth:`load` refuses."""
        if not self.path.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.path.iterdir() if entry.is_dir())
        return sorted(int(name[1]) for name in names if name)

    def at(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.path / f"step-{step:08d}"

    def describe_last(self) -> str:
        """What to tell a user about the last checkpoint."""
        steps = self.steps()
        if not steps:
            return "No checkpoint was saved before."
        return f"The last good checkpoint is {self.at(steps[-1])}; continue from it with --resume."

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint; the folder appears under its name once all of it is on the disk.

        Returns:
            The folder.
        """
        target = self.at(checkpoint.state.step)
        # an older one of this step is by a run that was resumed from before it
        with writing(target), new_folder(target, replace=True) as folder:
            _write_parts(folder, checkpoint)
        return target

    def load(self, step: int) -> Checkpoint:
        """Read a checkpoint."""
        folder = self.at(step)
        content = _read_state(folder)
        if content.state.step != step:
            raise CheckpointError(
                f"{folder / STATE_FILE}: expected step {step}, got {content.state.step}. "
                f"{_WHAT_TO_DO}"
            )
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        for name in content.files:
            parts[Path(name).stem] = _read_tensors(folder, name, content)
        return Checkpoint(state=content.state, model_card=_read_card(folder, content), **parts)

    def prune(self, keep: int, protected: Collection[int | None] = ()) -> None:
        """Remove all but the last ``keep`` checkpoints and those of the ``protected`` steps."""
        for step in self.steps()[: -keep or None]:
            if step not in protected:
                self._discard(self.at(step))

    def remove_leftovers(self) -> None:
        """Remove what an earlier process was writing when it was killed."""
        if self.path.is_dir():
            for entry in self.path.glob(".step-*"):
                remove_leftovers(self.path / entry.name.split(".")[1])
                shutil.rmtree(entry, ignore_errors=True)

    def _discard(self, folder: Path) -> None:
        """Remove a checkpoint so that half of it is never seen under its name."""
        if folder.exists():
            hidden = self.path / f".{folder.name}.{os.getpid()}.old"
            folder.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Write ``target`` inside; what is written appears whole or not at all."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{target}: cannot be written: {_reason(error)}. Check its free space and permissions."
        ) from error


def read_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """Read the tensors of one part of a checkpoint folder, ``"model"`` or ``"constants"``.

    Returns:
        Tensors by name; empty if the checkpoint does not have the part.
    """
    name, content = f"{part}.safetensors", _read_state(folder)
    return _read_tensors(folder, name, content) if name in content.files else {}


def read_card(folder: Path) -> dict[str, Any]:
    """Read what the model of a checkpoint folder is; see :mod:`zsseg_rt.training.trained.card`."""
    return _read_card(folder, _read_state(folder))


def _read_card(folder: Path, content: _StateFile) -> dict[str, Any]:
    card = _read_json(folder / MODEL_CARD)
    _check_hash(folder / MODEL_CARD, content)
    return card


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected a file of a training checkpoint, got {_reason(error)}. {_WHAT_TO_DO}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, got {type(content).__name__}. {_WHAT_TO_DO}"
        )
    return content


def _write_parts(folder: Path, checkpoint: Checkpoint) -> None:
    _write_json(folder / MODEL_CARD, checkpoint.model_card)
    sizes, hashes = {}, {MODEL_CARD: sha256_of(folder / MODEL_CARD)}
    for part in _PARTS:
        tensors = getattr(checkpoint, part)
        if tensors or part == "model":
            path = folder / f"{part}.safetensors"
            save_file(_separate(tensors), path)
            path.chmod(0o644)  # safetensors writes files that only the owner can read
            sizes[path.name] = path.stat().st_size
            hashes[path.name] = sha256_of(path)
    state: dict[str, Any] = schema.encode(checkpoint.state)
    state |= {"files": sizes, "format_version": FORMAT_VERSION}
    hashes[STATE_FILE] = _hash_state(state)
    _write_json(folder / STATE_FILE, state | {"sha256": hashes})


def _hash_state(state: Mapping[str, Any]) -> str:
    """SHA-256 of what ``state.json`` holds besides hashes, whatever its layout."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, as safetensors requires."""
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


def _read_state(folder: Path) -> _StateFile:
    """Read ``state.json``; checks all its keys and types and the sizes of the files it lists."""
    path = folder / STATE_FILE
    raw = _read_json(path)
    version = raw.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise CheckpointError(
            f"{path}: expected format_version 1 to {FORMAT_VERSION}, got {version!r}. "
            "Use the version of zsseg_rt that wrote it."
        )
    outer = {key: raw.pop(key) for key in ("format_version", "files", "sha256") if key in raw}
    try:
        found = _hash_state(raw | {key: outer[key] for key in outer if key != "sha256"})
        content = schema.decode(_StateFile, outer | {"state": raw}, str(path))
        _check_state(content, path)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{error}. {_WHAT_TO_DO}") from error
    if content.sha256 and content.sha256[STATE_FILE] != found:
        raise _damaged(path, content.sha256[STATE_FILE], found)
    for name, size in content.files.items():
        _check_size(folder / name, size)
    return content


def _check_state(content: _StateFile, path: Path) -> None:
    """Refuse values of the right type that saving never writes."""
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
    hashed = {MODEL_CARD, STATE_FILE, *content.files} if content.format_version > 2 else set()
    if content.sha256.keys() != hashed:
        raise ValueError(
            f"{path}.sha256: expected {', '.join(sorted(hashed)) or 'none'}, got "
            f"{', '.join(content.sha256) or 'none'}"
        )


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise CheckpointError(
            f"{path}: expected {size} bytes, got {'no file' if found is None else found}. "
            f"{_WHAT_TO_DO}"
        )


def _check_hash(path: Path, content: _StateFile) -> None:
    """Compare a file with its hash; checkpoints before format 3 have none."""
    expected = content.sha256.get(path.name)
    found = None if expected is None else sha256_of(path)
    if found != expected:
        raise _damaged(path, expected, found)


def _damaged(path: Path, expected: str | None, found: str | None) -> CheckpointError:
    return CheckpointError(
        f"{path}: expected SHA-256 {expected}, got {found}: the file was changed after it was "
        f"saved. {_WHAT_TO_DO}"
    )


def _read_tensors(folder: Path, name: str, content: _StateFile) -> dict[str, Tensor]:
    path = folder / name
    try:
        _check_hash(path, content)
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
