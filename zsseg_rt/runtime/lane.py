"""A lane: what it takes to label one frame at a time, beside other lanes of the same engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.backends.base import NodeTime, RecordingSession, Session
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import HeadSpec
from zsseg_rt.common.arrays import Array
from zsseg_rt.common.process import OwnProcess
from zsseg_rt.common.settings import is_share
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import (
    ArgumentError,
    BackendError,
    ConfigError,
    CudaError,
    DeviceError,
    EngineStateError,
    FrameError,
)
from zsseg_rt.results.segmentation import DeviceSegmentation, Segmentation
from zsseg_rt.results.visualize import palette
from zsseg_rt.runtime.captures import FrameCaptures, captures_wanted
from zsseg_rt.runtime.families.base import (
    BoundClasses,
    Family,
    Frame,
    FrameState,
    LabelRule,
    Labels,
    Painting,
    PixelLabels,
    Trace,
    run_plainly,
)
from zsseg_rt.runtime.families.candidates import CandidateGate
from zsseg_rt.runtime.frame_memory import FrameMemory, check_family
from zsseg_rt.runtime.frames import (
    MOST_SIDE,
    Nv12Frame,
    Windows,
    as_nv12,
    check_device_frame,
    check_frame,
    check_nv12,
    planes_of,
)
from zsseg_rt.runtime.stages import (
    Candidates,
    Check,
    Encode,
    EncodeWindows,
    Label,
    Preprocess,
    Stage,
    StageList,
    Steady,
)
from zsseg_rt.runtime.workspace import Workspace
from zsseg_rt.text.vocabulary import Vocabulary

Planes = tuple[Array, Array]
"""Brightness uint8 [H, W] and colour uint8 [H / 2, W / 2, 2]; see :class:`Nv12Frame`."""


class Lane:
    """Labels one frame at a time with its engine's classes; made by :meth:`Engine.lane`.

    A lane has a stream, buffers and sessions of its own and shares the weights with the engine's
    other lanes, so each lane may label a frame in a thread of its own. A second ``segment`` on the
    same lane at the same moment raises :class:`EngineStateError`.

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
        bundle: Bundle,
        config: EngineConfig,
        classes_in_force: Callable[[], BoundClasses],
        on_close: Callable[[Lane], None],
    ) -> None:
        self.sessions = MappingProxyType(dict(sessions))
        self.workspace = Workspace(
            device, sleeps=config.sleeps, with_times=config.with_times, with_nvtx=config.with_nvtx
        )
        self._family, self._config, self._bundle = family, config, bundle
        self._clock = self.workspace.clock
        self._windows = Windows.of(bundle.preprocess, bundle.head, config)
        most = config.max_candidates
        self._gate = None if most is None else CandidateGate(most)
        self._captures = FrameCaptures(sessions, self.workspace, wanted=captures_wanted())
        self._build_stages(self.sessions)
        limit = bundle.head.unknown_below if config.unknown_below is None else config.unknown_below
        self._rule = LabelRule(
            head=bundle.head, unknown_below=limit, with_scores=config.with_scores
        )
        self._classes_in_force, self._on_close = classes_in_force, on_close
        self._buffered: tuple[BoundClasses, bool] | None = None  # what buffers have
        self._adopted: BoundClasses | None = None
        self._is_warm = device == "cpu"
        self._process = OwnProcess(self, device)
        self._lock = threading.Lock()
        self._closed = False

    def _build_stages(self, sessions: Mapping[str, Session]) -> None:
        """The stages of frames: as configured, steadied, and of golden samples."""
        workspace = self.workspace
        self._pipeline = pipeline = self._family.pipeline(self._family, sessions, workspace)
        preprocess = Preprocess(
            workspace, self._bundle, sessions["image_encoder"], self._config.channel_order
        )
        encode = Encode(workspace, pipeline, recorded=self._family.in_one_part)
        check = [] if pipeline.checks_masks else [Check(workspace)]
        golden: list[Stage] = [preprocess, encode, *check]
        whole = golden
        if (windows := self._windows) is not None:
            whole = [EncodeWindows(workspace, pipeline, preprocess, windows), Check(workspace)]
        choose = [] if self._gate is None else [Candidates(workspace)]
        label, final = (Label(workspace, recorded=recorded) for recorded in (True, False))
        self.stages = StageList([*whole, *choose, final if choose else label])
        self._steady_stages = StageList([*whole, Steady(workspace), *choose, final])
        self._golden_stages = StageList([*golden, label])

    def segment(
        self,
        frame: npt.NDArray[np.uint8] | Nv12Frame | Planes,
        *,
        unknown_below: float | None = None,
        with_scores: bool | None = None,
        memory: FrameMemory | None = None,
        captured_at: float | None = None,
    ) -> Segmentation:
        """Label every pixel of a frame; see :meth:`Engine.segment`."""
        rule = self._rule_of(unknown_below, with_scores)
        with self._exclusive():
            classes = self._classes_in_force()
            frame = self._checked(frame)
            state = FrameState(frame=frame, classes=classes, rule=rule)
            if memory is None:
                return self._label(state, self.stages)
            self._check_memory(memory, frame)
            order = self._config.channel_order
            with memory.turn(frame, classes, rule, order, captured_at) as state.turn:
                stages = self._steady_stages if memory.steady else self.stages
                seg = self._label(state, stages)
                if not seg.reused:
                    state.turn.finish(seg)
            return seg

    def _checked(self, frame: Any, *, on_gpu: bool = False) -> Frame:
        """A frame that may be labelled: on the lane's GPU, or unless ``on_gpu`` in host memory."""
        device, planes = self.workspace.device, as_nv12(frame)
        if planes is not None:
            is_on_host = not on_gpu and isinstance(planes.luma, np.ndarray)
            check_nv12(planes, "cpu" if is_on_host else device)
            return planes
        if on_gpu or (isinstance(frame, ops.DeviceArray) and device != "cpu"):
            check_device_frame(frame, device)
        else:
            check_frame(frame)
        return frame

    def segment_device(
        self,
        frame: Array | Nv12Frame | Planes,
        *,
        unknown_below: float | None = None,
        with_scores: bool | None = None,
        with_overlay: bool = False,
        alpha: float = 0.5,
    ) -> DeviceSegmentation:
        """Label a frame that is on the lane's GPU; see :meth:`Engine.segment_device`."""
        rule = self._rule_of(unknown_below, with_scores)
        if self.workspace.device == "cpu":
            raise DeviceError(
                "segment_device: expected an engine on a GPU, got one on the CPU. Use segment, or "
                "EngineConfig(device='cuda:0')."
            )
        with self._exclusive():
            classes = self._classes_in_force()
            frame = self._checked(frame, on_gpu=True)
            if alpha is None or not is_share(alpha):
                raise ArgumentError(f"alpha: expected a number in [0, 1], got {alpha!r}")
            weight = float(alpha) if with_overlay else None
            try:
                return self._label_on_device(frame, classes, rule, weight)
            except BufferError as exc:
                raise FrameError(
                    f"frame: expected an array that can be lent on {self.workspace.device}, got: "
                    f"{exc}"
                ) from exc

    def frame_buffer(self, height: int, width: int) -> npt.NDArray[np.uint8]:
        """Where frames may be written for this lane; see :meth:`Engine.frame_buffer`."""
        for name, size in (("height", height), ("width", width)):
            if not isinstance(size, (int, np.integer)) or not 1 <= size <= MOST_SIDE:
                raise ArgumentError(f"{name}: expected from 1 to {MOST_SIDE} pixels, got {size!r}")
        with self._exclusive():
            return self.workspace.frame_buffer(int(height), int(width), 3)

    def run_golden(
        self, frame: npt.NDArray[np.uint8], classes: BoundClasses, head: HeadSpec
    ) -> dict[str, npt.NDArray[Any]]:
        """Label a golden sample's frame in RGB; all intermediates and ``labels``, on the host."""
        if self._config.channel_order == "bgr":
            frame = np.ascontiguousarray(frame[..., ::-1])  # the sample is RGB
        rule = LabelRule(head=head, unknown_below=head.unknown_below, with_scores=False)
        trace: Trace = {}
        with self._exclusive():
            state = FrameState(frame=frame, classes=classes, rule=rule, trace=trace)
            labels = self._label(state, self._golden_stages).labels
            fetched = {name: np.array(self.workspace.fetch(a)) for name, a in trace.items()}
        return fetched | {"labels": labels}

    def node_times(
        self, frame: npt.NDArray[np.uint8], *, runs: int = 10
    ) -> dict[str, tuple[NodeTime, ...]]:
        """Time the nodes of every graph on what a frame feeds them, over several runs.

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
            recorded, stream = self._recorded(frame), self.workspace.stream
            with ops.thread_limit(self._config.num_threads):
                return {
                    name: session.profile_recorded(stream=stream, runs=runs)
                    for name, session in recorded.items()
                }

    def graph_inputs(
        self, frame: npt.NDArray[np.uint8]
    ) -> dict[str, tuple[Mapping[str, Array], ...]]:
        """A frame's inputs of every graph, by graph: one mapping of arrays for each run."""
        with self._exclusive():
            return {name: tuple(one.feeds) for name, one in self._recorded(frame).items()}

    def _recorded(self, frame: npt.NDArray[np.uint8]) -> dict[str, RecordingSession]:
        """Sessions that know what a frame feeds them, by graph."""
        classes = self._classes_in_force()
        recorded = {name: RecordingSession(one) for name, one in self.sessions.items()}
        check_frame(frame)
        was_on, self._captures.is_on = self._captures.is_on, False
        self._build_stages(recorded)
        self._buffered = None  # the same buffers serve both pipelines
        try:
            state = FrameState(frame=frame, classes=classes, rule=self._rule)
            self._label(state, self.stages)
        finally:
            self._build_stages(self.sessions)
            self._buffered, self._captures.is_on = None, was_on
        return recorded

    def close(self) -> None:
        """Free sessions and buffers, after the frame under way. Calling it twice is harmless."""
        if not self._process.is_here:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._buffered = self._adopted = None
            with ExitStack() as parts:  # each also where another one fails, the last one first
                parts.callback(self._on_close, self)
                parts.callback(self.workspace.close)
                for session in self.sessions.values():
                    parts.callback(session.close)
                parts.callback(self._captures.clear)
                parts.callback(self.workspace.synchronize)  # after a frame that failed, too

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_memory(self, memory: object, frame: object) -> None:
        if not isinstance(frame, np.ndarray):
            raise ArgumentError(
                "memory: expected None for a frame in two planes or on a GPU, got one. Convert "
                "the frame to RGB in host memory."
            )
        if not isinstance(memory, FrameMemory):
            raise ArgumentError(f"memory: expected a FrameMemory, got {type(memory).__name__}")
        check_family(self._family.name)

    def _label(self, state: FrameState, stages: StageList) -> Segmentation:
        """Take a frame through the stages, wait, and give out its labels."""
        vocabulary, maps = state.classes.vocabulary, None
        with ops.thread_limit(self._config.num_threads):
            self._begin(state)
            if state.turn is not None:
                again: Segmentation | None = state.turn.reused()
                self._clock.mark("compare")
                if again is not None:
                    self.workspace.synchronize()
                    return replace(again, times=self._clock.times())
            stages.run(state)
            if self._config.with_class_scores is not None:
                num_phrases = len(vocabulary.phrases)
                maps = state.masks.grid_scores(state.rule, self.workspace, num_phrases)
            labels, scores = self._fetch(state.pixels, state.classes)
        return Segmentation(
            labels=labels,
            scores=scores,
            class_scores=None if maps is None else vocabulary.best_of_synonyms(maps),
            **self._facts(vocabulary),
        )

    def _label_on_device(
        self, frame: Frame, classes: BoundClasses, rule: LabelRule, alpha: float | None
    ) -> DeviceSegmentation:
        """Label a frame on the GPU and leave the labels there."""
        workspace, vocabulary = self.workspace, classes.vocabulary
        if alpha is not None and not isinstance(frame, Nv12Frame):
            rule = replace(rule, painting=self._painting(frame, vocabulary.names, alpha))
        state = FrameState(frame=frame, classes=classes, rule=rule)
        self._begin(state)
        self.stages.run(state)
        pixels: PixelLabels = state.pixels
        in_place = pixels.look_up is None and (pixels.of_classes or vocabulary.is_plain)
        give: Callable[[Any], Any] = workspace.copy if in_place else workspace.place
        source = pixels.labels, pixels.scores
        if not in_place:
            source = self._fetch(pixels, state.classes, is_last=False)
        labels, scores = give(source[0]), None if source[1] is None else give(source[1])
        drawing: Array | None = None
        if rule.painting is not None and pixels.painted:
            drawing = workspace.copy(rule.painting.image)
        elif alpha is not None:
            drawing = self._draw(frame, labels, vocabulary.names, alpha)
        self._clock.mark("results")
        workspace.synchronize()
        self._require_finite()
        return DeviceSegmentation(
            labels=labels, scores=scores, picture=drawing, **self._facts(vocabulary)
        )

    def _facts(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """A result's fields beside its arrays."""
        return {
            "names": vocabulary.names,
            "vocabulary_version": vocabulary.version,
            "times": self._clock.times(),
            "channel_order": self._config.channel_order,
            "candidates": None if self._gate is None else self._gate.names(vocabulary),
        }

    def _begin(self, state: FrameState) -> None:
        """Adopt the frame's classes and start its clock."""
        on_host, captured = state.classes, self._captures.is_on and state.trace is None
        state.classes = self._adopt(on_host, captured)
        if captured:
            state.run = self._captures.run
        if not self._is_warm:  # kernels and libraries are loaded at first use: in no frame's time
            self._clock.start()
            self._golden_stages.run(replace(state, run=run_plainly, turn=None, trace=None))
            self.workspace.synchronize()
            self._is_warm = True
        if self._gate is not None and state.trace is None:
            self._gate.begin(on_host.seen, state.turn)
            state.classes = replace(state.classes, gate=self._gate)
        self._clock.start()

    def _adopt(self, classes: BoundClasses, captured: bool) -> BoundClasses:
        """Return the classes in this lane's buffers; they are copied there when they change."""
        last = self._buffered
        if self._adopted is None or last is None or last[0] is not classes or last[1] != captured:
            self._buffered = None  # a failed copy leaves buffers with neither the old nor the new
            rows = self._family.rows_for(len(classes.vocabulary.phrases)) if captured else None
            self._adopted = self._pipeline.adopt(classes, num_rows=rows)
            self.workspace.synchronize()  # what is copied from may be freed after this
            self._buffered = (classes, captured)
        return self._adopted

    def _fetch(self, pixels: PixelLabels, classes: BoundClasses, *, is_last: bool = True) -> Labels:
        """Wait for labels and scores, and do what is left to the host."""
        workspace, on_gpu = self.workspace, self.workspace.device != "cpu"
        labels = workspace.download(pixels.labels)
        scores = None if pixels.scores is None else workspace.download(pixels.scores)
        if on_gpu:
            if is_last:
                self._clock.mark("results")
            workspace.synchronize()
        if pixels.look_up is not None:
            labels, scores = pixels.look_up(labels, classes)
        self._require_finite()
        if not (pixels.of_classes or classes.vocabulary.is_plain):
            labels = classes.vocabulary.label_table[labels]
        if not on_gpu:
            self._clock.mark("results")
        return labels, scores

    def _require_finite(self) -> None:
        if not self.workspace.flag()[0][0]:
            raise BackendError(
                "mask_logits: expected finite numbers, got NaN or infinity at precision "
                f"{self.sessions['image_encoder'].precision}. Use precision='float32' and run "
                "self_check(), which shows whether the weights are sound."
            )

    def _painting(self, frame: Array, names: tuple[str, ...], alpha: float) -> Painting:
        """For masks that draw as they label: from and into buffers that captures may hold."""
        workspace, shape = self.workspace, (int(frame.shape[0]), int(frame.shape[1]), 3)
        source: Any = workspace.array("painted frame", shape, np.uint8)
        source.copy_from(frame, stream=workspace.stream)
        return Painting(
            frame=source,
            palette=self._palette(names),
            image=workspace.array("picture", shape, np.uint8),
            alpha=alpha,
        )

    def _draw(self, frame: Frame, labels: Array, names: tuple[str, ...], alpha: float) -> Array:
        """Draw in a launch of its own, on planes or where masks did not: uint8 [H, W, 3]."""
        height, width, _ = frame.shape
        image, matrix = planes_of(frame)
        return ops.overlay(
            image,
            labels,
            self._palette(names),
            alpha=alpha,
            channel_order=self._config.channel_order,
            **matrix,
            out=self.workspace.new_array((int(height), int(width), 3), np.uint8),
            stream=self.workspace.stream,
        )

    def _palette(self, names: tuple[str, ...]) -> Array:
        return self.workspace.upload("palette", palette(names, self._config.channel_order))

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
        self._process.require()
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
            try:
                yield
            except BaseException:  # wait for what a failed frame leaves: its memory is used again
                with suppress(CudaError):  # the frame's own error says more
                    self.workspace.synchronize()
                raise
        finally:
            self._clock.stop()
            self._lock.release()
