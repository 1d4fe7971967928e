"""The weights among whatever a training run saved, as arrays: nothing is run, torch not needed."""

from __future__ import annotations

import io
import json
import logging
import math
import pickle
import pickletools
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from zsseg_rt.common.arrays import widened_bits
from zsseg_rt.common.files import is_file
from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files.shapes import Array, Later, some

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
Stored = tuple[Array, str]
"""An array and the name of its type; bfloat16 comes as the uint16 of its bits."""

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # of torch.save before version 1.6
_FORMAT_VERSION = 1001
# Views can share bytes: all tensors together take at most this many times the file's size.
_MAX_EXPANSION, _ALWAYS_ALLOWED = 4, 1 << 24

_PART_BYTES = 1 << 22  # read at once
_PLAIN = ("torch.jit._pickle.", "torch.device")  # makers of lists and the like in archives
_MAX_ATTRIBUTES, _MAX_KEY = 100_000, 500  # of nested modules

# What reading may raise on bytes that are not a checkpoint.
READING_ERRORS = (
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error, ArithmeticError),
    *(AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError),
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


# Instructions that push their argument, or a fixed value.
_PUSH_ARGUMENT = {
    *("BINFLOAT", "BININT", "BININT1", "BININT2", "LONG1", "LONG4"),
    *("BINBYTES", "SHORT_BINBYTES", "BYTEARRAY8"),
    *("BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE"),  # two of Python 2
}
_PUSH_NEW: Mapping[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": tuple,
    "NEWFALSE": lambda: False,
    "NEWTRUE": lambda: True,
    "NONE": lambda: None,
}

_DTYPES = {
    "torch.BFloat16Storage": "bfloat16",
    "torch.BoolStorage": "bool",
    "torch.ByteStorage": "uint8",
    "torch.CharStorage": "int8",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.ComplexFloatStorage": "complex64",
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.IntStorage": "int32",
    "torch.LongStorage": "int64",
    "torch.ShortStorage": "int16",
}
# More than any checkpoint has: its pickle takes about fifteen instructions per tensor.
_MAX_STEPS = 1 << 20  # and items that one instruction copies
_MAX_AXES = 64
_MAX_TUPLE_KEYS, _MAX_KEY_PARTS = 1000, 8  # every look-up hashes a tuple again
_TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_PARAMETERS = {
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
}
_SETS = {"__builtin__.set", "builtins.set"}  # stand-ins for sets are lists


@dataclass(frozen=True)
class _Name:
    """A class or function that a pickle names."""

    text: str


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    dtype: str


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """Where a tensor's values are stored; ``offset`` and ``strides`` count elements."""

    key: str  # Key of the storage
    dtype: str  # Name of the element type
    offset: int  # Position of the first element in the storage
    shape: tuple[int, ...]  # Shape of the tensor
    strides: tuple[int, ...]  # One per axis


class Instance(dict[Any, Any]):
    """A stand-in for an object; its items are those of the object, if that is a kind of dict."""

    __slots__ = ("attributes", "class_name")

    def __init__(self, class_name: str) -> None:
        super().__init__()
        self.class_name = class_name
        self.attributes: Mapping[Any, Any] | None = {}

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


