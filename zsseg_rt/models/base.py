"""The interface that every model implements, and whole images through a fixed-size model."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Self

from zsseg_rt import ops
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError


@dataclass(frozen=True, kw_only=True)
class SlideSettings:
    """A sliding-window protocol, in pixels."""

    short_side: int  # Short side of the resized image
    crop_size: int  # Side of a window
    stride: int  # Step between windows


def prepare_image(
    rgb: NDArray[np.uint8],
    *,
    short_side: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    """Resize an image as mmseg does, bilinear on uint8, and normalise it, float32 ``[1, 3, h, w]``.

    The short side becomes ``short_side`` exactly, the long side in proportion.
    """
    check_rgb(rgb)
    height, width = rgb.shape[:2]
    # The long side's target is computed before the factor: the order decides the last rounding.
    long_side = short_side * max(height, width) / min(height, width)
    factor = min(long_side / max(height, width), short_side / min(height, width))
    size_wh = (int(width * factor + 0.5), int(height * factor + 0.5))
    resized = cv2.resize(rgb, size_wh, interpolation=cv2.INTER_LINEAR)
    scaled = (resized.astype(np.float64) - 255 * np.array(mean)) / (255 * np.array(std))
    return torch.from_numpy(scaled.astype(np.float32).transpose(2, 0, 1)[None].copy())


def check_rgb(rgb: NDArray[np.uint8]) -> None:
    """Refuse anything but uint8 ``[H, W, 3]``."""
    if not isinstance(rgb, np.ndarray):
        raise DTypeError(
            f"rgb: expected a NumPy array, got {type(rgb).__module__}.{type(rgb).__qualname__}. "
            "Give uint8 [H, W, 3]."
        )
    if rgb.ndim != 3 or rgb.shape[2] != 3 or 0 in rgb.shape:
        raise ShapeError(f"rgb: expected [H, W, 3], got {list(rgb.shape)}. Convert it to RGB.")
    if rgb.dtype != np.uint8:
        raise DTypeError(f"rgb: expected uint8, got {rgb.dtype}. Give 8-bit pixels.")


def _starts(size: int, crop: int, stride: int) -> list[int]:
    """Window starts along one axis; the last is shifted back to end at the border."""
    count = max(size - crop + stride - 1, 0) // stride + 1
    return [max(min(index * stride, size - crop), 0) for index in range(count)]


def slide_scores(
    predict: Callable[[Tensor], Tensor], image: Tensor, *, crop_size: int, stride: int
) -> Tensor:
    """The mean scores ``[B, C, H, W]`` of overlapping windows of ``[B, 3, H, W]``."""
    height, width = image.shape[2:]
    totals, counts = None, image.new_zeros(1, 1, height, width)
    for top in _starts(height, crop_size, stride):
        for left in _starts(width, crop_size, stride):
            window = (..., slice(top, top + crop_size), slice(left, left + crop_size))
            scores = predict(image[window])
            if totals is None:
                totals = scores.new_zeros(*scores.shape[:2], height, width)
            totals[window] += scores
            counts[window] += 1
    assert totals is not None
    return totals / counts


def score_windows(
    model: Any,
    predict: Callable[[Tensor], Tensor],
    rgb: NDArray[np.uint8],
    windows: SlideSettings,
) -> Tensor:
    """The mean scores ``[C, H, W]`` of an image's windows, at its own size, bilinear."""
    short_side, crop_size, stride = windows.short_side, windows.crop_size, windows.stride
    if min(short_side, crop_size, stride) < 1 or stride > crop_size:
        raise ShapeError(
            f"stride: expected 1 <= stride <= crop_size and a positive short_side, got stride "
            f"{stride}, crop_size {crop_size}, short_side {short_side}. Windows must overlap or "
            "touch."
        )
    image = prepare_image(rgb, short_side=short_side, mean=model.image_mean, std=model.image_std)
    image = image.to(next(model.parameters()).device)
    scores = slide_scores(predict, image, crop_size=crop_size, stride=stride)
    return F.interpolate(scores, size=rgb.shape[:2], mode="bilinear", align_corners=False)[0]


@torch.no_grad()
def slide_predict(
    model: PixelModel,
    rgb: NDArray[np.uint8],
    text_embeds: Tensor,
    *,
    short_side: int | None = None,
    crop_size: int | None = None,
    stride: int | None = None,
    softmax: bool = True,
) -> Tensor:
    """Score every class at every pixel of a whole image, as the official evaluation does.

    Resize so that the short side is ``short_side``, normalise, average ``model.predict`` over
    sliding windows, resize the scores to the image, softmax over classes. CAT-Seg has five views
    of its own instead; see :meth:`zsseg_rt.models.cat_seg.model.CatSeg.slide_views`.

    Args:
        model: A model that compares patches with classes.
        rgb: uint8 ``[H, W, 3]``, RGB.
        text_embeds: Class embeddings, ``[C, D]``.
        short_side: Short side of the resized image, in pixels; None is 512, or CAT-Seg's own.
        crop_size: Side of a window, in pixels; None is 512.
        stride: Step between windows, in pixels; None is 426.
        softmax: Whether to end with the official softmax over scores; the argmax is the same
            without it.

    Returns:
        ``[C, H, W]`` at the image's own size; ``.argmax(0)`` gives labels.

    Raises:
        ShapeError: The image or the text embeddings have another shape, or a size is not
            positive.
        DTypeError: The image is not uint8.
    """
    own: Any = model if hasattr(model, "slide_views") else None
    usual = own.windows if own else SlideSettings(short_side=512, crop_size=512, stride=426)
    sizes = {"short_side": short_side, "crop_size": crop_size, "stride": stride}
    windows = replace(usual, **{k: v for k, v in sizes.items() if v is not None})
    if own:
        scores: Tensor = own.slide_views(rgb, text_embeds, windows)
        return scores
    scores = score_windows(model, lambda window: model.predict(window, text_embeds), rgb, windows)
    return scores.softmax(dim=0) if softmax else scores


