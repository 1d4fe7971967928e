"""ZegFormer as a segmenter to evaluate."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zsseg_rt.models.zegformer import ZegFormer
from zsseg_rt.training.torch_phrases import (
    Phrases,
    check_evaluation_mode,
    describe_model,
    with_seen_rows,
)

__all__ = ["ZegFormerSegmenter"]


class ZegFormerSegmenter:
    """Labels pictures with ZegFormer as its official evaluation does: whole, in their own shape.

    A class's synonyms make one embedding, their mean. (Officially the mean over all prompts of all
    synonyms at once, which differs where there are several prompts: 3e-4 with eight. At run time
    the best synonym counts instead.)

    Args:
        model: The model, in evaluation mode; pictures go to its device. It is not changed.
        class_names: One phrase a class; commas separate synonyms.
        text_embeds: Embeddings of all phrases for the segment branch, ``[P, D]``, unit norm.
        region_embeds: The same for the CLIP branch; None if CLIP classifies no regions.
        seen_names: Names of the classes that training saw.
        short_side: Of the resized picture, in pixels; None is the model's ``image_size``.
        long_side: At most this, in pixels.

    Attributes:
        class_names: As given.

    Raises:
        ArgumentError: The model is in training mode.
        ShapeError: There is not one embedding a phrase.
    """

    def __init__(
        self,
        model: ZegFormer,
        class_names: Sequence[str],
        text_embeds: Tensor,
        region_embeds: Tensor | None = None,
        *,
        seen_names: Collection[str] = (),
        short_side: int | None = None,
        long_side: int = 2048,
    ) -> None:
        check_evaluation_mode(model)
        phrases = Phrases(class_names, seen_names)
        phrases.check_embeds("text_embeds", text_embeds)
        if region_embeds is not None:
            phrases.check_embeds("region_embeds", region_embeds)
        self.class_names = phrases.class_names
        self._device = next(model.parameters()).device
        self._text_embeds = phrases.class_embeds(text_embeds.to(self._device, torch.float32))
        self._region_embeds = None
        if region_embeds is not None:
            self._region_embeds = phrases.class_embeds(region_embeds.to(self._text_embeds))
        self._model = with_seen_rows(model, phrases.seen_classes)
        self._sides = short_side or model.config.image_size, long_side

    @torch.inference_mode()
    def segment(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Label every pixel; see :class:`zsseg_rt.training.evaluation.Segmenter`."""
        planes = torch.from_numpy(self._resize(image)).permute(2, 0, 1).to(self._device)
        out_hw = (image.shape[0], image.shape[1])
        output = self._model([planes], self._text_embeds, self._region_embeds, [out_hw])
        labels: npt.NDArray[Any] = output.sem_seg[0].argmax(dim=0).cpu().numpy()
        return labels.astype(np.uint8 if len(self.class_names) <= 254 else np.uint16)

    def describe(self) -> dict[str, Any]:
        """Architecture, hash of the weights, protocol and device."""
        short_side, long_side = self._sides
        return describe_model(self._model, self._device) | {
            "protocol": "whole",
            "short_side": short_side,
            "long_side": long_side,
        }

    def _resize(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resize antialiased, sides rounded half up, as detectron2's ``ResizeShortestEdge``."""
        from PIL import Image

        short_side, long_side = self._sides
        scale = short_side / min(image.shape[:2])
        sides = [side * scale for side in image.shape[:2]]
        if max(sides) > long_side:
            scale = long_side / max(sides)
            sides = [side * scale for side in sides]
        height, width = (int(side + 0.5) for side in sides)
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return np.array(resized)
