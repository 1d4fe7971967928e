"""The weights among whatever a training run saved, as arrays: nothing is run, torch not needed.

A file may hold them bare, under a key (``"state_dict"``, ``"model"``) or as pickled modules, beside
optimizers, settings and counters of any class; wrappers put prefixes in front of their keys.
"""

from __future__ import annotations

import io
import json
import logging
import math
import pickle
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from zsseg_rt.common.arrays import widened_bits
from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files.inert_pickle import Instance, Machine, StoredTensor
from zsseg_rt.torch_files.shapes import Array, Later, some

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
Stored = tuple[Array, str]
"""An array and the name of its type; bfloat16 comes as the uint16 of its bits."""

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # of torch.save before version 1.6
_FORMAT_VERSION = 1001
# Views can share bytes: all tensors together take at most this many times the file's size.
_MAX_EXPANSION, _ALWAYS_ALLOWED = 4, 1 << 24

_MAX_CODE, _MAX_NAMES = 1 << 25, 1 << 16  # characters of source text, of a module's names
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_MAX_ATTRIBUTES, _MAX_KEY = 100_000, 500  # of nested modules
# A module's class in an archive's source text. Before torch 1.6 it does not list buffers.
_MODULE = re.compile(
    r"^class (\w+)\(Module\):\n"
    r"  __parameters__ = \[(.*)\]\n"
    r"(?:  __buffers__ = \[(.*)\]\n)?",
    re.MULTILINE,
)
_Names = Collection[str] | None  # None: every tensor

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
_MAX_DEPTH = 4  # of holders within holders
_IN_FRONT = ("module.", "model.", "_forward_module.")  # of all keys, by wrappers and Lightning
_ANYWHERE = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_NO_WEIGHT = re.compile(r"(?:.*\.)?(?:_extra_state|n_averaged)")


class TensorReader:
    """Makes arrays from the storages of a file; those of one storage share its memory."""

    def __init__(self, read: Callable[[str], bytearray], file_size: int) -> None:
        self._read = read
        self._storages: dict[str, bytearray] = {}
        self._left = max(_MAX_EXPANSION * file_size, _ALWAYS_ALLOWED)

    def make(self, stored: StoredTensor) -> Array:
        """Read a tensor; bfloat16, which NumPy lacks, as the uint16 of its bits."""
        dtype, shape = element_type(stored.dtype), stored.shape
        self._left -= math.prod(shape) * dtype.itemsize
        if self._left < 0:
            raise ValueError("tensors that are much larger than the file")
        if stored.key not in self._storages:
            self._storages[stored.key] = self._read(stored.key)
        storage = self._storages[stored.key]
        reach = sum((n - 1) * stride for n, stride in zip(shape, stored.strides, strict=True))
        if not math.prod(shape):
            return np.empty(shape, dtype)
        if stored.offset + reach >= len(storage) // dtype.itemsize:
            raise ValueError(f"a tensor of shape {list(shape)} beyond its storage")
        steps = tuple(stride * dtype.itemsize for stride in stored.strides)
        return np.ndarray(shape, dtype, storage, stored.offset * dtype.itemsize, steps)


def element_type(name: str) -> np.dtype[Any]:
    """The type of a stored tensor's elements; that of its bits for bfloat16."""
    return np.dtype("uint16" if name == "bfloat16" else name)


class Archive:
    """A ZIP file of torch; its entries are in one folder, and tensors are uncompressed.

    Attributes:
        folder: Name of the folder.
        tensors: Makes the file's tensors.
    """

    def __init__(self, file: zipfile.ZipFile, size: int) -> None:
        self.file = file
        self.folder = file.namelist()[0].split("/")[0]
        self._left = size
        self.tensors = TensorReader(lambda key: self._read(f"data/{key}"), size)
        if f"{self.folder}/byteorder" in file.namelist():
            _check_byte_order(self._read("byteorder").decode())

    def unpickle(self) -> Any:
        """The content of the archive, with tensors as :class:`StoredTensor`."""
        return Machine().run(io.BytesIO(self._read("data.pkl")))

    def _read(self, name: str) -> bytearray:
        entry = self.file.getinfo(f"{self.folder}/{name}")
        self._left -= entry.file_size
        if entry.compress_type != zipfile.ZIP_STORED or self._left < 0:
            raise zipfile.BadZipFile(
                f"{entry.filename[:80]}, {entry.file_size} bytes, is compressed or larger than the "
                "file"
            )
        content = bytearray(self.file.read(entry))
        if len(content) != entry.file_size:
            raise zipfile.BadZipFile(f"{entry.filename[:80]} is cut short")
        return content


