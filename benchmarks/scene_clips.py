"""Labelled clips: a window that pans over a scene in which things move, with the exact motion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from tools.scenes.drawing import Layer, cast_shadow, paint, thing_layer
from tools.scenes.layout import Plan, Thing, plan_scene
from tools.scenes.world import WORLD_VERSION, World, label_table

_CLIPS = 1_000_000  # scenes of clips are numbered from here: no still image shows one of them


@dataclass(frozen=True)
class ClipFrame:
    """One frame of a clip.

    Attributes:
        image: RGB, uint8 ``[S, S, 3]``.
        labels: Indices into ``CLASS_NAMES``, uint8 ``[S, S]``; 255 where there is no class.
        motion: Where each pixel was in the frame before, relative to where it is, int16
            ``[S, S, 2]``: x, then y, in pixels. Zero in the first frame.
        was_visible: Whether it was inside that frame and not hidden, bool ``[S, S]``; false
            everywhere in the first frame.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    motion: NDArray[np.int16]
    was_visible: NDArray[np.bool_]


class SceneClip:
    """A square window that pans over a scene; some of the scene's things move, too.

    The window and each moving thing go straight on at a speed of their own and turn round at the
    scene's edge. They are drawn at whole pixels, so that the motion is known exactly. Each frame
    has camera noise of its own. Frames depend on the arguments alone.

    Args:
        world: The scene's world; each side of its scenes is larger than the window.
        index: Which of the world's clips, from 0.
        speed: Pixels per frame that the window moves; things move half as fast.
        length: Number of frames.
        side: Height and width of the window in pixels.
        num_moving: How many things move, at most.

    Example:
        >>> clip = SceneClip(World(seed=1, size=320), 0, speed=2.0, length=3)
        >>> [frame.image.shape for frame in clip]
        [(128, 128, 3), (128, 128, 3), (128, 128, 3)]
    """

    def __init__(
        self,
        world: World,
        index: int,
        *,
        speed: float,
        length: int,
        side: int = 128,
        num_moving: int = 4,
    ) -> None:
        self._rng_key = [WORLD_VERSION, world.seed, _CLIPS + index]
        rng = np.random.default_rng(self._rng_key)
        plan = plan_scene(rng, world.size_hw, world.class_share)
        movers = rng.permutation(len(plan.things))[:num_moving]
        moving = [plan.things[number] for number in sorted(movers)]
        still = tuple(thing for thing in plan.things if thing not in moving)
        self._plan = replace(plan, things=still)
        self._canvas, self._identities = paint(self._plan, rng)
        kinds = [part.kind for part in (*plan.stretches, *still, *moving)]
        self._table = label_table(tuple(kinds), world.class_names)
        self._first = len(kinds) - len(moving)  # number of the first moving thing
        self._movers = [_Mover(thing, self._plan, 0.5 * speed, rng) for thing in moving]
        self._window = _Path(
            rng.uniform(0, np.array(world.size_hw[::-1]) - side),
            _velocity(speed, rng),
            (np.zeros(2), np.array(world.size_hw[::-1]) - side),
        )
        self._noise = float(rng.uniform(1.0, 7.0))
        self._length, self._side = length, side

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[ClipFrame]:
        """Draw the frames in order."""
        before: NDArray[np.uint8] | None = None
        for number in range(self._length):
            canvas, identities = self._draw(number)
            motion = self._motion(number, identities)
            yield ClipFrame(
                image=self._photograph(canvas, number),
                labels=self._table[identities],
                motion=motion,
                was_visible=_was_visible(identities, before, motion),
            )
            before = identities

    def _draw(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Colours and identities of the window."""
        canvas, identities = self._canvas.copy(), self._identities.copy()
        for offset, mover in enumerate(self._movers):
            cast_shadow(canvas, mover.thing_at(number), self._plan.light)
            layer = mover.layer_at(number, canvas.shape)
            if layer is not None:
                layer.cover(canvas, identities, self._first + offset)
        x, y = self._window.at(number)
        seen = slice(y, y + self._side), slice(x, x + self._side)
        return canvas[seen], identities[seen]

    def _motion(self, number: int, identities: NDArray[np.uint8]) -> NDArray[np.int16]:
        table = np.tile(self._window.step(number), (256, 1))
        for offset, mover in enumerate(self._movers):
            table[self._first + offset] -= mover.path.step(number)
        motion: NDArray[np.int16] = table.astype(np.int16)[identities]
        return motion

    def _photograph(self, canvas: NDArray[np.float32], number: int) -> NDArray[np.uint8]:
        rng = np.random.default_rng([*self._rng_key, number])
        noise = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(self._noise)
        rounded: NDArray[np.uint8] = cv2.add(noise, canvas, dtype=cv2.CV_8U)
        return rounded


def flicker(
    before: NDArray[np.integer], labels: NDArray[np.integer], frame: ClipFrame
) -> tuple[int, int]:
    """Count the pixels whose label changed although what they show did not.

    Args:
        before: Labels ``[S, S]`` given to the frame before.
        labels: Labels ``[S, S]`` given to this frame.
        frame: This frame.

    Returns:
        How many labels differ from those at the same place of the same thing one frame before, and
        how many were compared: the pixels that were visible.
    """
    y, x = np.nonzero(frame.was_visible)
    dx, dy = frame.motion[y, x].T
    return int((labels[y, x] != before[y + dy, x + dx]).sum()), len(y)


class _Path:
    """A straight way at constant speed that turns round at the ends of its room."""

    def __init__(
        self,
        start: NDArray[np.float64],
        velocity: NDArray[np.float64],
        room: tuple[NDArray[np.float64], NDArray[np.float64]],
    ) -> None:
        self._start, self._velocity, self._room = start, velocity, room

    def at(self, number: int) -> NDArray[np.int64]:
        """Whole pixels x, y in one frame."""
        low, high = self._room
        span = np.maximum(high - low, 1e-9)
        way = np.mod(self._start + self._velocity * number - low, 2 * span)
        place: NDArray[np.float64] = low + np.where(way > span, 2 * span - way, way)
        return np.rint(place).astype(np.int64)

    def step(self, number: int) -> NDArray[np.int64]:
        """From the frame before to this one; zero in the first."""
        return self.at(number) - self.at(max(number - 1, 0))


class _Mover:
    """A thing that is drawn once and shown at many places."""

    def __init__(self, thing: Thing, plan: Plan, speed: float, rng: np.random.Generator) -> None:
        reach = int(1.25 * thing.radius) + 1
        x, y = thing.centre_xy
        inside = (reach + x % 1.0, reach + y % 1.0)
        own = replace(plan, size_hw=(2 * reach + 1, 2 * reach + 1))
        layer = thing_layer(replace(thing, centre_xy=inside), own, rng)
        assert layer is not None, "its centre lies on the canvas"
        self._thing, self._layer = thing, layer
        self._shift = np.floor(thing.centre_xy).astype(np.int64) - reach
        limits = np.array(plan.size_hw[::-1], np.float64)
        start = np.clip(np.zeros(2), -np.array(thing.centre_xy), limits - thing.centre_xy)
        room = (-np.array(thing.centre_xy), limits - np.array(thing.centre_xy))
        self.path = _Path(start, _velocity(speed, rng), room)

    def thing_at(self, number: int) -> Thing:
        x, y = np.array(self._thing.centre_xy) + self.path.at(number)
        return replace(self._thing, centre_xy=(float(x), float(y)))

    def layer_at(self, number: int, canvas_shape: Sequence[int]) -> Layer | None:
        """The part of it that lies on the canvas."""
        x, y = self._shift + self.path.at(number)
        rows, from_rows = _overlap(y + self._layer.rows.start, self._layer.opacity.shape[0],
                                   canvas_shape[0])  # fmt: skip
        columns, from_columns = _overlap(x + self._layer.columns.start,
                                         self._layer.opacity.shape[1], canvas_shape[1])  # fmt: skip
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return None
        cut = from_rows, from_columns
        return Layer(rows, columns, self._layer.opacity[cut], self._layer.colours[cut])


def _overlap(start: int, size: int, limit: int) -> tuple[slice, slice]:
    """Where a span lies within ``[0, limit)``, and which part of it that is."""
    first, last = max(start, 0), min(start + size, limit)
    return slice(first, last), slice(first - start, last - start)


def _velocity(speed: float, rng: np.random.Generator) -> NDArray[np.float64]:
    angle = rng.uniform(0, 2 * np.pi)
    return speed * np.array([np.cos(angle), np.sin(angle)])


def _was_visible(
    identities: NDArray[np.uint8], before: NDArray[np.uint8] | None, motion: NDArray[np.int16]
) -> NDArray[np.bool_]:
    if before is None:
        return np.zeros(identities.shape, bool)
    height, width = identities.shape
    rows, columns = np.mgrid[0:height, 0:width]
    x, y = columns + motion[..., 0], rows + motion[..., 1]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    there = before[np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)]
    visible: NDArray[np.bool_] = inside & (there == identities)
    return visible
