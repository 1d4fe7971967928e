"""Compare a checkpoint's arrays with the shapes that they must have; without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import CheckpointError

Array = npt.NDArray[Any]
Shapes = dict[str, tuple[int, ...]]

_LISTED = 4
_MANY_ROWS = 100_000
_BLOCKS = "transformer.resblocks."


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

    tensors: Mapping[str, Array]  # The arrays
    where: str  # The file, and the part of it
    what: str  # What it should hold
    remedy: str  # What to do
    prefix: str = ""  # What stands before the keys in the file, for errors

    def shape(self, key: str, axes: int) -> tuple[int, ...]:
        """The shape of one array, which must have so many axes."""
        shape = self.tensors[key].shape if key in self.tensors else None
        if shape is None or len(shape) != axes:
            raise CheckpointError(
                f"{self.where}: {self.prefix}{key}: expected a tensor of {axes} axes, as in "
                f"{self.what}, got {'none' if shape is None else list(shape)}. {self.remedy}"
            )
        return tuple(shape)

    def depth(self, prefix: str = _BLOCKS) -> int:
        """How many blocks ``{prefix}0.``, ``{prefix}1.`` there are."""
        keys = [key.removeprefix(prefix) for key in self.tensors if key.startswith(prefix)]
        return len({key.partition(".")[0] for key in keys})

    def blocks(self, width: int) -> Shapes:
        """Shapes of all residual blocks with CLIP's keys."""
        hidden = self.shape(f"{_BLOCKS}0.mlp.c_fc.weight", 2)[0]
        shapes: Shapes = {}
        for number in range(self.depth()):
            at = f"{_BLOCKS}{number}."
            shapes |= norm(f"{at}ln_1", width) | norm(f"{at}ln_2", width)
            shapes |= linear(f"{at}attn.in_proj_", 3 * width, width)
            shapes |= linear(f"{at}attn.out_proj.", width, width)
            shapes |= linear(f"{at}mlp.c_fc.", hidden, width)
            shapes |= linear(f"{at}mlp.c_proj.", width, hidden)
        return shapes

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse other keys and shapes, what is not float32, NaN and infinity.

        Tables of many rows are checked when they are written.
        """
        tensors = self.tensors
        wrong = [f"{self.prefix}{key} missing" for key in shapes if key not in tensors]
        wrong += [f"{self.prefix}{key} unknown" for key in tensors if key not in shapes]
        for key, shape in shapes.items():
            named = f"{self.prefix}{key}"
            if key not in tensors:
                continue
            if tensors[key].shape != shape:
                wrong.append(f"{named} {list(tensors[key].shape)} instead of {list(shape)}")
            elif tensors[key].dtype != np.float32:
                wrong.append(f"{named} {tensors[key].dtype} instead of float32")
            elif not has_many_rows(tensors[key]) and not np.isfinite(whole(tensors[key])).all():
                wrong.append(f"NaN or infinity in {named}")
        if wrong:
            raise CheckpointError(
                f"{self.where}: expected the {len(shapes)} finite tensors of {self.what}, got "
                f"{some(wrong)}. {self.remedy}"
            )


def norm(name: str, width: int) -> Shapes:
    """Shapes of a layer norm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name: str, outs: int, ins: int) -> Shapes:
    """Shapes of a projection; the name ends as its keys go on."""
    return {f"{name}weight": (outs, ins), f"{name}bias": (outs,)}


def divisor(name: str, heads: int, width: int) -> int:
    """A number of attention heads that a width can have."""
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
