"""Read checkpoint files and load their tensors, or say exactly why not."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from zsseg_rt.common.files import is_file
from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files.weights import Stored, read_safetensors, read_weights, unwrap

_LISTED, _SHOWN = 5, 160  # offending keys that an error lists, and characters of each

DIFFERS_FROM = "zsseg_rt.differs_from"
"""Names, in a file's metadata, the weights without which it is not a whole checkpoint."""


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
    path = Path(path)
    if not is_file(path):
        raise CheckpointError(f"path: expected a checkpoint file, got {path}. Check the path.")
    if path.suffix != ".safetensors":
        return as_tensors(read_weights(path))
    tensors, metadata = read_safetensors(path)
    if DIFFERS_FROM in metadata:
        raise CheckpointError(
            f"{path.name}: expected a whole checkpoint, got one that holds only what differs "
            f"from {metadata[DIFFERS_FROM][:80]}. Name that CLIP beside it: zsseg-rt "
            "import-checkpoint cat_seg FILE --clip CLIP."
        )
    return unwrap(tensors, path.name)


def as_tensors(stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Arrays that were read as torch's tensors, which share their memory."""
    tensors = {key: torch.from_numpy(array) for key, (array, _) in stored.items()}
    short = [key for key, (_, dtype) in stored.items() if dtype == "bfloat16"]
    return tensors | {key: tensors[key].view(torch.bfloat16) for key in short}


def normalize_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo what wrappers do to weights: strip their prefixes from keys, make floats float32.

    Loading never makes floats float32 by itself: half-precision weights lack digits that official
    results were measured with.

    Args:
        state_dict: Tensors by key.

    Returns:
        A new mapping; tensors that need no conversion are shared.
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
            f"state_dict: expected tensors of {architecture} by key, got {_some(foreign)}. Pass "
            "the result of zsseg_rt.models.load_checkpoint, or the checkpoint's own 'state_dict'."
        )
    remedy = "Pass the state_dict through zsseg_rt.models.normalize_state_dict first."
    wrapped = [key for key in state_dict if key.startswith("module.")]
    if wrapped:
        raise CheckpointError(
            f"state_dict: expected {architecture} keys without a prefix, got 'module.' before "
            f"{len(wrapped)} of {len(state_dict)} keys: {_some(wrapped)}. {remedy}"
        )
    others = [
        f"{key} ({str(value.dtype).removeprefix('torch.')})"
        for key, value in state_dict.items()
        if value.is_floating_point() and value.dtype != torch.float32
    ]
    if others:
        raise CheckpointError(f"state_dict: expected float32, got {_some(others)}. {remedy}")
    whole = [k for k, v in state_dict.items() if v.ndim > 0 and not v.is_floating_point()]
    if whole:
        raise CheckpointError(
            f"state_dict: expected floating-point weights, got integers or others under "
            f"{_some(whole)}. Get the checkpoint again."
        )


class Sizes:
    """The sizes of a model, read from the shapes of its ``state_dict``."""

    def __init__(self, state_dict: Mapping[str, Tensor], architecture: str) -> None:
        self._state_dict = state_dict
        self._architecture = architecture

    def of(self, key: str, ndim: int) -> tuple[int, ...]:
        """The shape of one tensor."""
        if key not in self._state_dict:
            raise CheckpointError(
                f"state_dict: expected the key '{key}' of a {self._architecture} checkpoint, got "
                f"{len(self._state_dict)} keys: {_some(list(self._state_dict))}. "
                "Check that the checkpoint is from this architecture."
            )
        shape = tuple(self._state_dict[key].shape)
        if len(shape) != ndim:
            raise CheckpointError(
                f"{key}: expected {ndim} axes, got shape {list(shape)}. "
                "Check that the checkpoint is from this architecture."
            )
        return shape

    def grid_side(self, key: str, ndim: int) -> int:
        """The side of the square grid that positions are stored for, behind the class token's."""
        rows = self.of(key, ndim)[-2]
        side = math.isqrt(max(rows - 1, 0))
        if 1 + side**2 != rows:
            raise CheckpointError(
                f"{key}: expected one row and those of a square grid, got {rows} rows. "
                "Check that the checkpoint is from this architecture."
            )
        return side

    def has(self, prefix: str) -> bool:
        """Whether some key begins so."""
        return any(key.startswith(prefix) for key in self._state_dict)

    def count(self, prefix: str) -> int:
        """The number of layers ``{prefix}0.``, ``{prefix}1.``, and so on."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        numbers = {match[1] for key in self._state_dict if (match := pattern.match(key))}
        if not numbers:
            self.of(prefix + "0", 0)
        if gaps := numbers - {str(number) for number in range(len(numbers))}:
            raise CheckpointError(
                f"{prefix}: expected layers 0 to {len(numbers) - 1}, got {_some(gaps)}. "
                "Check that the checkpoint is complete."
            )
        return len(numbers)

    def heads(self, name: str, given: int | None, width: int) -> int:
        """The number of heads: as given, or one per 64 channels."""
        heads = max(1, width // 64) if given is None else given
        if heads < 1 or width % heads:
            raise CheckpointError(
                f"{name}: expected a divisor of the width {width}, got {heads}. "
                "Pass the number of heads the checkpoint was trained with."
            )
        return heads


def load_weights(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    architecture: str,
    ignored: Sequence[str] = (),
) -> None:
    """Copy tensors into a model with the same keys; the model may be on the meta device."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    unused = re.compile("|".join(ignored) if ignored else r"(?!)")
    unknown = [key for key in state_dict if key not in expected and not unused.fullmatch(key)]
    missing = [key for key in expected if key not in state_dict]
    if missing or unknown:
        raise CheckpointError(
            f"state_dict: expected the {len(expected)} keys of {architecture}, got "
            f"{len(missing)} missing ({_some(missing)}) and {len(unknown)} unknown "
            f"({_some(unknown)}). Check that the checkpoint is from this architecture."
        )
    wrong = [
        f"{key} expected {list(shape)}, got {list(state_dict[key].shape)}"
        for key, shape in expected.items()
        if tuple(state_dict[key].shape) != shape
    ]
    if wrong:
        raise CheckpointError(
            f"state_dict: expected the shapes of {architecture}: {_some(wrong)}. "
            "Check that the checkpoint is complete and from this architecture."
        )
    copies = {key: state_dict[key].detach().clone() for key in expected}
    model.load_state_dict(copies, assign=True)


def _some(items: Iterable[str]) -> str:
    items = list(items)
    listed = ", ".join(item[:_SHOWN] for item in items[:_LISTED]) or "none"
    return listed + (f", and {len(items) - _LISTED} more" if len(items) > _LISTED else "")
