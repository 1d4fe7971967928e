"""Torch models as segmenters to evaluate: the official protocols, and the runtime's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.dense_baseline import DenseBaseline
from zsseg_rt.models.dense_clip import DenseCLIP
from zsseg_rt.models.descriptor_model import DescriptorModel
from zsseg_rt.models.functional import preprocess, upsample_argmax
from zsseg_rt.models.sliding import slide_predict
from zsseg_rt.models.zegformer import ZegFormer
from zsseg_rt.models.zeroseg import ZeroSeg
from zsseg_rt.models.zeroseg_labels import segment_predict
from zsseg_rt.training.segment_zegformer import ZegFormerSegmenter
from zsseg_rt.training.torch_phrases import (
    Phrases,
    check_evaluation_mode,
    describe_model,
    with_seen_rows,
)

__all__ = ["SlideSettings", "TorchSegmenter", "default_windows", "torch_segmenter"]

Activation = Literal["none", "sigmoid", "softmax"]
PixelModel = DescriptorModel | DenseCLIP | ZeroSeg


@dataclass(frozen=True, kw_only=True)
class SlideSettings:
    """A sliding-window protocol, in pixels.

    Attributes:
        short_side: Of the resized picture.
        crop_size: Side of a window.
        stride: Step between windows.
    """

    short_side: int
    crop_size: int
    stride: int


# Each authors' default for most data sets; others take the whole picture officially.
_DENSE_WINDOWS = {
    "clearclip": SlideSettings(short_side=448, crop_size=448, stride=224),
    "naclip": SlideSettings(short_side=336, crop_size=224, stride=112),
    "sclip": SlideSettings(short_side=336, crop_size=224, stride=112),
}


def default_windows(model: PixelModel) -> SlideSettings:
    """The authors' sliding windows.

    ZegCLIP and CLIP-RC: the short side and the window are the native side, windows step by
    426 / 512 of it. ZeroSeg: GroupViT's, by half a window.
    """
    if isinstance(model, DescriptorModel):
        side = model.native_size_hw[0]
        return SlideSettings(short_side=side, crop_size=side, stride=side * 426 // 512)
    side = min(model.config.size_hw)
    whole = SlideSettings(short_side=side, crop_size=side, stride=side // 2)
    return whole if isinstance(model, ZeroSeg) else _DENSE_WINDOWS.get(model.config.head, whole)


class TorchSegmenter:
    """Labels pictures with a model that scores pixels: ZegCLIP, CLIP-RC, dense CLIP, ZeroSeg.

    Protocol ``"whole"`` is the runtime's: the picture is resized to the model's input, mask logits
    are upsampled to the picture and activated, seen classes lowered, and the best taken; a
    bundle's engine differs from it by export and precision alone. Protocol ``"slide"`` is the
    official evaluation, :func:`zsseg_rt.models.slide_predict` or, for ZeroSeg,
    :func:`zsseg_rt.models.zeroseg_labels.segment_predict`.

    Args:
        model: The model, in evaluation mode; pictures go to its device. It is not changed.
        class_names: One phrase a class; commas separate synonyms, of which the best one counts.
        text_embeds: Embeddings of all phrases in order, ``[P, D]``.
        seen_names: Names of the classes that training saw; their scores are lowered by the model's
            ``seen_bias``.
        protocol: ``"whole"`` or ``"slide"``.
        windows: Of ``"slide"``; the authors' if None.

    Attributes:
        class_names: As given.

    Raises:
        ArgumentError: The model is in training mode, or the protocol is unknown.
        ShapeError: There is not one embedding a phrase.
    """

    def __init__(
        self,
        model: PixelModel,
        class_names: Sequence[str],
        text_embeds: Tensor,
        *,
        seen_names: Collection[str] = (),
        protocol: str = "whole",
        windows: SlideSettings | None = None,
    ) -> None:
        _check_choice("protocol", protocol, ("whole", "slide"))
        check_evaluation_mode(model)
        phrases = Phrases(class_names, seen_names)
        phrases.check_embeds("text_embeds", text_embeds)
        self.class_names = phrases.class_names
        self._phrases = phrases
        self._device = next(model.parameters()).device
        self._text_embeds = text_embeds.to(self._device, torch.float32)
        self._model = with_seen_rows(model, phrases.seen_rows)
        self._windows = None if protocol == "whole" else windows or default_windows(model)

    @torch.inference_mode()
    def segment(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Label every pixel; see :class:`zsseg_rt.training.evaluation.Segmenter`."""
        windows = self._windows
        labels = self._label_whole(image) if windows is None else self._slide(image, windows)
        return self._phrases.to_classes(labels.cpu().numpy())

    def describe(self) -> dict[str, Any]:
        """Architecture, hash of the weights, protocol and device."""
        description = describe_model(self._model, self._device)
        description["protocol"] = "whole" if self._windows is None else "slide"
        if self._windows is not None:
            description["windows"] = vars(self._windows)
        description["size_hw"] = list(_rule_of(self._model).size_hw)
        return description

    def _label_whole(self, image: npt.NDArray[np.uint8]) -> Tensor:
        model, rule = self._model, _rule_of(self._model)
        planes = preprocess(
            torch.from_numpy(image).to(self._device),
            size_hw=rule.size_hw,
            mean=model.image_mean,
            std=model.image_std,
        )
        out_hw = (image.shape[0], image.shape[1])
        if isinstance(model, ZeroSeg):
            return model.segment(planes[None], self._text_embeds, out_hw)[0][0]
        labels, _ = upsample_argmax(
            model(planes[None], self._text_embeds).mask_logits,
            out_hw,
            activation=rule.activation,
            seen=self._phrases.seen_mask(self._device) if rule.seen_bias else None,
            seen_bias=rule.seen_bias,
            unknown_below=rule.unknown_below,
        )
        return labels[0]

    def _slide(self, image: npt.NDArray[np.uint8], windows: SlideSettings) -> Tensor:
        model, threshold = self._model, _rule_of(self._model).unknown_below
        if isinstance(model, ZeroSeg):
            scores = segment_predict(
                model, image, self._text_embeds, **vars(windows), background_threshold=threshold
            )
            return scores.argmax(dim=0) - int(threshold is not None)  # the background comes first
        # A threshold is a probability; the baseline's scores are that already.
        softmax = threshold is not None and not isinstance(model, DenseBaseline)
        scores = slide_predict(model, image, self._text_embeds, **vars(windows), softmax=softmax)
        best = scores.max(dim=0)
        if threshold is None:
            return best.indices
        return best.indices.masked_fill(best.values < threshold, len(scores))


