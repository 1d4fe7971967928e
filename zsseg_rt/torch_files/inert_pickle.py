"""Read a pickle without running any of it: names stay names, calls become stand-ins."""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

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
