"""A frame is a list of stages, which a lane builds once: an option that is off is an absent stage.

On the CPU a frame passes them one after another. On a GPU, neighbours into which the host does not
look are recorded as one capture, and replayed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from zsseg_rt import ops
from zsseg_rt.backends.base import Session
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.common.arrays import Array, dtype_of, reshaped
from zsseg_rt.runtime.families.base import (
    ClassLogits,
    Frame,
    FrameState,
    Masks,
    Pipeline,
    PixelLabels,
    run_plainly,
)
from zsseg_rt.runtime.frames import Nv12Frame, Windows, planes_of
from zsseg_rt.runtime.workspace import Workspace


class Stage(ABC):
    """A step of every frame."""

    # Whether a capture may hold it: the host looks at nothing in it, all its memory is the lane's
    recorded = False

    def __init__(self, workspace: Workspace) -> None:
        self._workspace, self._clock = workspace, workspace.clock

    @abstractmethod
    def run(self, state: FrameState) -> None:
        """Add to a frame, and mark the clock at the end."""


class Preprocess(Stage):
    """Puts a frame, from anywhere, on the lane's device and makes the encoder's input of it."""

    def __init__(
        self, workspace: Workspace, bundle: Bundle, image_encoder: Session, channel_order: str
    ) -> None:
        super().__init__(workspace)
        self._spec, self._align, self._order = bundle.preprocess, bundle.head.align, channel_order
        self._dtype = dtype_of("image", image_encoder.inputs)

    def run(self, state: FrameState) -> None:
        state.image = self.image(state.frame, self.on_device(state.frame))
        self._clock.mark("preprocess")
        if state.trace is not None:
            state.trace["image"] = state.image

    def on_device(self, frame: Frame) -> Array | tuple[Array, Array]:
        """The frame, or its two planes, where the lane works."""
        upload = self._workspace.upload_frame
        if not isinstance(frame, Nv12Frame):
            return upload(frame) if isinstance(frame, np.ndarray) else frame
        if not isinstance(frame.luma, np.ndarray):
            return frame.luma, frame.chroma
        return upload(frame.luma, "luma"), upload(frame.chroma, "chroma")

    def image(self, frame: Frame, placed: Any, **window: Any) -> Array:
        """The encoder's input [1, 3, h, w]: the frame, ``placed`` on the device, or a window."""
        spec, shape = self._spec, (3, *self._spec.size_hw)
        image = self._workspace.array("image", shape, self._dtype)
        _, matrix = planes_of(frame)
        ops.preprocess(
            placed,
            size_hw=spec.size_hw,
            mean=spec.mean,
            std=spec.std,
            channel_order="rgb" if matrix else self._order,
            **matrix,
            align=self._align,
            out=image,
            stream=self._workspace.stream,
            **window,
        )
        return reshaped(image, (1, *shape))


class Encode(Stage):
    """Runs the networks and compares what they give with the classes."""

    def __init__(self, workspace: Workspace, pipeline: Pipeline, *, recorded: bool) -> None:
        super().__init__(workspace)
        self._pipeline, self.recorded = pipeline, recorded

    def run(self, state: FrameState) -> None:
        """A pipeline that the host looks into records its own parts."""
        state.masks = self._pipeline.masks(state)


class EncodeWindows(Stage):
    """Prepares and encodes one window of the frame after another, and averages their logits."""

    def __init__(
        self, workspace: Workspace, pipeline: Pipeline, preprocess: Preprocess, windows: Windows
    ) -> None:
        super().__init__(workspace)
        self._pipeline, self._preprocess, self._windows = pipeline, preprocess, windows

    def run(self, state: FrameState) -> None:
        plan, workspace, clock = self._windows.plan(state.out_hw), self._workspace, self._clock
        placed = self._preprocess.on_device(state.frame)
        kind = ("window", *state.kind)
        shares = workspace.upload("window shares", plan.shares)
        # On a GPU a stage has one event, and a recorded window's would be every window's.
        clock.is_muted = on_gpu = workspace.device != "cpu"
        for number, (place, origin) in enumerate(zip(plan.places, plan.origins, strict=True)):
            window = {"whole_hw": plan.whole_hw, "origin": origin}
            state.image = self._preprocess.image(state.frame, placed, **window)
            clock.mark("preprocess")
            masks = state.run(kind, partial(self._pipeline.masks, state))
            logits = ops.merge_windows(
                masks.mask_logits,
                shares,
                (place,),
                add=number > 0,
                out=workspace.array(
                    "window logits", (1, masks.mask_logits.shape[1], *plan.shares.shape), np.float32
                ),
                stream=workspace.stream,
            )
            clock.mark("similarity")
        if on_gpu:
            clock.is_muted = False
            clock.mark("image_encoder")
        state.masks = ClassLogits(mask_logits=logits)


