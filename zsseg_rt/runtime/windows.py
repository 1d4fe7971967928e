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
    of_window: Callable[[int], Masks],
    workspace: Workspace,
    clock: StageClock,
) -> ClassLogits:
    """The mean of all windows' logits on the whole frame's grid, valid until the next frame.

    Shapes:
        of_window: Gives the masks of the window of a number, valid until the next one's.
    """
    shares, merged = workspace.upload("window shares", plan.shares), None
    for number, place in enumerate(plan.places):
        masks = of_window(number)
        logits = masks.mask_logits
        merged = ops.merge_windows(
            logits,
            shares,
            [place],
            add=number > 0,
            out=workspace.array(
                "window logits", (1, logits.shape[1], *plan.shares.shape), np.float32
            ),
            stream=workspace.stream,
        )
        clock.mark("similarity")
    assert isinstance(masks, ClassLogits), "other families were refused"
    return replace(masks, mask_logits=merged, checked=False)
