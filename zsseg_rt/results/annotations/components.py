"""Connected parts of a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.extras import import_opencv
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
