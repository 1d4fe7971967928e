"""A memory of past frames for the next one: how the image moved, labels that flicker less.

A memory belongs to a source, not to a lane: a lane is handed the memory together with the frame.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.common.arrays import Array, reshaped
from zsseg_rt.common.extras import import_opencv
from zsseg_rt.errors import ArgumentError, EngineStateError
from zsseg_rt.ops import core
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.runtime.families.base import BoundClasses, ClassLogits, LabelRule, Masks
from zsseg_rt.runtime.workspace import Workspace

SIDE = 128  # of the small images, whatever the frame's shape
FOLLOW_SIDE = 160  # the longer one of those that labels are moved by; they keep the frame's shape
_SHORTEST = 32  # what is left of the other one; the flow's patches need it
_STILL_SIDE = 32
# Few cells that change much matter more than many that change a little: 2 levels in one cell of 30
# spare as much of a still scene, but also 5 % of a moving one instead of 1 %.
_STILL_LEVELS = 6
_STILL_SHARE = 0.01
# A cut leaves a mean difference of 28 to 100 levels after the flow is undone, moving cameras 1 to
# 12, unless they are so fast that no flow is found. Dark and dull images differ less.
_CUT_SHARE = 0.5  # of the grey image's standard deviation
_CUT_LEVELS = (10.0, 25.0)  # the least and the largest threshold

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
    def at(
        cls, frame: Bytes, channel_order: str, size_hw: tuple[int, int] = (SIDE, SIDE)
    ) -> Glance:
        """Reduce a frame, uint8 [H, W, 3], whatever its shape."""
        cv2, (height, width) = load_opencv(), size_hw
        # Sampled before its pixels are averaged: 0.1 ms for 720p; the mean of all takes 8 ms
        sampled = min(frame.shape[1], 2 * width), min(frame.shape[0], 2 * height)
        colours = cv2.resize(
            cv2.resize(frame, sampled), (width, height), interpolation=cv2.INTER_AREA
        )
        code = cv2.COLOR_BGR2GRAY if channel_order == "bgr" else cv2.COLOR_RGB2GRAY
        return cls(colours=colours, grey=cv2.cvtColor(colours, code))


class Motion(NamedTuple):
    """Where the cells of a grid were one frame before; the arguments of ``ops.warp_blend``."""

    flow: Floats  # float32 [1, h, w, 2]: x, then y, in cells
    past_weight: Floats  # float32 [1, h, w], in [0, 1]


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
        """Find where each cell of a grid over a frame was in the one before; None after a cut."""
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
        return Motion(cells[None], weight[None])

    def _trust(self, cells: Floats, difference: Floats) -> Floats:
        settings = self._settings
        fraction = cells - np.floor(cells)
        blur = (fraction * (1 - fraction)).sum(axis=-1)
        trust = np.maximum(settings.most - settings.per_blur * blur, settings.least)
        span = settings.lost_levels - settings.sure_levels
        likeness = np.clip((settings.lost_levels - difference) / span, 0.0, 1.0)
        return np.asarray(trust * likeness, np.float32)


def follow_size(size_hw: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the small images by which labels of such frames are moved."""
    scale = min(1.0, FOLLOW_SIDE / max(size_hw))
    height, width = (max(round(side * scale), _SHORTEST) for side in size_hw)
    return height, width


@dataclass(eq=False)
class Way:
    """The way back from a frame to one that was labelled."""

    start: Glance  # The labelled frame, reduced to :func:`follow_size`
    # float32 [h, w, 2]: where each pixel of the other frame was in it, relative to where it is: x,
    # then y; None after a scene cut
    flow: Floats | None
    steps: int = 0

    @classmethod
    def begin(cls, start: Glance) -> Way:
        """From the labelled frame to itself."""
        return cls(start, np.zeros((*start.grey.shape, 2), np.float32))


