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
    """A connected part of a class: pixels that share edges.

    Attributes:
        name: The class.
        index: Its label.
        area: Pixels.
        box: Left, top, right and bottom in pixels; right and bottom are beyond the last pixel.
        centroid: Mean x and y of its pixels' centres.
        confidence: Mean score of its pixels, None without scores.
        mask: bool [bottom - top, right - left], true inside.
    """

    name: str
    index: int
    area: int
    box: tuple[int, int, int, int]
    centroid: tuple[float, float]
    confidence: float | None = None
    mask: npt.NDArray[np.bool_] = field(repr=False)

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
    """Find the connected parts of classes, largest first.

    Shapes:
        labels: Integers [H, W].
        scores: float32 [H, W], or None.
    """
    if min_area < 1:
        raise ArgumentError(f"min_area: expected at least 1 pixel, got {min_area}")
    cv2 = import_opencv("to find connected parts")
    found = []
    for index, name in classes:
        inside = (labels == index).view(np.uint8)
        count, parts, stats, centroids = cv2.connectedComponentsWithStats(inside, connectivity=4)
        for part in range(1, count):
            left, top, width, height, area = map(int, stats[part])
            if area < min_area:
                continue
            window = slice(top, top + height), slice(left, left + width)
            mask = parts[window] == part
            found.append(
                Component(
                    name=name,
                    index=index,
                    area=area,
                    box=(left, top, left + width, top + height),
                    centroid=(float(centroids[part][0]), float(centroids[part][1])),
                    confidence=None if scores is None else float(scores[window][mask].mean()),
                    mask=mask,
                )
            )
    return sorted(found, key=lambda one: -one.area)


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


def annotate_classes(
    labels: npt.NDArray[Any], classes: Sequence[tuple[int, str, int]], image_id: int | str
) -> list[dict[str, Any]]:
    """One annotation per class.

    Shapes:
        labels: Integers [H, W].
    """
    flat = labels.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    starts = np.concatenate([[0], edges]) if flat.size else np.zeros(0, np.int64)
    lengths = np.diff(np.concatenate([starts, [flat.size]]))
    owners = flat[starts]
    found = []
    for number, (index, name, pixels) in enumerate(classes, 1):
        counts = _alternate(owners == index, lengths)
        box = _box_of(labels == index)
        found.append(_annotation(number, image_id, (index, name, pixels), box, labels, counts))
    return found


def annotate_components(
    labels: npt.NDArray[Any], components: Sequence[Component], image_id: int | str
) -> list[dict[str, Any]]:
    """One annotation per connected part, with its score where there is one."""
    found = []
    for number, part in enumerate(components, 1):
        left, top, right, bottom = part.box
        flat = part.full_mask(labels.shape[:2]).T.reshape(-1)
        edges = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1])
        counts = _alternate(flat[edges], np.diff(np.concatenate([edges, [flat.size]])))
        box = [left, top, right - left, bottom - top]
        whose = part.index, part.name, part.area
        entry = _annotation(number, image_id, whose, box, labels, counts)
        found.append(entry if part.confidence is None else {**entry, "score": part.confidence})
    return found


def _annotation(
    number: int,
    image_id: int | str,
    whose: tuple[int, str, int],
    box: list[int],
    labels: npt.NDArray[Any],
    counts: list[int],
) -> dict[str, Any]:
    index, name, pixels = whose
    return {
        "id": number,
        "image_id": image_id,
        "category_id": index + 1,  # as COCO counts: importers take 0 for no class
        "category_name": name,
        "area": pixels,
        "bbox": box,
        "iscrowd": 0,
        "segmentation": {"size": list(labels.shape), "counts": counts},
    }


def _box_of(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Left, top, width and height of what is inside, which is not nothing."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]


def _alternate(inside: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int64]) -> list[int]:
    """Run lengths of alternating outside and inside, starting outside (perhaps with 0)."""
    counts = [0]
    state = False
    for is_inside, length in zip(inside.tolist(), lengths.tolist(), strict=True):
        if is_inside != state:
            counts.append(0)
            state = is_inside
        counts[-1] += length
    return counts


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


_VERSION = "5.4.1"  # of labelme, whose format this is


def to_shapes(
    parts: Sequence[Component],
    *,
    size_hw: tuple[int, int],
    image_path: str | Path,
    tolerance: float,
) -> dict[str, Any]:
    """Return the content of a labelme file.

    Its polygons have no holes, so the larger outline comes first: drawn in order, what lies in a
    hole covers it.
    """
    found = [(part, outline(part, tolerance=tolerance).exterior) for part in parts]
    found.sort(key=lambda pair: -ring_area(pair[1]))
    return {
        "version": _VERSION,
        "flags": {},
        "shapes": [_shape(part, ring) for part, ring in found],
        "imagePath": str(image_path),
        "imageData": None,
        "imageHeight": size_hw[0],
        "imageWidth": size_hw[1],
    }


def enclosed_parts(
    labels: npt.NDArray[Any], whose: tuple[int, str], *, min_area: int
) -> list[Component]:
    """The connected parts of a label that could lie in a hole: those away from every edge.

    Shapes:
        labels: Integers [H, W].
    """
    height, width = labels.shape
    edges = (0, 0, width, height)
    found = find_components(labels, [whose], min_area=min_area)
    return [p for p in found if all(s != e for s, e in zip(p.box, edges, strict=True))]


def _shape(part: Component, ring: npt.NDArray[np.int32]) -> dict[str, Any]:
    return {
        "label": part.name,
        "points": ring.astype(float).tolist(),
        "group_id": None,
        "description": "",
        "shape_type": "polygon",
        "flags": {},
        "mask": None,
    }


def detections(
    masks: Sequence[npt.NDArray[np.bool_]],
    classes: Sequence[tuple[int, str]],
    confidences: Sequence[float] | None,
) -> Any:
    """Return ``supervision.Detections`` with a box around each mask.

    Shapes:
        masks: bool [H, W] each.
    """
    with needs_extra("supervision", "for its detections"):
        import supervision
    if not masks:
        return supervision.Detections.empty()
    stacked = np.stack(masks)
    return supervision.Detections(
        xyxy=supervision.mask_to_xyxy(stacked),
        mask=stacked,
        class_id=np.array([index for index, _ in classes]),
        confidence=None if confidences is None else np.array(confidences, np.float32),
        data={"class_name": np.array([name for _, name in classes])},
    )