def _read_old(stream: BinaryIO, size: int) -> tuple[Any, TensorReader]:
    """The content of a file of ``torch.save`` before version 1.6, and what makes its tensors."""
    machine = Machine()
    if machine.run(stream) != _MAGIC_NUMBER or machine.run(stream) != _FORMAT_VERSION:
        raise pickle.UnpicklingError("not a file of torch.save")
    _check_byte_order("little" if machine.run(stream)["little_endian"] else "big")
    content, places = machine.run(stream), {}
    for key in machine.run(stream):
        count = int.from_bytes(stream.read(8), sys.byteorder)
        begin, num_bytes = stream.tell(), count * element_type(machine.storages[key]).itemsize
        if begin + num_bytes > size:
            raise EOFError(f"storage {key[:40]!r} ends past the end of the file")
        places[key] = (begin, num_bytes)
        stream.seek(begin + num_bytes)

    def read(key: str) -> bytearray:
        begin, num_bytes = places[key]
        stream.seek(begin)
        return bytearray(stream.read(num_bytes))

    return content, TensorReader(read, size)


def _check_byte_order(order: str) -> None:
    if order != sys.byteorder:
        raise ValueError(f"{order[:20]}-endian numbers on a {sys.byteorder}-endian machine")


def _read_torchscript(archive: Archive) -> dict[str, StoredTensor]:
    """What ``torch.jit.load(path).state_dict()`` holds, which would run code of the archive."""
    classes, root = _module_classes(archive), archive.unpickle()
    if not _is_module(root, classes):
        raise ValueError(f"a {type(root).__name__} instead of a module")
    return named_tensors(root, lambda module: _parts_of(module, classes))


def _module_classes(archive: Archive) -> dict[str, _Names]:
    """Names of the parameters and buffers of every module class, read from the source text."""
    folder = f"{archive.folder}/code/"
    entries = [entry for entry in archive.file.infolist() if entry.filename.startswith(folder)]
    sources = [entry for entry in entries if entry.filename.endswith(".py")]
    if sum(entry.file_size for entry in sources) > _MAX_CODE:
        raise ValueError("more source text than a model has")
    if any(entry.compress_type not in _COMPRESSIONS for entry in sources):
        raise ValueError("source text that is compressed as torch never does")
    classes: dict[str, _Names] = {}
    for entry in sources:
        module = entry.filename.removeprefix(folder).removesuffix(".py").replace("/", ".")
        with archive.file.open(entry) as stream:
            text = stream.read(entry.file_size).decode()  # also limits the unpacked size
        for found in _MODULE.finditer(text):
            name, parameters, buffers = found.groups()
            if len(parameters) + len(buffers or "") > _MAX_NAMES:
                raise ValueError("a module of more names than a model has")
            listed = None if buffers is None else re.findall(r'"([^"]*)"', parameters + buffers)
            classes[f"{module}.{name}"] = listed
    return classes


def named_tensors(
    root: Instance, parts_of: Callable[[Instance], Mapping[Any, Any]]
) -> dict[str, StoredTensor]:
    """The tensors of a module and of its submodules, which ``parts_of`` gives by name."""
    found: dict[str, StoredTensor] = {}
    waiting, left = [("", root)], _MAX_ATTRIBUTES
    while waiting:
        prefix, module = waiting.pop()
        parts = parts_of(module)
        left -= 1 + len(parts)
        for name, value in parts.items():
            key = f"{prefix}{name}" if isinstance(name, str) else ""
            if left < 0 or not 0 < len(key) <= _MAX_KEY:
                raise ValueError("modules that contain each other without end")
            if isinstance(value, StoredTensor):
                found[key] = value
            elif isinstance(value, Instance):
                waiting.append((f"{key}.", value))
    if not found:
        raise ValueError("modules without a tensor")
    return found


