"""Connected parts of classes, their outlines, and the formats in which others take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.extras import import_opencv, needs_extra
from zsseg_rt.errors import ArgumentError


@dataclass(frozen=True, kw_only=True, eq=False)
class Component:
    """A connected part of a class: pixels that share edges."""

    name: str  # The class
    index: int  # Its label
    area: int  # Pixels
    box: tuple[int, int, int, int]  # Left, top, right, bottom in pixels; the last two are beyond it
    centroid: tuple[float, float]  # Mean x and y of its pixels' centres
    confidence: float | None = None  # Mean score of its pixels, None without scores
    mask: npt.NDArray[np.bool_] = field(repr=False)  # [bottom - top, right - left], true inside

    def full_mask(self, size_hw: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """The mask in a frame of that size, bool [H, W]."""
        whole = np.zeros(size_hw, np.bool_)
        left, top, right, bottom = self.box
        whole[top:bottom, left:right] = self.mask
        return whole


def find_components(
    labels: npt.NDArray[Any],
    classes: Sequence[tuple[int, str]],
    *,
    min_area: int = 1,
    scores: npt.NDArray[np.float32] | None = None,
) -> list[Component]:
    """Find the connected parts of classes in labels [H, W], largest first."""
    if min_area < 1:
        raise ArgumentError(f"min_area: expected at least 1 pixel, got {min_area}")
    cv2 = import_opencv("to find connected parts")
    components = []
    for index, name in classes:
        inside = (labels == index).view(np.uint8)
        count, parts, stats, _ = cv2.connectedComponentsWithStats(inside, connectivity=4)
        for part in range(1, count):
            left, top, width, height, area = map(int, stats[part])
            if area >= min_area:
                mask = parts[top : top + height, left : left + width] == part
                components.append(_component(index, name, mask, (left, top), scores))
    return sorted(components, key=lambda one: -one.area)


def whole_classes(
    labels: npt.NDArray[Any],
    classes: Sequence[tuple[int, str]],
    scores: npt.NDArray[np.float32] | None,
) -> list[Component]:
    """All pixels of each class as one part; classes must be there."""
    components = []
    for index, name in classes:
        inside = labels == index
        columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
        mask = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        corner = int(columns[0]), int(rows[0])
        components.append(_component(index, name, mask, corner, scores))
    return components


def _component(
    index: int,
    name: str,
    mask: npt.NDArray[np.bool_],
    corner: tuple[int, int],
    scores: npt.NDArray[np.float32] | None,
) -> Component:
    (left, top), (height, width) = corner, mask.shape
    right, bottom = left + width, top + height
    rows, columns = np.nonzero(mask)
    return Component(
        name=name,
        index=index,
        area=len(rows),
        box=(left, top, right, bottom),
        centroid=(left + float(columns.mean()), top + float(rows.mean())),
        confidence=None if scores is None else float(scores[top:bottom, left:right][mask].mean()),
        mask=mask,
    )


Ring = npt.NDArray[np.int32]

_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # right, down, left, up: x, y


@dataclass(frozen=True, kw_only=True, eq=False)
class Polygon:
    """The outline of a connected part of a class.

    Coordinates are x and y in pixels from the frame's top left corner, so the first pixel covers
    (0, 0) to (1, 1). Without a tolerance the outline runs along pixels' edges and encloses exactly
    the part's area.
    """

    name: str  # The class
    index: int  # Its label
    area: int  # Pixels of the part
    exterior: Ring = field(repr=False)  # int32 [N, 2], N >= 4; clockwise in the frame, not closed
    holes: tuple[Ring, ...] = field(default=(), repr=False)  # int32 [M, 2] each, anticlockwise


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
    """All outlines of a part; it lies to their right as they are walked."""
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
            left = (way - 1) % 4  # the other pixel where two touch by a corner only: then
            leaving = ways[end]  # no outline of a part that is connected by edges meets itself
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


def to_coco(
    parts: Sequence[Component],
    *,
    size_hw: tuple[int, int],
    image_id: int | str,
    with_scores: bool,
) -> list[dict[str, Any]]:
    """Return an annotation per part."""
    annotations = []
    for number, part in enumerate(parts, 1):
        left, top, right, bottom = part.box
        counts = _run_lengths(part.full_mask(size_hw))
        annotation: dict[str, Any] = {
            "id": number,
            "image_id": image_id,
            "category_id": part.index + 1,  # as COCO counts: importers take 0 for no class
            "category_name": part.name,
            "area": part.area,
            "bbox": [left, top, right - left, bottom - top],
            "iscrowd": 0,
            "segmentation": {"size": list(size_hw), "counts": counts},
        }
        if with_scores and part.confidence is not None:
            annotation["score"] = part.confidence
        annotations.append(annotation)
    return annotations


def _run_lengths(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Lengths of alternating runs outside and inside, column by column; the first may be 0."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths: list[int] = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *lengths] if flat[0] else lengths


def to_features(
    parts: Sequence[Component], *, transform: Sequence[float] | None, tolerance: float
) -> dict[str, Any]:
    """Return a GeoJSON feature per connected part."""
    matrix = None if transform is None else _matrix_of(transform)
    features = []
    for part in parts:
        polygon = outline(part, tolerance=tolerance)
        rings = [_positions(ring, matrix) for ring in (polygon.exterior, *polygon.holes)]
        properties: dict[str, Any] = {"name": part.name, "index": part.index, "area": part.area}
        if part.confidence is not None:
            properties["confidence"] = part.confidence
        geometry = {"type": "Polygon", "coordinates": rings}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return {"type": "FeatureCollection", "features": features}


def _positions(
    ring: npt.NDArray[np.int32], matrix: npt.NDArray[np.float64] | None
) -> list[list[float]]:
    """A closed ring as in GeoJSON: with y upwards, outlines anticlockwise and holes clockwise."""
    closed: npt.NDArray[Any] = np.concatenate([ring, ring[:1]])
    if matrix is not None:  # in pixels, whose y points down, outlines are so already
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


def to_shapes(
    parts: Sequence[Component],
    *,
    size_hw: tuple[int, int],
    image_path: str | Path,
    tolerance: float,
) -> dict[str, Any]:
    """Return the content of a labelme file: polygons without holes, the larger outline first."""
    outlines = [(part.name, outline(part, tolerance=tolerance).exterior) for part in parts]
    outlines.sort(key=lambda pair: -ring_area(pair[1]))
    others = {"group_id": None, "description": "", "shape_type": "polygon", "mask": None}
    return {
        "version": "5.4.1",  # of labelme, whose format this is
        "flags": {},
        "shapes": [
            {"label": name, "points": ring.astype(float).tolist(), "flags": {}, **others}
            for name, ring in outlines
        ],
        "imagePath": str(image_path),
        "imageData": None,
        "imageHeight": size_hw[0],
        "imageWidth": size_hw[1],
    }


def to_detections(
    parts: Sequence[Component], *, size_hw: tuple[int, int], with_scores: bool
) -> Any:
    """Return ``supervision.Detections`` with a mask and a box per part."""
    with needs_extra("supervision", "for its detections"):
        import supervision
    if not parts:
        return supervision.Detections.empty()
    masks = np.stack([part.full_mask(size_hw) for part in parts])
    confidences = np.array([part.confidence for part in parts], np.float32) if with_scores else None
    return supervision.Detections(
        xyxy=supervision.mask_to_xyxy(masks),
        mask=masks,
        class_id=np.array([part.index for part in parts]),
        confidence=confidences,
        data={"class_name": np.array([part.name for part in parts])},
    )
