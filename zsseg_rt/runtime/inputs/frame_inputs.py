"""What networks and kernels take of a frame, in a lane's buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from zsseg_rt import ops
from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.common.arrays import Array, row_of
from zsseg_rt.runtime.inputs.nv12 import Nv12Frame
from zsseg_rt.runtime.workspace import Workspace

Frame = Array | Nv12Frame
"""uint8 [H, W, 3], or the same in two planes."""


class FrameInputs:
    """Puts frames on a lane's device and makes planes of them.

    Args:
        workspace: The lane's buffers.
        preprocess: How a frame becomes the encoder's input.
        head: Where the bundle's cells lie.
        channel_order: Of frames that are not in two planes.
        dtype: Of the encoder's input.
    """

    def __init__(
        self,
        workspace: Workspace,
        preprocess: PreprocessSpec,
        head: HeadSpec,
        *,
        channel_order: str,
        dtype: str,
    ) -> None:
        self._workspace, self._spec, self._head = workspace, preprocess, head
        self._order, self._dtype = channel_order, dtype

    def on_device(self, frame: Frame) -> Array | tuple[Array, Array]:
        """The frame, or its two planes, where the lane works."""
        upload = self._workspace.upload_frame
        if not isinstance(frame, Nv12Frame):
            return upload(frame) if isinstance(frame, np.ndarray) else frame
        if not isinstance(frame.luma, np.ndarray):
            return frame.luma, frame.chroma
        return upload(frame.luma, "luma"), upload(frame.chroma, "chroma")

    def image(self, frame: Frame, given: Any, *parts: Mapping[str, Any]) -> Array:
        """The encoder's input [B, 3, h, w]: the frame, ``given`` on the device, or parts of it."""
        spec, parts = self._spec, parts or ({},)
        shape = (len(parts), 3, *spec.size_hw)
        images = self._workspace.array("image", shape, self._dtype)
        is_nv12 = isinstance(frame, Nv12Frame)
        for number, part in enumerate(parts):
            ops.preprocess(
                given,
                size_hw=spec.size_hw,
                mean=spec.mean,
                std=spec.std,
                channel_order="rgb" if is_nv12 else self._order,
                colour_matrix=frame.colour_matrix if is_nv12 else "bt601",
                align=self._head.align,
                out=row_of(images, number),
                stream=self._workspace.stream,
                **part,
            )
        return images
