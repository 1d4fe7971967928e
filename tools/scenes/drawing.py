"""Draw a planned scene: textures, shading, shadows, clutter, and camera artefacts."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from tools.scenes.layout import Light, Plan, Thing
from tools.scenes.shapes import SIDE, sprite
from tools.scenes.textures import TILE, tile
from tools.scenes.words import COLOURS, GROUNDS, Kind

CLUTTER = 255  # identity of small things without a name

Floats = NDArray[np.float32]
_DARK, _PALE, _MORTAR = (38, 36, 40), (240, 238, 232), (196, 190, 180)
_BROWN = np.array((135, 92, 52), np.float32)
_LIGHT_COLOURS = ("white", "yellow", "grey")


@dataclass(frozen=True)
class Drawing:
    """A drawn scene.

    Attributes:
        image: RGB, uint8 ``[H, W, 3]``.
        identities: uint8 ``[H, W]``: a stretch's index in the plan, or the number of stretches plus
            a thing's index, or :data:`CLUTTER`.
    """

    image: NDArray[np.uint8]
    identities: NDArray[np.uint8]


@dataclass(frozen=True)
class Layer:
    """A thing by itself, to be laid onto a canvas.

    Attributes:
        rows: Where it lies on the canvas.
        columns: Likewise.
        opacity: float32 ``[h, w]``, in [0, 1].
        colours: RGB, float32 ``[h, w, 3]``.
    """

    rows: slice
    columns: slice
    opacity: Floats
    colours: Floats

    def cover(self, canvas: Floats, identities: NDArray[np.uint8], number: int) -> None:
        """Lay it onto a canvas and write its number where it hides what is behind it."""
        part = canvas[self.rows, self.columns]
        part += self.opacity[..., None] * (self.colours - part)
        identities[self.rows, self.columns][self.opacity > 0.5] = number


def draw(plan: Plan, rng: np.random.Generator) -> Drawing:
    """Draw a plan; small choices that captions do not mention come from ``rng``."""
    canvas, identities = paint(plan, rng)
    return Drawing(_photograph(canvas, rng), identities)


def paint(plan: Plan, rng: np.random.Generator) -> tuple[Floats, NDArray[np.uint8]]:
    """Draw a plan as it is before a camera adds blur and noise.

    Returns:
        RGB in 0..255, not clipped, float32 ``[H, W, 3]``; identities as in :class:`Drawing`.
    """
    canvas = np.zeros((*plan.size_hw, 3), np.float32)
    identities = np.zeros(plan.size_hw, np.uint8)
    for number, stretch in enumerate(plan.stretches):
        cv2.fillPoly(identities, [np.round(stretch.outline).astype(np.int32)], number)
    for number, stretch in enumerate(plan.stretches):
        _draw_stretch(canvas, identities == number, stretch.kind, plan, rng)
    canvas *= _light_field(plan, rng)[..., None]
    _draw_clutter(canvas, identities, plan.zoom, rng)
    for number, thing in enumerate(plan.things, start=len(plan.stretches)):
        cast_shadow(canvas, thing, plan.light)
        layer = thing_layer(thing, plan, rng)
        if layer is not None:
            layer.cover(canvas, identities, number)
    if rng.random() < 0.3:
        _draw_clutter(canvas, identities, plan.zoom, rng)
    return canvas, identities


def _palette(kind: Kind, light: Light, rng: np.random.Generator) -> Floats:
    """First and second colour of a kind under the light, varied a little; float32 ``[2, 3]``."""
    first = np.array(COLOURS[kind.colour], np.float32) * rng.uniform(0.9, 1.08, 3).astype(
        np.float32
    )
    grey = first.mean()
    first = grey + (first - grey) * np.float32(rng.uniform(0.82, 1.08))
    if kind.surface == "wooden":
        first = 0.8 * first + 0.2 * _BROWN
    second: tuple[int, int, int] = _PALE
    if kind.surface in ("brick", "tiled"):
        second = _MORTAR
    elif kind.surface == "checkered" or (kind.colour in _LIGHT_COLOURS and kind.surface):
        second = _DARK
    return np.stack([first, np.array(second, np.float32)]) * light.tint


def _paint(pattern: Floats, palette: Floats) -> Floats:
    """Colours of a pattern's two channels, float32 ``[H, W, 3]``."""
    first, second = palette
    painted: Floats = cv2.transform(pattern, np.stack([first, second - first], axis=1))
    return painted