def torch_segmenter(
    model: nn.Module,
    class_names: Sequence[str],
    text_embeds: Tensor,
    *,
    region_embeds: Tensor | None = None,
    seen_names: Collection[str] = (),
    protocol: str = "whole",
    windows: SlideSettings | None = None,
) -> TorchSegmenter | ZegFormerSegmenter:
    """Wrap any model that can be evaluated.

    Args:
        model: ZegCLIP, CLIP-RC, dense CLIP, ZeroSeg or ZegFormer, in evaluation mode.
        class_names: One phrase a class; commas separate synonyms.
        text_embeds: Embeddings of all phrases in order, ``[P, D]``.
        region_embeds: ZegFormer's second set.
        seen_names: Names of the classes that training saw.
        protocol: ``"whole"`` or ``"slide"``; ZegFormer knows ``"whole"`` only.
        windows: Of ``"slide"``; the authors' if None.

    Raises:
        ArgumentError: The model is of another kind, in training mode, or does not know the
            protocol.
        ShapeError: There is not one embedding a phrase.
    """
    if isinstance(model, ZegFormer):
        _check_choice("protocol", protocol, ("whole",))
        return ZegFormerSegmenter(
            model, class_names, text_embeds, region_embeds, seen_names=seen_names
        )
    if isinstance(model, (DescriptorModel, DenseCLIP, ZeroSeg)):
        return TorchSegmenter(
            model,
            class_names,
            text_embeds,
            seen_names=seen_names,
            protocol=protocol,
            windows=windows,
        )
    raise ArgumentError(
        f"model: expected ZegCLIP, CLIP-RC, dense CLIP, ZeroSeg or ZegFormer, got "
        f"{type(model).__name__}. Export it to a bundle and evaluate that."
    )


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """How a model's mask logits become labels at run time."""

    size_hw: tuple[int, int]
    activation: Activation
    seen_bias: float = 0.0
    unknown_below: float | None = None


def _rule_of(model: PixelModel) -> _Rule:
    if isinstance(model, DescriptorModel):
        bias = 0.0 if model.config.self_trained else model.config.seen_bias
        activation = model.config.score_activation
        return _Rule(size_hw=model.native_size_hw, activation=activation, seen_bias=bias)
    if isinstance(model, ZeroSeg):
        threshold = model.config.background_threshold
        return _Rule(size_hw=model.config.size_hw, activation="none", unknown_below=threshold)
    return _Rule(
        size_hw=model.config.size_hw,
        activation=model.score_activation,
        seen_bias=model.seen_bias,
        unknown_below=model.config.unknown_below,
    )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ArgumentError(
            f"{name}: expected one of {', '.join(choices)}, got {value!r}. Choose one that this "
            "model knows."
        )
