"""The layout of a scene: stretches of stuff, things on them, light; nothing is drawn here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tools.scenes.shapes import sprite
from tools.scenes.words import (
    CLASS_NAMES,
    GROUNDS,
    SHAPES,
    UPRIGHTS,
    Kind,
    all_stuff,
    all_things,
    kind_of,
)

_AREA = 128 * 128  # pixels; numbers of things are given for this area
_RADII = (17.0, 40.0)  # of things, in pixels whatever the image's size


@dataclass(frozen=True)
class Light:
    """Where light comes from and what it is like.

    Attributes:
        direction: Unit vector to the light: x right, y down, z to the viewer.
        tint: Factor of each channel.
        ambient: Brightness of what faces away.
    """

    direction: NDArray[np.float32]
    tint: NDArray[np.float32]
    ambient: float


@dataclass(frozen=True)
class Stretch:
    """A region of stuff.

    Attributes:
        kind: What it is.
        outline: Corners (x, y) in pixels, float32 ``[P, 2]``; later stretches cover earlier ones.
    """

    kind: Kind
    outline: NDArray[np.float32]


@dataclass(frozen=True)
class Thing:
    """An object.

    Attributes:
        kind: What it is.
        centre_xy: Its centre in pixels.
        radius: Half its size in pixels.
        angle: Clockwise rotation in radians.
        mirrored: Whether left and right are swapped.
        floating: Whether it hangs in the air or on the wall.
    """

    kind: Kind
    centre_xy: tuple[float, float]
    radius: float
    angle: float
    mirrored: bool
    floating: bool


@dataclass(frozen=True)
class Plan:
    """A scene before it is drawn.

    Attributes:
        size_hw: Height and width in pixels.
        stretches: Stuff, back to front.
        things: Back to front.
        light: The light.
        zoom: How much larger than planned it is; patterns grow with it.
    """

    size_hw: tuple[int, int]
    stretches: tuple[Stretch, ...]
    things: tuple[Thing, ...]
    light: Light
    zoom: int = 1

    def magnified(self, zoom: int) -> Plan:
        """The same scene with ``zoom`` times the pixels per side."""
        stretches = tuple(replace(part, outline=part.outline * zoom) for part in self.stretches)
        things = tuple(
            replace(
                part,
                centre_xy=(part.centre_xy[0] * zoom, part.centre_xy[1] * zoom),
                radius=part.radius * zoom,
            )
            for part in self.things
        )
        size_hw = (self.size_hw[0] * zoom, self.size_hw[1] * zoom)
        return Plan(size_hw, stretches, things, self.light, self.zoom * zoom)


def plan_scene(
    rng: np.random.Generator,
    size_hw: tuple[int, int],
    class_share: float,
    common: tuple[str, ...] = CLASS_NAMES,
) -> Plan:
    """Decide what a scene shows."""
    horizon = size_hw[0] * rng.uniform(0.36, 0.62)
    kinds = _Kinds(rng, class_share, common)
    stretches = _plan_stretches(rng, size_hw, horizon, kinds)
    things = _plan_things(rng, size_hw, horizon, kinds)
    return Plan(size_hw, stretches, things, _plan_light(rng))


@lru_cache(maxsize=64)
def _choices(
    role: str, common: tuple[str, ...]
) -> tuple[tuple[Kind, ...], tuple[tuple[Kind, ...], ...]]:
    """Kinds of a role: the common ones, and all of them, grouped by noun."""
    nouns = {"upright": UPRIGHTS, "wall": ("wall",), "ground": GROUNDS, "thing": SHAPES}[role]
    every = all_things() if role == "thing" else all_stuff(nouns)
    classes = tuple(kind for kind in map(kind_of, common) if kind in every)
    return classes, tuple(tuple(kind for kind in every if kind.noun == noun) for noun in nouns)


@dataclass(frozen=True)
class _Kinds:
    """Draws what things and stretches are."""

    rng: np.random.Generator
    class_share: float
    common: tuple[str, ...]

    def pick(self, role: str) -> Kind:
        classes, groups = _choices(role, self.common)
        rng = self.rng
        # Outside the classes, a noun is drawn first, so that many surfaces do not make it frequent.
        kinds = classes if rng.random() < self.class_share else groups[rng.integers(len(groups))]
        return kinds[rng.integers(len(kinds))]


def _plan_stretches(
    rng: np.random.Generator, size_hw: tuple[int, int], horizon: float, kinds: _Kinds
) -> tuple[Stretch, ...]:
    height, width = size_hw
    whole = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    stretches = [Stretch(kinds.pick("upright"), whole)]
    layout = rng.random()
    if layout < 0.2:  # another wall beside the first
        x, slant = width * rng.uniform(0.3, 0.7), width * rng.uniform(-0.08, 0.08)
        side = np.array(
            [[x - slant, 0], [width, 0], [width, height], [x + slant, height]], np.float32
        )
        stretches.append(Stretch(kinds.pick("wall"), side))
    elif layout < 0.4:  # a wall in the distance
        top = horizon - height * rng.uniform(0.16, 0.3)
        stretches.append(_below(rng, "wall", kinds, size_hw, top, waves=False))
    waves = rng.random() < 0.35
    stretches.append(_below(rng, "ground", kinds, size_hw, horizon, waves=waves))
    if rng.random() < 0.3:  # other ground in front
        top = horizon + (height - horizon) * rng.uniform(0.4, 0.65)
        stretches.append(_below(rng, "ground", kinds, size_hw, top, waves=True))
    return tuple(stretches)


def _below(
    rng: np.random.Generator,
    role: str,
    kinds: _Kinds,
    size_hw: tuple[int, int],
    top: float,
    *,
    waves: bool,
) -> Stretch:
    """A stretch from a line across the image down to its lower edge."""
    height, width = size_hw
    x = np.linspace(0, width, 17)
    y = top + (x / width - 0.5) * height * rng.uniform(-0.12, 0.12)
    if waves:
        y = y + height * 0.03 * np.sin(x / width * rng.uniform(4, 9) + rng.uniform(0, 6))
    outline = np.stack([x, y], axis=1)
    corners = [[width, height], [0, height]]
    return Stretch(
        kinds.pick(role),
        np.concatenate([outline, corners]).astype(np.float32),
    )


def _plan_things(
    rng: np.random.Generator, size_hw: tuple[int, int], horizon: float, kinds: _Kinds
) -> tuple[Thing, ...]:
    expected = max(1.0, size_hw[0] * size_hw[1] / _AREA) * 2.5
    count = int(np.clip(round(rng.normal(expected, 0.4 * expected)), 1, 2 * expected))
    things = [_plan_thing(rng, size_hw, horizon, kinds) for _ in range(count)]
    return tuple(sorted(things, key=lambda thing: (not thing.floating, _base(thing))))


def _base(thing: Thing) -> float:
    return thing.centre_xy[1] + thing.radius * sprite(thing.kind.noun).base


def _plan_thing(
    rng: np.random.Generator, size_hw: tuple[int, int], horizon: float, kinds: _Kinds
) -> Thing:
    height, width = size_hw
    kind = kinds.pick("thing")
    shape = sprite(kind.noun)
    radius = float(rng.triangular(_RADII[0], 28.0, _RADII[1]))
    x = float(rng.uniform(0.3 * radius, width - 0.3 * radius))
    floating = bool(rng.random() < 0.2)
    if floating:
        y = float(rng.uniform(0.6 * radius, height - radius))
    else:
        lowest = height + 0.25 * radius
        y = float(rng.uniform(min(horizon + 4, lowest), lowest)) - shape.base * radius
    turn = 0.12 if shape.upright else np.pi
    angle = float(rng.uniform(-turn, turn))
    return Thing(kind, (x, y), radius, angle, bool(rng.random() < 0.5), floating)


def _plan_light(rng: np.random.Generator) -> Light:
    direction = np.array([rng.uniform(-0.9, 0.9), -rng.uniform(0.4, 0.9), rng.uniform(0.4, 0.9)])
    tint = rng.uniform(0.92, 1.08, 3).astype(np.float32) * np.float32(rng.uniform(0.78, 1.08))
    unit = (direction / np.linalg.norm(direction)).astype(np.float32)
    return Light(unit, tint, float(rng.uniform(0.42, 0.62)))
