"""Outlines of connected parts, exactly along the edges of their pixels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.extras import import_opencv
from zsseg_rt.errors import ArgumentError
from zsseg_rt.results.annotations.components import Component

Ring = npt.NDArray[np.int32]

_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # right, down, left, up: x, y


@dataclass(frozen=True, kw_only=True, eq=False)
class Polygon:
    """The outline of a connected part of a class.

    Coordinates are x and y in pixels from the frame's top left corner, so the first pixel covers
    (0, 0) to (1, 1). Without a tolerance the outline runs along pixels' edges and encloses exactly
    the part's area.

    Attributes:
        name: The class.
        index: Its label.
        area: Pixels of the part.
        exterior: int32 [N, 2], N >= 4; clockwise as seen in the frame, not closed.
        holes: int32 [M, 2] each, anticlockwise.
    """

    name: str
    index: int
    area: int
    exterior: Ring = field(repr=False)
    holes: tuple[Ring, ...] = field(default=(), repr=False)


def outline(component: Component, *, tolerance: float = 0.0) -> Polygon:
    """Trace the outline of a connected part."""
    if not tolerance >= 0:
        raise ArgumentError(f"tolerance: expected 0 or more pixels, got {tolerance}")
    offset = np.array(component.box[:2], np.int32)
    rings = [ring + offset for ring in _trace(component.mask)]
    if tolerance:
        rings = [_simplified(ring, tolerance) for ring in rings]
    outer = [ring for ring in rings if ring_area(ring) > 0]
    return Polygon(
        name=component.name,
        index=component.index,
        area=component.area,
        exterior=outer[0],
        holes=tuple(ring for ring in rings if ring_area(ring) < 0),
    )


def _trace(mask: npt.NDArray[np.bool_]) -> list[Ring]:
    """All outlines of a part; it lies to their right as they are walked.

    Where two of its pixels touch by a corner only, the outline goes on along the other pixel: in a
    part that is connected by edges, no outline then meets itself.
    """
    ways = _edges(mask)
    waiting = {(corner, way): None for corner, leaving in ways.items() for way in leaving}
    rings = []
    while waiting:
        begin = edge = next(iter(waiting))
        ring, before = [], -1
        while edge in waiting:
            del waiting[edge]
            corner, way = edge
            if way != before:
                ring.append(corner)
            end = corner[0] + _STEPS[way][0], corner[1] + _STEPS[way][1]
            left = (way - 1) % 4
            leaving = ways[end]
            edge, before = (end, left if left in leaving else leaving[0]), way
        if before == begin[1]:  # the walk began within a straight line
            ring.pop(0)
        rings.append(np.array(ring, np.int32))
    return rings


def _edges(mask: npt.NDArray[np.bool_]) -> dict[tuple[int, int], list[int]]:
    """For each corner, the ways in which an edge between inside and outside leaves it."""
    padded = np.pad(mask, 1)
    sides = (  # of pixels, clockwise, by where the outside is, and where each begins
        (padded[:-2, 1:-1], 0, 0), (padded[1:-1, 2:], 1, 0),
        (padded[2:, 1:-1], 1, 1), (padded[1:-1, :-2], 0, 1),
    )  # fmt: skip
    ways: dict[tuple[int, int], list[int]] = {}
    for way, (neighbour, right, down) in enumerate(sides):
        rows, columns = np.nonzero(mask & ~neighbour)
        for corner in zip((columns + right).tolist(), (rows + down).tolist(), strict=True):
            ways.setdefault(corner, []).append(way)
    return ways


def ring_area(ring: Ring) -> float:
    """Signed area: above 0 for outlines, below 0 for holes."""
    x, y = ring.astype(np.int64).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2


def _simplified(ring: Ring, tolerance: float) -> Ring:
    """A ring with fewer corners; as it is where none would be left of it."""
    cv2 = import_opencv("to simplify outlines")
    fewer: Ring = cv2.approxPolyDP(ring.reshape(-1, 1, 2), tolerance, True).reshape(-1, 2)
    return fewer if ring_area(fewer) * ring_area(ring) > 0 else ring
