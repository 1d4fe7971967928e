"""Surface patterns as periodic tiles, drawn once from a fixed seed.

A tile has two channels: brightness, and brightness times the share of the second colour; both are
linear in what is drawn, so tiles can be resized.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

TILE = 256  # side of a tile in pixels; every period divides it

Floats = NDArray[np.float32]
_Pair = tuple[Floats, Floats]


@lru_cache(maxsize=32)
def tile(surface: str) -> Floats:
    """The tile of a surface or of a noun with one surface.

    Returns:
        float32 ``[TILE, TILE, 2]``; the first channel is about 1, the second from 0 to the first.
    """
    rng = np.random.default_rng([20, sorted(_DRAW).index(surface)])
    share, brightness = _DRAW[surface](rng)
    both: Floats = np.dstack([brightness, share * brightness]).astype(np.float32)
    both.flags.writeable = False
    return both


def _grid() -> _Pair:
    rows, columns = np.mgrid[0:TILE, 0:TILE].astype(np.float32)
    return rows, columns


def _noise(rng: np.random.Generator, kernel_hw: tuple[int, int], times: int = 1) -> Floats:
    """Periodic noise blurred by a box, mean 0, standard deviation 1."""
    noise = rng.standard_normal((TILE, TILE), dtype=np.float32)
    margin = 64
    for _ in range(times):
        padded = np.pad(noise, margin, mode="wrap")
        noise = cv2.blur(padded, kernel_hw[::-1])[margin:-margin, margin:-margin]
    scaled: Floats = (noise - noise.mean()) / noise.std()
    return scaled


def _none() -> Floats:
    return np.zeros((TILE, TILE), np.float32)


def _brick(rng: np.random.Generator) -> _Pair:
    rows, columns = _grid()
    course = rows // 8
    shifted = (columns + 8 * (course % 2)) % TILE
    tone = rng.uniform(0.8, 1.15, (32, 16)).astype(np.float32)
    brightness = tone[course.astype(int), (shifted // 16).astype(int)] + 0.05 * _noise(rng, (2, 2))
    mortar = ((rows % 8) < 1.5) | ((shifted % 16) < 1.5)
    return mortar.astype(np.float32), brightness


def _stone(rng: np.random.Generator) -> _Pair:
    cell, count = 16, TILE // 16
    sites = rng.uniform(0.15, 0.85, (count, count, 2)) * cell
    tone = rng.uniform(0.72, 1.2, (count, count))
    rows, columns = _grid()
    first = np.full((TILE, TILE), 1e9)
    second, brightness = first.copy(), first.copy()
    for dr in (-1, 0, 1):
        for dc in (-1, 0, 1):
            r, c = (rows // cell + dr).astype(int), (columns // cell + dc).astype(int)
            site = sites[r % count, c % count]
            distance = np.hypot(r * cell + site[..., 0] - rows, c * cell + site[..., 1] - columns)
            nearer = distance < first
            second = np.where(nearer, first, np.minimum(second, distance))
            brightness = np.where(nearer, tone[r % count, c % count], brightness)
            first = np.minimum(first, distance)
    gap = np.clip(1.6 - (second - first) * 0.7, 0, 1)
    speckle = 0.06 * _noise(rng, (2, 2))
    return _none(), ((brightness + speckle) * (1 - 0.65 * gap)).astype(np.float32)


def _wooden(rng: np.random.Generator) -> _Pair:
    _, columns = _grid()
    tone = rng.uniform(0.8, 1.15, TILE // 16).astype(np.float32)[(columns // 16).astype(int)]
    grain = 0.13 * _noise(rng, (41, 1)) + 0.08 * _noise(rng, (61, 3))
    gap = ((columns % 16) < 1.3).astype(np.float32)
    return _none(), (tone + grain) * (1 - 0.55 * gap)


def _striped(rng: np.random.Generator) -> _Pair:
    _, columns = _grid()
    wave = np.sin(columns * (2 * np.pi / 16))
    return np.clip(0.5 + 2.5 * wave, 0, 1), 1 + 0.03 * _noise(rng, (2, 2))


def _dotted(rng: np.random.Generator) -> _Pair:
    rows, columns = _grid()
    shifted = columns + 8 * ((rows // 16) % 2)
    distance = np.hypot(rows % 16 - 7.5, shifted % 16 - 7.5)
    return np.clip(5.2 - distance, 0, 1), 1 + 0.03 * _noise(rng, (2, 2))


def _checkered(rng: np.random.Generator) -> _Pair:
    rows, columns = _grid()
    odd = (rows // 8 + columns // 8) % 2
    return odd.astype(np.float32), 1 + 0.03 * _noise(rng, (2, 2))


def _tiled(rng: np.random.Generator) -> _Pair:
    rows, columns = _grid()
    tone = rng.uniform(0.93, 1.06, (16, 16)).astype(np.float32)
    brightness = tone[(rows // 16).astype(int), (columns // 16).astype(int)]
    grout = ((rows % 16) < 1.6) | ((columns % 16) < 1.6)
    return 0.8 * grout.astype(np.float32), brightness + 0.02 * _noise(rng, (3, 3))


def _metal(rng: np.random.Generator) -> _Pair:
    return _none(), 1 + 0.04 * _noise(rng, (1, 25))


def _fuzzy(rng: np.random.Generator) -> _Pair:
    return _none(), np.clip(0.9 + 0.3 * _noise(rng, (2, 2)), 0.3, 1.6)


def _grass(rng: np.random.Generator) -> _Pair:
    blades = _noise(rng, (7, 1)) + 0.5 * _noise(rng, (13, 2))
    patches = _noise(rng, (31, 31), times=2)
    return _none(), np.clip(0.92 + 0.22 * blades + 0.08 * patches, 0.35, 1.6)


def _sand(rng: np.random.Generator) -> _Pair:
    ripples = _noise(rng, (5, 41), times=2)
    return _none(), np.clip(1 + 0.07 * _noise(rng, (1, 1)) + 0.06 * ripples, 0.6, 1.4)


def _water(rng: np.random.Generator) -> _Pair:
    waves = _noise(rng, (3, 23), times=2)
    share = np.clip(0.35 * (waves - 0.8), 0, 0.7)
    return share, np.clip(0.95 + 0.15 * waves, 0.5, 1.4)


def _sky(rng: np.random.Generator) -> _Pair:
    clouds = _noise(rng, (13, 41), times=3)
    return np.clip(0.3 * (clouds - 0.3), 0, 0.6), 1 + 0.02 * clouds


_DRAW: dict[str, Callable[[np.random.Generator], _Pair]] = {
    "brick": _brick,
    "checkered": _checkered,
    "dotted": _dotted,
    "fuzzy": _fuzzy,
    "grass": _grass,
    "metal": _metal,
    "sand": _sand,
    "sky": _sky,
    "stone": _stone,
    "striped": _striped,
    "tiled": _tiled,
    "water": _water,
    "wooden": _wooden,
}
