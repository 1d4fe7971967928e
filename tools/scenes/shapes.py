"""Shapes of things as sprites: silhouette, surface normals and pattern coordinates.

Sprites are drawn once on a grid from -1 to 1, x to the right and y down; normals point to the
viewer with positive z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 96
_FINE = 4  # how much finer the silhouette is drawn, for smooth edges

Floats = NDArray[np.float32]
_Points = Sequence[tuple[float, float]]
_Drawn = tuple[Floats, NDArray[np.floating[Any]], NDArray[np.floating[Any]]]


@dataclass(frozen=True)
class Sprite:
    """One shape.

    Attributes:
        surface: float32 ``[SIDE, SIDE, 4]``: opacity, then the unit normal (x, y, z).
        pattern: float32 ``[SIDE, SIDE, 2]``: the surface's position in its pattern, in the
            sprite's units.
        base: y of the point it stands on.
        upright: Whether it stands; others may be rotated freely.
    """

    surface: Floats
    pattern: Floats
    base: float
    upright: bool


@lru_cache(maxsize=16)
def sprite(shape: str) -> Sprite:
    """The sprite of a shape."""
    draw, base, upright = _SHAPES[shape]
    opacity, normals, pattern = draw()
    normals = normals / np.linalg.norm(normals, axis=2, keepdims=True)
    surface = np.ascontiguousarray(np.dstack([opacity, normals]), np.float32)
    return Sprite(surface, np.ascontiguousarray(pattern, np.float32), base, upright)


def _grid(side: int = SIDE) -> tuple[Floats, Floats]:
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32)
    return (columns + 0.5) / side * 2 - 1, (rows + 0.5) / side * 2 - 1


def _smooth(inside: Callable[[Floats, Floats], NDArray[np.bool_]]) -> Floats:
    fine = inside(*_grid(SIDE * _FINE)).astype(np.float32)
    opacity: Floats = cv2.resize(fine, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return opacity


def _polygon(points: _Points, side: int) -> Floats:
    corners = np.round((np.array(points) + 1) / 2 * side - 0.5).astype(np.int32)
    filled: Floats = cv2.fillPoly(np.zeros((side, side), np.float32), [corners], 1.0)
    return filled


def _polygons(*polygons: _Points) -> Floats:
    fine = np.max([_polygon(points, SIDE * _FINE) for points in polygons], axis=0)
    opacity: Floats = cv2.resize(fine, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return opacity


def _ball() -> _Drawn:
    x, y = _grid()
    radius = 0.94
    squared = np.clip((x**2 + y**2) / radius**2, 0, 0.98)
    z = np.sqrt(1 - squared)
    normals = np.dstack([x / radius, y / radius, z])
    pattern = np.dstack([np.arctan2(x / radius, z), np.arcsin(np.clip(y / radius, -0.98, 0.98))])
    return _smooth(lambda x, y: x**2 + y**2 < radius**2), normals, pattern


def _box() -> _Drawn:
    x, y = _grid()
    left, right, top, bottom = -0.86, 0.42, -0.42, 0.86
    dx, dy = 0.40, -0.36
    lid = [(left, top), (right, top), (right + dx, top + dy), (left + dx, top + dy)]
    flank = [(right, top), (right, bottom), (right + dx, bottom + dy), (right + dx, top + dy)]
    front = [(left, top), (right, top), (right, bottom), (left, bottom)]
    normals = np.tile(np.array([-0.2, 0, 1], np.float32), (SIDE, SIDE, 1))
    pattern = np.dstack([x, y])
    depth = (top - y) / -dy
    on_lid, on_flank = _polygon(lid, SIDE) > 0, _polygon(flank, SIDE) > 0
    normals[on_lid] = (0, -1, 0.25)
    pattern[on_lid] = np.dstack([x - dx * depth, -0.8 * depth + top])[on_lid]
    normals[on_flank] = (1, 0, 0.25)
    depth = (x - right) / dx
    pattern[on_flank] = np.dstack([right + 0.8 * depth, y - dy * depth])[on_flank]
    return _polygons(lid, flank, front), normals, pattern


def _cone() -> _Drawn:
    x, y = _grid()
    apex, base, width, sag = -0.94, 0.70, 0.80, 0.22
    half = np.clip((y - apex) / (base - apex), 0.03, 1) * width
    across = np.clip(x / half, -0.98, 0.98)
    normals = np.dstack([across, np.full_like(x, -0.35), np.sqrt(1 - across**2)])
    pattern = np.dstack([np.arcsin(across) * half, y])

    def inside(x: Floats, y: Floats) -> NDArray[np.bool_]:
        half = (y - apex) / (base - apex) * width
        foot = (x / width) ** 2 + ((y - base) / sag) ** 2 < 1
        result: NDArray[np.bool_] = ((np.abs(x) < half) & (y > apex) & (y < base)) | foot
        return result

    return _smooth(inside), normals, pattern


def _cylinder() -> _Drawn:
    x, y = _grid()
    width, sag, top, bottom = 0.60, 0.20, -0.70, 0.70
    across = np.clip(x / width, -0.98, 0.98)
    normals = np.dstack([across, np.zeros_like(x), np.sqrt(1 - across**2)])
    pattern = np.dstack([np.arcsin(across) * width, y])
    on_lid = (x / width) ** 2 + ((y - top) / sag) ** 2 < 1
    normals[on_lid] = (0, -1, 0.3)
    pattern[on_lid] = np.dstack([x, (y - top) * 3 + top])[on_lid]

    def inside(x: Floats, y: Floats) -> NDArray[np.bool_]:
        caps = [(x / width) ** 2 + ((y - end) / sag) ** 2 < 1 for end in (top, bottom)]
        result: NDArray[np.bool_] = ((np.abs(x) < width) & (y > top) & (y < bottom)) | caps[0]
        return result | caps[1]

    return _smooth(inside), normals, pattern


def _star() -> _Drawn:
    x, y = _grid()
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2 == 0, 0.96, 0.46)
    points = [
        (float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)
    ]
    inside = (_polygon(points, SIDE) > 0).astype(np.uint8)
    height = cv2.distanceTransform(inside, cv2.DIST_L2, 5)
    height = cv2.GaussianBlur(np.minimum(height, 9.0), (0, 0), 1.5)
    slope_y, slope_x = np.gradient(height)
    normals = np.dstack([-slope_x, -slope_y, np.full_like(slope_x, 0.9)])
    return _polygons(points), normals, np.dstack([x, y])


def _ring() -> _Drawn:
    x, y = _grid()
    middle, thick = 0.63, 0.31
    radius = np.hypot(x, y) + 1e-6
    across = np.clip((radius - middle) / thick, -0.98, 0.98)
    normals = np.dstack([x / radius * across, y / radius * across, np.sqrt(1 - across**2)])
    pattern = np.dstack([np.arctan2(y, x) * middle, across * thick * 1.3])
    opacity = _smooth(lambda x, y: np.abs(np.hypot(x, y) - middle) < thick)
    return opacity, normals, pattern


_SHAPES: dict[str, tuple[Callable[[], _Drawn], float, bool]] = {
    "ball": (_ball, 0.94, False),
    "box": (_box, 0.80, True),
    "cone": (_cone, 0.84, True),
    "cylinder": (_cylinder, 0.84, True),
    "ring": (_ring, 0.94, False),
    "star": (_star, 0.90, False),
}