@dataclass(eq=False)
class LabelMover:
    """Moves labels along the optical flow of frames of one size; for one thread at a time."""

    # The numbers were chosen by benchmarks/follow.py --tune, on other clips than it reports.
    holds: bool = False  # Whether places where motion fails keep their last label
    # Levels of 255 by which moving must explain a place better than rest does, one fewer with every
    # other step, or noise would move still things
    gain: int = 3
    lost: int = 60  # Where the better of both is off by more, every other label is wrong
    entered: int = 20  # What comes in from outside counts as new where rest is off by more

    def __post_init__(self) -> None:
        self._cv2 = load_opencv()
        self._neighbours = _flow_search(self._cv2, level=1, stride=6)
        self._apart = _flow_search(self._cv2, level=1, patch=4, stride=3, iterations=8)

    def extend(self, before: Glance, now: Glance, *ways: Way) -> None:
        """Lead ways on from one frame to its neighbour; a scene cut ends them."""
        cv2 = self._cv2
        step: Floats = self._neighbours.calc(now.grey, before.grey, None)
        is_cut = _is_cut(cv2, now.grey, cv2.mean(cv2.absdiff(now.grey, before.grey))[0])
        if is_cut:
            came = _sampled(cv2, before.grey, step)
            is_cut = _is_cut(cv2, now.grey, cv2.mean(cv2.absdiff(now.grey, came))[0])
        for way in ways:
            if way.flow is not None:
                way.flow = None if is_cut else cv2.add(step, _sampled(cv2, way.flow, step))
            way.steps += 1

    def move(self, labels: npt.NDArray[Any], way: Way, now: Glance) -> npt.NDArray[Any]:
        """The labels [H, W] of the way's start, where they are now; the way is set right."""
        if way.flow is None:
            return labels.copy() if self.holds else np.full_like(labels, np.iinfo(labels.dtype).max)
        start, refined = way.start, None
        if way.steps % 2:
            refined = self._apart.calc(now.grey, start.grey, way.flow.copy())
        gain = max(self.gain - way.steps // 2, 1)
        limits = (gain, 255, 255) if self.holds else (gain, self.lost, self.entered)
        moved, flow = np.empty_like(labels), np.empty_like(way.flow)
        # whichever explains the frame best: where the way leads, the search from there, or rest
        core.move_labels(labels, way.flow, refined, start.colours, now.colours, limits, moved, flow)
        way.flow = flow
        return moved


def _sampled(cv2: Any, image: npt.NDArray[Any], flow: Floats) -> npt.NDArray[Any]:
    """A small image at the places that a flow leads to; by fixed point, in half the time."""
    places = cv2.convertMaps(cv2.add(_places_of(flow.shape[:2]), flow), None, cv2.CV_16SC2)
    edge = cv2.BORDER_REPLICATE
    return np.asarray(cv2.remap(image, *places, cv2.INTER_LINEAR, borderMode=edge))


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


def _flow_search(
    cv2: Any, *, level: int = 2, patch: int = 8, stride: int = 4, iterations: int = 12
) -> Any:
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    search.setFinestScale(level)
    search.setPatchSize(patch)
    search.setPatchStride(stride)
    search.setGradientDescentIterations(iterations)
    return search


@functools.lru_cache(maxsize=8)
def _places_of(size_hw: tuple[int, int]) -> Floats:
    """Each pixel's own place: float32 [h, w, 2], x, then y."""
    rows, columns = (np.arange(side, dtype=np.float32) for side in size_hw)
    return np.dstack(np.meshgrid(columns, rows))


def _average(cv2: Any, image: npt.NDArray[Any], grid_hw: tuple[int, int]) -> Floats:
    """Means over cells; channels laid out side by side are averaged, too."""
    return np.asarray(cv2.resize(image, grid_hw[::-1], interpolation=cv2.INTER_AREA), np.float32)


LONGEST_REUSE = 1.0  # seconds


class FrameMemory:
    """The memory of one source's frames for the next; give it with each: ``memory=``.

    With ``steady``, the class logits of past frames are moved along the optical flow and blended
    with the new ones, before pixels are labelled. With ``skip_still``, the labels of the last
    frame that ran are given again while the image stands still: while under 1 % of 32x32
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
        self._past: Turn | None = None  # that of the last frame that ran
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
        frame: Any,
        classes: BoundClasses,
        rule: LabelRule,
        channel_order: str,
        captured_at: float | None,
    ) -> Iterator[Turn]:
        """Take part in labelling one checked frame; for lanes. Any error makes it forget."""
        with self._exclusive():
            try:
                turn = Turn(
                    memory=self,
                    glance=Glance.at(frame, channel_order),
                    classes=classes,
                    size_hw=frame.shape[:2],
                    rule=rule,
                    at=time.monotonic() if captured_at is None else captured_at,
                )
                past = self._past
                if past and (past.classes is not classes or past.size_hw != turn.size_hw):
                    self._forget()
                if self._past is not None:
                    turn.candidates = self._past.candidates
                yield turn
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


@dataclass(kw_only=True, eq=False)
class Turn:
    """One frame's turn with a memory, and what is known of it afterwards.

    Call :meth:`reused`; if it has no result, :meth:`steadied` and :meth:`finish`.
    """

    memory: FrameMemory
    glance: Glance
    classes: BoundClasses
    size_hw: tuple[int, ...]
    rule: LabelRule
    at: float
    candidates: tuple[int, ...] = ()  # Classes of the last frame, to be replaced by this one's
    logits: Array | None = None  # Steadied
    result: Segmentation | None = None

    def reused(self) -> Segmentation | None:
        """The last result again, freshly owned, if the image stood still; else None."""
        past = self.memory._past
        if past is None or past.result is None or past.rule != self.rule:
            return None
        if not 0.0 <= self.at - past.at <= LONGEST_REUSE or not is_still(past.glance, self.glance):
            return None
        return _owned(past.result, reused=True)

    def steadied(self, masks: Masks, workspace: Workspace) -> Masks:
        """Blend the masks with the past, in arrays of the memory's own."""
        assert isinstance(masks, ClassLogits), "other families were refused"
        logits, memory = masks.mask_logits, self.memory
        past = None if memory._past is None else memory._past.logits
        if past is not None and past.shape[1] < logits.shape[1]:
            memory._forget()  # it cannot be blended
            past = None
        flow, past_weight = self._motion(logits.shape[2:])
        spare = _rows_of(memory._spare, logits.shape)
        self.logits = ops.warp_blend(
            logits,
            logits if past is None else _rows_of(past, logits.shape),
            workspace.upload("flow", flow),
            workspace.upload("past_weight", past_weight),
            out=workspace.new_array(logits.shape, np.float32) if spare is None else spare,
            stream=workspace.stream,
        )
        return replace(masks, mask_logits=self.logits)

    def finish(self, seg: Segmentation) -> None:
        """Remember the frame, once its result is known to be sound."""
        memory, past = self.memory, self.memory._past
        memory._spare = None if past is None else past.logits
        self.result = _owned(seg) if memory.skip_still else None
        memory._past = self
        del self.memory  # which holds this turn: a cycle would keep logits on a GPU

    def _motion(self, grid_hw: tuple[int, int]) -> Motion:
        past, estimator = self.memory._past, self.memory._estimator
        if past is not None and estimator is not None:
            motion = estimator.between(past.glance, self.glance, grid_hw)
            if motion is not None:
                return motion
        return Motion(*(np.zeros((1, *grid_hw, *axes), np.float32) for axes in ((2,), ())))


def _rows_of(array: Array | None, shape: tuple[int, ...]) -> Array | None:
    """The first rows of logits [1, P, gh, gw], of which recorded frames have more than others."""
    fits = array is not None and array.shape[1] >= shape[1]
    return reshaped(array, shape) if fits else None


def check_family(name: str) -> None:
    """Refuse families whose masks are not logits of classes."""
    if not FAMILIES[name].has_class_logits:
        *most, last = sorted(other for other, family in FAMILIES.items() if family.has_class_logits)
        able = f"{', '.join(most)} or {last}"
        raise ArgumentError(
            f"memory: expected a bundle of family {able}, got {name}. Its frames "
            "can only be labelled one by one: leave out memory, steady and skip_still."
        )


def _owned(seg: Segmentation, *, reused: bool = False) -> Segmentation:
    maps = {"scores": seg.scores, "class_scores": seg.class_scores}
    copies: dict[str, Any] = {n: None if m is None else m.copy() for n, m in maps.items()}
    return replace(seg, labels=seg.labels.copy(), reused=reused, **copies)
