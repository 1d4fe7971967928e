"""The interface that every model implements, so that no caller has to ask which model it is."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Self

from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, ShapeError
from zsseg_rt.models.sliding import SlideSettings, slide_predict

ScoreActivation = Literal["sigmoid", "softmax"]


class SegmentationModel(nn.Module, ABC):
    """A model that labels pixels with classes given as text embeddings.

    Attributes:
        architecture: Its name in :data:`zsseg_rt.models.registry.ARCHITECTURES`.
        averages_synonyms: Whether a class is one embedding, the mean of its synonyms'. Otherwise
            every synonym is compared and the best one counts.
        config: Everything that defines the model besides its weights.
    """

    architecture: ClassVar[str]
    averages_synonyms: ClassVar[bool] = False
    config: Any
    text_space = ""  # of a text tower that was trained with the model; empty: it has none

    @property
    @abstractmethod
    def size_hw(self) -> tuple[int, int]:
        """Height and width in pixels of the images that a bundle is built for."""

    @property
    def crop_hw(self) -> tuple[int, int] | None:
        """Size in pixels of the crops that the model is trained on; None if it takes any size."""
        return None

    @property
    def windows(self) -> SlideSettings | None:
        """The authors' sliding windows; None for a model that only takes whole images."""
        return None

    @property
    def region_templates(self) -> tuple[str, ...]:
        """Default prompts of a second text input, which classifies regions; empty without one."""
        return ()

    @abstractmethod
    def label(
        self, rgb: NDArray[np.uint8], text_embeds: Tensor, region_embeds: Tensor | None = None
    ) -> Tensor:
        """Label every pixel of a whole image.

        Args:
            rgb: uint8 ``[H, W, 3]``, RGB.
            text_embeds: One row per label, ``[P, D]``, unit norm, on the model's device.
            region_embeds: The rows of the second text input, for a model that has one.

        Returns:
            Rows of ``text_embeds``, ``[H, W]``; unknown pixels have -1, or P and above.
        """

    def slide(self, rgb: NDArray[np.uint8], text_embeds: Tensor, windows: SlideSettings) -> Tensor:
        """Label every pixel from sliding windows, as the official evaluation does.

        Args:
            rgb: uint8 ``[H, W, 3]``, RGB.
            text_embeds: One row per label, ``[P, D]``, unit norm, on the model's device.
            windows: The windows to use; only for a model that has :attr:`windows`.

        Returns:
            As :meth:`label`.

        Raises:
            ArgumentError: The model only takes whole images.
        """
        raise ArgumentError(
            f"windows: expected None for {self.architecture}, which only takes whole images, got "
            f"{windows}. Call label()."
        )

    def describe_input(self) -> dict[str, Any]:
        """The size that :meth:`label` resizes images to, as plain data."""
        return {"size_hw": list(self.size_hw)}

    def with_seen(self, rows: Sequence[int], *, self_trained: bool | None = None) -> Self:
        """The same weights with other seen classes, for architectures that have such a rule.

        Args:
            rows: Rows of the text embeddings whose classes were seen in training.
            self_trained: Whether the weights come from self-training; None leaves it unchanged.

        Returns:
            A model that shares everything but its ``config`` with this one.
        """
        changes: dict[str, Any] = {"seen_classes": tuple(rows)}
        if self_trained is not None:
            changes["self_trained"] = self_trained
        known = {field.name for field in fields(self.config)}
        twin = copy.copy(self)
        twin.config = replace(self.config, **{k: v for k, v in changes.items() if k in known})
        return twin


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """How upsampled mask logits become labels.

    Attributes:
        activation: What turns logits into scores.
        seen_classes: Rows of the text embeddings whose scores are lowered.
        seen_bias: How much they are lowered, as a probability.
        unknown_below: Score below which a pixel is unknown; None keeps every pixel.
    """

    activation: ScoreActivation
    seen_classes: tuple[int, ...] = ()
    seen_bias: float = 0.0
    unknown_below: float | None = None


