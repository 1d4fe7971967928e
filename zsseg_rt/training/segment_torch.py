"""Torch models as segmenters to evaluate: the official protocols, and the runtime's."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError, ShapeError
from zsseg_rt.models.dense_clip import DenseCLIP
from zsseg_rt.models.descriptor_model import DescriptorModel
from zsseg_rt.models.functional import preprocess, upsample_argmax
from zsseg_rt.models.sliding import slide_predict
from zsseg_rt.models.zegformer import ZegFormer
from zsseg_rt.training.class_phrases import join_synonyms, split_synonyms

__all__ = [
    "SlideSettings",
    "TorchSegmenter",
    "ZegFormerSegmenter",
    "default_windows",
    "hash_weights",
    "torch_segmenter",
]

Activation = Literal["none", "sigmoid", "softmax"]
PixelModel = DescriptorModel | DenseCLIP


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


# Source: ../specs of the training-free methods; each authors' default for most data sets.
_DENSE_WINDOWS = {
    "clearclip": SlideSettings(short_side=448, crop_size=448, stride=224),
    "naclip": SlideSettings(short_side=336, crop_size=224, stride=112),
    "sclip": SlideSettings(short_side=336, crop_size=224, stride=112),
}


def default_windows(model: PixelModel) -> SlideSettings:
    """The authors' sliding windows.

    ZegCLIP and CLIP-RC: the short side and the window are the native side, windows step by
    426 / 512 of it.
    """
    if isinstance(model, DescriptorModel):
        side = model.native_size_hw[0]
        return SlideSettings(short_side=side, crop_size=side, stride=side * 426 // 512)
    side = min(model.config.size_hw)
    whole = SlideSettings(short_side=side, crop_size=side, stride=side // 2)
    return _DENSE_WINDOWS.get(model.config.head, whole)


class TorchSegmenter:
    """Labels pictures with a model that scores pixels: ZegCLIP, CLIP-RC, dense CLIP.

    Protocol ``"whole"`` is the runtime's: the picture is resized to the model's input, mask logits
    are upsampled to the picture and activated, seen classes lowered, and the best taken; a
    bundle's engine differs from it by export and precision alone. Protocol ``"slide"`` is the
    official evaluation, :func:`zsseg_rt.models.slide_predict`.

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
        _check_evaluation_mode(model)
        phrases = _Phrases(class_names, seen_names)
        phrases.check_embeds("text_embeds", text_embeds)
        self.class_names = phrases.class_names
        self._phrases = phrases
        self._device = next(model.parameters()).device
        self._text_embeds = text_embeds.to(self._device, torch.float32)
        self._model = _with_seen_rows(model, phrases.seen_rows)
        self._windows = None if protocol == "whole" else windows or default_windows(model)

    @torch.inference_mode()
    def segment(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Label every pixel; see :class:`zsseg_rt.training.evaluation.Segmenter`."""
        labels = self._label_whole(image) if self._windows is None else self._slide(image)
        return self._phrases.to_classes(labels.cpu().numpy())

    def describe(self) -> dict[str, Any]:
        """Architecture, hash of the weights, protocol and device."""
        description = _describe_model(self._model, self._device)
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
        logits = model(planes[None], self._text_embeds).mask_logits
        labels, _ = upsample_argmax(
            logits,
            (image.shape[0], image.shape[1]),
            activation=rule.activation,
            seen=self._phrases.seen_mask(self._device) if rule.seen_bias else None,
            seen_bias=rule.seen_bias,
            unknown_below=rule.unknown_below,
        )
        return labels[0]

    def _slide(self, image: npt.NDArray[np.uint8]) -> Tensor:
        assert self._windows is not None
        threshold = _rule_of(self._model).unknown_below
        scores = slide_predict(
            self._model,
            image,
            self._text_embeds,
            **vars(self._windows),
            softmax=threshold is not None,
        )
        best = scores.max(dim=0)
        if threshold is None:
            return best.indices
        return best.indices.masked_fill(best.values < threshold, len(scores))


class ZegFormerSegmenter:
    """Labels pictures with ZegFormer as its official evaluation does: whole, short side 512.

    Args:
        model: The model, in evaluation mode; pictures go to its device. It is not changed.
        class_names: One phrase a class; commas separate synonyms, of which the best one counts.
        text_embeds: Embeddings of all phrases for the segment branch, ``[P, D]``, unit norm.
        region_embeds: The same for the CLIP branch; None if CLIP classifies no regions.
        seen_names: Names of the classes that training saw.
        short_side: Of the resized picture, in pixels.
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
        short_side: int = 512,
        long_side: int = 2048,
    ) -> None:
        _check_evaluation_mode(model)
        phrases = _Phrases(class_names, seen_names)
        phrases.check_embeds("text_embeds", text_embeds)
        if region_embeds is not None:
            phrases.check_embeds("region_embeds", region_embeds)
        self.class_names = phrases.class_names
        self._phrases = phrases
        self._device = next(model.parameters()).device
        self._text_embeds = text_embeds.to(self._device, torch.float32)
        self._region_embeds = None if region_embeds is None else region_embeds.to(self._text_embeds)
        self._model = _with_seen_rows(model, phrases.seen_rows)
        self._sides = short_side, long_side

    @torch.inference_mode()
    def segment(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Label every pixel; see :class:`zsseg_rt.training.evaluation.Segmenter`."""
        planes = torch.from_numpy(self._resize(image)).permute(2, 0, 1).to(self._device)
        out_hw = (image.shape[0], image.shape[1])
        output = self._model([planes], self._text_embeds, self._region_embeds, [out_hw])
        return self._phrases.to_classes(output.sem_seg[0].argmax(dim=0).cpu().numpy())

    def describe(self) -> dict[str, Any]:
        """Architecture, hash of the weights, protocol and device."""
        short_side, long_side = self._sides
        return _describe_model(self._model, self._device) | {
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
        model: ZegCLIP, CLIP-RC, dense CLIP or ZegFormer, in evaluation mode.
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
    if isinstance(model, (DescriptorModel, DenseCLIP)):
        return TorchSegmenter(
            model,
            class_names,
            text_embeds,
            seen_names=seen_names,
            protocol=protocol,
            windows=windows,
        )
    raise ArgumentError(
        f"model: expected ZegCLIP, CLIP-RC, dense CLIP or ZegFormer, got {type(model).__name__}. "
        "Export it to a bundle and evaluate that."
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
    return _Rule(
        size_hw=model.config.size_hw,
        activation=model.score_activation,
        seen_bias=model.seen_bias,
        unknown_below=model.config.unknown_below,
    )


class _Phrases:
    """Which phrases stand for which class, and which of them training saw."""

    def __init__(self, class_names: Sequence[str], seen_names: Collection[str]) -> None:
        classes = split_synonyms(class_names)
        self.class_names = join_synonyms(classes)
        self.phrases = [phrase for synonyms in classes for phrase in synonyms]
        self.seen_rows = tuple(i for i, name in enumerate(self.phrases) if name in seen_names)
        owners = [index for index, synonyms in enumerate(classes) for _ in synonyms]
        unknown = 255 if len(classes) <= 254 else 65535
        # One entry more: whatever lies beyond the phrases is unknown.
        self._table = np.array([*owners, unknown], np.uint8 if unknown == 255 else np.uint16)

    def check_embeds(self, name: str, embeds: Tensor) -> None:
        if embeds.ndim != 2 or len(embeds) != len(self.phrases):
            raise ShapeError(
                f"{name}: expected one row for each of {len(self.phrases)} phrases, got "
                f"{list(embeds.shape)}. Embed every synonym, class by class."
            )

    def seen_mask(self, device: torch.device) -> Tensor:
        mask = torch.zeros(len(self.phrases), dtype=torch.bool, device=device)
        mask[list(self.seen_rows)] = True
        return mask

    def to_classes(self, labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        classes: npt.NDArray[Any] = self._table[np.minimum(labels, len(self.phrases))]
        return classes


def _with_seen_rows(model: Any, rows: tuple[int, ...]) -> Any:
    """The same model and weights, with the seen classes of another vocabulary."""
    if not hasattr(model.config, "seen_classes"):
        return model
    twin = copy.copy(model)
    twin.config = replace(model.config, seen_classes=rows)
    return twin


def _describe_model(model: nn.Module, device: torch.device) -> dict[str, Any]:
    return {
        "kind": "torch",
        "architecture": getattr(model, "architecture", type(model).__name__.lower()),
        "sha256": hash_weights(model),
        "device": str(device),
        "precision": str(next(model.parameters()).dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of all tensors of the ``state_dict`` with their names, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ArgumentError(
            f"{name}: expected one of {', '.join(choices)}, got {value!r}. Choose one that this "
            "model knows."
        )


def _check_evaluation_mode(model: nn.Module) -> None:
    if model.training:
        raise ArgumentError(
            "model: expected evaluation mode, got training mode. Call model.eval() first."
        )
