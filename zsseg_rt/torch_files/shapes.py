"""Compare a checkpoint's arrays with the shapes that they must have; without torch.

The shapes of a system are a table: a key and its sizes per line. A size is a number, or terms of
capital letters such as ``3W`` and ``H+G``; the first row with a letter alone says its value. ``#``
in a key stands for all numbers of layers. A key that ends with ``.`` or ``_`` has a ``weight``, and
a ``bias`` of the first size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import CheckpointError

Array = npt.NDArray[Any]

_LISTED = 4
_MANY_ROWS = 100_000

BLOCKS = """
transformer.resblocks.#.ln_1. W
transformer.resblocks.#.ln_2. W
transformer.resblocks.#.attn.in_proj_ 3W W
transformer.resblocks.#.attn.out_proj. W W
transformer.resblocks.#.mlp.c_fc. M W
transformer.resblocks.#.mlp.c_proj. W M
"""
"""Residual blocks with CLIP's keys."""

IMAGE_TOWER = f"""
conv1.weight W 3 P P
class_embedding W
positional_embedding R W
proj W D
ln_pre. W
ln_post. W
{BLOCKS}"""
"""CLIP's image tower."""

TEXT_TOWER = f"""
token_embedding.weight V W
positional_embedding L W
text_projection W D
ln_final. W
{BLOCKS}""".replace("W", "T").replace("M", "F")
"""CLIP's text tower, whose letters may stand beside the image tower's."""


def under(prefix: str, table: str) -> str:
    """A table whose keys begin with a prefix."""
    return "".join(f"{prefix}{line}\n" for line in table.splitlines() if line)


class Later:
    """A float32 array that is made, or read from its file, whenever it is asked for."""

    dtype = np.dtype(np.float32)

    def __init__(self, shape: tuple[int, ...], make: Callable[[], Array]) -> None:
        self.shape, self.ndim, self.size, self._make = shape, len(shape), math.prod(shape), make

    def whole(self) -> Array:
        """The array."""
        return self._make().reshape(self.shape)


def whole(array: Any) -> Array:
    """An array that may be a later one."""
    return array.whole() if isinstance(array, Later) else array


def has_many_rows(array: Any) -> bool:
    """Whether a later array is so large a table that its rows are read one by one."""
    return isinstance(array, Later) and array.shape[:1] > (_MANY_ROWS,)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Arrays by key, and what errors say about their file."""

    tensors: Mapping[str, Any]  # Arrays, or torch's tensors
    what: str  # What they should be
    where: str = "state_dict"  # The file, and the part of it
    remedy: str = "Check that the checkpoint is complete and from this architecture."

    def shape(self, key: str, axes: int) -> tuple[int, ...]:
        """The shape of one array, which must have so many axes."""
        shape = self.tensors[key].shape if key in self.tensors else None
        if shape is None or len(shape) != axes:
            raise CheckpointError(
                f"{self.where}: {key}: expected a tensor of {axes} axes, as in {self.what}, got "
                f"{'none' if shape is None else list(shape)}. {self.remedy}"
            )
        return tuple(shape)

    def has(self, prefix: str) -> bool:
        """Whether some key begins so."""
        return any(key.startswith(prefix) for key in self.tensors)

    def depth(self, prefix: str) -> int:
        """The number of layers ``{prefix}0.``, ``{prefix}1.``, and so on; at least one."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return max(1, len({match[1] for key in self.tensors if (match := pattern.match(key))}))

    def grid_side(self, key: str, axes: int) -> int:
        """The side of the square grid that positions are stored for, behind the class token's."""
        rows = self.shape(key, axes)[-2]
        self.check_square(key, rows)
        return math.isqrt(rows - 1)

    def check(self, table: str, **sizes: int) -> dict[str, int]:
        """Refuse other keys and shapes than a table's, what is not float32, NaN and infinity.

        ``sizes`` are those of letters that no row says. Rows that stay in their file are checked
        when they are written.
        """
        for key, row in _rows(table, self.depth):
            if letters := [one for one in row if one.isalpha() and one not in sizes]:
                shape = self.shape(key, len(row))
                sizes |= {one: shape[row.index(one)] for one in letters}
        self.compare(expand(table, sizes, self.depth))
        return sizes

    def compare(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse other keys and shapes; of NumPy's arrays other types, NaN and infinity."""
        tensors = self.tensors
        wrong = [f"{key} missing" for key in shapes if key not in tensors]
        wrong += [f"{key} unknown" for key in tensors if key not in shapes]
        for key in shapes.keys() & tensors.keys():
            tensor, is_array = tensors[key], isinstance(tensors[key], (np.ndarray, Later))
            if tuple(tensor.shape) != shapes[key]:
                wrong.append(f"{key} {list(tensor.shape)} instead of {list(shapes[key])}")
            elif is_array and tensor.dtype != np.float32:
                wrong.append(f"{key} {tensor.dtype} instead of float32")
            elif is_array and not has_many_rows(tensor) and not np.isfinite(whole(tensor)).all():
                wrong.append(f"NaN or infinity in {key}")
        if wrong:
            raise CheckpointError(
                f"{self.where}: expected the {len(shapes)} tensors of {self.what}, got "
                f"{some(sorted(wrong))}. {self.remedy}"
            )

    def check_square(self, key: str, rows: int, others: int = 1) -> None:
        """Refuse positions that are not so many of other tokens and those of a square grid."""
        side = math.isqrt(max(rows - others, 0))
        if side < 1 or others + side**2 != rows:
            raise CheckpointError(
                f"{self.where}: {key}: expected {'one row and ' * others}those of a square grid, "
                f"got {rows} rows. {self.remedy}"
            )


def expand(
    table: str, sizes: Mapping[str, int], depth: Callable[[str], int]
) -> dict[str, tuple[int, ...]]:
    """Shapes by key of a table with these sizes; ``depth`` counts the layers behind a prefix."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, row in _rows(table, depth):
        shapes.setdefault(key, tuple(_size(one, sizes) for one in row))
    return shapes


def _rows(table: str, depth: Callable[[str], int]) -> Iterator[tuple[str, list[str]]]:
    for line in filter(None, table.splitlines()):
        name, *row = line.split()
        start, numbered, rest = name.partition("#")
        for number in range(depth(start)) if numbered else [""]:
            key = f"{start}{number}{rest}"
            if key.endswith((".", "_")):
                yield f"{key}weight", row
                yield f"{key}bias", row[:1]
            else:
                yield key, row


def _size(terms: str, sizes: Mapping[str, int]) -> int:
    total = 0
    for term in terms.split("+"):
        letter = term[-1:] if term[-1:].isalpha() else ""
        total += int(term.removesuffix(letter) or 1) * (sizes.get(letter, 0) if letter else 1)
    return total


def divisor(name: str, heads: int | None, width: int) -> int:
    """Attention heads of a width: as given, or one per 64 channels."""
    heads = max(1, width // 64) if heads is None else heads
    if heads < 1 or width % heads:
        raise CheckpointError(
            f"{name}: expected a divisor of the width {width}, got {heads}. "
            "Give the number that the weights were trained with."
        )
    return heads


def some(items: Sequence[str]) -> str:
    """The first few of what is wrong."""
    listed = ", ".join(item[:100] for item in items[:_LISTED]) or "none"
    return listed + (f" and {len(items) - _LISTED} more" if len(items) > _LISTED else "")