@dataclass(frozen=True)
class SegmentationOutput:
    """What a forward pass returns.

    Attributes:
        mask_logits: Mask logits at the grid's resolution, ``[B, C, gh, gw]``.
        patch_embeds: Unit-norm patch embeddings, ``[B, D, gh, gw]``.
        cls_embed: Unit-norm image embeddings, ``[B, D]``.
    """

    mask_logits: Tensor
    patch_embeds: Tensor
    cls_embed: Tensor


class PixelModel(SegmentationModel):
    """A model that compares every patch with every class.

    Attributes:
        image_mean: Mean of R, G, B, in ``[0, 1]``.
        image_std: Standard deviation of R, G, B, in ``[0, 1]``.
        predicts_logits: Whether :meth:`predict` returns logits, not probabilities.
    """

    predicts_logits: ClassVar[bool] = False
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    @property
    @abstractmethod
    def label_rule(self) -> LabelRule:
        """How the model's mask logits become labels at run time."""

    @abstractmethod
    def predict(self, image: Tensor, text_embeds: Tensor) -> Tensor:
        """Score every class at every pixel, as the official evaluation does.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.
            text_embeds: Class embeddings, ``[C, D]``, unit norm.

        Returns:
            ``[B, C, H, W]``.
        """

    def label(
        self, rgb: NDArray[np.uint8], text_embeds: Tensor, region_embeds: Tensor | None = None
    ) -> Tensor:
        """Label every pixel as the runtime does; see :meth:`SegmentationModel.label`."""
        rule = self.label_rule
        logits = self(input_image(self, rgb, text_embeds.device), text_embeds).mask_logits
        seen = np.zeros(len(text_embeds), bool)
        seen[list(rule.seen_classes)] = True
        labels, _ = ops.upsample_argmax(
            logits.detach().float().cpu().numpy(),
            (rgb.shape[0], rgb.shape[1]),
            activation=rule.activation,
            seen=seen if rule.seen_bias else None,
            seen_bias=rule.seen_bias,
            unknown_below=rule.unknown_below,
        )
        return torch.from_numpy(np.asarray(labels[0], np.int64))

    def slide(self, rgb: NDArray[np.uint8], text_embeds: Tensor, windows: SlideSettings) -> Tensor:
        """Label by :func:`zsseg_rt.models.slide_predict`; see :meth:`SegmentationModel.slide`."""
        threshold = self.label_rule.unknown_below
        softmax = threshold is not None and self.predicts_logits  # a threshold is a probability
        scores = slide_predict(self, rgb, text_embeds, **vars(windows), softmax=softmax)
        best = scores.max(dim=0)
        if threshold is None:
            return best.indices
        return best.indices.masked_fill(best.values < threshold, len(scores))


def input_image(model: Any, rgb: NDArray[np.uint8], device: torch.device) -> Tensor:
    """An image as a model gets it at run time: stretched and normalised, ``[1, 3, h, w]``."""
    rule = {"size_hw": model.size_hw, "mean": model.image_mean, "std": model.image_std}
    planes = ops.preprocess(np.ascontiguousarray(rgb), **rule)
    return torch.from_numpy(np.asarray(planes))[None].to(device)


def lower_seen(scores: Tensor, seen_classes: Sequence[int], bias: float) -> Tensor:
    """Lower the scores of seen classes.

    Shapes:
        scores: ``[B, C, H, W]``.

    Returns:
        ``[B, C, H, W]``.
    """
    check_seen(seen_classes, scores.shape[1])
    shift = scores.new_zeros(scores.shape[1], 1, 1)
    shift[list(seen_classes)] = bias
    return scores - shift


def check_seen(seen_classes: Sequence[int], num_classes: int, name: str = "text_embeds") -> None:
    """Refuse seen classes that are not rows of the class embeddings called ``name``."""
    if seen_classes and not 0 <= min(seen_classes) <= max(seen_classes) < num_classes:
        raise ShapeError(
            f"seen_classes: expected indices from 0 to {num_classes - 1}, the rows of {name}, got "
            f"{min(seen_classes)} to {max(seen_classes)}. Give the model the seen classes of this "
            "vocabulary."
        )
