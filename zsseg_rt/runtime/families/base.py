"""Families: all that the runtime knows of how an image's features become masks, and these labels.

A :class:`Family` is made once per engine; a :class:`Pipeline` runs one lane's frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.backends.base import ANY_PRECISION, Bounds, Session
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import HeadSpec
from zsseg_rt.common.arrays import Array, label_dtype, reshaped
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ArgumentError, BundleError
from zsseg_rt.ops import core
from zsseg_rt.runtime.families.candidates import CandidateGate
from zsseg_rt.runtime.frames import Nv12Frame
from zsseg_rt.runtime.workspace import Workspace
from zsseg_rt.text.vocabulary import PromptSet, Vocabulary

Trace = dict[str, Array]
"""Receives every intermediate array by its name in the golden sample."""

Labels = tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]
"""A label for every pixel and, if wanted, its score, in host memory."""

_Result = TypeVar("_Result")


PartRunner = Callable[[Hashable, Callable[[], Any]], Any]
"""Given a key and what enqueues a part of a frame, which may be recorded once and replayed: returns
what enqueueing returned, now or when it was recorded."""


def run_plainly(key: Hashable, enqueue: Callable[[], _Result]) -> _Result:
    """Record nothing; a :data:`PartRunner`."""
    return enqueue()


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelLabels:
    """Labels that one kernel call makes of masks, on the device; it may still be under way."""

    labels: Array  # [H, W]
    scores: Array | None = None  # float32 [H, W]
    of_classes: bool = False  # Whether labels are classes; otherwise they are phrases
    # Turns labels that have reached the host into phrases and their scores, given the classes
    look_up: Callable[[npt.NDArray[Any], BoundClasses], Labels] | None = None
    painted: bool = False  # Whether the rule's painting is done


@dataclass(frozen=True, kw_only=True)
class BoundClasses:
    """A vocabulary with what a family computes from it alone.

    :meth:`Family.bind` returns it with host arrays, :meth:`Pipeline.adopt` with the same arrays in
    a lane's buffers. There P may be larger than the number of phrases: rows beyond repeat the last
    phrase, and ``num_phrases`` tells kernels how many count.
    """

    vocabulary: Vocabulary
    seen: Array | None  # bool [P], phrases that training saw; None if the bundle names none
    text_embeds: Array  # float32 [P, D]; adopted beside embeddings in float16, maybe float16
    text_queries: Array | None = None  # float32 [P, E], the image-independent half of the queries
    # float32 [P], subtracted from scores; None in families whose kernel takes ``seen`` instead
    bias: Array | None = None
    num_phrases: Array | None = None  # int32 [1] on the device; None where all rows count
    # uint8 or uint16 [P] on the device: the label of each phrase's class; None where the lane maps
    # phrases to classes on the host
    label_table: Array | None = None
    gate: CandidateGate | None = None  # What leaves classes out of each frame

    @cached_property
    def layout(self) -> Hashable:
        """Shapes and dtypes of the arrays on the device, on which captures depend."""
        arrays = (self.text_embeds, self.seen, self.bias, self.label_table)
        return tuple(
            None if a is None or isinstance(a, np.ndarray) else (tuple(a.shape), str(a.dtype))
            for a in arrays
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Painting:
    """A drawing of a frame's labels as they are stored, all on the device."""

    frame: Array  # uint8 [H, W, 3]
    palette: Array  # uint8 [C, 3]
    image: Array  # uint8 [H, W, 3], which is written
    alpha: float  # Weight of the colours


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """How scores become labels."""

    head: HeadSpec
    unknown_below: float | None  # None keeps every pixel
    with_scores: bool
    painting: Painting | None = None  # Drawn in the same kernel, by masks that can


@dataclass(frozen=True, kw_only=True)
class GoldenRule:
    """How a golden sample of a family is compared with a run."""

    stages: tuple[str, ...]  # Names of the intermediates in the order data flows
    # Factor on the tolerance of stages that follow from a threshold within the frame
    slack: Mapping[str, float] = field(default_factory=dict)
    raw_logits: bool  # Whether ``mask_logits`` precede the activation and the seen bias


