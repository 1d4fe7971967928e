"""A lane: what it takes to label one frame at a time, beside other lanes of the same engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.arrays import Array, reshaped
from zsseg_rt.backends.base import NodeTime, Session
from zsseg_rt.backends.recording import RecordingSession
from zsseg_rt.bundle_specs import HeadSpec, PreprocessSpec
from zsseg_rt.clock import NvtxRanges
from zsseg_rt.config import EngineConfig, is_share
from zsseg_rt.errors import (
    ArgumentError,
    BackendError,
    ConfigError,
    EngineStateError,
    VocabularyError,
)
from zsseg_rt.families.base import BoundClasses, Family, LabelRule, Masks, Trace
from zsseg_rt.frame_check import check_frame as _check_frame
from zsseg_rt.result import Segmentation
from zsseg_rt.steady.memory import FrameMemory, Turn, check_family
from zsseg_rt.workspace import Workspace

__all__ = ["Lane"]


class Lane:
    """Labels one frame at a time with its engine's classes; made by :meth:`Engine.lane`.

    A lane has a stream, buffers and sessions of its own and shares the weights with the engine's
    other lanes, so each lane may label a frame in a thread of its own. A second ``segment`` on the
    same lane at the same moment raises :class:`EngineStateError`.

    Args:
        family: How the bundle's features become masks.
        sessions: The lane's own sessions by graph name.
        device: ``"cpu"`` or ``"cuda:N"``.
        preprocess: How a frame becomes the encoder's input.
        head: How scores become labels.
        config: The engine's settings.
        classes: Returns the engine's classes, or None before they are named.
        on_close: Called once, when the lane is closed.

    Example:
        >>> with Engine("street.zsseg", EngineConfig(num_lanes=2)) as engine:  # doctest: +SKIP
        ...     engine.set_classes(["road", "person"])
        ...     with engine.lane() as lane:
        ...         lane.segment(frame).save("mask.png")
    """

    def __init__(
        self,
        *,
        family: Family,
        sessions: Mapping[str, Session],
        device: str,
        preprocess: PreprocessSpec,
        head: HeadSpec,
        config: EngineConfig,
        classes: Callable[[], BoundClasses | None],
        on_close: Callable[[Lane], None],
    ) -> None:
        self.sessions = MappingProxyType(dict(sessions))
        ranges = NvtxRanges() if config.with_nvtx else None
        self.workspace = Workspace(device)
        self._family = family
        self._pipeline = family.pipeline(sessions, self.workspace)
        self._clock = self.workspace.clock(enabled=config.with_times, ranges=ranges)
        self._preprocess, self._config = preprocess, config
        self._rule = LabelRule(
            head=head, unknown_below=config.unknown_below, with_scores=config.with_scores
        )
        self._classes, self._on_close = classes, on_close
        self._given: BoundClasses | None = None  # what the buffers hold, as the engine gave it
        self._adopted: BoundClasses | None = None
        self._lock = threading.Lock()
        self._closed = False

    def segment(
        self,
        frame: npt.NDArray[np.uint8],
        *,
        unknown_below: float | None = None,
        with_scores: bool | None = None,
        memory: FrameMemory | None = None,
        captured_at: float | None = None,
    ) -> Segmentation:
        """Label every pixel of a frame.

        Args:
            frame: uint8 [H, W, 3], C-contiguous, any size from 1x1 up, in the configured channel
                order. Borrowed until the call returns.
            unknown_below: Score in [0, 1] below which a pixel is unknown; 0 keeps every pixel; None
                takes the engine's setting.
            with_scores: Whether the result carries per-pixel scores; None takes the engine's
                setting.
            memory: What the source's past frames left behind; None labels the frame by itself.
            captured_at: When the frame was captured, in seconds of the source's clock, for a
                memory that skips still frames; None takes ``time.monotonic()``.

        Returns:
            Labels of the frame's own size, freshly owned, for the classes that were in force when
            the call began.

        Raises:
            ShapeError: The frame is not [H, W, 3], is empty, or is not C-contiguous.
            DTypeError: The frame is not uint8, or is a masked array.
            ArgumentError: ``unknown_below`` is outside [0, 1], or the bundle's family has no use
                for a memory.
            VocabularyError: No classes have been named yet.
            EngineStateError: The lane or its engine is closed, or it or the memory is busy in
                another thread.
            BackendError: The graphs gave NaN or infinity, or the backend failed.
        """
        rule = self._rule_of(unknown_below, with_scores)
        with self._exclusive():
            classes = self._classes()
            if classes is None:
                raise VocabularyError("class_names: expected classes, got none yet. "
                                      "Call set_classes([...]) first.")  # fmt: skip
            if memory is None:
                return self._label(frame, classes, rule)
            return self._label_with(memory, frame, classes, rule, captured_at)

    def run_golden(
        self, frame: npt.NDArray[np.uint8], classes: BoundClasses, head: HeadSpec
    ) -> dict[str, npt.NDArray[Any]]:
        """Label a golden sample and keep every intermediate.

        Args:
            frame: The sample's frame, uint8 [H, W, 3] RGB.
            classes: The sample's classes, bound.
            head: The rule that its labels follow.

        Returns:
            The intermediates by name and ``labels``, in host memory.
        """
        if self._config.channel_order == "bgr":
            frame = np.ascontiguousarray(frame[..., ::-1])  # the sample is RGB
        rule = LabelRule(head=head, unknown_below=None, with_scores=False)
        trace: Trace = {}
        with self._exclusive():
            labels = self._label(frame, classes, rule, trace).labels
            fetched = {name: np.array(self.workspace.fetch(a)) for name, a in trace.items()}
        return fetched | {"labels": labels}

    def node_times(
        self, frame: npt.NDArray[np.uint8], *, runs: int = 10
    ) -> dict[str, tuple[NodeTime, ...]]:
        """Time the nodes of every graph on what a frame feeds them.

        Args:
            frame: As for :meth:`segment`.
            runs: How many runs the times are the mean of.

        Returns:
            By graph, its nodes in the order they ran.

        Raises:
            ConfigError: The engine was made without ``with_node_times``.
            VocabularyError: No classes have been named yet.
            EngineStateError: The lane or its engine is closed, or busy in another thread.
            BackendError: The backend does not tell.
        """
        if not self._config.with_node_times:
            raise ConfigError(
                "with_node_times: expected True to time nodes, got False. Create the engine with "
                "EngineConfig(with_node_times=True)."
            )
        with self._exclusive():
            classes = self._classes()
            if classes is None:
                raise VocabularyError("class_names: expected classes, got none yet. "
                                      "Call set_classes([...]) first.")  # fmt: skip
            recorded = {name: RecordingSession(one) for name, one in self.sessions.items()}
            usual, self._pipeline = (
                self._pipeline,
                self._family.pipeline(recorded, self.workspace),
            )
            try:
                self._given = None  # both pipelines keep classes in the same buffers
                self._label(frame, classes, self._rule)
            finally:
                self._pipeline, self._given = usual, None
            with ops.thread_limit(self._config.num_threads):
                stream = self.workspace.stream
                return {
                    name: session.profile_recorded(stream=stream, runs=runs)
                    for name, session in recorded.items()
                }

    def close(self) -> None:
        """Free sessions and buffers, after the frame under way. Calling it twice is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self.workspace.synchronize()  # also after a frame that ended in an error
            finally:
                self._free()

    def _free(self) -> None:
        """Free everything, each part also where another one fails."""
        with ExitStack() as parts:
            parts.callback(self._on_close, self)
            parts.callback(self.workspace.close)
            for session in self.sessions.values():
                parts.callback(session.close)
            self._given = self._adopted = None

    def __enter__(self) -> Lane:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _label_with(
        self,
        memory: FrameMemory,
        frame: npt.NDArray[np.uint8],
        classes: BoundClasses,
        rule: LabelRule,
        captured_at: float | None,
    ) -> Segmentation:
        if not isinstance(memory, FrameMemory):
            raise ArgumentError(f"memory: expected a FrameMemory, got {type(memory).__name__}")
        check_family(self._family.name)
        _check_frame(frame)
        order = self._config.channel_order
        with memory.turn(
            frame, classes, rule, channel_order=order, captured_at=captured_at
        ) as turn:
            seg = self._label(frame, classes, rule, turn=turn)
            if not seg.reused:
                turn.finish(seg)
        return seg

    def _label(
        self,
        frame: npt.NDArray[np.uint8],
        classes: BoundClasses,
        rule: LabelRule,
        trace: Trace | None = None,
        turn: Turn | None = None,
    ) -> Segmentation:
        _check_frame(frame)
        clock, workspace, vocabulary = self._clock, self.workspace, classes.vocabulary
        with ops.thread_limit(self._config.num_threads):
            adopted = self._adopt(classes)
            clock.start()
            again = None if turn is None else self._look_back(turn)
            if again is not None:
                return again
            masks, finite = self._checked_masks(frame, adopted, trace)
            if turn is not None and turn.steadies:
                masks = turn.steadied(masks, workspace)
                clock.mark("steady")
            labels, scores = masks.label(frame.shape[:2], adopted, rule, workspace, clock)
            low = self._config.with_class_scores
            maps = None if low is None else masks.grid_scores(rule, workspace)
        if not workspace.fetch(finite)[0]:
            raise BackendError(
                "mask_logits: expected finite numbers, got NaN or infinity at precision "
                f"{self.sessions['image_encoder'].precision}. Use precision='float32' and run "
                "self_check(), which tells whether the weights are sound."
            )
        if not vocabulary.is_plain:
            labels = vocabulary.label_table[labels]
        clock.mark("results")
        workspace.synchronize()
        return Segmentation(
            labels=labels,
            names=vocabulary.names,
            vocabulary_version=vocabulary.version,
            scores=scores,
            times=MappingProxyType(clock.times()),
            channel_order=self._config.channel_order,
            class_scores=None if maps is None else vocabulary.best_of_synonyms(maps),
        )

    def _look_back(self, turn: Turn) -> Segmentation | None:
        again = turn.reused()
        self._clock.mark("compare")
        if again is None:
            return None
        self.workspace.synchronize()
        return replace(again, times=MappingProxyType(self._clock.times()))

    def _checked_masks(
        self, frame: npt.NDArray[np.uint8], classes: BoundClasses, trace: Trace | None
    ) -> tuple[Masks, Array]:
        """Masks, and one byte on the device: whether they are finite."""
        masks = self._masks(frame, classes, trace)
        finite = ops.all_finite(
            masks.mask_logits,
            out=self.workspace.array("finite", (1,), np.uint8),
            stream=self.workspace.stream,
        )
        self._clock.mark("check")
        return masks, finite

    def _masks(
        self, frame: npt.NDArray[np.uint8], classes: BoundClasses, trace: Trace | None
    ) -> Masks:
        spec, workspace = self._preprocess, self.workspace
        pixels = ops.preprocess(
            workspace.upload("frame", frame),
            size_hw=spec.size_hw,
            mean=spec.mean,
            std=spec.std,
            channel_order=self._config.channel_order,
            out=workspace.array("image", (3, *spec.size_hw), np.float32),
            stream=workspace.stream,
        )
        image = reshaped(pixels, (1, 3, *spec.size_hw))
        self._clock.mark("preprocess")
        if trace is not None:
            trace["image"] = image
        return self._pipeline.masks(image, classes, self._clock, trace)

    def _adopt(self, classes: BoundClasses) -> BoundClasses:
        """Return the classes in this lane's buffers; they are copied there when they change."""
        if self._adopted is None or self._given is not classes:
            self._given = None  # a failed copy leaves buffers with neither the old nor the new
            self._adopted = self._pipeline.adopt(classes)
            self._given = classes
        return self._adopted

    def _rule_of(self, unknown_below: float | None, with_scores: bool | None) -> LabelRule:
        if unknown_below is None and with_scores is None:
            return self._rule
        if not is_share(unknown_below):
            raise ArgumentError(
                f"unknown_below: expected a score in [0, 1] or None, got {unknown_below}. "
                "0 keeps every pixel."
            )
        if not (with_scores is None or isinstance(with_scores, (bool, np.bool_))):
            raise ArgumentError(f"with_scores: expected True, False or None, got {with_scores!r}")
        changes: dict[str, Any] = {"unknown_below": unknown_below, "with_scores": with_scores}
        return replace(self._rule, **{k: v for k, v in changes.items() if v is not None})

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise EngineStateError(
                "engine: is busy in another thread. Open a lane per thread with engine.lane(), or "
                "take turns."
            )
        try:
            if self._closed:
                raise EngineStateError(
                    "lane: is closed, or its engine is. Open another with engine.lane()."
                )
            yield
        finally:
            self._clock.stop()
            self._lock.release()
