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
from zsseg_rt.backends.base import NodeTime, Session
from zsseg_rt.backends.recording import RecordingSession
from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.common.arrays import Array
from zsseg_rt.common.forks import OwnProcess
from zsseg_rt.config import EngineConfig, is_share
from zsseg_rt.errors import (
    ArgumentError,
    ConfigError,
    CudaError,
    DeviceError,
    EngineStateError,
    FrameError,
    VocabularyError,
)
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.runtime.device_result import DeviceSegmentation
from zsseg_rt.runtime.families.base import BoundClasses, Family, LabelRule, Trace
from zsseg_rt.runtime.inputs.checks import MOST_SIDE, check_device_frame, check_frame
from zsseg_rt.runtime.inputs.nv12 import Nv12Frame, as_nv12, check_nv12
from zsseg_rt.runtime.inputs.window_plan import Windows
from zsseg_rt.runtime.path import FramePath
from zsseg_rt.runtime.steady.memory import FrameMemory, check_family
from zsseg_rt.runtime.workspace import Workspace

Planes = tuple[Array, Array]
"""Brightness uint8 [H, W] and colour uint8 [H / 2, W / 2, 2]; see :class:`Nv12Frame`."""


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
        self.workspace = Workspace(device, sleeps=config.sleeps)
        self._family, self._config = family, config
        self._path = FramePath(
            family,
            self.sessions,
            self.workspace,
            preprocess,
            config,
            head=head,
            windows=Windows.of(preprocess, head, config),
        )
        self._rule = LabelRule(
            head=head, unknown_below=config.unknown_below, with_scores=config.with_scores
        )
        self._classes, self._on_close = classes, on_close
        self.expect_lanes = self._path.expect_lanes
        self._process = OwnProcess(self, device)
        self._lock = threading.Lock()
        self._closed = False

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
            planes = as_nv12(frame)
            if planes is not None:
                is_on_host = isinstance(planes.luma, np.ndarray)
                check_nv12(planes, "cpu" if is_on_host else self.workspace.device)
                _refuse_memory(memory)
                return self._path.label(planes, classes, rule)
            if not isinstance(frame, np.ndarray) and self._is_ours(frame):
                check_device_frame(frame, self.workspace.device)
                _refuse_memory(memory)
                return self._path.label(frame, classes, rule)
            check_frame(frame)
            assert isinstance(frame, np.ndarray)
            if memory is None:
                return self._path.label(frame, classes, rule)
            return self._label_with(memory, frame, classes, rule, captured_at)

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
            planes = as_nv12(frame)
            if planes is None:
                check_device_frame(frame, self.workspace.device)
            else:
                check_nv12(planes, self.workspace.device)
            drawn = _overlay_weight(with_overlay, alpha)
            given = frame if planes is None else planes
            try:
                return self._path.label_device(given, classes, rule, alpha=drawn)
            except BufferError as exc:
                raise FrameError(
                    f"frame: expected an array that can be lent on {self.workspace.device}, got: "
                    f"{exc}"
                ) from exc

    def _is_ours(self, frame: Any) -> bool:
        """Whether a frame is an array of ours on a GPU, for an engine on one."""
        return self.workspace.device != "cpu" and isinstance(frame, ops.DeviceArray)

    def frame_buffer(self, height: int, width: int) -> npt.NDArray[np.uint8]:
        """Where frames may be written for this lane; see :meth:`Engine.frame_buffer`."""
        for name, size in (("height", height), ("width", width)):
            if not isinstance(size, (int, np.integer)) or not 1 <= size <= MOST_SIDE:
                raise ArgumentError(f"{name}: expected from 1 to {MOST_SIDE} pixels, got {size!r}")
        with self._exclusive():
            return self.workspace.frame_buffer(int(height), int(width))

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
            check_frame(frame)
            labels = self._path.label(frame, classes, rule, trace).labels
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
            recorded = self._recorded(frame)
            with ops.thread_limit(self._config.num_threads):
                stream = self.workspace.stream
                return {
                    name: session.profile_recorded(stream=stream, runs=runs)
                    for name, session in recorded.items()
                }

    def graph_inputs(
        self, frame: npt.NDArray[np.uint8]
    ) -> dict[str, tuple[Mapping[str, Array], ...]]:
        """What a frame feeds to every graph, by graph: one mapping of arrays for each run.

        Raises:
            VocabularyError: No classes have been named yet.
            EngineStateError: The lane or its engine is closed, or busy in another thread.
        """
        with self._exclusive():
            return {name: session.feeds for name, session in self._recorded(frame).items()}

    def _recorded(self, frame: npt.NDArray[np.uint8]) -> dict[str, RecordingSession]:
        """Sessions that know what a frame feeds them, by graph."""
        classes = self._classes_in_force()
        recorded = {name: RecordingSession(one) for name, one in self.sessions.items()}
        check_frame(frame)
        with self._path.using(recorded):
            self._path.label(frame, classes, self._rule)
        return recorded

    def close(self) -> None:
        """Free sessions and buffers, after the frame under way. Calling it twice is harmless."""
        if not self._process.is_here:
            return
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
            self._path.close()

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *exception: object) -> None:
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
        order = self._config.channel_order
        with memory.turn(
            frame, classes, rule, channel_order=order, captured_at=captured_at
        ) as turn:
            seg = self._path.label(frame, classes, rule, turn=turn)
            if not seg.reused:
                turn.finish(seg)
        return seg

    def _classes_in_force(self) -> BoundClasses:
        classes = self._classes()
        if classes is None:
            raise VocabularyError("class_names: expected classes, got none yet. "
                                  "Call set_classes([...]) first.")  # fmt: skip
        return classes

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
    def _settled(self) -> Iterator[None]:
        """Wait for what a failed frame leaves behind: its memory is used again."""
        try:
            yield
        except BaseException:
            with suppress(CudaError):  # the frame's own error says more
                self.workspace.synchronize()
            raise

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
            with self._settled():
                yield
        finally:
            self._path.clock.stop()
            self._lock.release()


def _refuse_memory(memory: FrameMemory | None) -> None:
    if memory is not None:
        raise ArgumentError(
            "memory: expected None for a frame in two planes or on a GPU, got one. Convert the "
            "frame to RGB in host memory."
        )


def _overlay_weight(wanted: bool, alpha: float) -> float | None:
    """The colours' weight; None for no overlay."""
    if alpha is None or not is_share(alpha):
        raise ArgumentError(f"alpha: expected a number in [0, 1], got {alpha!r}")
    return float(alpha) if wanted else None
