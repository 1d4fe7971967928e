"""Torch models as segmenters to evaluate: the official protocols, and the runtime's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.base import SegmentationModel
from zsseg_rt.models.registry import ARCHITECTURES
from zsseg_rt.models.sliding import SlideSettings
from zsseg_rt.training.segmenters.torch_phrases import (
    Phrases,
    check_evaluation_mode,
    describe_model,
)


class TorchSegmenter:
    """Labels images with any of our models.

    Protocol ``"whole"`` is :meth:`zsseg_rt.models.base.SegmentationModel.label`: for most models
    the runtime's method, from which a bundle's engine differs only by export and precision; for
    ZegFormer the official evaluation. Protocol ``"slide"`` is the official evaluation of the
    others, :meth:`zsseg_rt.models.base.SegmentationModel.slide`.

    Shapes:
        text_embeds: Embeddings of all phrases in order, ``[P, D]``, unit norm.

    Attributes:
        class_names: As given.
    """

    def __init__(
        self,
        model: SegmentationModel,
        class_names: Sequence[str],
        text_embeds: Tensor,
        *,
        region_embeds: Tensor | None = None,
        seen_names: Collection[str] = (),
        protocol: str = "whole",
        windows: SlideSettings | None = None,
    ) -> None:
        if getattr(model, "architecture", None) not in ARCHITECTURES:
            raise ArgumentError(
                f"model: expected one of {', '.join(ARCHITECTURES)}, got {type(model).__name__}. "
                "Export it to a bundle and evaluate that."
            )
        check_evaluation_mode(model)
        _check_protocol(protocol, ("whole", "slide") if model.windows else ("whole",))
        self._phrases = Phrases(class_names, seen_names, merged=model.averages_synonyms)
        self._device = next(model.parameters()).device
        self._text_embeds = self._rows("text_embeds", text_embeds)
        self._region_embeds = None
        if region_embeds is not None:
            self._region_embeds = self._rows("region_embeds", region_embeds)
        self._model = model.with_seen(self._phrases.seen_rows)
        self._windows = None if protocol == "whole" else windows or model.windows
        self.class_names = self._phrases.class_names

    @torch.inference_mode()
    def segment(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Label every pixel; see :class:`zsseg_rt.evaluation.evaluate.Segmenter`."""
        if self._windows is None:
            labels = self._model.label(image, self._text_embeds, self._region_embeds)
        else:
            labels = self._model.slide(image, self._text_embeds, self._windows)
        return self._phrases.to_classes(labels.cpu().numpy())

    def describe(self) -> dict[str, Any]:
        """Architecture, hash of the weights, protocol and device."""
        description = describe_model(self._model, self._device)
        description["protocol"] = "whole" if self._windows is None else "slide"
        if self._windows is not None:
            description["windows"] = vars(self._windows)
        return description | self._model.describe_input()

    def _rows(self, name: str, embeds: Tensor) -> Tensor:
        return self._phrases.rows(name, embeds.to(self._device, torch.float32))


def _check_protocol(protocol: str, known: Sequence[str]) -> None:
    if protocol not in known:
        raise ArgumentError(
            f"protocol: expected one of {', '.join(known)}, got {protocol!r}. Choose one that this "
            "model knows."
        )
