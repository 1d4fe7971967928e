"""A frame's path on its lane's stream: from pixels to labels, recorded and replayed on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.backends.base import Session
from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.common.arrays import Array, dtype_of
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import BackendError
from zsseg_rt.results.segmentation import Segmentation
from zsseg_rt.runtime.captures import FrameCaptures, captures_wanted, kind_of, splits
from zsseg_rt.runtime.clock import NvtxRanges
from zsseg_rt.runtime.device_result import DeviceSegmentation
from zsseg_rt.runtime.drawing import Drawer
from zsseg_rt.runtime.families.base import (
    BoundClasses,
    Family,
    LabelRule,
    Labels,
    Masks,
    PartRunner,
    PixelLabels,
    Trace,
    run_plainly,
)
from zsseg_rt.runtime.families.candidates import cut
from zsseg_rt.runtime.families.gate import CandidateGate
from zsseg_rt.runtime.inputs.frame_inputs import Frame, FrameInputs
from zsseg_rt.runtime.inputs.nv12 import Nv12Frame
from zsseg_rt.runtime.inputs.window_plan import Windows
from zsseg_rt.runtime.steady.memory import Turn
from zsseg_rt.runtime.windows import merge
from zsseg_rt.runtime.workspace import Workspace


@dataclass(frozen=True, kw_only=True, eq=False)
class _Labelled:
    """What a frame's work makes, on the device; it may still be under way."""

    masks: Masks
    pixels: PixelLabels
    finite: Array  # uint8 [1]
    finite_on_host: npt.NDArray[np.uint8] | None  # the same, readable after a wait


