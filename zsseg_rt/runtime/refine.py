"""Masks on a finer grid, along the edges of their frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from zsseg_rt import ops
from zsseg_rt.bundles.specs import HeadSpec
from zsseg_rt.common.arrays import reshaped
from zsseg_rt.runtime.families.base import Masks
from zsseg_rt.runtime.families.masks import ClassLogits
from zsseg_rt.runtime.workspace import Workspace

SCALE = 5
"""Points of the finer grid from a cell to the next; odd, so that one lies in a cell's middle."""

REACH = 0.2
"""How far apart colours in [0, 1] are, in all three channels together, that count as unlike."""


def finer_hw(grid_hw: Sequence[int], align: str) -> tuple[int, int]:
    """Rows and columns of the finer grid."""
    less = SCALE - 1 if align == "corners" else 0
    return grid_hw[0] * SCALE - less, grid_hw[1] * SCALE - less


def refined(masks: Masks, head: HeadSpec, workspace: Workspace) -> Masks:
    """Masks whose edges are those of the frame, which the buffer ``guide`` has.

    Args:
        masks: Logits of classes; other families were refused.
        head: Where the bundle's cells lie.
        workspace: Has the buffers and the stream.

    Returns:
        The same on the finer grid, valid until the next frame.
    """
    assert isinstance(masks, ClassLogits), "other families were refused"
    logits = masks.mask_logits
    size_hw = finer_hw(logits.shape[2:], head.align)
    guide = workspace.array("guide", (3, *size_hw), np.float32)
    finer = ops.bilateral_upsample(
        logits,
        reshaped(guide, (1, 3, *size_hw)),
        scale=SCALE,
        reach=REACH,
        align=head.align,
        out=workspace.array("refined", (1, logits.shape[1], *size_hw), np.float32),
        stream=workspace.stream,
    )
    return replace(masks, mask_logits=finer)
