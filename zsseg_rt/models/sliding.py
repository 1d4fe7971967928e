"""Whole images through a fixed-size model: the official evaluation protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from zsseg_rt.errors import DTypeError, ShapeError


@dataclass(frozen=True, kw_only=True)
class SlideSettings:
    """A sliding-window protocol, in pixels.

    Attributes:
        short_side: Short side of the resized image.
        crop_size: Side of a window.
        stride: Step between windows.
    """

    short_side: int
    crop_size: int
    stride: int


class Prepared(Protocol):
    """A model that images are resized and normalised for."""

    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    def parameters(self) -> Iterator[Any]:
        """Its weights, which are on the device it runs on."""


class _Predictor(Prepared, Protocol):
    def predict(self, image: Tensor, text_embeds: Tensor) -> Tensor: ...


def prepare_image(
    rgb: NDArray[np.uint8],
    *,
    short_side: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    """Resize an image as mmseg does and normalise it.

    The short side becomes ``short_side`` exactly, the long side in proportion; bilinear on uint8.

    Shapes:
        rgb: uint8 ``[H, W, 3]``, RGB.
        mean: Mean of R, G, B, in ``[0, 1]``.
        std: Standard deviation of R, G, B, in ``[0, 1]``.

    Returns:
        float32 ``[1, 3, h, w]``.
    """
    check_picture(rgb)
    height, width = rgb.shape[:2]
    # The long side's target is computed before the factor: the order decides the last rounding.
    long_side = short_side * max(height, width) / min(height, width)
    factor = min(long_side / max(height, width), short_side / min(height, width))
    size_wh = (int(width * factor + 0.5), int(height * factor + 0.5))
    resized = cv2.resize(rgb, size_wh, interpolation=cv2.INTER_LINEAR)
    scaled = (resized.astype(np.float64) - 255 * np.array(mean)) / (255 * np.array(std))
    return torch.from_numpy(scaled.astype(np.float32).transpose(2, 0, 1)[None].copy())


def check_picture(rgb: NDArray[np.uint8]) -> None:
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
    """Average the scores of overlapping windows.

    Shapes:
        predict: Maps a window ``[B, 3, h, w]`` to scores ``[B, C, h, w]``.
        image: ``[B, 3, H, W]``.

    Returns:
        ``[B, C, H, W]``.
    """
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
    model: Prepared,
    predict: Callable[[Tensor], Tensor],
    rgb: NDArray[np.uint8],
    windows: SlideSettings,
) -> Tensor:
    """Resize and normalise an image for a model, and average its windows' scores.

    Shapes:
        predict: As for :func:`slide_scores`.
        rgb: uint8 ``[H, W, 3]``, RGB.

    Returns:
        ``[C, H, W]`` at the image's own size, bilinear.
    """
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
    model: _Predictor,
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
        model: A model with ``predict``, such as
            :class:`zsseg_rt.models.descriptor.zegclip.ZegCLIP`.
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
    given = {"short_side": short_side, "crop_size": crop_size, "stride": stride}
    windows = replace(usual, **{k: v for k, v in given.items() if v is not None})
    if own:
        scores: Tensor = own.slide_views(rgb, text_embeds, windows)
        return scores
    scores = score_windows(model, lambda window: model.predict(window, text_embeds), rgb, windows)
    return scores.softmax(dim=0) if softmax else scores


LONGEST_SIDE = 2048


def resize_picture(
    rgb: NDArray[np.uint8], short_side: int, long_side: int = LONGEST_SIDE
) -> NDArray[np.uint8]:
    """Resize antialiased, sides rounded half up, as detectron2's ``ResizeShortestEdge``.

    Shapes:
        rgb: uint8 ``[H, W, 3]``, RGB.
    """
    from PIL import Image

    scale = short_side / min(rgb.shape[:2])
    sides = [side * scale for side in rgb.shape[:2]]
    if max(sides) > long_side:
        scale = long_side / max(sides)
        sides = [side * scale for side in sides]
    height, width = (int(side + 0.5) for side in sides)
    return np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))


def check_pictures(images: Sequence[Tensor], out_hw: Sequence[tuple[int, int]]) -> None:
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