class FramePath:
    """Labels one frame at a time; the lane sees to that."""

    def __init__(
        self,
        family: Family,
        sessions: Mapping[str, Session],
        workspace: Workspace,
        preprocess: PreprocessSpec,
        config: EngineConfig,
        *,
        head: HeadSpec,
        windows: Windows | None = None,
    ) -> None:
        ranges = NvtxRanges() if config.with_nvtx else None
        self._family, self._sessions, self._workspace = family, sessions, workspace
        self.pipeline = family.pipeline(sessions, workspace)
        self.clock = workspace.clock(enabled=config.with_times, ranges=ranges)
        self._config, self._head, self._windows = config, head, windows
        most = config.max_candidates
        self._gate = None if most is None else CandidateGate(most)
        dtype = dtype_of("image", sessions["image_encoder"].inputs)
        order = config.channel_order
        self._inputs = FrameInputs(workspace, preprocess, head, channel_order=order, dtype=dtype)
        self._drawer = Drawer(workspace, order)
        self._captures = FrameCaptures(
            sessions, workspace, self.clock, wanted=captures_wanted(), num_lanes=config.num_lanes
        )
        self._given: tuple[BoundClasses, int | None] | None = None  # what the buffers hold
        self.adopted: BoundClasses | None = None
        self._is_warm = workspace.device == "cpu"

    def label(
        self,
        frame: Frame,
        classes: BoundClasses,
        rule: LabelRule,
        trace: Trace | None = None,
        turn: Turn | None = None,
    ) -> Segmentation:
        """Label a frame; see :meth:`zsseg_rt.Lane.segment`.

        Shapes:
            frame: uint8 [H, W, 3], or two planes, in host memory, checked.
        """
        workspace, clock, vocabulary = self._workspace, self.clock, classes.vocabulary
        with ops.thread_limit(self._config.num_threads):
            found, maps = self._enqueue(frame, classes, rule, trace, turn), None
            if isinstance(found, Segmentation):
                return found
            if self._config.with_class_scores is not None:
                maps = found.masks.grid_scores(rule, workspace, len(vocabulary.phrases))
            labels, scores = self._download(found.pixels)
        if workspace.device != "cpu":
            clock.mark("results")
            workspace.synchronize()
        labels, scores = self._finish(found, labels, scores, classes)
        if workspace.device == "cpu":
            clock.mark("results")
        return Segmentation(
            labels=labels,
            names=vocabulary.names,
            vocabulary_version=vocabulary.version,
            scores=scores,
            times=MappingProxyType(clock.times()),
            channel_order=self._config.channel_order,
            class_scores=None if maps is None else vocabulary.best_of_synonyms(maps),
            candidates=None if self._gate is None else self._gate.names(vocabulary),
        )

    def label_device(
        self,
        frame: Frame,
        classes: BoundClasses,
        rule: LabelRule,
        *,
        alpha: float | None = None,
    ) -> DeviceSegmentation:
        """Label a frame on the GPU and leave the labels there.

        Shapes:
            frame: uint8 [H, W, 3], or two planes, on the lane's GPU, checked.
        """
        workspace, clock, vocabulary = self._workspace, self.clock, classes.vocabulary
        if alpha is not None and not isinstance(frame, Nv12Frame):
            rule = replace(rule, painting=self._drawer.painting(frame, vocabulary.names, alpha))
        found = self._enqueue(frame, classes, rule)
        assert isinstance(found, _Labelled), "no memory was given"
        pixels = found.pixels
        is_final = pixels.look_up is None and (pixels.of_classes or vocabulary.is_plain)
        picture: Array | None = None
        if is_final:
            labels: Array = workspace.copy(pixels.labels)
            scores: Array | None = None if pixels.scores is None else workspace.copy(pixels.scores)
        else:
            labels, scores = self._download(pixels)
        if rule.painting is not None and pixels.painted:
            picture = workspace.copy(rule.painting.picture)
        elif is_final and alpha is not None:
            picture = self._drawer.draw(frame, labels, vocabulary.names, alpha)
        clock.mark("results")
        workspace.synchronize()
        if is_final:
            self._require_finite(found)
        else:
            labels, scores = self._finish(found, labels, scores, classes)
            labels = workspace.place(np.ascontiguousarray(labels))
            scores = None if scores is None else workspace.place(np.ascontiguousarray(scores))
        if picture is None and alpha is not None:
            picture = self._drawer.draw(frame, labels, vocabulary.names, alpha)
            workspace.synchronize()
        return DeviceSegmentation(
            labels=labels,
            names=vocabulary.names,
            vocabulary_version=vocabulary.version,
            scores=scores,
            picture=picture,
            times=MappingProxyType(clock.times()),
            channel_order=self._config.channel_order,
            candidates=None if self._gate is None else self._gate.names(vocabulary),
        )

    @contextmanager
    def using(self, sessions: Mapping[str, Session]) -> Iterator[None]:
        """Run frames through other sessions inside the block, uncaptured."""
        usual, was_on = self.pipeline, self._captures.is_on
        self.pipeline = self._family.pipeline(sessions, self._workspace)
        self._given, self._captures.is_on = None, False  # both keep classes in the same buffers
        try:
            yield
        finally:
            self.pipeline, self._given, self._captures.is_on = usual, None, was_on

    def expect_lanes(self, num_lanes: int) -> None:
        """Record frames from now on only where so many lanes may work at the same time."""
        self._captures.num_lanes = num_lanes

    def close(self) -> None:
        """Drop captures and classes."""
        self._captures.clear()
        self._given = self.adopted = None

    def _enqueue(
        self,
        frame: Frame,
        classes: BoundClasses,
        rule: LabelRule,
        trace: Trace | None = None,
        turn: Turn | None = None,
    ) -> _Labelled | Segmentation:
        """Enqueue a frame's work, or return the last frame's result if the picture stood still."""
        captures = self._captures
        captured = captures.is_on and trace is None
        num_phrases = len(classes.vocabulary.phrases)
        rows = self._family.rows_for(num_phrases) if captured else None
        adopted = self._adopt(classes, rows)
        if self._gate is not None and trace is None:
            adopted = replace(adopted, gate=self._gate)
        out_hw = (int(frame.shape[0]), int(frame.shape[1]))
        if not self._is_warm:
            self._warm_up(frame, out_hw, adopted, rule)
        self.clock.start()
        again = None if turn is None else self._look_back(turn)
        if again is not None:
            return again
        if self._gate is not None:
            self._gate.begin(classes.seen, turn)
        run = captures.run if captured else run_plainly
        if self._windows is not None and trace is None:
            return self._work_in_windows(frame, self._windows, adopted, rule, run, turn)
        given = self._image(frame, trace), out_hw, adopted, rule
        if captured and self._family.in_one_part and not splits(adopted, turn):
            key = kind_of(out_hw, adopted, rule)
            return run(key, partial(self._work, *given, run_plainly))
        return self._work(*given, run, trace, turn)

    def _warm_up(
        self, frame: Frame, out_hw: tuple[int, int], classes: BoundClasses, rule: LabelRule
    ) -> None:
        """Run a frame that nobody times: kernels and libraries are loaded when first used."""
        self.clock.start()
        self._work(self._image(frame), out_hw, classes, rule, run_plainly)
        self._workspace.synchronize()
        self._is_warm = True

    def _work(
        self,
        image: Array,
        out_hw: tuple[int, int],
        classes: BoundClasses,
        rule: LabelRule,
        run: PartRunner,
        trace: Trace | None = None,
        turn: Turn | None = None,
    ) -> _Labelled:
        """From the encoder's input to labels."""
        kind, is_split = kind_of(out_hw, classes, rule), splits(classes, turn)
        make = partial(self.pipeline.masks, image, classes, self.clock)
        if is_split and self._family.in_one_part:
            masks = run(("masks", *kind), lambda: make(run_plainly, trace))
        else:
            masks = make(run, trace)
        label = partial(self._label_pixels, masks, out_hw, classes, rule, turn)
        return label() if is_split else run(("labels", *kind), label)

    def _work_in_windows(
        self,
        frame: Frame,
        windows: Windows,
        classes: BoundClasses,
        rule: LabelRule,
        run: PartRunner,
        turn: Turn | None,
    ) -> _Labelled:
        """Run the networks on some windows at a time; label from the mean of all logits."""
        out_hw = (int(frame.shape[0]), int(frame.shape[1]))
        plan, at_once = windows.plan(out_hw), self._head.window_batch
        workspace, inputs = self._workspace, self._inputs
        given = inputs.on_device(frame)
        # On a GPU a stage has one event, and a recorded window's would be every window's.
        clock = self.clock if workspace.device == "cpu" else workspace.clock(enabled=False)
        kind = kind_of(out_hw, classes, rule)

        def of_windows(some: slice) -> Masks:
            parts = [{"whole_hw": plan.whole_hw, "origin": at} for at in plan.origins[some]]
            image = inputs.image(frame, given, *parts)
            clock.mark("preprocess")
            masks = partial(self.pipeline.masks, image, classes, clock, run_plainly)
            return run(("windows", len(parts), *kind), masks)

        if workspace.device != "cpu":  # a recording, and TensorRT's state, hold one shape
            plan, at_once = plan.in_equal_batches(at_once)
        masks = merge(plan, of_windows, workspace, clock, at_once=at_once)
        if clock is not self.clock:
            self.clock.mark("image_encoder")
        label = partial(self._label_pixels, masks, out_hw, classes, rule, turn)
        return label() if splits(classes, turn) else run(("labels", *kind), label)

    def _label_pixels(
        self,
        masks: Masks,
        out_hw: tuple[int, int],
        classes: BoundClasses,
        rule: LabelRule,
        turn: Turn | None,
    ) -> _Labelled:
        workspace, clock = self._workspace, self.clock
        host, finite = workspace.flag()
        if not masks.checked:
            ops.all_finite(masks.mask_logits, out=finite, stream=workspace.stream)
        clock.mark("check")
        if turn is not None and turn.steadies:
            masks = turn.steadied(masks, workspace)
            clock.mark("steady")
        drawn = masks
        if classes.gate is not None:
            drawn, classes = cut(masks, classes, workspace)
            clock.mark("candidates")
        pixels = drawn.label(out_hw, classes, rule, workspace, clock)
        return _Labelled(masks=masks, pixels=pixels, finite=finite, finite_on_host=host)

    def _image(self, frame: Frame, trace: Trace | None = None) -> Array:
        """The encoder's input [1, 3, h, w] on the device, of the dtype that the encoder takes."""
        inputs = self._inputs
        image = inputs.image(frame, inputs.on_device(frame))
        self.clock.mark("preprocess")
        if trace is not None:
            trace["image"] = image
        return image

    def _look_back(self, turn: Turn) -> Segmentation | None:
        again = turn.reused()
        self.clock.mark("compare")
        if again is None:
            return None
        self._workspace.synchronize()
        return replace(again, times=MappingProxyType(self.clock.times()))

    def _download(
        self, pixels: PixelLabels
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
        """Labels and scores in host memory, once the stream has been waited for."""
        scores = None if pixels.scores is None else self._workspace.download(pixels.scores)
        return self._workspace.download(pixels.labels), scores

    def _finish(
        self,
        found: _Labelled,
        labels: npt.NDArray[Any],
        scores: npt.NDArray[np.float32] | None,
        classes: BoundClasses,
    ) -> Labels:
        """Do what is left to the host, which has waited."""
        pixels, vocabulary = found.pixels, classes.vocabulary
        if pixels.look_up is not None:
            labels, scores = pixels.look_up(labels, classes)
        self._require_finite(found)
        if not (pixels.of_classes or vocabulary.is_plain):
            labels = vocabulary.label_table[labels]
        return labels, scores

    def _require_finite(self, found: _Labelled) -> None:
        flag = found.finite if found.finite_on_host is None else found.finite_on_host
        if not flag[0]:
            raise BackendError(
                "mask_logits: expected finite numbers, got NaN or infinity at precision "
                f"{self._sessions['image_encoder'].precision}. Use precision='float32' and run "
                "self_check(), which shows whether the weights are sound."
            )

    def _adopt(self, classes: BoundClasses, rows: int | None) -> BoundClasses:
        """Return the classes in this lane's buffers; they are copied there when they change."""
        held = self._given
        if self.adopted is None or held is None or held[0] is not classes or held[1] != rows:
            self._given = None  # a failed copy leaves buffers with neither the old nor the new
            self.adopted = self.pipeline.adopt(classes, num_rows=rows)
            self._workspace.synchronize()  # what is copied from may be freed after this
            self._given = (classes, rows)
        return self.adopted