class Check(Stage):
    """Finds NaN and infinity in masks; the workspace's flag says so."""

    recorded = True

    def run(self, state: FrameState) -> None:
        _, finite = self._workspace.flag()
        ops.all_finite(state.masks.mask_logits, out=finite, stream=self._workspace.stream)
        self._clock.mark("check")


class Steady(Stage):
    """Blends masks with those of past frames, moved along the flow that the host finds."""

    def run(self, state: FrameState) -> None:
        assert state.turn is not None, "frames without a memory pass other stages"
        state.masks = state.turn.steadied(state.masks, self._workspace)
        self._clock.mark("steady")


class Candidates(Stage):
    """Leaves out the classes that are least like anything in the frame; the host chooses."""

    def run(self, state: FrameState) -> None:
        """Labels of what is kept are classes, by a table."""
        workspace, classes, gate = self._workspace, state.classes, state.classes.gate
        assert gate is not None, "nothing is left out"
        assert isinstance(state.masks, ClassLogits), "other families were refused"
        vocabulary, phrases = classes.vocabulary, len(classes.vocabulary.phrases)
        logits = workspace.fetch(state.masks.mask_logits)[:, :phrases]
        rows = gate.rows
        if rows is None:
            # Cells differ in how large all their logits are: a share of the cell can be compared.
            cells = logits[0].reshape(phrases, -1)
            cells = cells - cells.max(axis=0)
            shares = cells - np.log(np.exp(cells).sum(axis=0))
            rows = gate.choose(shares.max(axis=1), vocabulary)
        if len(rows) < phrases:
            seen, table = gate.seen, vocabulary.label_table[rows]
            logits = np.ascontiguousarray(logits[:, rows], np.float32)
            named = replace(
                classes,
                seen=None
                if seen is None
                else workspace.upload("kept seen", np.asarray(seen)[rows]),
                num_phrases=None,
                label_table=workspace.upload(f"kept label_table {table.dtype}", table),
            )
            state.labelled = ClassLogits(mask_logits=workspace.upload("kept logits", logits)), named
        self._clock.mark("candidates")


class Label(Stage):
    """Labels every pixel with one kernel call."""

    def __init__(self, workspace: Workspace, *, recorded: bool) -> None:
        super().__init__(workspace)
        self.recorded = recorded

    def run(self, state: FrameState) -> None:
        masks, classes = state.labelled or (state.masks, state.classes)
        state.pixels = masks.label(state.out_hw, classes, state.rule, self._workspace)
        self._clock.mark("upsample_argmax")


class StageList:
    """Stages in order, and which of them a capture holds together."""

    def __init__(self, stages: Iterable[Stage]) -> None:
        self.stages = tuple(stages)
        parts = [tuple(part) for _, part in groupby(self.stages, lambda stage: stage.recorded)]
        self._parts = [(tuple(map(type, p)) if p[0].recorded else (), p) for p in parts]

    def run(self, state: FrameState) -> None:
        """Take a frame through all stages."""
        if state.run is run_plainly:
            for stage in self.stages:
                stage.run(state)
            return
        kind = state.kind
        for name, part in self._parts:
            if name:
                enqueue = partial(_enqueue, part, state)
                state.masks, state.pixels = state.run((name, *kind), enqueue)
            else:
                for stage in part:
                    stage.run(state)


def _enqueue(part: tuple[Stage, ...], state: FrameState) -> tuple[Masks, PixelLabels | None]:
    """A part's masks and labels: a replayed capture adds the same arrays, written anew."""
    for stage in part:
        stage.run(state)
    return state.masks, state.pixels
