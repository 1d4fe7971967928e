"""Arrays and their descriptions, as every layer above the kernels speaks of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

HALF_PRECISIONS = ("float16", "bfloat16")
_NAMES: dict[Any, str] = {"bfloat16": "bfloat16"}

Array = Any
"""A ``numpy.ndarray``, or an object with ``__dlpack__`` / ``__cuda_array_interface__`` on a GPU."""


def label_dtype(num_classes: int) -> np.dtype[Any]:
    """Labels are uint8 up to 254 classes, then uint16; the largest value means unknown."""
    return np.dtype(np.uint8 if num_classes <= 254 else np.uint16)


def gpu_index(device: str) -> int:
    """The number of ``"cuda:N"``; 0 without one."""
    return int(device.partition(":")[2] or 0)


_PART = 8192  # numbers that stay in a cache; most weights show in the first of them what they are


def is_half(array: npt.NDArray[Any]) -> bool:
    """Whether float16 holds every number exactly."""
    numbers = array.ravel("K")
    parts = (numbers[start : start + _PART] for start in range(0, numbers.size, _PART))
    with np.errstate(over="ignore"):
        return all(np.array_equal(part.astype(np.float16), part) for part in parts)


def widened_bits(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Return bfloat16 numbers, given by their bits, as float32: these are its upper halves."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One named input or output of a graph."""

    name: str  # The graph's own name for it
    dtype: str  # NumPy name, such as "float32"
    shape: tuple[int | str, ...]  # Sizes; a string names a dynamic axis


def widened(specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The same tensors with float32 in the place of half precision."""
    return tuple(
        replace(spec, dtype="float32") if spec.dtype in HALF_PRECISIONS else spec for spec in specs
    )


def dtype_name(dtype: npt.DTypeLike) -> str:
    """NumPy's name of a dtype, ``"bfloat16"`` of its own; kept, as a frame asks several times."""
    name = _NAMES.get(dtype)
    if name is None:
        name = _NAMES[dtype] = np.dtype(dtype).name
    return name


def typestr_of(name: str) -> str:
    """How ``__cuda_array_interface__`` writes a dtype; bfloat16 as ml_dtypes does."""
    return "<V2" if name == "bfloat16" else np.dtype(name).str


def dtype_of(name: str, specs: Iterable[TensorSpec]) -> str:
    """The dtype of a named input or output; ``"float32"`` if there is none of this name."""
    return next((spec.dtype for spec in specs if spec.name == name), "float32")


def reshaped(array: Array, shape: tuple[int, ...]) -> Array:
    """The array's leading elements with another shape, no copy, on either kind of device."""
    return array.reshape(shape) if isinstance(array, np.ndarray) else array.view(shape)
