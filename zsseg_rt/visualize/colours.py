"""Colours for labels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["palette"]


def palette(num_classes: int) -> npt.NDArray[np.uint8]:
    """Return distinct colours, uint8 RGB [num_classes, 3]; an index always has the same colour.

    Hues advance by the golden ratio, so that neighbours in the list are far apart in colour;
    value and saturation cycle so that long lists stay distinguishable.
    """
    index = np.arange(max(num_classes, 0))
    hue = (index * 0.61803398875 + 0.02) % 1.0
    saturation = np.array([0.80, 0.55, 0.95])[index % 3]
    value = np.array([0.95, 0.75, 0.60])[(index // 3) % 3]
    sector = hue[:, None] * 6.0 + np.array([5.0, 3.0, 1.0])
    ramp = np.clip(np.minimum(sector % 6.0, 4.0 - sector % 6.0), 0.0, 1.0)
    rgb = value[:, None] * (1.0 - saturation[:, None] * ramp)
    colours: npt.NDArray[np.uint8] = np.rint(rgb * 255.0).astype(np.uint8)
    return colours