@dataclass(frozen=True, kw_only=True)
class ClassLogits:
    """A logit for every phrase at every point of a grid."""

    mask_logits: Array  # float32 [1, P, gh, gw] on the device, valid until the next frame

    def label(
        self, out_hw: tuple[int, int], classes: BoundClasses, rule: LabelRule, workspace: Workspace
    ) -> PixelLabels:
        """Enqueue one kernel call: upsample, activate, take the best phrase, or its class."""
        shape, table = self.mask_logits.shape, classes.label_table
        dtype = label_dtype(shape[1]) if table is None else table.dtype
        painting = rule.painting if table is not None else None  # colours are those of classes
        label: Callable[..., tuple[Any, ...]] = partial(ops.upsample_argmax, out_hw=out_hw)
        if painting is not None:
            label = partial(
                ops.upsample_argmax_overlay,
                frame=painting.frame,
                palette=painting.palette,
                alpha=painting.alpha,
                picture=painting.image,
            )
        labels, scores, *_ = label(
            self.mask_logits,
            activation=rule.head.activation,
            seen=classes.seen,
            seen_bias=rule.head.seen_bias if classes.seen is not None else 0.0,
            unknown_below=rule.unknown_below,
            with_scores=rule.with_scores,
            label_table=table,
            num_classes=classes.num_phrases,
            align=rule.head.align,
            out=_label_memory((1, *out_hw), dtype, rule.with_scores, workspace),
            stream=workspace.stream,
        )
        return PixelLabels(
            labels=reshaped(labels, out_hw),
            scores=None if scores is None else reshaped(scores, out_hw),
            of_classes=table is not None,
            painted=painting is not None,
        )

    def grid_scores(
        self, rule: LabelRule, workspace: Workspace, num_phrases: int
    ) -> npt.NDArray[np.float32]:
        """Every phrase's activated score without seen bias, float32 [P, gh, gw] on the host."""
        logits = np.array(workspace.fetch(self.mask_logits)[0, :num_phrases], np.float32)
        if rule.head.activation == "sigmoid":
            return _sigmoid(logits)
        if rule.head.activation == "softmax":
            shares = np.exp(logits - logits.max(axis=0))
            logits = shares / shares.sum(axis=0)
        return logits


@dataclass(frozen=True, kw_only=True)
class RegionVotes:
    """Soft masks that vote for classes."""

    mask_logits: Array  # float32 [Q, h, w] on the device
    class_scores: Array  # float32 [P, Q] on the device
    canvas_hw: tuple[int, int]  # Height and width at which masks become soft

    def label(
        self, out_hw: tuple[int, int], classes: BoundClasses, rule: LabelRule, workspace: Workspace
    ) -> PixelLabels:
        """Sum the votes of all masks and take the best phrase."""
        dtype, scratch = label_dtype(self.class_scores.shape[0]), None
        if workspace.device != "cpu":
            size = core.label_regions_device_bytes(*self.class_scores.shape)
            scratch = workspace.array("label_regions", (size,), np.uint8)
        labels, scores = ops.label_regions(
            self.mask_logits,
            self.class_scores,
            canvas_hw=self.canvas_hw,
            out_hw=out_hw,
            bias=classes.bias,
            unknown_below=rule.unknown_below,
            with_scores=rule.with_scores,
            out=_label_memory(out_hw, dtype, rule.with_scores, workspace),
            workspace=scratch,
            stream=workspace.stream,
        )
        return PixelLabels(labels=labels, scores=scores)

    def grid_scores(
        self, rule: LabelRule, workspace: Workspace, num_phrases: int
    ) -> npt.NDArray[np.float32]:
        """The sums of votes."""
        votes = np.asarray(workspace.fetch(self.class_scores))[:num_phrases]
        soft = _sigmoid(np.asarray(workspace.fetch(self.mask_logits)))
        scores: npt.NDArray[np.float32] = np.einsum("pq,qhw->phw", votes, soft, optimize=True)
        return scores


@dataclass(frozen=True, kw_only=True)
class SegmentMasks:
    """An image cut into segments, each with one phrase."""

    # float32 [1, G, gh, gw] on the device: a pixel belongs to the segment whose upsampled value is
    # largest
    mask_logits: Array
    # Returns the best phrase of each segment, int64 [G], and its score in [0, 1], float32 [G],
    # given the classes; called once the GPU's work has been waited for
    judge: Callable[[BoundClasses], tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]

    def label(
        self, out_hw: tuple[int, int], classes: BoundClasses, rule: LabelRule, workspace: Workspace
    ) -> PixelLabels:
        """Find each pixel's segment; what it is called is looked up later, on the host."""
        dtype = label_dtype(self.mask_logits.shape[1])
        out = _label_memory((1, *out_hw), dtype, False, workspace)
        segments, _ = ops.upsample_argmax(
            self.mask_logits, out_hw, out=out, stream=workspace.stream
        )

        def look_up(host: npt.NDArray[Any], named: BoundClasses) -> Labels:
            phrases, values = self.judge(named)
            dtype, limit = label_dtype(len(named.vocabulary.phrases)), np.float32(-np.inf)
            if rule.unknown_below is not None:  # the best one never is unknown
                limit = min(np.float32(rule.unknown_below), np.max(values))
            unknown, count = np.iinfo(dtype).max, len(phrases)
            labels, scores = np.full(256, unknown, dtype), np.zeros(256, np.float32)
            labels[:count], scores[:count] = np.where(values < limit, unknown, phrases), values
            return labels[host], scores[host] if rule.with_scores else None

        return PixelLabels(labels=reshaped(segments, out_hw), look_up=look_up)

    def grid_scores(
        self, rule: LabelRule, workspace: Workspace, num_phrases: int
    ) -> npt.NDArray[np.float32]:
        """Refused: segments have one phrase each."""
        raise ArgumentError(
            "with_class_scores: expected None for a bundle of family segment_tokens, whose "
            "segments have one class each, got 'low'."
        )


