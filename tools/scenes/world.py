"""Scenes by number: image, labels, captions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tools.scenes.captions import Seen, describe_one, describe_scene
from tools.scenes.drawing import draw
from tools.scenes.layout import plan_scene
from tools.scenes.words import CLASS_NAMES, Kind
from zsseg_rt.errors import ArgumentError
from zsseg_rt.evaluation.datasets.base import ignore_label

WORLD_VERSION = 1  # changes whenever the same seed and index give another image
IGNORE = ignore_label(len(CLASS_NAMES))
_VISIBLE = 60  # pixels; captions mention nothing smaller


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        image: RGB, uint8 ``[H, W, 3]``.
        labels: Indices into the world's class names, uint8 ``[H, W]``; 255 where there is no class.
        identities: What each pixel belongs to, uint8 ``[H, W]``: index into ``kinds``, or 255.
        kinds: What the scene is made of: stuff, then things.
        captions: Several phrases about the scene.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    identities: NDArray[np.uint8]
    kinds: tuple[Kind, ...]
    captions: tuple[str, ...]


class World:
    """Endless scenes; each depends on seed and index alone.

    Example:
        >>> scene = World(seed=1).scene(5)
        >>> scene.image.shape, scene.labels.dtype
        ((128, 128, 3), dtype('uint8'))
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        size: int | tuple[int, int] = 128,
        class_share: float = 0.85,
        class_names: tuple[str, ...] = CLASS_NAMES,
        zoom: int = 1,
        common: tuple[str, ...] = CLASS_NAMES,
    ) -> None:
        self.seed, self.common = seed, common
        self.size_hw = (size, size) if isinstance(size, int) else size
        self.class_share, self.zoom = class_share, zoom
        self.class_names = class_names
        if seed < 0:
            raise ArgumentError(f"seed: expected >= 0, got {seed}. Choose another.")
        if min(self.size_hw) < 64:
            raise ArgumentError(
                f"size: expected at least 64 pixels, got {self.size_hw}. Things are up to 80 large."
            )
        if not 0 <= class_share <= 1:
            raise ArgumentError(
                f"class_share: expected a probability, got {class_share}. Choose from [0, 1]."
            )
        if zoom < 1:
            raise ArgumentError(f"zoom: expected at least 1, got {zoom}. Choose a whole number.")

    def scene(self, index: int, *, num_captions: int = 4) -> Scene:
        """Draw a scene."""
        rng = np.random.default_rng([WORLD_VERSION, self.seed, index])
        plan = plan_scene(rng, self.size_hw, self.class_share, self.common)
        plan = plan.magnified(self.zoom)
        drawing = draw(plan, rng)
        kinds = tuple([part.kind for part in plan.stretches] + [part.kind for part in plan.things])
        seen = visible(drawing.identities, kinds) if num_captions else ()
        return Scene(
            image=drawing.image,
            labels=label_table(kinds, self.class_names)[drawing.identities],
            identities=drawing.identities,
            kinds=kinds,
            captions=_captions(seen, rng, num_captions),
        )


def visible(
    identities: NDArray[np.uint8], kinds: tuple[Kind, ...], least_pixels: int = _VISIBLE
) -> tuple[Seen, ...]:
    """The things that an image, or a window of it, shows enough of to mention.

    Shapes:
        identities: Indices into ``kinds``, or 255, uint8 ``[H, W]``.
    """
    flat = identities.ravel()
    counts = np.bincount(flat, minlength=256)[: len(kinds)]
    rows, columns = _coordinates(identities.shape[0], identities.shape[1])
    x = np.bincount(flat, columns, minlength=256)
    y = np.bincount(flat, rows, minlength=256)
    return tuple(
        Seen(kind, int(count), (x[number] / count, y[number] / count))
        for number, (kind, count) in enumerate(zip(kinds, counts, strict=True))
        if count >= least_pixels
    )


@lru_cache(maxsize=8)
def _coordinates(height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    return rows.ravel(), columns.ravel()


def _captions(seen: tuple[Seen, ...], rng: np.random.Generator, count: int) -> tuple[str, ...]:
    captions = []
    for number in range(count):
        one = number % 2 == 1 and seen
        captions.append(
            describe_one(seen[rng.integers(len(seen))].kind, rng)
            if one
            else describe_scene(seen, rng)
        )
    return tuple(captions)


def label_table(
    kinds: tuple[Kind, ...], class_names: tuple[str, ...] = CLASS_NAMES
) -> NDArray[np.uint8]:
    """The label of every identity, ``[256]``; :data:`IGNORE` where it is no class."""
    index_of = {name: index for index, name in enumerate(class_names)}
    table = np.full(256, IGNORE, np.uint8)
    table[: len(kinds)] = [index_of.get(kind.name, IGNORE) for kind in kinds]
    return table
