"""Argument checks of the NumPy reference, worded as csrc/zsseg/check.cpp words them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError

__all__ = [
    "ABSENT_LOGIT",
    "ANY",
    "MAX_SIDE",
    "expect_array",
    "expect_dtype",
    "expect_logits",
    "expect_out",
    "expect_rows",
    "expect_shape",
    "expect_side_range",
    "expect_writable",
    "fail_argument",
    "label_pair",
    "three_numbers",
]

ANY = -1
ABSENT_LOGIT = np.float32(-1e20)  # a class that is not above this at a pixel is absent there
MAX_SIDE = 32767  # longest side of frames and of preprocess's results


def _text(shape: Sequence[int]) -> str:
    sizes = ["*" if size == ANY else str(size) for size in shape]
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"


def expect_array(name: str, array: Any, *dtypes: str) -> npt.NDArray[Any]:
    """Return ``array`` if it is a C-contiguous array of one of the dtypes; otherwise raise."""
    if not isinstance(array, np.ndarray):
        raise DTypeError(
            f"{name}: expected an array, got {type(array).__name__}. Pass a NumPy array or an "
            "object with __dlpack__ or __cuda_array_interface__."
        )
    if not array.flags.c_contiguous:
        raise ShapeError(
            f"{name}: expected a C-contiguous array, got strides {_text(array.strides)} in bytes. "
            "Copy it with numpy.ascontiguousarray."
        )
    if dtypes:
        expect_dtype(name, array, *dtypes)
    return array


def expect_rows(name: str, array: Any) -> npt.NDArray[Any]:
    """Return ``array`` if it is C-contiguous but for gaps between rows; otherwise raise."""
    if not (isinstance(array, np.ndarray) and array.ndim and array.size):
        return expect_array(name, array)
    row = array.nbytes // len(array)
    if not array[0].flags.c_contiguous or (len(array) > 1 and array.strides[0] < row):
        raise ShapeError(
            f"{name}: expected rows without gaps in them, got strides {_text(array.strides)} in "
            "bytes. Copy it with numpy.ascontiguousarray."
        )
    return array


def expect_dtype(name: str, array: npt.NDArray[Any], *dtypes: str) -> None:
    """Raise DTypeError unless the array's dtype is among those named."""
    if array.dtype.name not in dtypes:
        raise DTypeError(
            f"{name}: expected {' or '.join(dtypes)}, got {array.dtype.name}. Convert it first."
        )


def expect_shape(name: str, array: npt.NDArray[Any], pattern: Sequence[int]) -> None:
    """Raise ShapeError unless the sizes fit; :data:`ANY` fits every size."""
    fits = array.ndim == len(pattern) and all(
        wanted in (ANY, size) for wanted, size in zip(pattern, array.shape, strict=True)
    )
    if not fits:
        raise ShapeError(
            f"{name}: expected shape {_text(pattern)}, got {_text(array.shape)}. "
            "Check its sizes and the order of its axes."
        )


def expect_writable(name: str, array: Any) -> npt.NDArray[Any]:
    """Return ``array`` if it is one that can be written; otherwise raise."""
    out = expect_array(name, array)
    if not out.flags.writeable:
        raise ShapeError(f"{name}: expected a writable array, got a read-only one. Pass a copy.")
    return out


def expect_out(
    name: str, out: Any | None, shape: tuple[int, ...], dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """Return a new array, or the caller's if it can take a result of this shape and dtype."""
    if out is None:
        return np.empty(shape, dtype)
    array = expect_writable(name, out)
    expect_dtype(name, array, np.dtype(dtype).name)
    expect_shape(name, array, shape)
    return array


def label_pair(out: Any, with_scores: bool) -> dict[str, Any]:
    """The labels and scores of ``out``, each None if not given."""
    pair = out if isinstance(out, tuple) else (out, None)
    if len(pair) != 2:
        fail_argument("out", "labels or a pair of labels and scores", f"{len(pair)} arrays")
    if not with_scores and pair[1] is not None:
        fail_argument("out", "labels only, because with_scores is False", "labels and scores")
    return {"labels": pair[0], "scores": pair[1]}


def expect_label_outs(
    pair: dict[str, Any], shape: tuple[int, ...], dtype: npt.DTypeLike
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Labels and scores to write; scores that were not asked for are written and dropped."""
    labels = expect_out("labels", pair["labels"], shape, dtype)
    return labels, expect_out("scores", pair["scores"], shape, np.float32)


def expect_side_range(
    name: str,
    sides: tuple[int, int],
    shown: tuple[int, ...],
    remedy: str,
    *,
    longest: int = MAX_SIDE,
) -> None:
    """Raise ShapeError unless both sides are from 1 to ``longest``."""
    if not all(1 <= side <= longest for side in sides):
        raise ShapeError(
            f"{name}: expected sides from 1 to {longest}, got {tuple(shown)}. {remedy}"
        )


def expect_logits(name: str, array: Any, *dtypes: str) -> npt.NDArray[Any]:
    """Return ``array`` if it can be logits ``[B, C, h, w]`` of one of the dtypes; else raise."""
    logits = expect_array(name, expect_array(name, array), *dtypes)
    expect_shape(name, logits, (ANY, ANY, ANY, ANY))
    batch, classes, height, width = logits.shape
    shown = str(logits.shape)
    if not 1 <= classes <= 65534:
        raise ShapeError(
            f"{name}: expected from 1 to 65534 classes, got {shown}. Set the classes first."
        )
    expect_side_range(name, (height, width), logits.shape, "Check the order of its axes.")
    if batch > 65535:
        raise ShapeError(f"{name}: expected at most 65535 images, got {shown}. Split the batch.")
    return logits


def fail_argument(name: str, expected: str, got: str) -> NoReturn:
    """Raise ArgumentError."""
    raise ArgumentError(f"{name}: expected {expected}, got {got}. Pass a value in that range.")


def three_numbers(name: str, values: Sequence[float], expected: str, *, above: float) -> None:
    """Raise ArgumentError unless there are three finite numbers above a bound."""
    if len(values) != 3:
        fail_argument(name, expected, f"{len(values)} numbers")
    for value in values:
        if not (math.isfinite(value) and value > above):
            fail_argument(name, expected, f"{value:g}")
