"""Read checkpoint files and load their tensors, or say exactly why not."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files.shapes import Checked, some
from zsseg_rt.torch_files.weights import read_stored, unwrap


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint file of any training run.

    It reads files of ``torch.save``, ``.safetensors`` files and TorchScript archives. In the first,
    a ``state_dict`` may be bare, under a key such as ``"state_dict"`` (mmcv, Lightning) or
    ``"model"`` (detectron2), or a pickled module's; whatever lies beside it is not read. Prefixes
    of wrappers (``module.``, ``model.``, ``_orig_mod.``) are stripped. Nothing that a file holds is
    run.

    Returns:
        Tensors by key, of the file's types, on the CPU.

    Raises:
        CheckpointError: The file is missing, is none of these, is damaged, or claims more memory
            than it holds.
    """
    stored = read_stored(Path(path))
    tensors = {key: torch.from_numpy(array) for key, (array, _) in stored.items()}
    short = [key for key, (_, dtype) in stored.items() if dtype == "bfloat16"]
    return tensors | {key: tensors[key].view(torch.bfloat16) for key in short}


def normalize_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo what wrappers do to weights: strip their prefixes from keys, make floats float32.

    Loading never makes floats float32 by itself: half-precision weights lack digits that official
    results were measured with. Tensors that need no conversion are shared.
    """
    return {
        key: value.float() if value.is_floating_point() else value
        for key, value in unwrap(state_dict).items()
    }


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of all tensors of the ``state_dict`` with their names, in hex."""
    return hash_tensors(model.state_dict())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, in hex; the order of the names does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_float32(state_dict: Mapping[str, Tensor], architecture: str) -> None:
    """Refuse values that are not tensors, wrapped keys and tensors that are not float32."""
    foreign = [
        f"{key} ({type(value).__name__})"
        for key, value in state_dict.items()
        if not isinstance(value, Tensor)
    ]
    if foreign:
        raise CheckpointError(
            f"state_dict: expected tensors of {architecture} by key, got {some(foreign)}. Pass "
            "the result of zsseg_rt.models.load_checkpoint, or the checkpoint's own 'state_dict'."
        )
    remedy = "Pass the state_dict through zsseg_rt.models.normalize_state_dict first."
    if wrapped := [key for key in state_dict if key.startswith("module.")]:
        raise CheckpointError(
            f"state_dict: expected {architecture} keys without a prefix, got 'module.' before "
            f"{len(wrapped)} of {len(state_dict)} keys: {some(wrapped)}. {remedy}"
        )
    others = [
        f"{key} ({str(value.dtype).removeprefix('torch.')})"
        for key, value in state_dict.items()
        if value.dtype != torch.float32 and (value.is_floating_point() or value.ndim)
    ]
    if others:
        raise CheckpointError(f"state_dict: expected float32, got {some(others)}. {remedy}")


def load_weights(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    *,
    architecture: str,
    ignored: Sequence[str] = (),
) -> None:
    """Copy tensors or arrays into a model with the same keys, even one on the meta device."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    unused = re.compile("|".join(ignored) if ignored else r"(?!)")
    read = {k: v for k, v in state_dict.items() if k in shapes or not unused.fullmatch(k)}
    Checked(tensors=read, what=architecture).compare(shapes)
    copies = {key: torch.as_tensor(state_dict[key]).detach().clone() for key in shapes}
    model.load_state_dict(copies, assign=True)
