"""Results as ``supervision.Detections``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.extras import needs_extra


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