LONGEST_SIDE = 2048


def resize_rgb(
    rgb: NDArray[np.uint8], short_side: int, long_side: int = LONGEST_SIDE
) -> NDArray[np.uint8]:
    """Resize antialiased, sides rounded half up, as detectron2's ``ResizeShortestEdge``."""
    from PIL import Image

    scale = short_side / min(rgb.shape[:2])
    sides = [side * scale for side in rgb.shape[:2]]
    if max(sides) > long_side:
        scale = long_side / max(sides)
        sides = [side * scale for side in sides]
    height, width = (int(side + 0.5) for side in sides)
    return np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))


def check_images(images: Sequence[Tensor], out_hw: Sequence[tuple[int, int]]) -> None:
    """Refuse images that are not uint8 ``[3, h, w]``, and sizes that do not match them."""
    if not len(images) or len(images) != len(out_hw):
        raise ShapeError(
            f"images: expected at least one image and an out_hw for each, got {len(images)} "
            f"images and {len(out_hw)} sizes. Give one (height, width) per image."
        )
    for index, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            raise ShapeError(
                f"images[{index}]: expected [3, h, w], got {list(image.shape)}. Give RGB planes."
            )
        if image.dtype != torch.uint8:
            raise DTypeError(
                f"images[{index}]: expected uint8, got {image.dtype}. "
                "Give the image in 0..255; the model normalises it."
            )
    for index, size in enumerate(out_hw):
        if len(size) != 2 or min(size) < 1:
            raise ShapeError(
                f"out_hw[{index}]: expected a height and width of at least 1 pixel, got "
                f"{list(size)}. Give the size of the score maps."
            )


ScoreActivation = Literal["sigmoid", "softmax"]


class SegmentationModel(nn.Module, ABC):
    """A model that labels pixels with classes given as text embeddings."""

    architecture: ClassVar[str]  # Its name in zsseg_rt.models.registry.ARCHITECTURES
    # Whether a class is one embedding, the mean of its synonyms'; otherwise the best of them counts
    averages_synonyms: ClassVar[bool] = False
    config: Any  # Everything that defines the model besides its weights
    text_space = ""  # Of a text tower that was trained with the model; empty: it has none

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

        Arguments and result as of :meth:`label`, for a model that has :attr:`windows`.

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

        ``rows`` are those of the text embeddings whose classes were seen in training;
        ``self_trained`` None leaves it unchanged. All but ``config`` is shared.
        """
        changes: dict[str, Any] = {"seen_classes": tuple(rows)}
        if self_trained is not None:
            changes["self_trained"] = self_trained
        names = {field.name for field in fields(self.config)}
        twin = copy.copy(self)
        twin.config = replace(self.config, **{k: v for k, v in changes.items() if k in names})
        return twin


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """How upsampled mask logits become labels."""

    activation: ScoreActivation  # What turns logits into scores
    seen_classes: tuple[int, ...] = ()  # Rows of the text embeddings whose scores are lowered
    seen_bias: float = 0.0  # How much they are lowered, as a probability
    # Score below which a pixel is unknown; None keeps every pixel
    unknown_below: float | None = None


@dataclass(frozen=True)
class SegmentationOutput:
    """The result of a forward pass."""

    mask_logits: Tensor  # Mask logits at the grid's resolution, [B, C, gh, gw]
    patch_embeds: Tensor  # Unit-norm patch embeddings, [B, D, gh, gw]
    cls_embed: Tensor  # Unit-norm image embeddings, [B, D]


class PixelModel(SegmentationModel):
    """A model that compares every patch with every class."""

    predicts_logits: ClassVar[bool] = False  # Whether predict() returns logits, not probabilities
    image_mean: tuple[float, float, float]  # Of R, G, B, in [0, 1]
    image_std: tuple[float, float, float]

    @property
    @abstractmethod
    def label_rule(self) -> LabelRule:
        """How the model's mask logits become labels at run time."""

    @abstractmethod
    def predict(self, image: Tensor, text_embeds: Tensor) -> Tensor:
        """Score every class at every pixel, as the official evaluation does, ``[B, C, H, W]``.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.
            text_embeds: Class embeddings, ``[C, D]``, unit norm.
        """

    def label(
        self, rgb: NDArray[np.uint8], text_embeds: Tensor, region_embeds: Tensor | None = None
    ) -> Tensor:
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
    """Lower the scores ``[B, C, H, W]`` of seen classes."""
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