def _label_memory(
    shape: tuple[int, ...], dtype: np.dtype[Any], with_scores: bool, workspace: Workspace
) -> tuple[Array, Array | None] | None:
    """The lane's memory for labels and scores; None, so new arrays, on the CPU."""
    if workspace.device == "cpu":
        return None
    scores = workspace.array("scores", shape, np.float32) if with_scores else None
    return workspace.array(f"labels {dtype}", shape, dtype), scores


def _sigmoid(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    shares: npt.NDArray[np.float32] = 0.5 * (np.tanh(0.5 * values) + 1.0)  # never overflows
    return shares


Masks = ClassLogits | RegionVotes | SegmentMasks
"""Small masks that a pipeline makes of an image; each labels all pixels with one kernel call."""

Frame = Array | Nv12Frame
"""uint8 [H, W, 3], or the same in two planes."""


@dataclass(kw_only=True, eq=False)
class FrameState:
    """One frame on its way; what stages add lies on the device and may still be under way."""

    frame: Frame  # As it came, checked
    classes: BoundClasses  # The classes in the lane's buffers
    rule: LabelRule  # How scores become labels
    run: PartRunner = run_plainly  # Records and replays what is enqueued, or runs it plainly
    turn: Any = None  # The frame's turn with its source's memory, if it has one
    trace: Trace | None = None  # Receives every intermediate, for self-checks
    image: Any = None  # The encoder's input [1, 3, h, w], of the dtype that the encoder takes
    masks: Any = None  # The pipeline's, steadied where a memory is
    # Masks and classes without those that are left out; None if all are kept
    labelled: tuple[Masks, BoundClasses] | None = None
    pixels: Any = None  # Labels and scores of all pixels

    @property
    def out_hw(self) -> tuple[int, int]:
        """Height and width of the labels."""
        return int(self.frame.shape[0]), int(self.frame.shape[1])

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """All that the frame's work depends on but the contents of buffers."""
        rule, painting = self.rule, self.rule.painting
        drawn = None if painting is None else (painting.alpha, tuple(painting.palette.shape))
        return self.out_hw, self.classes.layout, rule.unknown_below, rule.with_scores, drawn


class Pipeline(ABC):
    """From an image to masks, in one lane's buffers and sessions."""

    of_cells = False  # Whether masks are what :meth:`_compare` gives

    def __init__(self, family: Any, sessions: Mapping[str, Session], workspace: Workspace) -> None:
        self._head, self._workspace, self._clock = family.head, workspace, workspace.clock
        self._image_encoder = sessions["image_encoder"]
        # Whether the last kernel writes to the workspace's flag if masks are finite
        self.checks_masks = self.of_cells and workspace.device != "cpu"

    @abstractmethod
    def adopt(self, classes: BoundClasses, *, num_rows: int | None = None) -> BoundClasses:
        """Copy what frames need to know of bound classes into this lane's named buffers.

        These keep their addresses unless a larger vocabulary needs larger ones. ``num_rows`` are
        laid out, for vocabularies that share a capture; None: one per phrase.
        """

    def _encode(self, image: Array) -> Mapping[str, Array]:
        """Run the image encoder."""
        encoded = self._image_encoder.run({"image": image}, stream=self._workspace.stream)
        self._clock.mark("image_encoder")
        return encoded

    def _compare(self, patches: Array, texts: Array) -> ClassLogits:
        """Every phrase's logit for every cell, of patches [1, N, D] and texts [P, D] or [1, P, D].

        On a GPU the kernel also tells the workspace's flag whether all are finite.
        """
        workspace, head = self._workspace, self._head
        shape = (1, texts.shape[-2], patches.shape[1])
        products = workspace.products()
        logits = ops.patch_text_similarity(
            patches,
            texts,
            logit_scale=head.logit_scale,
            normalize=head.normalize,
            out=workspace.array("mask_logits", shape, np.float32),
            finite=None if products is None else workspace.flag()[1],
            workspace=products,
            stream=workspace.stream,
        )
        self._clock.mark("similarity")
        return ClassLogits(mask_logits=reshaped(logits, (*shape[:2], *head.grid_hw)))

    @abstractmethod
    def masks(self, state: FrameState) -> Masks:
        """Run the graphs on a frame's image and compare their output with its classes.

        Masks are valid until the next call. Families in one part have no use for ``state.run``,
        which runs what is enqueued between two looks of the host. NaN or infinity where a class
        is decided on the host is a BackendError.
        """


class Family(ABC):
    """How bundles of one family are run; immutable and usable from any thread."""

    name: str  # As in ``bundle.json``
    graphs: tuple[str, ...] = ("image_encoder",)  # For which a lane needs a session
    auto_precisions: tuple[str, ...] = ANY_PRECISION  # That ``precision="auto"`` may take
    golden: GoldenRule
    pipeline: type[Pipeline]
    """Made for each lane of the family, the lane's sessions and its workspace."""
    in_one_part = True
    """Whether a frame's work on the GPU is enqueued without the host looking at any of it."""

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        self.head = bundle.head
        self.axes = class_axis(bundle.head.max_classes)
        """Smallest, usual and largest size of every dynamic axis of the graphs."""
        self.prompt_sets: tuple[PromptSet, ...] = (PromptSet(templates=bundle.text.templates),)
        """The templates of every text input; the first one's embeddings are the vocabulary's."""

    def rows_for(self, num_phrases: int) -> int:
        """How many rows a capture has; where phrases are compared alone, more change nothing."""
        return bucket_of(num_phrases, self.head.max_classes)

    def bind(self, vocabulary: Vocabulary, *, device: str = "cpu") -> BoundClasses:
        """Precompute on the host what depends on the classes alone.

        What is better computed on ``device``, where lanes run, is left to :meth:`Pipeline.adopt`.
        """
        return BoundClasses(
            vocabulary=vocabulary,
            seen=vocabulary.seen(self.head.seen),
            text_embeds=vocabulary.embeds,
        )


def class_axis(most: int) -> dict[str, Bounds]:
    """The axis of phrases, which is open in graphs that take them."""
    return {"classes": (1, min(32, most), most)}


_SIZES = (8, 16, 32, 64, 128, 254, *(1 << power for power in range(9, 17)))


def bucket_of(num_phrases: int, most: int) -> int:
    """The number of rows that vocabularies of about this size share.

    8, 16, 32, 64, 128, 254, 512, 1024 and so on: with 255 classes, labels take two bytes.

    Example:
        >>> [bucket_of(number, 1000) for number in (1, 9, 254, 255, 600)]
        [8, 16, 254, 512, 1000]
    """
    return min(next(size for size in _SIZES if size >= num_phrases), max(most, num_phrases))


def adopt_rows(
    classes: BoundClasses,
    num_rows: int | None,
    workspace: Workspace,
    *,
    text_dtype: str = "float32",
) -> BoundClasses:
    """Copy text embeddings, rounded to a dtype, seen flags and the label table to a lane's buffers.

    On the CPU, arrays are used where they are, and the lane maps phrases to classes.
    """
    if workspace.device == "cpu":
        return classes
    text_embeds = classes.text_embeds.astype(text_dtype, copy=False)
    vocabulary, phrases = classes.vocabulary, len(classes.vocabulary.phrases)
    rows = phrases if num_rows is None else num_rows
    table = vocabulary.label_table[:rows]
    seen = None if classes.seen is None else repeated_rows(np.asarray(classes.seen), rows)
    return replace(
        classes,
        text_embeds=workspace.upload("text_embeds", repeated_rows(text_embeds, rows)),
        seen=None if seen is None else workspace.upload("seen", seen),
        num_phrases=workspace.upload("num_phrases", np.array([phrases], np.int32)),
        label_table=workspace.upload(f"label_table {table.dtype}", table),
    )


def repeated_rows(values: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """So many rows: those beyond the last repeat it, which keeps them as finite as the others."""
    if rows == len(values):
        return values
    return values[np.minimum(np.arange(rows), len(values) - 1)]


def read_weights(bundle: Bundle, names: Sequence[str]) -> list[npt.NDArray[np.float32]]:
    """The named tensors of a bundle's ``weights``, C-contiguous."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    assert bundle.weights is not None, "the family's bundles have them"
    path = bundle.open_path(bundle.weights)
    try:
        tensors = load_file(path)
        return [np.ascontiguousarray(tensors[name], np.float32) for name in names]
    except (SafetensorError, KeyError, OSError) as exc:
        raise BundleError(f"{path}: expected {', '.join(names)}, got {exc}") from exc
