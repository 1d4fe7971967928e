"""COCO annotations in uncompressed run lengths, as pycocotools reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.results.annotations.components import Component


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
