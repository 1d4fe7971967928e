"""What past frames tell about the next one: how the image moved, labels that flicker less.

A memory belongs to a source, not to a lane: a lane is handed the memory together with the frame.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.common.arrays import Array, reshaped
from zsseg_rt.common.extras import import_opencv
from zsseg_rt.errors import ArgumentError, EngineStateError
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.runtime.families.base import BoundClasses, LabelRule, Masks
from zsseg_rt.runtime.families.masks import ClassLogits
from zsseg_rt.runtime.workspace import Workspace

SIDE = 128  # of the small pictures, whatever the frame's shape
FOLLOW_SIDE = 320  # the longer one of those that labels are moved by; they keep the frame's shape
_SHORTEST = 32  # what is left of the other one; the flow's patches need it
_SAMPLED = 256  # sides that a larger frame is sampled at before its pixels are averaged
_STILL_SIDE = 32
# Few cells that change much matter more than many that change a little: 2 levels in one cell of 30
# spare as much of a still scene, but also 5 % of a moving one instead of 1 %.
_STILL_LEVELS = 6
_STILL_SHARE = 0.01
# A cut leaves a mean difference of 28 to 100 levels after the flow is undone, moving cameras 1 to
# 12, unless they are so fast that no flow is found. Dark and dull pictures differ less.
_CUT_SHARE = 0.5  # of the grey picture's standard deviation
_CUT_LEVELS = (10.0, 25.0)  # the least and the largest threshold
# Chosen by benchmarks/follow.py --tune, on other clips than it reports: moving must explain a place
# better than rest does by so many levels of 255, or noise would move still things; where the better
# of both is off by more than the second number, every other label is wrong.
GAIN = 3
LOST = 45
_NOISE = 10  # what noise alone explains: nothing has come in where rest differs by less
_OUTSIDE = 2.0  # pixels of the small picture by which the flow at its edge may be wrong
_AROUND = (9, 9)  # pixels of the small picture over which differences are averaged
_GREY = np.full((1, 3), 1 / 3, np.float32)

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class BlendSettings:
    """How much the past counts; chosen by benchmarks/steady.py."""

    most: float = 0.86  # Weight of the past where nothing moves
    # What is taken off per unit of blur. Sampling between cells blurs: by t (1 - t) per axis, in
    # cells squared, at fraction t of a cell. What moves by fractions of a cell would be blurred
    # anew with every frame
    per_blur: float = 0.5
    least: float = 0.72  # What remains at least of the above
    # Mean difference, in levels of 255, that noise alone explains. From there on the weight falls
    sure_levels: float = 10.0
    lost_levels: float = 80.0  # Mean difference from which on the past does not count at all


@dataclass(frozen=True, kw_only=True, eq=False)
class Glance:
    """A frame, much reduced."""

    colours: Bytes  # uint8 [h, w, 3], in the frame's channel order; 128x128 unless labels are moved
    grey: Bytes  # uint8 [h, w]

    @classmethod
    def at(cls, frame: Bytes, channel_order: str) -> Glance:
        """Reduce a frame, whatever its shape.

        Shapes:
            frame: uint8 [H, W, 3], checked.
        """
        cv2 = load_opencv()
        height, width = frame.shape[:2]
        if max(height, width) > _SAMPLED:  # 0.2 ms for 720p; the mean of all pixels takes 8 ms
            frame = cv2.resize(frame, (min(width, _SAMPLED), min(height, _SAMPLED)))
        colours = cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        return cls.of(colours, channel_order)

    @classmethod
    def of(cls, colours: Bytes, channel_order: str) -> Glance:
        """A picture that is small already."""
        cv2 = load_opencv()
        code = cv2.COLOR_BGR2GRAY if channel_order == "bgr" else cv2.COLOR_RGB2GRAY
        return cls(colours=colours, grey=cv2.cvtColor(colours, code))


@dataclass(frozen=True, kw_only=True, eq=False)
class Motion:
    """Where the cells of a grid were one frame before; the arguments of ``ops.warp_blend``."""

    flow: Floats  # float32 [1, h, w, 2]: x, then y, in cells
    past_weight: Floats  # float32 [1, h, w], in [0, 1]

    @classmethod
    def none(cls, grid_hw: tuple[int, int]) -> Motion:
        """No past."""
        return cls(
            flow=np.zeros((1, *grid_hw, 2), np.float32),
            past_weight=np.zeros((1, *grid_hw), np.float32),
        )


class MotionEstimator:
    """Finds motion by dense inverse search optical flow; for one thread at a time.

    Source:
        Kroeger et al., "Fast Optical Flow using Dense Inverse Search", ECCV 2016.
    """

    def __init__(self, settings: BlendSettings | None = None) -> None:
        self._cv2 = cv2 = load_opencv()
        self._settings = settings or BlendSettings()
        self._search = _flow_search(cv2)
        self._pixels = _places_of((SIDE, SIDE))

    def between(self, past: Glance, now: Glance, grid_hw: tuple[int, int]) -> Motion | None:
        """Find where each cell of a grid over a frame was in the one before."""
        cv2 = self._cv2
        flow = self._search.calc(now.grey, past.grey, None)
        origin = self._pixels + flow
        inside = cv2.inRange(origin, (-0.5, -0.5), (SIDE - 0.5, SIDE - 0.5))
        moved = cv2.remap(
            past.colours, origin, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        difference = cv2.absdiff(now.colours, moved)  # in colour: red and blue may be equally grey
        mean = float(np.mean(cv2.mean(difference, inside)[:3]))
        if not inside.any() or _is_cut(cv2, now.grey, mean):
            return None
        rows, columns = grid_hw
        cells = _average(cv2, flow, grid_hw)
        cells *= np.array([columns / SIDE, rows / SIDE], np.float32)
        weight = self._trust(cells, _average(cv2, difference.reshape(SIDE, -1), grid_hw))
        weight *= (_average(cv2, inside, grid_hw) / 255) ** 2  # cells that come in are partly new
        return Motion(flow=cells[None], past_weight=weight[None])

    def _trust(self, cells: Floats, difference: Floats) -> Floats:
        settings = self._settings
        fraction = cells - np.floor(cells)
        blur = (fraction * (1 - fraction)).sum(axis=-1)
        trust = np.maximum(settings.most - settings.per_blur * blur, settings.least)
        span = settings.lost_levels - settings.sure_levels
        likeness = np.clip((settings.lost_levels - difference) / span, 0.0, 1.0)
        return np.asarray(trust * likeness, np.float32)


def follow_size(size_hw: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the small pictures by which labels of such frames are moved."""
    scale = min(1.0, FOLLOW_SIDE / max(size_hw))
    height, width = (max(round(side * scale), _SHORTEST) for side in size_hw)
    return height, width


@dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """The way back from a frame to one that was labelled."""

    start: Glance  # The labelled frame, reduced to :func:`follow_size`
    # float32 [h, w, 2]: where each pixel of the other frame was in it, relative to where it is: x,
    # then y
    flow: Floats

    @classmethod
    def begin(cls, start: Glance) -> Way:
        """From the labelled frame to itself."""
        return cls(start=start, flow=np.zeros((*start.grey.shape, 2), np.float32))


# The motion between neighbouring frames: as Way.flow, and where each pixel was, as OpenCV's
# fixed-point maps, which take half the time.
Step = tuple[Floats, tuple[Any, Any]]


class LabelMover:
    """Moves labels along the optical flow of frames of one size; for one thread at a time."""

    def __init__(self, *, gain: int = GAIN, lost: int = LOST) -> None:
        self._cv2 = load_opencv()
        self._search = _flow_search(self._cv2)
        self._gain, self._lost = gain, lost

    def step(self, before: Glance, now: Glance) -> Step | None:
        """The motion from a neighbouring frame; None at a scene cut."""
        cv2, (height, width) = self._cv2, now.grey.shape
        flow = self._search.calc(now.grey, before.grey, None)
        places = cv2.convertMaps(cv2.add(_places_of((height, width)), flow), None, cv2.CV_16SC2)
        came = cv2.remap(before.grey, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        if _is_cut(cv2, now.grey, cv2.mean(cv2.absdiff(now.grey, came))[0]):
            return None
        return flow, places

    def extend(self, way: Way, step: Step) -> Way:
        """The way from one frame further on."""
        cv2, (flow, places) = self._cv2, step
        before = cv2.remap(way.flow, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return Way(start=way.start, flow=cv2.add(flow, before))

    def move(
        self, labels: npt.NDArray[Any], way: Way, now: Glance, *, holds: bool
    ) -> npt.NDArray[Any]:
        """The labels of the way's start, where they are now.

        A place takes the label from where it came; from where it is, if that explains the frame as
        well. Where neither does, and where it came from outside, it becomes unknown unless
        ``holds``.

        Shapes:
            labels: uint8 or uint16 [H, W]; so is the result.
        """
        cv2, (rows, columns) = self._cv2, now.grey.shape
        at_rest = _places_of((rows, columns))
        places = cv2.add(at_rest, way.flow)
        fixed = cv2.convertMaps(places, None, cv2.CV_16SC2)
        edge = cv2.BORDER_REPLICATE
        came = cv2.remap(way.start.colours, *fixed, cv2.INTER_LINEAR, borderMode=edge)
        moved, rested = (
            cv2.blur(cv2.transform(cv2.absdiff(now.colours, past), _GREY), _AROUND)
            for past in (came, way.start.colours)
        )
        moves = cv2.compare(rested, cv2.add(moved, self._gain), cv2.CMP_GE)
        result = self._sampled(labels, cv2.copyTo(places, moves, at_rest.copy()))
        if holds:
            return result
        low, high = (-_OUTSIDE,) * 2, (columns - 1 + _OUTSIDE, rows - 1 + _OUTSIDE)
        inside = cv2.inRange(places, low, high)
        entered = cv2.bitwise_and(cv2.compare(rested, _NOISE, cv2.CMP_GT), cv2.bitwise_not(inside))
        lost = cv2.compare(cv2.min(moved, rested), self._lost, cv2.CMP_GT)
        fails = cv2.bitwise_or(lost, entered)
        if not fails.any():
            return result
        unknown = cv2.resize(fails, labels.shape[::-1], interpolation=cv2.INTER_NEAREST)
        if labels.dtype == np.uint16:
            unknown = unknown.astype(np.uint16) * 257
        return np.asarray(cv2.bitwise_or(result, unknown))

    def _sampled(self, labels: npt.NDArray[Any], places: Floats) -> npt.NDArray[Any]:
        """Labels at places of the small picture, which are the centres of its pixels."""
        cv2, (rows, columns) = self._cv2, places.shape[:2]
        across, down = labels.shape[1] / columns, labels.shape[0] / rows
        scale = np.array(
            [[across, 0.0, 0.5 * across - 0.5], [0.0, down, 0.5 * down - 0.5]], np.float32
        )
        scaled = cv2.transform(places, scale)
        whole, _ = cv2.convertMaps(scaled, None, cv2.CV_16SC2, nninterpolation=True)
        size = labels.shape[::-1]
        where = cv2.resize(whole, size, interpolation=cv2.INTER_LINEAR)  # no float of frame's size
        edge = cv2.BORDER_REPLICATE
        return np.asarray(cv2.remap(labels, where, None, cv2.INTER_NEAREST, borderMode=edge))


def is_still(past: Glance, now: Glance) -> bool:
    """Whether under 1 % of 32x32 grey cells differ by more than 6 levels of 255."""
    cv2 = load_opencv()
    size = (_STILL_SIDE, _STILL_SIDE)
    cells = [cv2.resize(g.grey, size, interpolation=cv2.INTER_AREA) for g in (past, now)]
    changed = int((cv2.absdiff(*cells) > _STILL_LEVELS).sum())
    return changed < _STILL_SHARE * _STILL_SIDE**2


def load_opencv() -> Any:
    """Import OpenCV with its optical flow."""
    purpose = "with its optical flow"
    return import_opencv(purpose, argument="memory", needs="DISOpticalFlow_create")


def _is_cut(cv2: Any, grey: Bytes, mean_difference: float) -> bool:
    contrast = float(cv2.meanStdDev(grey)[1][0, 0])
    threshold = min(max(_CUT_SHARE * contrast, _CUT_LEVELS[0]), _CUT_LEVELS[1])
    return mean_difference > threshold


def _flow_search(cv2: Any) -> Any:
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)


@functools.lru_cache(maxsize=8)
def _places_of(size_hw: tuple[int, int]) -> Floats:
    """Each pixel's own place: float32 [h, w, 2], x, then y."""
    rows, columns = (np.arange(side, dtype=np.float32) for side in size_hw)
    return np.dstack(np.meshgrid(columns, rows))


def _average(cv2: Any, picture: npt.NDArray[Any], grid_hw: tuple[int, int]) -> Floats:
    """Means over cells; channels laid out side by side are averaged, too."""
    return np.asarray(cv2.resize(picture, grid_hw[::-1], interpolation=cv2.INTER_AREA), np.float32)


LONGEST_REUSE = 1.0  # seconds


class FrameMemory:
    """What one source's frames leave behind for the next; give it with each: ``memory=``.

    With ``steady``, the class logits of past frames are moved along the optical flow and blended
    with the new ones, before pixels are labelled. With ``skip_still``, the labels of the last
    frame that ran are given again while the picture stands still: while under 1 % of 32x32
    grey cells differ from it by more than 6 levels of 255, and for 1 s at most.

    Other classes, another size of frames and a scene cut begin anew. A memory serves one source
    and one call at a time; engines and lanes may take turns with it.

    Args:
        steady: Whether labels are steadied.
        skip_still: Whether still frames are labelled by the last frame that ran.
        blend: How much the past counts; the measured settings if None.

    Raises:
        ArgumentError: Neither is wanted.
        BackendUnavailableError: OpenCV is not installed.

    Example:
        >>> memory = FrameMemory()  # doctest: +SKIP
        >>> for frame in camera:  # doctest: +SKIP
        ...     engine.segment(frame, memory=memory).present()
    """

    def __init__(
        self,
        *,
        steady: bool = True,
        skip_still: bool = False,
        blend: BlendSettings | None = None,
    ) -> None:
        if not (steady or skip_still):
            raise ArgumentError(
                "memory: expected steady or skip_still to be true, got neither. Leave the memory "
                "out to label every frame by itself."
            )
        load_opencv()
        self.steady, self.skip_still = bool(steady), bool(skip_still)
        self._estimator = MotionEstimator(blend) if steady else None
        self._lock = threading.Lock()
        self._past: _Past | None = None
        self._spare: Array | None = None  # as the past's logits, to write the next ones into

    def reset(self) -> None:
        """Forget the past: the next frame is labelled by itself.

        Raises:
            EngineStateError: A frame is being labelled with it.
        """
        with self._exclusive():
            self._forget()

    @contextmanager
    def turn(
        self,
        frame: npt.NDArray[np.uint8],
        classes: BoundClasses,
        rule: LabelRule,
        *,
        channel_order: str,
        captured_at: float | None,
    ) -> Iterator[Turn]:
        """Take part in labelling one frame; for lanes. Any error makes the memory forget.

        Args:
            frame: uint8 [H, W, 3], checked.
            classes: The classes, as the engine gives them.
            rule: How scores become labels.
            channel_order: The frame's.
            captured_at: When the frame was captured, in seconds of a clock of the source's; None
                takes ``time.monotonic()``.

        Raises:
            EngineStateError: Another frame is being labelled with it.
        """
        with self._exclusive():
            try:
                scene = _Scene(classes=classes, size_hw=frame.shape[:2])
                if self._past is not None and not self._past.scene.is_like(scene):
                    self._forget()
                at = time.monotonic() if captured_at is None else captured_at
                yield Turn(self, lambda: Glance.at(frame, channel_order), scene, rule, at)
            except BaseException:
                self._forget()
                raise

    def _forget(self) -> None:
        self._past = self._spare = None

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise EngineStateError(
                "memory: is in use for another frame. Use a separate FrameMemory for each source."
            )
        try:
            yield
        finally:
            self._lock.release()


class Turn:
    """One frame's turn with a memory; made by :meth:`FrameMemory.turn`.

    Call :meth:`reused`; if it has no result, :meth:`steadied` and :meth:`finish`.

    Attributes:
        candidates: Classes that the last frame was labelled with, to be replaced by this one's.
    """

    def __init__(
        self,
        memory: FrameMemory,
        look: Callable[[], Glance],
        scene: _Scene,
        rule: LabelRule,
        at: float,
    ) -> None:
        self._memory, self._look = memory, look
        self._scene, self._rule, self._at = scene, rule, at
        self._logits: Array | None = None
        past = memory._past
        self.candidates: tuple[int, ...] = () if past is None else past.candidates

    @property
    def steadies(self) -> bool:
        """Whether masks are to be steadied."""
        return self._memory.steady

    def reused(self) -> Segmentation | None:
        """The last result again, freshly owned, if the picture stood still; else None."""
        self._glance = self._look()
        past = self._memory._past
        if past is None or past.result is None or past.rule != self._rule:
            return None
        if not 0.0 <= self._at - past.at <= LONGEST_REUSE or not is_still(
            past.glance, self._glance
        ):
            return None
        return _owned(past.result, reused=True)

    def steadied(self, masks: Masks, workspace: Workspace) -> Masks:
        """Blend the masks with the past, in arrays of the memory's own."""
        assert isinstance(masks, ClassLogits), "other families were refused"
        logits, memory = masks.mask_logits, self._memory
        past = None if memory._past is None else memory._past.logits
        if past is not None and past.shape[1] < logits.shape[1]:
            memory._forget()  # it cannot be blended
            past = None
        motion, spare = self._motion(logits.shape[2:]), _rows_of(memory._spare, logits.shape)
        self._logits = ops.warp_blend(
            logits,
            logits if past is None else _rows_of(past, logits.shape),
            workspace.upload("flow", motion.flow),
            workspace.upload("past_weight", motion.past_weight),
            out=workspace.new_array(logits.shape, np.float32) if spare is None else spare,
            stream=workspace.stream,
        )
        return replace(masks, mask_logits=self._logits)

    def finish(self, seg: Segmentation) -> None:
        """Remember the frame, once its result is known to be sound."""
        memory = self._memory
        memory._spare = None if memory._past is None else memory._past.logits
        memory._past = _Past(
            scene=self._scene,
            glance=self._glance,
            at=self._at,
            rule=self._rule,
            logits=self._logits,
            candidates=self.candidates,
            result=_owned(seg) if memory.skip_still else None,
        )

    def _motion(self, grid_hw: tuple[int, int]) -> Motion:
        past, estimator = self._memory._past, self._memory._estimator
        found = None
        if past is not None and estimator is not None:
            found = estimator.between(past.glance, self._glance, grid_hw)
        return Motion.none(grid_hw) if found is None else found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scene:
    """What frames must have in common to follow each other."""

    classes: BoundClasses
    size_hw: tuple[int, int]

    def is_like(self, other: _Scene) -> bool:
        return self.classes is other.classes and self.size_hw == other.size_hw


@dataclass(frozen=True, kw_only=True, eq=False)
class _Past:
    """The last frame that ran."""

    scene: _Scene
    glance: Glance
    at: float
    rule: LabelRule
    logits: Array | None  # steadied
    candidates: tuple[int, ...]  # classes that it was labelled with
    result: Segmentation | None


def _rows_of(array: Array | None, shape: tuple[int, ...]) -> Array | None:
    """The first rows of logits [1, P, gh, gw], of which recorded frames have more than others."""
    fits = array is not None and array.shape[1] >= shape[1]
    return reshaped(array, shape) if fits else None


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def check_family(name: str) -> None:
    """Refuse families whose masks are not logits of classes."""
    if not FAMILIES[name].has_class_logits:
        *most, last = sorted(other for other, family in FAMILIES.items() if family.has_class_logits)
        able = f"{', '.join(most)} or {last}"
        raise ArgumentError(
            f"memory: expected a bundle of family {able}, got {name}. Its frames "
            "can only be labelled one by one: leave out memory, steady and skip_still."
        )


def source_memories(
    sources: Iterable[_Named], *, steady: bool, skip_still: bool
) -> dict[str, FrameMemory] | None:
    """Make a memory for each source of a stream, by its name, or None if none is wanted."""
    if not (steady or skip_still):
        return None
    return {source.name: FrameMemory(steady=steady, skip_still=skip_still) for source in sources}


def _owned(seg: Segmentation, *, reused: bool = False) -> Segmentation:
    maps = {"scores": seg.scores, "class_scores": seg.class_scores}
    copies: dict[str, Any] = {n: None if m is None else m.copy() for n, m in maps.items()}
    return replace(seg, labels=seg.labels.copy(), reused=reused, **copies)
