"""Check what a caller feeds to a graph, in the same way for every backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from zsseg_rt.common.arrays import Array, TensorSpec
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError

AxisRanges = Mapping[str, tuple[int, int, int]]


def check_names(feeds: Mapping[str, Array], specs: Sequence[TensorSpec]) -> None:
    """Refuse missing and unknown inputs."""
    known = [spec.name for spec in specs]
    missing = [name for name in known if name not in feeds]
    unknown = [name for name in feeds if name not in known]
    if missing or unknown:
        problem = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
        raise ShapeError(f"feeds: expected {', '.join(known)}, got {problem}. Feed every input.")


def check_feed(
    spec: TensorSpec, dtype: str, shape: tuple[int, ...], ranges: AxisRanges | None
) -> None:
    """Refuse a feed of the wrong dtype or shape."""
    if dtype != spec.dtype:
        raise DTypeError(f"{spec.name}: expected {spec.dtype}, got {dtype}. Convert it first.")
    if len(shape) != len(spec.shape) or not all(
        _fits(axis, size, ranges) for axis, size in zip(spec.shape, shape, strict=True)
    ):
        raise ShapeError(
            f"{spec.name}: expected shape ({_describe(spec, ranges)}), got {shape}. "
            "Named axes take any size in their range."
        )


def check_tokens(feeds: Mapping[str, Array], token_rows: Mapping[str, int]) -> None:
    """Refuse integers that point beyond the table that they choose rows of."""
    for name, rows in token_rows.items():
        numbers = np.asarray(feeds[name])
        low, high = int(numbers.min(initial=0)), int(numbers.max(initial=0))
        if low < 0 or high >= rows:
            raise ArgumentError(
                f"{name}: expected integers from 0 to {rows - 1}, got {low if low < 0 else high}. "
                "Use the tokenizer that was exported with the graph."
            )


def _fits(axis: int | str, size: int, ranges: AxisRanges | None) -> bool:
    if isinstance(axis, int):
        return size == axis
    low, _, high = (ranges or {}).get(axis, (1, 1, size))
    return low <= size <= high


def _describe(spec: TensorSpec, ranges: AxisRanges | None) -> str:
    parts = []
    for axis in spec.shape:
        bounds = (ranges or {}).get(axis) if isinstance(axis, str) else None
        parts.append(f"{axis} in {bounds[0]}..{bounds[2]}" if bounds else str(axis))
    return ", ".join(parts)
