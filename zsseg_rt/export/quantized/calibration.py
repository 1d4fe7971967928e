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
_PERCENTILES = (99.99, 99.9, 99.5)


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
        scale: Of the values.
        method: How it was found.
        error: Squared error of the layers' results relative to their squares.
    """

    scale: float
    method: str
    error: float


def choose_range(model: onnx.ModelProto, group: Group, seen: Seen, kind: NumberFormat) -> Range:
    """Try every clipping on the samples; take the one with the smallest error.

    Raises:
        ArgumentError: The pictures gave numbers that float16, in which the rest is, cannot hold.
    """
    sample, most = seen.sample, float(np.finfo(np.float16).max)
    if not (seen.largest <= most).all():  # NaN too
        raise ArgumentError(
            f"photos: expected numbers up to {most:g} before {group.name}, got "
            f"{seen.largest.max():g}: all but the layers is in float16. Use float32 or bfloat16."
        )
    exact, rounded = sample, None
    if not group.convolves:  # of these the values' own error counts
        weights = weights_of(model)
        layers = [weight_matrix(model.graph.node[place], weights) for place in group.nodes]
        matrix = np.concatenate(layers, 1)
        exact = sample @ matrix
        rounded = kind.rounded(matrix, kind.scale(np.abs(matrix).max(axis=0)))
    power = float(np.square(exact, dtype=np.float64).sum()) or 1.0
    results = []
    for method, clip in _clips(sample, float(seen.largest.max())).items():
        scale = float(kind.scale(clip))
        kept = kind.rounded(sample, scale)
        off = (kept if rounded is None else kept @ rounded) - exact
        results.append((float(np.square(off, dtype=np.float64).sum()) / power, method, scale))
    error, method, scale = min(results)
    return Range(scale=scale, method=method, error=error)


def _clips(values: FloatArray, most: float) -> Mapping[str, float]:
    """Candidates for the largest magnitude that is kept, by how they were found."""
    levels = np.percentile(np.abs(values), _PERCENTILES)
    clips = {"max": most}
    return clips | {f"{p} %": float(v) for p, v in zip(_PERCENTILES, levels, strict=True) if v > 0}