def _draw_stretch(
    canvas: Floats,
    inside: NDArray[np.bool_],
    kind: Kind,
    plan: Plan,
    rng: np.random.Generator,
) -> None:
    squeeze = rng.uniform(0.4, 1.2) if kind.noun in GROUNDS else 0.0
    palette = _palette(kind, plan.light, rng)
    x, y, width, height = cv2.boundingRect(inside.view(np.uint8))
    if not width:
        return
    box = slice(y, y + height), slice(x, x + width)
    painted = _paint(_stretch_pattern(kind, (height, width), squeeze, plan.zoom, rng), palette)
    cv2.copyTo(painted, inside[box].view(np.uint8), canvas[box])


def _stretch_pattern(
    kind: Kind, size_hw: tuple[int, int], squeeze: float, zoom: int, rng: np.random.Generator
) -> Floats:
    """A tile over an image; ``squeeze`` makes it smaller towards the top, as on a floor."""
    height, width = size_hw
    scale = rng.uniform(0.55, 1.0) / zoom
    angle = rng.uniform(-0.06, 0.06) if not squeeze else rng.uniform(-0.5, 0.5)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
    flat = np.eye(3)
    flat[:2, :2] = turn
    flat[:2, 2] = rng.uniform(0, TILE, 2)
    view = np.array(
        [
            [1 + squeeze, 0, -(1 + squeeze) * width / 2],
            [0, 1 + squeeze, 0],
            [0, squeeze / height, 1],
        ]
    )
    pattern: Floats = cv2.warpPerspective(
        tile(kind.surface or kind.noun),
        flat @ view,
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_WRAP,
    )
    return pattern


def _light_field(plan: Plan, rng: np.random.Generator) -> Floats:
    """Light that falls off across the image, away from its source."""
    height, width = plan.size_hw
    fall = rng.uniform(0.0, 0.22)
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32) * plan.light.direction[0]
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32) * plan.light.direction[1]
    field: Floats = 1 + np.float32(2 * fall) * (x[None, :] + y[:, None])
    return field


def _placement(thing: Thing) -> NDArray[np.float64]:
    """Map sprite pixels to image pixels."""
    scale = 2 * thing.radius / SIDE
    flip = -1.0 if thing.mirrored else 1.0
    cos, sin = np.cos(thing.angle) * scale, np.sin(thing.angle) * scale
    matrix = np.array([[cos * flip, -sin], [sin * flip, cos]])
    shift = np.array(thing.centre_xy) - matrix @ np.full(2, (SIDE - 1) / 2)
    return np.hstack([matrix, shift[:, None]])


def cast_shadow(canvas: Floats, thing: Thing, light: Light) -> None:
    """Darken what is behind and beside a thing, away from the light."""
    shape = sprite(thing.kind.noun)
    radius, (x, y) = thing.radius, thing.centre_xy
    lean = -float(light.direction[0]) / max(float(light.direction[2]), 0.3)
    matrix = _placement(thing)
    if thing.floating:
        matrix[:, 2] += (0.35 * radius * lean, 0.3 * radius)
    else:  # laid down on the ground, about the line where it stands
        base = y + shape.base * radius
        lay = np.array([[1, -0.8 * lean, 0.8 * lean * base], [0, 0.42, 0.58 * base], [0, 0, 1]])
        matrix = (lay @ np.vstack([matrix, [0, 0, 1]]))[:2]
    rows = _span(y, 1.6 * radius, canvas.shape[0])
    columns = _span(x, 2.8 * radius, canvas.shape[1])
    matrix[:, 2] -= (columns.start, rows.start)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    if min(size) < 1:
        return
    shadow = cv2.warpAffine(shape.surface[..., 0], matrix, size)
    shadow = cv2.blur(cv2.blur(shadow, (5, 5)), (3, 3))
    strength = np.float32(0.85 - light.ambient)
    canvas[rows, columns] *= 1 - strength * shadow[..., None]


def _span(centre: float, reach: float, limit: int) -> slice:
    return slice(max(0, int(centre - reach)), max(0, min(limit, int(centre + reach) + 1)))