class Machine:
    """Interprets pickles."""

    def __init__(self) -> None:
        self.storages: dict[str, str] = {}

    def run(self, stream: BinaryIO) -> Any:
        """Read one pickle and leave the stream just after it."""
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}
        self._steps_left, self._tuple_keys_left = _MAX_STEPS, _MAX_TUPLE_KEYS
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                break
            self._spend(1)
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        if name in _PUSH_ARGUMENT:
            self._stack.append(argument)
        elif name in _PUSH_NEW:
            self._stack.append(_PUSH_NEW[name]())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = tuple(self._stack.pop() for _ in range(int(name[-1])))
            self._stack.append(items[::-1])
        elif action := getattr(self, f"_op_{name.lower()}", None):
            action(argument)
        else:
            raise pickle.UnpicklingError(f"instruction {name}, which torch does not write")

    def _spend(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            raise pickle.UnpicklingError("a pickle longer than any checkpoint's")

    def _op_proto(self, version: int) -> None:
        if not 2 <= version <= 5:
            raise pickle.UnpicklingError(f"pickle protocol {version} instead of 2 to 5")

    def _op_frame(self, _: Any) -> None:
        """A frame's length says nothing that is needed."""

    def _op_pop(self, _: Any) -> None:
        self._stack.pop()

    def _op_mark(self, _: Any) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _pop_to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _op_frozenset(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._stack.append(tuple(items))

    _op_tuple = _op_frozenset

    def _op_append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _op_additems(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    _op_appends = _op_additems

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Instance):  # whose list nobody reads
            raise pickle.UnpicklingError(f"items for a {type(target).__name__}")

    def _op_setitem(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._put(self._stack[-1], [key, value])

    def _op_setitems(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._put(self._stack[-1], items)

    def _op_binput(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    _op_long_binput = _op_memoize = _op_binput

    def _op_binget(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _op_long_binget = _op_binget

    def _put(self, target: dict[Any, Any], items: list[Any]) -> None:
        """Add alternating keys and values."""
        if not isinstance(target, dict):
            raise pickle.UnpicklingError(f"items for a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, tuple):
                self._tuple_keys_left -= 1
                if self._tuple_keys_left < 0 or len(key) > _MAX_KEY_PARTS:
                    raise pickle.UnpicklingError("keys of more tuples than a checkpoint has")
                if any(isinstance(part, tuple) for part in key):
                    raise pickle.UnpicklingError("a key of nested tuples")  # hashed in C, deeply
            elif isinstance(key, int) and abs(key) >= 1 << 60:  # many of these share a hash
                raise pickle.UnpicklingError("a key that is a huge number")
            target[key] = value

    def _op_global(self, text: str) -> None:
        self._stack.append(_Name(text.replace(" ", ".")))

    def _op_stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._op_global(f"{module} {name}")

    def _op_binpersid(self, _: Any) -> None:
        what, kind, key, *_, view = [*_parts(self._stack.pop(), most=6), None][:6]
        if what == "module":  # a class with its source text, in files of torch.save before 1.6
            self._stack.append(kind)
            return
        if what != "storage" or type(key) is not str or view is not None:
            raise pickle.UnpicklingError(f"a storage of {kind.text}, which is not read")
        dtype = _DTYPES.get(kind.text)
        if dtype is None:  # of tensors that are not read either
            self._stack.append(Instance(kind.text))
            return
        if self.storages.setdefault(key, dtype) != dtype:
            raise pickle.UnpicklingError(f"storage {key[:40]!r} with two element types")
        self._stack.append(_Storage(key, dtype))

    def _op_reduce(self, _: Any) -> None:
        arguments, name = self._stack.pop(), self._stack.pop()
        self._stack.append(self._result(name.text if isinstance(name, _Name) else "", arguments))

    def _result(self, name: str, arguments: Any) -> Any:
        if name in _TENSORS and not isinstance(arguments[0], Instance):
            return _stored_tensor(*_parts(arguments, most=7))
        if name in _PARAMETERS:
            return arguments[0]
        if name == "torch._tensor._rebuild_from_type_v2":  # a tensor with attributes of its own
            return self._result(arguments[0].text, arguments[2])
        if name in _SETS and arguments and isinstance(arguments[0], list):
            return arguments[0]
        if name == "collections.OrderedDict":
            pairs = arguments[0] if arguments else []
            mapping: dict[Any, Any] = {}
            self._spend(len(pairs))
            self._put(mapping, [part for pair in pairs for part in _parts(pair, most=2)])
            return mapping
        return Instance(name)

    def _op_newobj(self, _: Any) -> None:
        _, name = self._stack.pop(), self._stack.pop()
        self._stack.append(Instance(name.text))

    def _op_newobj_ex(self, _: Any) -> None:
        self._stack.pop()
        self._op_newobj(None)

    def _op_build(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Instance):  # others carry torch's own notes
            target.attributes = state if isinstance(state, dict) else None


def _parts(values: Any, *, most: int) -> tuple[Any, ...] | list[Any]:
    if not isinstance(values, (tuple, list)) or len(values) > most:
        raise pickle.UnpicklingError("a description that makes no sense")
    return values


def _stored_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *notes: Any
) -> StoredTensor:
    """``notes`` hold whether it needs gradients, its hooks, and flags such as *conjugate*."""
    numbers = (offset, *_parts(shape, most=_MAX_AXES), *_parts(strides, most=_MAX_AXES))
    whole = all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
    if not isinstance(storage, _Storage) or not whole or len(shape) != len(strides) or notes[2:3]:
        raise pickle.UnpicklingError("a tensor whose description makes no sense")
    return StoredTensor(storage.key, storage.dtype, offset, tuple(shape), tuple(strides))


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
    """A ZIP file of torch; its entries are in one folder, and tensors are uncompressed."""

    def __init__(self, file: zipfile.ZipFile, size: int) -> None:
        names = file.namelist()
        self._file, self._folder, self._left = file, names[0].split("/")[0], size
        self.is_torchscript = any(name.endswith("/constants.pkl") for name in names)
        self.tensors = TensorReader(lambda key: self._read(f"data/{key}"), size)
        if f"{self._folder}/byteorder" in names:
            _check_byte_order(self._read("byteorder").decode())

    def unpickle(self) -> Any:
        """The content of the archive, with tensors as :class:`StoredTensor`."""
        return Machine().run(io.BytesIO(self._read("data.pkl")))

    def _read(self, name: str) -> bytearray:
        entry = self._file.getinfo(f"{self._folder}/{name}")
        self._left -= entry.file_size
        if entry.compress_type != zipfile.ZIP_STORED or self._left < 0:
            raise zipfile.BadZipFile(
                f"{entry.filename[:80]}, {entry.file_size} bytes, is compressed or larger than the "
                "file"
            )
        content = bytearray()
        with self._file.open(entry) as stream:
            while part := stream.read(_PART_BYTES):
                content += part
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


def _named_tensors(
    root: Any, parts_of: Callable[[Instance], Mapping[Any, Any]]
) -> dict[str, StoredTensor]:
    """The tensors of a module and of its submodules, which ``parts_of`` gives by name."""
    if not isinstance(root, Instance):
        raise ValueError(f"a {type(root).__name__} instead of a module")
    tensors: dict[str, StoredTensor] = {}
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
                tensors[key] = value
            elif isinstance(value, Instance):
                waiting.append((f"{key}.", value))
    if not tensors:
        raise ValueError("modules without a tensor")
    return tensors


def _attributes(module: Instance) -> Mapping[Any, Any]:
    """A scripted module's tensors, whether parameters or not, and submodules."""
    if module.attributes is None:
        raise ValueError(
            f"{module.class_name[:80]}, which restores its state by code of its own, which is "
            "never run"
        )
    parts = {}
    for name, value in module.attributes.items():
        kind = value.class_name if isinstance(value, Instance) else "__torch__."
        if kind.startswith("__torch__."):
            parts[name] = value
        elif not kind.startswith(_PLAIN):
            raise ValueError(f"{name}, a tensor made by {kind[:80]}, which is not read")
    return parts


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what reading may raise on bytes that are not a checkpoint into a CheckpointError."""
    from safetensors import SafetensorError

    try:
        yield
    except CheckpointError:
        raise
    except (SafetensorError, *READING_ERRORS) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"{path.name}: expected a checkpoint file, got one that cannot be read "
            f"({type(error).__name__}: {reason}). Get the file again."
        ) from error


def read_weights(path: Path) -> dict[str, Stored]:
    """Read the weights of a TorchScript archive or a file of ``torch.save``, by key."""
    with _reading(path), path.open("rb") as stream:
        size = path.stat().st_size
        if not zipfile.is_zipfile(stream):
            stream.seek(0)
            content, reader = _read_old(stream, size)
            return _arrays(_find(content, path.name), reader)
        with zipfile.ZipFile(stream) as file:
            archive = Archive(file, size)
            content, scripted = archive.unpickle(), archive.is_torchscript
            named = _named_tensors(content, _attributes) if scripted else _find(content, path.name)
            return _arrays(named, archive.tensors)


def _arrays(tensors: Mapping[str, StoredTensor], reader: TensorReader) -> dict[str, Stored]:
    return {key: (reader.make(tensor), tensor.dtype) for key, tensor in tensors.items()}


_PART = re.compile(r"\.index\.json$|-\d{5}-of-\d{5}\.")


def read_stored(path: Path, *, later: bool = False) -> dict[str, Stored]:
    """Read a checkpoint of any kind; ``later`` as for :func:`read_safetensors`."""
    if _PART.search(path.name):
        raise CheckpointError(
            f"{path.name}: expected the whole weights, got a part of them or their list. Save them "
            "as one file: model.save_pretrained(FOLDER, max_shard_size='20GB')."
        )
    require_file(path)
    if path.suffix != ".safetensors":
        return unwrap(read_weights(path), path.name)
    return unwrap(read_safetensors(path, later=later), path.name)


def require_file(path: Path) -> None:
    """Refuse a path that leads to no file."""
    if not is_file(path):
        raise CheckpointError(f"path: expected a checkpoint file, got {path}. Check the path.")


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a ``.safetensors`` file, checked by the library, and where numbers begin."""
    from safetensors import safe_open

    with safe_open(path, framework="np"), path.open("rb") as stream:  # checks the file's length
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)), 8 + length


_KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OTHER_KINDS = {"F64": "float64", "BOOL": "bool", "U8": "uint8"}
_OTHER_KINDS |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
_OTHER_KINDS |= {f"U{bits}": f"uint{bits}" for bits in (16, 32, 64)}


def read_safetensors(path: Path, *, later: bool = False) -> dict[str, tuple[Any, str]]:
    """Read a ``.safetensors`` file; with ``later``, floats stay in it as :class:`FileRows`."""
    stored: dict[str, tuple[Any, str]] = {}
    with _reading(path):
        entries, begin = _header(path)
        entries.pop("__metadata__", None)
        for key, entry in entries.items():
            kind = (_KINDS | _OTHER_KINDS)[entry["dtype"]]
            shape = tuple(entry["shape"])
            rows = FileRows(path, begin + entry["data_offsets"][0], shape, kind)
            if later and entry["dtype"] in _KINDS:
                stored[key] = (rows, "float32")
            else:
                whole = rows.stored(0, shape[0] if shape else 1)
                stored[key] = (whole.reshape(shape), kind)
    return stored


def as_float32(array: Array, kind: str) -> Array:
    """A stored array as float32."""
    return np.asarray(widened_bits(array) if kind == "bfloat16" else array, np.float32, order="C")


class FileRows(Later):
    """A table that stays in its file, from where also single rows are read, as float32."""

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], kind: str) -> None:
        super().__init__(shape, lambda: self[:])
        self._path, self._offset, self._kind = path, offset, kind

    def __getitem__(self, rows: Any) -> Array:
        """Rows by an array of numbers of any shape, or a slice without a step; float32."""
        if isinstance(rows, slice) or not self.shape:
            start, stop, _ = rows.indices(self.shape[0] if self.shape else 1)
            numbers = self.stored(start, stop - start)
            return as_float32(numbers, self._kind).reshape(-1, *self.shape[1:])
        wanted = np.asarray(rows)
        read = np.concatenate([self.stored(int(number), 1) for number in wanted.reshape(-1)])
        return as_float32(read, self._kind).reshape(*wanted.shape, *self.shape[1:])

    def stored(self, first: int, count: int) -> Array:
        """The numbers of some rows, as the file has them."""
        width, kind = math.prod(self.shape[1:]), element_type(self._kind)
        start = self._offset + first * width * kind.itemsize
        numbers = np.fromfile(self._path, kind, count * width, offset=start)
        if len(numbers) != count * width:
            raise CheckpointError(f"{self._path.name}: expected whole rows, got the file's end.")
        return numbers


def unwrap(weights: Mapping[str, _T], name: str = "state_dict") -> dict[str, _T]:
    """Strip the prefixes of wrappers: DDP, EMA, Lightning, ``torch.compile``, FSDP."""
    tensors = {_ANYWHERE.sub("", key): value for key, value in weights.items()}
    while True:
        counts = {p: sum(key.startswith(p) for key in tensors) for p in _IN_FRONT}
        prefix = max(counts, key=lambda p: counts[p])
        if 2 * counts[prefix] < len(tensors) or not counts[prefix]:
            return tensors
        beside = [key for key in tensors if not key.startswith(prefix)]
        beside = [key for key in beside if not _NO_WEIGHT.fullmatch(key)]
        if beside:
            _log.warning(
                "%s: the weights are those under %r; %d others are left out: %s",
                name, prefix, len(beside), some(beside),
            )  # fmt: skip
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _find(content: Any, name: str) -> dict[str, StoredTensor]:
    state_dict = _state_dict_in(content, _MAX_DEPTH)
    if state_dict is None:
        kind = {StoredTensor: "a tensor", Instance: "another object"}.get(type(content))
        raise CheckpointError(
            f"{name}: expected a state_dict, got {kind or type(content).__name__}"
            f"{_listed(content)}. Save the model's state_dict()."
        )
    tensors = {key: value for key, value in state_dict.items() if isinstance(value, StoredTensor)}
    others = {
        k: v for k, v in state_dict.items() if k not in tensors and not _NO_WEIGHT.fullmatch(str(k))
    }
    if others or not all(isinstance(key, str) for key in tensors):
        raise CheckpointError(
            f"{name}: expected only tensors by name in the state_dict, got other values"
            f"{_listed(others or tensors)}. Save the model's state_dict()."
        )
    return tensors


def _listed(content: Any) -> str:
    keys = list(content) if isinstance(content, Mapping) else []
    shown = [key if isinstance(key, str) else f"a {type(key).__name__}" for key in keys]
    return f" under {some(shown)}" if shown else ""


def _state_dict_in(content: Any, depth: int) -> Mapping[Any, Any] | None:
    """The mapping that holds the weights: at the top, under a known key, or the only one."""
    attributes = content.attributes if isinstance(content, Instance) else None
    if attributes and "_parameters" in attributes and "_modules" in attributes:
        return _named_tensors(content, _parts_of_module)
    if not isinstance(content, Mapping) or not depth:
        return None
    for holder in _HOLDERS:
        if isinstance(inner := content.get(holder), Mapping):
            state_dict = _state_dict_in(inner, depth - 1)
            if state_dict is not None:
                return state_dict
    if any(isinstance(value, StoredTensor) for value in content.values()):
        return content
    inside = [_state_dict_in(value, 1) for value in content.values()]
    there = [state_dict for state_dict in inside if state_dict is not None]
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
