"""Polygons as a file of labelme's, to be corrected by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.results.annotations.components import Component, find_components
from zsseg_rt.results.annotations.polygons import outline, ring_area

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
