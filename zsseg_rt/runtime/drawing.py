"""Labels' colours on frames that are on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from zsseg_rt import ops
from zsseg_rt.common.arrays import Array
from zsseg_rt.results.visualize import palette
from zsseg_rt.runtime.families.base import Painting
from zsseg_rt.runtime.inputs.frame_inputs import Frame
from zsseg_rt.runtime.inputs.nv12 import Nv12Frame
from zsseg_rt.runtime.workspace import Workspace


class Drawer:
    """Draws on a lane's stream; pictures are in the configured channel order."""

    def __init__(self, workspace: Workspace, channel_order: str) -> None:
        self._workspace, self._order = workspace, channel_order

    def painting(self, frame: Array, names: tuple[str, ...], alpha: float) -> Painting:
        """For masks that draw as they label: from and into buffers that captures may hold.

        Shapes:
            frame: uint8 [H, W, 3].
        """
        workspace, shape = self._workspace, (int(frame.shape[0]), int(frame.shape[1]), 3)
        given: Any = workspace.array("painted frame", shape, np.uint8)
        given.copy_from(frame, stream=workspace.stream)
        return Painting(
            frame=given,
            palette=self._palette(names),
            picture=workspace.array("picture", shape, np.uint8),
            alpha=alpha,
        )

    def draw(self, frame: Frame, labels: Array, names: tuple[str, ...], alpha: float) -> Array:
        """Draw in a launch of its own: on planes, or where masks did not draw.

        Returns:
            uint8 [H, W, 3], the caller's, whole after a wait.
        """
        height, width, _ = frame.shape
        is_nv12 = isinstance(frame, Nv12Frame)
        return ops.overlay(
            (frame.luma, frame.chroma) if is_nv12 else frame,
            labels,
            self._palette(names),
            alpha=alpha,
            channel_order=self._order,
            colour_matrix=frame.colour_matrix if is_nv12 else "bt601",
            out=self._workspace.new_array((int(height), int(width), 3), np.uint8),
            stream=self._workspace.stream,
        )

    def _palette(self, names: tuple[str, ...]) -> Array:
        return self._workspace.upload("palette", palette(names, self._order))
