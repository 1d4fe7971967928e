"""The weights among whatever a training run saved, as arrays: nothing is run, torch not needed.

A file may hold them bare, under a key (``"state_dict"``, ``"model"``) or as pickled modules, beside
optimizers, settings and counters of any class; wrappers put prefixes in front of their keys.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files import torchscript
from zsseg_rt.torch_files.archive import open_torch_file
from zsseg_rt.torch_files.inert_pickle import Instance, StoredTensor
from zsseg_rt.torch_files.shapes import Array, some

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# What reading may raise on bytes that are not a checkpoint.
_READING_ERRORS = (
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
# What trainers call the weights, the likeliest first.
_HOLDERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network",
            "weights", "params", "ema", "model_ema", "state_dict_ema")  # fmt: skip
_MANY_ROWS = 100_000
_MAX_DEPTH = 4  # of holders within holders
_IN_FRONT = ("module.", "model.", "_forward_module.")  # of all keys, by wrappers and Lightning
_ANYWHERE = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_NO_WEIGHT = re.compile(r"(?:.*\.)?(?:_extra_state|n_averaged)")


def read_weights(path: Path) -> dict[str, tuple[Array, str]]:
    """Read the weights of a TorchScript archive or a file of ``torch.save``.

    Returns:
        By key, an array and the name of its type; bfloat16 comes as the uint16 of its bits.

    Raises:
        CheckpointError: The file is neither, is damaged, or claims more memory than it holds.
    """
    try:
        if torchscript.is_torchscript(path):
            return torchscript.read_torchscript(path)
        with open_torch_file(path) as (content, reader):
            found = unwrap(_find(content, path.name), path.name)
            return {key: (reader.make(stored), stored.dtype) for key, stored in found.items()}
    except CheckpointError:
        raise
    except _READING_ERRORS as error:
        raise unreadable(path, error) from error


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Torch's tensors of a ``.safetensors`` file, and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, notes  # noqa: SIM118
    except (SafetensorError, *_READING_ERRORS) as error:
        raise unreadable(path, error) from error


def read_safetensors_arrays(path: Path, in_file: str = "") -> dict[str, tuple[Any, str]]:
    """What :func:`read_weights` returns, of a ``.safetensors`` file; halves are widened to float32.

    Tables of more than 100,000 rows whose key ends with ``in_file`` stay in the file, as
    :class:`FileRows`.
    """
    from safetensors import SafetensorError, safe_open

    made: dict[str, tuple[Any, str]] = {}
    try:
        with safe_open(path, framework="np") as file:  # checks the header and the file's length
            entries = _header(path)
            for key in file.keys():  # noqa: SIM118
                entry = entries[key]
                if entry["dtype"] not in _KINDS:
                    array = file.get_tensor(key)
                    made[key] = (array, str(array.dtype))
                    continue
                rows = FileRows(path, entry["offset"], entry["shape"], _KINDS[entry["dtype"]])
                left = in_file and key.endswith(in_file) and rows.shape[0] > _MANY_ROWS
                made[key] = (rows if left else rows.whole(), "float32")
    except (SafetensorError, *_READING_ERRORS) as error:
        raise unreadable(path, error) from error
    return made


_KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _header(path: Path) -> dict[str, Any]:
    """Entries of a ``.safetensors`` file, with their places in it."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries: dict[str, Any] = json.loads(stream.read(length))
    for key in entries.keys() - {"__metadata__"}:
        entries[key]["offset"] = 8 + length + entries[key]["data_offsets"][0]
        entries[key]["shape"] = tuple(entries[key]["shape"])
    return entries


class FileRows:
    """A table that stays in its file: rows are read when they are asked for, as float32.

    Attributes:
        shape: Of the table.
        size: Numbers in it.
        kind: What the file holds: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], kind: str) -> None:
        self.shape, self.kind, self.size = shape, kind, math.prod(shape)
        self.ndim = len(shape)
        self._path, self._offset = path, offset

    def __getitem__(self, rows: Any) -> Array:
        """Rows by an array of numbers of any shape, or a slice without a step; float32."""
        width = self.size // self.shape[0]
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            return self._read(start * width, (stop - start) * width).reshape(-1, *self.shape[1:])
        wanted = np.asarray(rows)
        numbers, places = np.unique(wanted, return_inverse=True)
        read = np.stack([self._read(int(number) * width, width) for number in numbers])
        return np.asarray(read[places.reshape(-1)].reshape(*wanted.shape, *self.shape[1:]))

    def whole(self) -> Array:
        """All rows, float32."""
        return self._read(0, self.size).reshape(self.shape)

    def _read(self, start: int, count: int) -> Array:
        held = np.dtype("uint16" if self.kind == "bfloat16" else self.kind)
        with self._path.open("rb") as stream:
            stream.seek(self._offset + start * held.itemsize)
            numbers = np.fromfile(stream, held, count)
        if len(numbers) != count:
            raise CheckpointError(f"{self._path.name}: expected whole rows, got the file's end.")
        if self.kind == "bfloat16":  # the upper half of a float32's bits
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers.astype(np.float32, copy=False)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, such as OpenAI's ``ViT-B-16.pt``."""
    try:
        return torchscript.is_torchscript(path)
    except _READING_ERRORS as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: BaseException) -> CheckpointError:
    """The error for a file that cannot be read."""
    reason = str(error).strip().split("\n")[0][:200]
    return CheckpointError(
        f"{path.name}: expected a checkpoint file, got one that cannot be read "
        f"({type(error).__name__}: {reason}). Get the file again."
    )


