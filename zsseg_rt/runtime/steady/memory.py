"""The memory of one source: its last frame, what was made of it, and how the next one follows."""

from __future__ import annotations

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
from zsseg_rt.errors import ArgumentError, EngineStateError
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.runtime.families.base import BoundClasses, LabelRule, Masks
from zsseg_rt.runtime.families.masks import ClassLogits
from zsseg_rt.runtime.steady.motion import (
    BlendSettings,
    Glance,
    Motion,
    MotionEstimator,
    is_still,
    load_opencv,
)
from zsseg_rt.runtime.workspace import Workspace

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
