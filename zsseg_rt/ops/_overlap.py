"""The rule on arrays that share memory, worded as csrc/bindings/array_arg.cpp words it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import ArgumentError
from zsseg_rt.ops._contract import expect_writable

__all__ = ["expect_apart"]


def expect_apart(
    written: Mapping[str, Any], read: Mapping[str, Any], in_place: Sequence[str] = ()
) -> None:
    """Raise ArgumentError if an array that is written shares memory with another of the call.

    Inputs named in ``in_place`` may be an output, wholly. None stands for an array not given.
    """
    outputs = {
        name: expect_writable(name, array) for name, array in written.items() if array is not None
    }
    inputs = {name: array for name, array in read.items() if isinstance(array, np.ndarray)}
    for place, (name, output) in enumerate(outputs.items()):
        for other, array in [*inputs.items(), *list(outputs.items())[:place]]:
            allowed = other in in_place and _same_memory(output, array)
            if np.may_share_memory(output, array) and not allowed:
                raise ArgumentError(
                    f"{name}: expected memory apart from {other}'s, got an overlap. Pass an array "
                    "of its own."
                )


def _same_memory(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    return bool(a.ctypes.data == b.ctypes.data and a.nbytes == b.nbytes)
