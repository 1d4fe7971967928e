"""Random colour changes of a photo, on uint8 with clipping at every step."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from zsseg_rt.errors import ArgumentError

Picture = NDArray[np.uint8]

HUES = 180  # OpenCV stores a hue of 0..358 degrees as 0..179


@dataclass(frozen=True)
class ColourChange:
    """What happens to one image; None leaves that property alone.

    Attributes:
        brightness: Added to every value.
        contrast: Factor of every value.
        saturation: Factor of the saturation, 0..255.
        hue: Added to the hue, in steps of two degrees.
        contrast_first: Whether contrast changes before saturation and hue, or after them.
    """

    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: int | None = None
    contrast_first: bool = True

    def apply(self, image: Picture) -> Picture:
        """Change an RGB image uint8 ``[H, W, 3]``; the result may be the image itself.

        Values are computed in float32, clipped to 0..255 and truncated, once per property.
        Consecutive changes per value become one table; saturation and hue each go through HSV.
        """
        tables = [_linear_table(1.0, self.brightness)] if self.brightness is not None else []
        contrast = [_linear_table(self.contrast, 0.0)] if self.contrast is not None else []
        if self.contrast_first:
            tables += contrast
        image = _apply_tables(image, tables)
        if self.saturation is not None:
            image = _apply_to_hsv(image, 1, _linear_table(self.saturation, 0.0))
        if self.hue is not None:
            image = _apply_to_hsv(image, 0, _hue_table(self.hue))
        return image if self.contrast_first else _apply_tables(image, contrast)


@dataclass(frozen=True, kw_only=True)
class PhotometricDistortion:
    """Brightness, contrast, saturation and hue, each with some probability.

    Brightness first; then contrast, saturation, hue or, with even odds, saturation, hue, contrast.

    Attributes:
        brightness: Largest shift of the values, 0..255.
        contrast: Range of the factor.
        saturation: Range of the factor.
        hue: Largest shift of the hue, in steps of two degrees.
        probability: Probability that each property changes, 0..1.

    Source:
        Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016; the defaults are those of
        ZegCLIP, CLIP-RC and ZegFormer.
    """

    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18
    probability: float = 0.5

    def __post_init__(self) -> None:
        limits = {"brightness": 255, "hue": HUES // 2, "probability": 1}
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise ArgumentError(f"{name}: expected 0..{limit}, got {getattr(self, name)}.")
        for name, (low, high) in (("contrast", self.contrast), ("saturation", self.saturation)):
            if not 0 <= low <= high:
                raise ArgumentError(
                    f"{name}: expected factors (low, high) with 0 <= low <= high, "
                    f"got {(low, high)}."
                )

    def draw(self, rng: np.random.Generator) -> ColourChange:
        """Draw one change; always takes the same number of values from ``rng``."""
        changes = rng.random(4) < self.probability
        brightness = rng.uniform(-self.brightness, self.brightness)
        contrast = rng.uniform(*self.contrast)
        saturation = rng.uniform(*self.saturation)
        hue = int(rng.integers(-self.hue, self.hue, endpoint=True))
        return ColourChange(
            brightness=brightness if changes[0] else None,
            contrast=contrast if changes[1] else None,
            saturation=saturation if changes[2] else None,
            hue=hue if changes[3] else None,
            contrast_first=bool(rng.integers(2)),
        )

    def __call__(self, image: Picture, rng: np.random.Generator) -> Picture:
        """Draw a change and apply it to an RGB image uint8 ``[H, W, 3]``."""
        return self.draw(rng).apply(image)


def _linear_table(factor: float, shift: float) -> Picture:
    values = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(shift)
    table: Picture = np.clip(values, 0, 255).astype(np.uint8)
    return table


def _hue_table(shift: int) -> Picture:
    table: Picture = ((np.arange(256) + shift) % HUES).astype(np.uint8)
    return table


def _apply_tables(image: Picture, tables: list[Picture]) -> Picture:
    if not tables:
        return image
    table = tables[0]
    for following in tables[1:]:
        table = following[table]
    changed: Picture = cv2.LUT(image, table)
    return changed


def _apply_to_hsv(image: Picture, channel: int, table: Picture) -> Picture:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, channel), table), hsv, channel)
    changed: Picture = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return changed
