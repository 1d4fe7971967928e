"""Ways to spoil what is good: bytes, documents, text, arrays and values."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import numpy as np
import numpy.typing as npt

ODD_NUMBERS = (
    -1, 0, 1, 2, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**30, 0.5, -0.0, 1e-320, 1e38, 1e39, 1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
ODD_TEXTS = (
    "", " ", "\0", "a\0b", "..", "../../x", "/", "-", "--help", "@", "@none", "%s", "{}", "{0.x}",
    "\n", "\r\n", "\x1b[2J", "\ud800", "\u202egnp.exe", "\N{PILE OF POO}", "a" * 5000, "NaN",
    "e\N{COMBINING ACUTE ACCENT}" * 40, "null", "1e999", "__class__", "C:\\x", "file:///x",
    "\ufeff", "\uffff", ",", ",,",
)  # fmt: skip
DTYPES = ("u1", "i1", "u2", "i2", "i4", "i8", "u8", "f2", "f4", "f8", "c8", "?", ">f4", "U3")


def spoil_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip bits, write extreme values, cut, insert, or move pieces; mostly once."""
    spoilt = bytearray(content or b"\0")
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        _spoil_once(spoilt, draw)
    return bytes(spoilt)


def _spoil_once(spoilt: bytearray, draw: random.Random) -> None:
    # Headers and tables are at the ends; the middle is mostly weights.
    edge = min(len(spoilt), 400)
    place = draw.choice(
        (draw.randrange(edge), len(spoilt) - 1 - draw.randrange(edge), draw.randrange(len(spoilt)))
    )
    kind = draw.randrange(8)
    if kind <= 1:
        spoilt[place] ^= 1 << draw.randrange(8)
    elif kind == 2:
        spoilt[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
    elif kind == 3:
        size = draw.choice((2, 4, 8))
        value = draw.choice(
            (0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
        )
        spoilt[place : place + size] = value.to_bytes(size, draw.choice(("little", "big")))
    elif kind == 4:
        begin = draw.randrange(len(spoilt))
        piece = spoilt[begin : begin + draw.randrange(1, 64)]
        spoilt[place : place + len(piece)] = piece
    elif kind == 5:
        spoilt[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
    elif kind == 6:
        del spoilt[place : place + draw.randrange(1, 64)]
    else:
        del spoilt[place:]
    if not spoilt:
        spoilt.append(0x80)


def odd_value(draw: random.Random) -> Any:
    """Something that no reader asked for."""
    kind = draw.randrange(8)
    if kind <= 2:
        return draw.choice(ODD_NUMBERS)
    if kind <= 4:
        return draw.choice(ODD_TEXTS)
    if kind == 5:
        return draw.choice((None, True, False))
    if kind == 6:
        return draw.choice(([], {}, [[]], {"": {}}, [0] * 1000, {str(i): i for i in range(300)}))
    deep: Any = []
    for _ in range(draw.choice((3, 60, 400))):
        deep = [deep]
    return deep


def spoil_document(document: Any, draw: random.Random) -> Any:
    """A copy of a tree of dicts and lists with a few leaves or branches altered."""
    spoilt = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        branches = _branches(spoilt)
        if not branches:
            return odd_value(draw)
        _spoil_branch(*draw.choice(branches), draw, branches)
    return spoilt


def _branches(tree: Any) -> list[tuple[Any, Any]]:
    branches: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        branch = waiting.pop()
        places = branch.keys() if isinstance(branch, dict) else range(len(branch))
        for place in places:
            branches.append((branch, place))
            if isinstance(branch[place], (dict, list)):
                waiting.append(branch[place])
    return branches


def _spoil_branch(
    branch: Any, place: Any, draw: random.Random, branches: list[tuple[Any, Any]]
) -> None:
    kind = draw.randrange(8)
    if kind <= 3:
        branch[place] = odd_value(draw)
    elif kind == 4:
        del branch[place]
    elif kind == 5 and isinstance(branch, dict):
        branch[draw.choice(ODD_TEXTS)] = branch.pop(place)
    elif kind == 6:
        other, there = draw.choice(branches)
        try:
            branch[place] = copy.deepcopy(other[there])
        except (KeyError, IndexError):
            branch[place] = None
    elif isinstance(branch, list):
        branch.extend(copy.deepcopy(branch[:50]))
    else:
        branch[str(place) + "x"] = odd_value(draw)


def spoil_json(document: Any, draw: random.Random) -> bytes:
    """A JSON file with odd values; now and then with spoilt bytes as well."""
    text = json.dumps(spoil_document(document, draw) if draw.random() < 0.8 else document)
    content = text.encode("utf-8", "surrogatepass")
    return spoil_bytes(content, draw) if draw.random() < 0.3 else content


_PIECES = ("a", "cat", "red", "ball", " ", ",", "0", "é", "&amp;", "漢字", "\U0001f468", "'", '"',
           "\\", "[", "]", "$", "`", ";", "~", "…", "-", "_", "%", "(", "#")  # fmt: skip
_HOSTILE = ("\t", "\u0301", "&#0;", "<|endoftext|>", "\ud83d", "\u200d", "\x07", "\u2028")


def odd_text(draw: random.Random) -> str:
    """A text as a hostile or careless person would type it."""
    if draw.random() < 0.3:
        return draw.choice(ODD_TEXTS)
    pool = _PIECES + _HOSTILE if draw.random() < 0.4 else _PIECES
    return "".join(draw.choice(pool) for _ in range(draw.choice((1, 3, 9, 9, 80, 2000))))


def odd_shape(draw: random.Random, most: int = 64) -> tuple[int, ...]:
    """A small shape of 0 to 5 axes, often with a side of 0 or 1."""
    axes = draw.choice((0, 1, 2, 3, 3, 4, 4, 5))
    return tuple(draw.choice((0, 1, 1, 2, 3, 7, most)) for _ in range(axes))


def odd_array(draw: random.Random, shape: tuple[int, ...] | None = None) -> npt.NDArray[Any]:
    """An array of an odd dtype, shape, memory layout or content."""
    noise = np.random.default_rng(draw.getrandbits(64))
    shape = odd_shape(draw, 16) if shape is None else shape
    dtype = np.dtype(draw.choice(DTYPES))
    with np.errstate(all="ignore"):
        values = np.asarray(noise.standard_normal(shape) * draw.choice((1, 300, 1e30)), dtype)
    if dtype.kind == "f" and draw.random() < 0.3:
        values[...] = draw.choice((np.nan, np.inf, -np.inf, 0.0))
    return odd_layout(values, draw)


def odd_layout(values: npt.NDArray[Any], draw: random.Random) -> npt.NDArray[Any]:
    """The same values, perhaps reversed, in another order, misaligned, a view, or read-only."""
    kind = draw.randrange(8)
    if kind == 0:
        return np.asfortranarray(values)
    if kind == 1 and values.ndim:
        return values[::-1]
    if kind == 2 and values.ndim:
        wide = np.repeat(values, 2, axis=-1)
        return wide[..., ::2]
    if kind == 3:
        raw = np.zeros(values.nbytes + 1, np.uint8)
        shifted = raw[1:].view(values.dtype).reshape(values.shape) if values.size else values
        shifted[...] = values
        return shifted
    if kind == 4:
        values = values.copy()
        values.flags.writeable = False
    return values