def _parts_of(module: Instance, classes: Mapping[str, _Names]) -> Mapping[Any, Any]:
    """A module's parameters, buffers and submodules, among other attributes."""
    if module.attributes is None:
        raise ValueError(
            f"{module.class_name[:80]}, which restores its state by code of its own, which is "
            "never run"
        )
    names, parts = classes[module.class_name], {}
    for name, value in module.attributes.items():
        is_listed = names is None or name in names
        if _is_module(value, classes) or (isinstance(value, StoredTensor) and is_listed):
            parts[name] = value
        elif isinstance(value, Instance) and names is not None and is_listed:
            raise ValueError(f"{name}, a tensor made by {value.class_name[:80]}, which is not read")
    return parts


def _is_module(value: Any, classes: Mapping[str, _Names]) -> bool:
    return isinstance(value, Instance) and value.class_name in classes


def read_weights(path: Path) -> dict[str, Stored]:
    """Read the weights of a TorchScript archive or a file of ``torch.save``, by key."""
    try:
        size = path.stat().st_size
        if not zipfile.is_zipfile(path):
            with path.open("rb") as stream:
                return _made(path, *_read_old(stream, size))
        with zipfile.ZipFile(path) as file:
            archive = Archive(file, size)
            if not is_torchscript(path):
                return _made(path, archive.unpickle(), archive.tensors)
            return _arrays(_read_torchscript(archive), archive.tensors)
    except CheckpointError:
        raise
    except _READING_ERRORS as error:
        raise unreadable(path, error) from error


def _made(path: Path, content: Any, reader: TensorReader) -> dict[str, Stored]:
    return _arrays(unwrap(_find(content, path.name), path.name), reader)


def _arrays(tensors: Mapping[str, StoredTensor], reader: TensorReader) -> dict[str, Stored]:
    return {key: (reader.make(tensor), tensor.dtype) for key, tensor in tensors.items()}


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Torch's tensors of a ``.safetensors`` file, and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, notes  # noqa: SIM118
    except (SafetensorError, *_READING_ERRORS) as error:
        raise unreadable(path, error) from error


def read_safetensors_arrays(path: Path, *, later: bool = False) -> dict[str, tuple[Any, str]]:
    """What :func:`read_weights` returns, of a ``.safetensors`` file; halves are widened to float32.

    With ``later``, floats stay in the file as :class:`FileRows`.
    """
    from safetensors import SafetensorError, safe_open

    stored: dict[str, tuple[Any, str]] = {}
    try:  # to open it checks the header and the file's length
        with safe_open(path, framework="np") as file, path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(length))
            entries.pop("__metadata__", None)
            for key, entry in entries.items():
                if (kind := _KINDS.get(entry["dtype"])) is None:
                    array = file.get_tensor(key)
                    stored[key] = (array, str(array.dtype))
                    continue
                start = 8 + length + entry["data_offsets"][0]
                rows = FileRows(path, start, tuple(entry["shape"]), kind)
                stored[key] = (rows if later else rows.whole(), "float32")
    except (SafetensorError, *_READING_ERRORS) as error:
        raise unreadable(path, error) from error
    return stored


_KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class FileRows(Later):
    """A table that stays in its file, from where also single rows are read, as float32."""

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], kind: str) -> None:
        super().__init__(shape, lambda: self[:])
        self._path, self._offset, self._kind = path, offset, kind

    def __getitem__(self, rows: Any) -> Array:
        """Rows by an array of numbers of any shape, or a slice without a step; float32."""
        if isinstance(rows, slice) or not self.shape:
            start, stop, _ = rows.indices(self.shape[0] if self.shape else 1)
            return self._read(start, stop - start).reshape(-1, *self.shape[1:])
        wanted = np.asarray(rows)
        read = np.concatenate([self._read(int(number), 1) for number in wanted.reshape(-1)])
        return read.reshape(*wanted.shape, *self.shape[1:])

    def _read(self, first: int, count: int) -> Array:
        width = math.prod(self.shape[1:])
        stored = np.dtype("uint16" if self._kind == "bfloat16" else self._kind)
        start = self._offset + first * width * stored.itemsize
        numbers = np.fromfile(self._path, stored, count * width, offset=start)
        if len(numbers) != count * width:
            raise CheckpointError(f"{self._path.name}: expected whole rows, got the file's end.")
        if self._kind == "bfloat16":
            return widened_bits(numbers)
        return numbers.astype(np.float32, copy=False)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, such as OpenAI's ``ViT-B-16.pt``."""
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
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
        return named_tensors(content, _parts_of_module)
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
