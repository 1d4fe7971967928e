"""Ranges of activations: several candidates per layer, the one with the smallest error is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from zsseg_rt.errors import ArgumentError
from zsseg_rt.export.quantized.layers import Group, weight_matrix, weights_of
from zsseg_rt.export.quantized.number_formats import NumberFormat

FloatArray = npt.NDArray[np.float32]

_MOST_ROWS, _ROWS_PER_RUN = 384, 24
_SMOOTHING = (0.0, 0.4, 0.55, 0.7)  # exponents of SmoothQuant; 0 leaves the norm alone
_PERCENTILES = (99.99, 99.9, 99.5)
_SHARES = (0.8, 0.65, 0.5)  # of the largest value, searched for the smallest squared error


@dataclass
class Seen:
    """What calibration saw of one tensor.

    Attributes:
        largest: float32 [K], the largest magnitude of each channel.
        rows: Seeded samples, float32 [R, K]; of convolutions [R, 1].
    """

    largest: FloatArray = field(default_factory=lambda: np.zeros(0, np.float32))
    rows: list[FloatArray] = field(default_factory=list)

    def add(self, values: npt.NDArray[Any], *, convolves: bool, rng: np.random.Generator) -> None:
        """Take in one run's values: [..., K], or [B, C, H, W] of a convolution."""
        flat = values.reshape(-1, 1 if convolves else values.shape[-1]).astype(np.float32)
        most = np.abs(flat).max(axis=0)
        self.largest = most if not self.largest.size else np.maximum(self.largest, most)
        if sum(len(rows) for rows in self.rows) < _MOST_ROWS * (64 if convolves else 1):
            count = min(len(flat), _ROWS_PER_RUN * (64 if convolves else 1))
            self.rows.append(flat[rng.choice(len(flat), count, replace=False)])

    @property
    def sample(self) -> FloatArray:
        """All samples."""
        return np.concatenate(self.rows)


@dataclass(frozen=True, kw_only=True)
class Range:
    """How one tensor is quantised.

    Attributes:
        scale: Of the values, after they were divided by ``smoothing``.
        smoothing: float32 [K] that the norm in front is divided by, and the weights' rows are
            multiplied by; None if nothing is folded.
        method: How it was found.
        error: Squared error of the layers' results relative to their squares.
    """

    scale: float
    smoothing: FloatArray | None
    method: str
    error: float


def choose_range(model: onnx.ModelProto, group: Group, seen: Seen, kind: NumberFormat) -> Range:
    """Try every clipping and smoothing on the samples; take the one with the smallest error.

    Raises:
        ArgumentError: The pictures gave numbers that float16, in which the rest is, cannot hold.
    """
    sample, most = seen.sample, float(np.finfo(np.float16).max)
    if not (seen.largest <= most).all():  # NaN too
        raise ArgumentError(
            f"photos: expected numbers up to {most:g} before {group.name}, got "
            f"{seen.largest.max():g}: all but the layers is in float16. Use float32 or bfloat16."
        )
    if group.convolves:
        return _best(sample, None, None, seen.largest, kind)
    weights = weights_of(model)
    matrix = np.concatenate([weight_matrix(model.graph.node[n], weights) for n in group.nodes], 1)
    tries = _SMOOTHING if group.norm is not None and kind.name == "int8" else (0.0,)
    found = [
        _best(sample, matrix, _smoothing(seen.largest, matrix, power), seen.largest, kind)
        for power in tries
    ]
    return min(found, key=lambda one: one.error)


def _smoothing(largest: FloatArray, matrix: FloatArray, power: float) -> FloatArray | None:
    if power == 0.0:
        return None
    columns = np.maximum(np.abs(matrix).max(axis=1), 1e-5)
    raw = np.maximum(largest, 1e-5) ** power / columns ** (1.0 - power)
    return np.asarray(np.clip(raw / np.exp(np.log(raw).mean()), 0.05, 20.0), np.float32)


def _best(
    sample: FloatArray,
    matrix: FloatArray | None,
    smoothing: FloatArray | None,
    largest: FloatArray,
    kind: NumberFormat,
) -> Range:
    """The best clipping for one smoothing; without a matrix the values' own error counts."""
    divided = sample if smoothing is None else sample / smoothing
    most = float((largest if smoothing is None else largest / smoothing).max())
    exact, rounded = sample, None
    if matrix is not None:
        exact = sample @ matrix
        scaled = matrix if smoothing is None else matrix * smoothing[:, None]
        rounded = kind.rounded(scaled, kind.scale(np.abs(scaled).max(axis=0)))
    power = float(np.square(exact, dtype=np.float64).sum()) or 1.0
    results = []
    for method, clip in _clips(divided, most).items():
        scale = float(kind.scale(clip))
        kept = kind.rounded(divided, scale)
        off = (kept if rounded is None else kept @ rounded) - exact
        results.append((float(np.square(off, dtype=np.float64).sum()) / power, method, scale))
    error, method, scale = min(results)
    folded = "" if smoothing is None else ", smoothed"
    return Range(scale=scale, smoothing=smoothing, method=method + folded, error=error)


def _clips(values: FloatArray, most: float) -> Mapping[str, float]:
    """Candidates for the largest magnitude that is kept, by how they were found."""
    levels = np.percentile(np.abs(values), _PERCENTILES)
    clips = {"max": most}
    clips |= {f"{p} %": float(v) for p, v in zip(_PERCENTILES, levels, strict=True) if v > 0}
    return clips | {f"mse {share}": most * share for share in _SHARES}