def thing_layer(thing: Thing, plan: Plan, rng: np.random.Generator) -> Layer | None:
    """Draw a thing by itself.

    Returns:
        The part of it that lies on the canvas; None if it lies outside.
    """
    shape = sprite(thing.kind.noun)
    reach = 1.25 * thing.radius
    rows = _span(thing.centre_xy[1], reach, plan.size_hw[0])
    columns = _span(thing.centre_xy[0], reach, plan.size_hw[1])
    size = (columns.stop - columns.start, rows.stop - rows.start)
    if min(size) < 1:
        return None
    matrix = _placement(thing)
    matrix[:, 2] -= (columns.start, rows.start)
    surface = cv2.warpAffine(shape.surface, matrix, size)
    where = cv2.warpAffine(shape.pattern, matrix, size, borderMode=cv2.BORDER_REPLICATE)
    opacity = surface[..., 0]
    if thing.kind.surface == "fuzzy":
        ragged = rng.random(opacity.shape, dtype=np.float32)
        opacity = np.where(opacity < 0.98, opacity * (ragged > 0.4), opacity)
    return Layer(rows, columns, opacity, _shade(thing, plan, surface[..., 1:], where, rng))


def _shade(
    thing: Thing, plan: Plan, normals: Floats, where: Floats, rng: np.random.Generator
) -> Floats:
    light = plan.light
    palette = _palette(thing.kind, light, rng)
    spread = np.float32(thing.radius / plan.zoom * rng.uniform(0.85, 1.35))
    turned = rng.uniform(-0.5, 0.5) if thing.kind.surface in ("striped", "wooden") else 0.0
    cos, sin = np.float32(np.cos(turned) * spread), np.float32(np.sin(turned) * spread)
    x, y = where[..., 0], where[..., 1]
    offset = rng.uniform(0, TILE, 2).astype(np.float32)
    pattern = cv2.remap(
        tile(thing.kind.surface),
        x * cos - y * sin + offset[0],
        x * sin + y * cos + offset[1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_WRAP,
    )
    toward = _turn_light(thing, light.direction)
    facing = normals @ toward
    brightness = light.ambient + np.float32(0.72) * np.maximum(facing, 0)
    colours = _paint(pattern, palette)
    if thing.kind.surface == "metal":
        return _polish(colours, normals, toward, brightness)
    shaded: Floats = colours * brightness[..., None]
    return shaded


def _turn_light(thing: Thing, direction: Floats) -> Floats:
    """The light's direction as a thing's own normals see it."""
    cos, sin = np.cos(thing.angle), np.sin(thing.angle)
    x, y, z = direction
    flip = -1.0 if thing.mirrored else 1.0
    return np.array([flip * (x * cos + y * sin), -x * sin + y * cos, z], np.float32)


def _polish(colours: Floats, normals: Floats, toward: Floats, brightness: Floats) -> Floats:
    """Metal: a mirrored horizon, dark and bright, in the colour, and a highlight."""
    half = toward + np.array([0, 0, 1], np.float32)
    half /= np.linalg.norm(half)
    highlight = np.maximum(normals @ half, 0) ** 24
    mirrored = 0.78 + 0.38 * np.sin(5.5 * normals[..., 1] + 2.5 * normals[..., 0] - 0.8)
    base = colours * (brightness * mirrored)[..., None]
    shiny: Floats = base + 230 * highlight[..., None]
    return shiny


def _draw_clutter(
    canvas: Floats, identities: NDArray[np.uint8], zoom: int, rng: np.random.Generator
) -> None:
    height, width = identities.shape
    count = int(rng.poisson(2.0 * max(1.0, height * width / (128 * zoom) ** 2)))
    for _ in range(count):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        axes = (zoom * int(rng.integers(1, 5)), zoom * int(rng.integers(1, 5)))
        angle = float(rng.uniform(0, 180))
        colour = [float(value) for value in rng.uniform(20, 235, 3)]
        cv2.ellipse(canvas, centre, axes, angle, 0, 360, colour, -1, cv2.LINE_AA)
        cv2.ellipse(identities, centre, axes, angle, 0, 360, CLUTTER, -1)


def _photograph(canvas: Floats, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A camera's blur, noise and rounding."""
    if rng.random() < 0.5:
        canvas = cv2.GaussianBlur(canvas, (3, 3), float(rng.uniform(0.4, 0.9)))
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    noise *= np.float32(rng.uniform(1.0, 7.0))
    rounded: NDArray[np.uint8] = cv2.add(noise, canvas, dtype=cv2.CV_8U)
    return rounded
