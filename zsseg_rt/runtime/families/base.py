"""Families: all that the runtime knows of how an image's features become masks.

A :class:`Family` is made once per engine; a :class:`Pipeline` runs one lane's frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.backends.base import ANY_PRECISION, Bounds, Session
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import HeadSpec
from zsseg_rt.common.arrays import Array, reshaped
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import BundleError
from zsseg_rt.runtime.clock import StageClock
from zsseg_rt.runtime.families.candidates import CandidateGate
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
    unknown_below: float | None  # None takes the bundle's
    with_scores: bool
    painting: Painting | None = None  # Drawn in the same kernel, by masks that can

    @property
    def threshold(self) -> float | None:
        """The threshold in force, or None for none."""
        return self.head.unknown_below if self.unknown_below is None else self.unknown_below


@dataclass(frozen=True, kw_only=True)
class GoldenRule:
    """How a golden sample of a family is compared with a run."""

    stages: tuple[str, ...]  # Names of the intermediates in the order data flows
    # Factor on the tolerance of stages that follow from a threshold within the frame
    slack: Mapping[str, float] = field(default_factory=dict)
    raw_logits: bool  # Whether ``mask_logits`` precede the activation and the seen bias


class Masks(Protocol):
    """Small masks that a pipeline makes of an image, and that know how to label pixels."""

    @property
    def mask_logits(self) -> Array:
        """float32 [..., gh, gw] on the device, valid until the next frame."""

    def label(
        self, out_hw: tuple[int, int], classes: BoundClasses, rule: LabelRule, workspace: Workspace
    ) -> PixelLabels:
        """Enqueue one kernel call that labels every pixel; valid until the next frame."""

    def grid_scores(
        self, rule: LabelRule, workspace: Workspace, num_phrases: int
    ) -> npt.NDArray[np.float32]:
        """Every phrase's activated score without seen bias, float32 [P, gh, gw] on the host."""


class Pipeline(ABC):
    """From an image to masks, in one lane's buffers and sessions."""

    of_cells = False  # Whether masks are what :func:`cell_logits` gives

    def __init__(self, family: Any, sessions: Mapping[str, Session], workspace: Workspace) -> None:
        self._head, self._workspace = family.head, workspace
        self._image_encoder = sessions["image_encoder"]
        # Whether the last kernel writes to the workspace's flag if masks are finite
        self.checks_masks = self.of_cells and workspace.device != "cpu"

    @abstractmethod
    def adopt(self, classes: BoundClasses, *, num_rows: int | None = None) -> BoundClasses:
        """Copy what frames need to know of the classes into this lane's named buffers.

        Buffers keep their addresses unless a larger vocabulary needs larger ones.

        Args:
            classes: What :meth:`Family.bind` returned.
            num_rows: Rows to lay out, at least one per phrase, for vocabularies that share a
                capture; None: one per phrase.
        """

    @abstractmethod
    def masks(
        self,
        image: Array,
        classes: BoundClasses,
        clock: StageClock,
        run: PartRunner,
        trace: Trace | None = None,
    ) -> Masks:
        """Run the graphs and compare their output with the classes.

        Args:
            image: [1, 3, h, w], preprocessed, on the device, of the dtype that the encoder takes.
            classes: What :meth:`adopt` returned.
            clock: Marked at the end of every stage.
            run: Runs what is enqueued between two looks of the host; families in one part have no
                use for it.
            trace: Receives every intermediate, for self-checks.

        Returns:
            Masks that are valid until the next call.

        Raises:
            BackendError: A graph gave NaN or infinity where a class is decided on the host.
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
        self.axes = class_axis(bundle.head)
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


def class_axis(head: HeadSpec) -> dict[str, Bounds]:
    """The axis of phrases, which is open in graphs that take them."""
    return {"classes": (1, min(32, head.max_classes), head.max_classes)}


def cell_logits(patches: Array, texts: Array, head: HeadSpec, workspace: Workspace) -> Array:
    """Every phrase's logit for every cell, float32 [B, P, gh, gw] in the lane's buffer.

    Of patches [B, N, D] and texts [P, D] or [B, P, D]. On a GPU the kernel also tells the
    workspace's flag whether all are finite.
    """
    shape = (patches.shape[0], texts.shape[-2], patches.shape[1])
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
    return reshaped(logits, (*shape[:2], *head.grid_hw))


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
