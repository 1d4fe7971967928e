"""Decode protobuf messages by a schema, and refuse what the schema does not list.

Readers of protobuf disagree about odd bytes: a field that is repeated, of another wire type or of
an unknown number is merged by one reader and skipped by the next. A file that one reader checks and
another runs must not hold any.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

# Kinds of fields. Bytes stay a view of the file: nested messages and weights cost nothing.
INT, FLOAT, TEXT, BYTES = "INT", "FLOAT", "TEXT", "BYTES"
MANY_INTS, MANY_FLOATS = "MANY_INTS", "MANY_FLOATS"
MANY_TEXTS, MANY_BYTES = "MANY_TEXTS", "MANY_BYTES"

Schema = Mapping[int, tuple[str, str]]
"""Field number -> (name, kind)."""

_REPEATED = (MANY_INTS, MANY_FLOATS, MANY_TEXTS, MANY_BYTES)
_VARINT, _EIGHT_BYTES, _SIZED, _FOUR_BYTES = 0, 1, 2, 5
_WIRE_TYPES = {
    INT: (_VARINT,),
    FLOAT: (_FOUR_BYTES,),
    TEXT: (_SIZED,),
    BYTES: (_SIZED,),
    MANY_INTS: (_VARINT, _SIZED),  # one by one, or packed
    MANY_FLOATS: (_FOUR_BYTES, _SIZED),
    MANY_TEXTS: (_SIZED,),
    MANY_BYTES: (_SIZED,),
}


def decode(message: memoryview, schema: Schema) -> dict[str, Any]:
    """Decode one message; nested messages are left as bytes.

    Returns:
        Values by field name: a list for each repeated field present, signed 64-bit integers.
    """
    found: dict[str, Any] = {}
    position, end = 0, len(message)
    while position < end:
        key = message[position]
        if key < 0x80:  # a field number up to 15, as all known ones are
            position += 1
        else:
            key, position = _varint(message, position)
        name, kind = schema.get(key >> 3, ("", ""))
        if key & 7 not in _WIRE_TYPES.get(kind, ()):
            raise ValueError(f"field {key >> 3} of wire type {key & 7}, which is not expected here")
        value, position = _read_value(message, position, key & 7, kind)
        if kind not in _REPEATED:
            if name in found:
                raise ValueError(f"{name} given twice")
            found[name] = value
        elif isinstance(value, list):
            found.setdefault(name, []).extend(value)
        else:
            found.setdefault(name, []).append(value)
    return found


def packed_ints(content: memoryview) -> list[int]:
    """The signed 64-bit integers of a packed field."""
    values, position = [], 0
    while position < len(content):
        value, position = _varint(content, position)
        values.append(value)
    return values


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The signed 64-bit integer at ``position``, and the position after it."""
    if position < len(message) and message[position] < 0x80:
        return message[position], position + 1
    value = shift = 0
    for byte in message[position : position + 10]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value - (1 << 64) if value >> 63 else value, position + shift // 7
    raise ValueError(f"a damaged integer at byte {position}")


def _read_value(message: memoryview, position: int, wire: int, kind: str) -> tuple[Any, int]:
    if wire == _VARINT:
        return _varint(message, position)
    if wire == _FOUR_BYTES:
        size = 4
    else:
        size, position = _varint(message, position)
    if not 0 <= size <= len(message) - position:
        raise ValueError("a truncated file")
    content = message[position : position + size]
    return _READERS[kind](content), position + size


def _text(content: memoryview) -> str:
    return bytes(content).decode("utf-8")


def _float(content: memoryview) -> float:
    value: float = struct.unpack("<f", content)[0]
    return value


def _packed_floats(content: memoryview) -> list[float]:
    if len(content) % 4:
        raise ValueError(f"{len(content)} bytes of packed floats")
    return list(struct.unpack(f"<{len(content) // 4}f", content))


_READERS = {
    FLOAT: _float,
    TEXT: _text,
    MANY_TEXTS: _text,
    BYTES: lambda content: content,
    MANY_BYTES: lambda content: content,
    MANY_INTS: packed_ints,
    MANY_FLOATS: _packed_floats,
}