def unwrap(weights: Mapping[str, _T], name: str = "state_dict") -> dict[str, _T]:
    """Strip what wrappers put in front of keys: DDP, EMA, Lightning, ``torch.compile``, FSDP.

    What lies beside wrapped weights, such as a loss's, is left out; the log names it.
    """
    found = {_ANYWHERE.sub("", key): value for key, value in weights.items()}
    while True:
        counts = {p: sum(key.startswith(p) for key in found) for p in _IN_FRONT}
        prefix = max(counts, key=lambda p: counts[p])
        if 2 * counts[prefix] < len(found) or not counts[prefix]:
            return found
        beside = [key for key in found if not key.startswith(prefix)]
        beside = [key for key in beside if not _NO_WEIGHT.fullmatch(key)]
        if beside:
            _log.warning(
                "%s: the weights are those under %r; %d others are left out: %s",
                name, prefix, len(beside), some(beside),
            )  # fmt: skip
        found = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


def _find(content: Any, name: str) -> dict[str, StoredTensor]:
    found = _state_dict_in(content, _MAX_DEPTH)
    if found is None:
        kind = {StoredTensor: "a tensor", Instance: "another object"}.get(type(content))
        raise CheckpointError(
            f"{name}: expected a state_dict, got {kind or type(content).__name__}"
            f"{_listed(content)}. Save the model's state_dict()."
        )
    tensors = {key: value for key, value in found.items() if isinstance(value, StoredTensor)}
    others = {k: v for k, v in found.items() if k not in tensors and not _is_no_weight(k)}
    if others or not all(isinstance(key, str) for key in tensors):
        raise CheckpointError(
            f"{name}: expected only tensors by name in the state_dict, got other values"
            f"{_listed(others or tensors)}. Save the model's state_dict()."
        )
    return tensors


def _is_no_weight(key: Any) -> bool:
    return isinstance(key, str) and _NO_WEIGHT.fullmatch(key) is not None


def _listed(content: Any) -> str:
    keys = list(content) if isinstance(content, Mapping) else []
    shown = [key if isinstance(key, str) else f"a {type(key).__name__}" for key in keys]
    return f" under {some(shown)}" if shown else ""


def _state_dict_in(content: Any, depth: int) -> Mapping[Any, Any] | None:
    """The mapping that holds the weights: at the top, under a known key, or the only one."""
    attributes = content.attributes if isinstance(content, Instance) else None
    if attributes and "_parameters" in attributes and "_modules" in attributes:
        return torchscript.named_tensors(content, _parts_of_module)
    if not isinstance(content, Mapping) or not depth:
        return None
    for holder in _HOLDERS:
        if isinstance(inner := content.get(holder), Mapping):
            found = _state_dict_in(inner, depth - 1)
            if found is not None:
                return found
    if any(isinstance(value, StoredTensor) for value in content.values()):
        return content
    inside = [_state_dict_in(value, 1) for value in content.values()]
    there = [found for found in inside if found is not None]
    return there[0] if len(there) == 1 else None


def _parts_of_module(module: Instance) -> Mapping[Any, Any]:
    """A pickled ``nn.Module``'s parameters, saved buffers and submodules."""
    state = module.attributes or {}
    unsaved = state.get("_non_persistent_buffers_set") or ()
    buffers = {name: v for name, v in state.get("_buffers", {}).items() if name not in unsaved}
    tensors = {
        k: v for k, v in {**state.get("_parameters", {}), **buffers}.items() if v is not None
    }
    if strange := [name for name, v in tensors.items() if not isinstance(v, StoredTensor)]:
        raise ValueError(f"tensors of kinds that are not read: {some(strange)}")
    return {**tensors, **state.get("_modules", {})}
