"""Arrays and their descriptions, as every layer above the kernels speaks of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Array", "TensorSpec", "reshaped"]

Array = Any
"""A ``numpy.ndarray``, or an object with ``__dlpack__`` / ``__cuda_array_interface__`` on a GPU."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One named input or output of a graph.

    Attributes:
        name: The graph's own name for it.
        dtype: NumPy name, such as ``"float32"``.
        shape: Sizes; a string names a dynamic axis.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def reshaped(array: Array, shape: tuple[int, ...]) -> Array:
    """The array's leading elements with another shape, no copy, on either kind of device."""
    return array.reshape(shape) if isinstance(array, np.ndarray) else array.view(shape)
