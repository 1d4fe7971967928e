"""Captioned images, as image-text training needs them: whole scenes and closer views."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tools.scenes.captions import Seen, describe_one, describe_scene
from tools.scenes.words import Kind
from tools.scenes.world import Scene, visible

Captioned = tuple[NDArray[np.uint8], str]
_OTHER_SHARE = 0.12  # of a view: a second thing at least this large is mentioned
_MAIN_SHARE = 0.10  # of a view: a thing at least this large is the view's subject


def captioned_views(scene: Scene, side: int, rng: np.random.Generator) -> Iterator[Captioned]:
    """Closer views of a scene's things, and one of its surroundings, each with its caption.

    Yields:
        RGB uint8 ``[side, side, 3]``, and what it shows.
    """
    for part in visible(scene.identities, scene.kinds, int(_MAIN_SHARE * side**2)):
        if not part.kind.is_thing:
            continue
        rows, columns = _window(scene, part.centre_xy, side, rng)
        seen = visible(scene.identities[rows, columns], scene.kinds, int(_OTHER_SHARE * side**2))
        yield scene.image[rows, columns], _caption_view(part.kind, seen, rng)
    anywhere = rng.uniform(0, scene.image.shape[1]), rng.uniform(0, scene.image.shape[0])
    rows, columns = _window(scene, anywhere, side, rng)
    seen = visible(scene.identities[rows, columns], scene.kinds, int(_MAIN_SHARE * side**2))
    if seen:
        yield scene.image[rows, columns], _caption_surroundings(seen, rng)


def _window(
    scene: Scene,
    centre_xy: tuple[float, float],
    side: int,
    rng: np.random.Generator,
) -> tuple[slice, slice]:
    jitter = rng.uniform(-0.18, 0.18, 2) * side
    starts = []
    for centre, shift, limit in zip(
        centre_xy, jitter, (scene.image.shape[1], scene.image.shape[0]), strict=True
    ):
        starts.append(int(np.clip(round(centre + shift - side / 2), 0, limit - side)))
    x, y = starts
    return slice(y, y + side), slice(x, x + side)


def _caption_view(kind: Kind, seen: tuple[Seen, ...], rng: np.random.Generator) -> str:
    others = [part for part in seen if part.kind.is_thing and part.kind.name != kind.name]
    if others or rng.random() < 0.15:
        return describe_scene(seen, rng)
    return describe_one(kind, rng)


def _caption_surroundings(seen: tuple[Seen, ...], rng: np.random.Generator) -> str:
    if any(part.kind.is_thing for part in seen):
        return describe_scene(seen, rng)
    main = max(seen, key=lambda part: part.pixels)
    alone = len(seen) == 1 or rng.random() < 0.4
    return describe_one(main.kind, rng) if alone else describe_scene(seen, rng)
