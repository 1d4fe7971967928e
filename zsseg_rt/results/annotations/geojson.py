"""Polygons as a GeoJSON feature collection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import ArgumentError
from zsseg_rt.results.annotations.components import Component
from zsseg_rt.results.annotations.polygons import outline


def to_features(
    parts: Sequence[Component], *, transform: Sequence[float] | None, tolerance: float
) -> dict[str, Any]:
    """Return a feature per connected part."""
    matrix = None if transform is None else _matrix_of(transform)
    return {
        "type": "FeatureCollection",
        "features": [_feature(part, matrix, tolerance) for part in parts],
    }


def _feature(
    part: Component, matrix: npt.NDArray[np.float64] | None, tolerance: float
) -> dict[str, Any]:
    polygon = outline(part, tolerance=tolerance)
    rings = [_positions(ring, matrix) for ring in (polygon.exterior, *polygon.holes)]
    properties = {"name": part.name, "index": part.index, "area": part.area}
    if part.confidence is not None:
        properties["confidence"] = part.confidence
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": rings},
        "properties": properties,
    }


def _positions(
    ring: npt.NDArray[np.int32], matrix: npt.NDArray[np.float64] | None
) -> list[list[float]]:
    """A closed ring. GeoJSON wants outlines anticlockwise with y upwards, and holes clockwise.

    In pixels, whose y points down, outlines are so already; a transform that mirrors turns them.
    """
    closed: npt.NDArray[Any] = np.concatenate([ring, ring[:1]])
    if matrix is not None:
        mirrored = np.linalg.det(matrix[:, :2]) < 0
        closed = closed @ matrix[:, :2].T + matrix[:, 2]
        closed = closed[::-1] if mirrored else closed
    positions: list[list[float]] = closed.tolist()
    return positions


def _matrix_of(transform: Sequence[float]) -> npt.NDArray[np.float64]:
    """The transform as [2, 3]."""
    try:
        numbers = np.array(list(transform), np.float64)
    except (TypeError, ValueError):
        numbers = np.zeros(0)
    if numbers.shape == (9,) and numbers[6:].tolist() == [0.0, 0.0, 1.0]:
        numbers = numbers[:6]
    usable = numbers.shape == (6,) and bool(np.isfinite(numbers).all())
    if not usable or np.linalg.det(numbers.reshape(2, 3)[:, :2]) == 0:
        raise ArgumentError(
            "transform: expected six numbers (a, b, c, d, e, f) that can be undone, got "
            f"{transform!r}. rasterio's dataset.transform is one."
        )
    return numbers.reshape(2, 3)
