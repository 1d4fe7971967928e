"""Read a pickle without running any of it: nothing is imported or called.

Python's own unpickler imports what a pickle names and calls it. This one interprets the few
instructions that torch writes. Names stay names, and calls become records.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

# Instructions that push their argument, or a fixed value.
_PUSH_ARGUMENT = {
    "BINFLOAT",
    "BININT",
    "BININT1",
    "BININT2",
    "BINSTRING",  # from Python 2
    "BINUNICODE",
    "LONG1",
    "SHORT_BINSTRING",
}
_PUSH_NEW: Mapping[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NEWFALSE": lambda: False,
    "NEWTRUE": lambda: True,
    "NONE": lambda: None,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

_DTYPES = {
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.ShortStorage": torch.int16,
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
# Plain values that checkpoints hold besides their weights.
_PLAIN = {
    "__builtin__.bytearray",
    "__builtin__.complex",
    "__builtin__.set",
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
}


class ForeignObjectError(pickle.UnpicklingError):
    """A pickle makes an object of a class not known to be harmless; the message names it."""


@dataclass(frozen=True)
class _Name:
    """A class or function that a pickle names."""

    text: str


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """Where a tensor's values are stored; ``offset`` and ``strides`` count elements.

    Attributes:
        key: Key of the storage.
        dtype: Element type.
        offset: Position of the first element in the storage.
        shape: Shape of the tensor.
        strides: One per axis.
    """

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(eq=False)
class Instance:
    """A stand-in for an object.

    Attributes:
        class_name: Name of its class, with the module.
        attributes: Values by name; None if the class would restore its state with its own code.
    """

    class_name: str
    attributes: Mapping[Any, Any] | None = field(default_factory=dict)


class Machine:
    """Interprets pickles.

    Attributes:
        storages: Element type of every named storage, by key.
    """

    def __init__(self, *, stand_ins: bool) -> None:
        self._stand_ins = stand_ins
        self.storages: dict[str, torch.dtype] = {}

    def run(self, stream: BinaryIO) -> Any:
        """Read one pickle and leave the stream just after it.

        Returns:
            Plain values, :class:`StoredTensor` and :class:`Instance`.
        """
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
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = tuple(self._stack.pop() for _ in range(count))
            self._stack.append(items[::-1])
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise pickle.UnpicklingError(f"instruction {name}, which torch does not write")

    def _spend(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            raise pickle.UnpicklingError("a pickle longer than any checkpoint's")

    def _protocol(self, version: int) -> None:
        if version != 2:
            raise pickle.UnpicklingError(f"pickle protocol {version} instead of torch's, 2")

    def _mark(self, _: Any) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _pop_to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _tuple(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._stack.append(tuple(items))

    def _append(self, _: Any) -> None:
        item = self._stack.pop()
        self._top(list).append(item)

    def _appends(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._top(list).extend(items)

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._put(self._top(dict), [key, value])

    def _set_items(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._put(self._top(dict), items)

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise pickle.UnpicklingError(
                f"items for a {type(self._stack[-1]).__name__} instead of a {kind.__name__}"
            )
        return self._stack[-1]

    def _remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _recall(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _put(self, target: dict[Any, Any], items: list[Any]) -> None:
        """Add alternating keys and values."""
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

    def _name(self, text: str) -> None:
        self._stack.append(_Name(text.replace(" ", ".")))

    def _name_storage(self, _: Any) -> None:
        what, kind, key, _, _, *view = _parts(self._stack.pop(), most=6)
        dtype = _DTYPES.get(kind.text)
        if what != "storage" or type(key) is not str or dtype is None or view not in ([], [None]):
            raise pickle.UnpicklingError(f"a storage of {kind.text}, which is not read")
        if self.storages.setdefault(key, dtype) != dtype:
            raise pickle.UnpicklingError(f"storage {key[:40]!r} with two element types")
        self._stack.append(_Storage(key, dtype))

    def _call(self, _: Any) -> None:
        arguments, name = self._stack.pop(), self._stack.pop().text
        if name in _TENSORS:
            self._stack.append(_stored_tensor(*_parts(arguments, most=7)))
        elif name in _PARAMETERS:
            self._stack.append(arguments[0])
        elif name == "collections.OrderedDict":
            pairs = arguments[0] if arguments else []
            made: dict[Any, Any] = {}
            self._spend(len(pairs))
            self._put(made, [part for pair in pairs for part in _parts(pair, most=2)])
            self._stack.append(made)
        elif name.startswith("torch._utils."):
            raise pickle.UnpicklingError(f"a tensor made by {name[:80]}, which is not read")
        elif name in _PLAIN or self._stand_ins:
            self._stack.append(Instance(name))
        else:
            raise ForeignObjectError(name)

    def _make(self, _: Any) -> None:
        _, name = self._stack.pop(), self._stack.pop().text
        if not self._stand_ins:
            raise ForeignObjectError(name)
        self._stack.append(Instance(name))

    def _build(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Instance):
            target.attributes = state if isinstance(state, dict) else None
        elif not isinstance(target, (dict, StoredTensor)):  # these carry torch's own notes
            raise pickle.UnpicklingError(f"a state for a {type(target).__name__}")


_ACTIONS: Mapping[str, Callable[[Machine, Any], None]] = {
    "APPEND": Machine._append,
    "APPENDS": Machine._appends,
    "BINGET": Machine._recall,
    "BINPERSID": Machine._name_storage,
    "BINPUT": Machine._remember,
    "BUILD": Machine._build,
    "GLOBAL": Machine._name,
    "LONG_BINGET": Machine._recall,
    "LONG_BINPUT": Machine._remember,
    "MARK": Machine._mark,
    "NEWOBJ": Machine._make,
    "PROTO": Machine._protocol,
    "REDUCE": Machine._call,
    "SETITEM": Machine._set_item,
    "SETITEMS": Machine._set_items,
    "TUPLE": Machine._tuple,
}


def _parts(given: Any, *, most: int) -> tuple[Any, ...] | list[Any]:
    if not isinstance(given, (tuple, list)) or len(given) > most:
        raise pickle.UnpicklingError("a description that makes no sense")
    return given


def _stored_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *notes: Any
) -> StoredTensor:
    """``notes`` hold whether it needs gradients, its hooks, and flags such as *conjugate*."""
    numbers = (offset, *_parts(shape, most=_MAX_AXES), *_parts(strides, most=_MAX_AXES))
    whole = all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
    if not isinstance(storage, _Storage) or not whole or len(shape) != len(strides) or notes[2:3]:
        raise pickle.UnpicklingError("a tensor whose description makes no sense")
    return StoredTensor(storage.key, storage.dtype, offset, tuple(shape), tuple(strides))
