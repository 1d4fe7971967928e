"""The masks of a frame from those of its windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from zsseg_rt import ops
from zsseg_rt.runtime.clock import StageClock
from zsseg_rt.runtime.families.base import Masks
from zsseg_rt.runtime.families.masks import ClassLogits
from zsseg_rt.runtime.inputs.window_plan import WindowPlan
from zsseg_rt.runtime.workspace import Workspace


def merge(
    plan: WindowPlan,
    of_windows: Callable[[slice], Masks],
    workspace: Workspace,
    clock: StageClock,
    *,
    at_once: int = 1,
) -> ClassLogits:
    """The mean of all windows' logits on the whole frame's grid, valid until the next frame.

    Args:
        plan: Where the windows lie.
        of_windows: Gives the masks of some windows, valid until the next ones'.
        workspace: The lane's buffers.
        clock: The lane's.
        at_once: How many windows it is asked for.
    """
    shares = workspace.upload("window shares", plan.shares)
    for first in range(0, len(plan.places), at_once):
        part = slice(first, first + at_once)
        masks = of_windows(part)
        count = masks.mask_logits.shape[1]
        merged = ops.merge_windows(
            masks.mask_logits,
            shares,
            plan.places[part],
            add=first > 0,
            out=workspace.array("window logits", (1, count, *plan.shares.shape), np.float32),
            stream=workspace.stream,
        )
        clock.mark("similarity")
    assert isinstance(masks, ClassLogits), "other families were refused"
    return replace(masks, mask_logits=merged, checked=False)
