"""ZegFormer: segments from one network, judged by their own embeddings and by CLIP's look at them.

Regions with equal crops are encoded once, and what CLIP sees in an empty mask is kept from frame to
frame; neither changes any result.

Source: Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.backends.base import Session
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.common.arrays import Array, reshaped
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ArgumentError, BackendError
from zsseg_rt.runtime.families.base import (
    BoundClasses,
    Family,
    FrameState,
    GoldenRule,
    Pipeline,
    RegionVotes,
    repeated_rows,
)
from zsseg_rt.runtime.workspace import Workspace
from zsseg_rt.text.vocabulary import PromptSet, Vocabulary

REGION_PROMPTS = "regions"  # the prompt set of the region encoder

FloatArray = npt.NDArray[np.float32]

_TRUSTED = np.float32(2 / 3)  # exponent of the more trusted opinion
_OTHER = np.float32(1 / 3)


def distinct_crops(
    boxes: npt.NDArray[np.int32], style: str, num_pixels: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.intp]]:
    """Regions with distinct crops, int32 [R], and for each region the one of its crop, [Q].

    Of boxes int32 [Q, 5], as :func:`zsseg_rt.ops.mask_boxes` gives them.
    """
    first: dict[object, int] = {}
    places = np.empty(len(boxes), np.intp)
    for index, (*box, count) in enumerate(boxes.tolist()):
        if style == "crop":
            key: object = tuple(box)
        else:
            key = count if count in (0, num_pixels) else (index, "own")
        places[index] = first.setdefault(key, len(first))
    _, regions = np.unique(places, return_index=True)
    return regions.astype(np.int32), places


@dataclass(frozen=True, kw_only=True, eq=False)
class _Proposal:
    """The results before the host's first look; what is on the host is whole after a wait."""

    encoded: Mapping[str, Array]
    masks: Array  # float32 [Q, h, w] on the device
    logits: FloatArray  # [1, rows, Q] on the host
    no_object: FloatArray  # [1, Q] on the host
    boxes: Array | None  # int32 [Q, 5] on the device; None without a region encoder
    boxes_on_host: npt.NDArray[np.int32] | None


class ProposalsPipeline(Pipeline):
    """Proposes segments, shows their regions to the region encoder, and lets them vote."""

    def __init__(
        self, family: ProposalsFamily, sessions: Mapping[str, Session], workspace: Workspace
    ) -> None:
        super().__init__(family, sessions, workspace)
        image, spec = family.preprocess, family.encoder
        self._fusion, self._canvas_hw = family.fusion, image.size_hw
        self._spec = spec
        self._blank: FloatArray | None = None  # what CLIP sees in an empty mask, [1, D]
        if spec is not None:
            self._region_encoder = sessions["region_encoder"]
            # From the segments' normalisation to the region encoder's, in one step.
            statistics = [*zip(image.mean, image.std, spec.mean, spec.std, strict=True)]
            self._scale = [std / spec_std for _, std, _, spec_std in statistics]
            self._offset = [(mean - other) / std for mean, _, other, std in statistics]

    def adopt(self, classes: BoundClasses, *, num_rows: int | None = None) -> BoundClasses:
        workspace, bias = self._workspace, classes.bias
        rows = len(classes.vocabulary.phrases) if num_rows is None else num_rows
        embeds = repeated_rows(classes.text_embeds, rows)
        return replace(
            classes,
            text_embeds=workspace.upload("text_embeds", embeds),
            bias=None if bias is None else workspace.upload("bias", repeated_rows(bias, rows)),
        )

    def masks(self, state: FrameState) -> RegionVotes:
        """Run the networks and fuse their opinions, with a wait before each look of the host."""
        workspace, classes = self._workspace, state.classes
        rows, num_phrases = int(classes.text_embeds.shape[0]), len(classes.vocabulary.phrases)
        proposal = state.run(("proposals", rows), partial(self._propose, state.image, classes))
        workspace.synchronize()
        no_object = proposal.no_object[0]
        by_text, objectness = class_probabilities(proposal.logits[0, :num_phrases], no_object)
        by_region = None
        if self._spec is not None:
            by_region = self._judge(state, proposal, by_text, objectness)
            self._clock.mark("regions")
        scores = fuse(by_text, by_region, self._fusion, classes.seen)
        if not np.isfinite(scores).all():
            raise BackendError(
                "class_scores: expected finite numbers, got NaN or infinity at precision "
                f"{self._image_encoder.precision}. Use precision='float32' and run "
                "self_check()."
            )
        if state.trace is not None:
            state.trace.update(proposal.encoded, class_scores=workspace.place(scores))
        return RegionVotes(
            mask_logits=proposal.masks,
            class_scores=self._upload_scores(scores, rows),
            canvas_hw=self._canvas_hw,
        )

    def _propose(self, image: Array, classes: BoundClasses) -> _Proposal:
        """Enqueue all that comes before the host's first look."""
        workspace, encoded = self._workspace, self._encode(image)
        masks, embeds = encoded["region_masks"], encoded["segment_embeds"]
        masks = reshaped(workspace.own("region_masks", masks), tuple(masks.shape[1:]))
        shape = (1, int(classes.text_embeds.shape[0]), embeds.shape[1])
        logits = ops.patch_text_similarity(
            embeds,
            classes.text_embeds,
            logit_scale=self._head.logit_scale,
            normalize=self._head.normalize,
            out=workspace.array("logits", shape, np.float32),
            stream=workspace.stream,
        )
        self._clock.mark("similarity")
        boxes: Any = None
        if self._spec is not None:
            out = workspace.array("boxes", (masks.shape[0], 5), np.int32)
            boxes = ops.mask_boxes(masks, self._canvas_hw, out=out, stream=workspace.stream)
        return _Proposal(
            encoded=encoded,
            masks=masks,
            logits=workspace.read_back("logits", logits),
            no_object=workspace.read_back("no_object", encoded["no_object"]),
            boxes=boxes,
            boxes_on_host=None if boxes is None else workspace.read_back("boxes", boxes),
        )

    def _upload_scores(self, scores: FloatArray, rows: int) -> Array:
        workspace = self._workspace
        if workspace.device == "cpu":
            return np.ascontiguousarray(scores)
        staged = workspace.on_host("class_scores", (rows, scores.shape[1]), np.float32)
        staged[...] = repeated_rows(scores, rows)
        return workspace.upload("class_scores", staged)

    def _judge(
        self, state: FrameState, proposal: _Proposal, by_text: FloatArray, objectness: FloatArray
    ) -> FloatArray:
        """Class probabilities [P, Q]: the segments' own, ``by_text``, where CLIP is not asked."""
        assert self._spec is not None
        boxes, no_object = np.asarray(proposal.boxes_on_host), proposal.no_object[0]
        asked = np.ones(len(boxes), np.bool_)
        if self._spec.min_score > 0:
            # Empty masks are encoded once, and their soft masks vote: CLIP's opinion of them costs
            # next to nothing, yet matters.
            asked = (objectness >= self._spec.min_score) | (boxes[:, 4] == 0)
        indices = np.flatnonzero(asked)
        by_region = by_text.copy()
        if len(indices):
            embeds = self._embeds(state, proposal, boxes, indices)
            text = state.classes.vocabulary.prompt_embeds[REGION_PROMPTS]
            logits = np.float32(self._spec.logit_scale) * (text @ embeds.T)
            by_region[:, indices] = class_probabilities(logits, no_object[indices])[0]
        return by_region

    def _embeds(
        self,
        state: FrameState,
        proposal: _Proposal,
        boxes: npt.NDArray[np.int32],
        indices: npt.NDArray[np.intp],
    ) -> FloatArray:
        """Embeddings of the regions of such indices, float32 [len(indices), D] in host memory."""
        assert self._spec is not None
        height, width = self._canvas_hw
        own, places = distinct_crops(boxes[indices], self._spec.style, height * width)
        regions = indices[own].astype(np.int32)
        # The crop of an empty mask is blank in every frame (unless the style ignores masks).
        blank = np.flatnonzero((boxes[regions, 4] == 0) & (self._spec.style != "crop"))
        shown = np.delete(regions, blank)
        batches = np.array_split(shown, -(-len(shown) // self._spec.batch)) if len(shown) else []
        if len(blank) and self._blank is None:
            batches = [regions[blank], *batches]
        rows = self._look(state, proposal, batches)
        if len(blank):
            if self._blank is None:
                self._blank = rows.pop(0)
            rows = [np.insert(np.concatenate([self._blank[:0], *rows]), blank, self._blank, axis=0)]
        embeds: FloatArray = np.concatenate(rows)[places]
        return embeds

    def _look(
        self, state: FrameState, proposal: _Proposal, batches: list[npt.NDArray[np.int32]]
    ) -> list[FloatArray]:
        """Embeddings of every batch of regions, after one wait."""
        assert self._spec is not None
        workspace, spec = self._workspace, self._spec
        image = reshaped(state.image, state.image.shape[1:])
        most = -(-int(proposal.masks.shape[0]) // spec.batch) + 1  # one for the blank
        staged = workspace.on_host("regions", (most, spec.batch), np.int32)
        rows = []
        for place, batch in enumerate(batches):
            # On a GPU all batches have one size, so that one capture serves them: the last region
            # of a smaller one is shown again.
            size = len(batch) if workspace.device == "cpu" else spec.batch
            staged[place, :size] = repeated_rows(batch, size)
            regions = workspace.upload("regions", staged[place, :size])
            embeds = state.run("regions", partial(self._encode_regions, image, proposal, regions))
            if len(embeds.shape) != 2 or embeds.shape[0] != size:
                raise BackendError(
                    f"region_embeds: expected {size} rows, got shape {tuple(embeds.shape)}. Export "
                    "the bundle again."
                )
            host = workspace.on_host(
                "region_embeds", (most, spec.batch, embeds.shape[1]), np.float32
            )
            workspace.copy_out(embeds, host[place, :size])
            rows.append(host[place, : len(batch)])
        workspace.synchronize()
        return [np.array(row) for row in rows]

    def _encode_regions(self, image: Array, proposal: _Proposal, regions: Array) -> Array:
        """Enqueue the encoder's look at some regions, float32 [R, D] on the device."""
        assert self._spec is not None
        spec, workspace = self._spec, self._workspace
        crops = ops.crop_regions(
            image,
            proposal.masks,
            regions,
            proposal.boxes,
            side=spec.side,
            style=spec.style,
            scale=self._scale,
            offset=self._offset,
            out=workspace.array("crops", (regions.shape[0], 3, spec.side, spec.side), np.float32),
            stream=workspace.stream,
        )
        encoded = self._region_encoder.run({"crops": crops}, stream=workspace.stream)
        return workspace.own("region_embeds", encoded["region_embeds"])


class ProposalsFamily(Family):
    """Bundles of family ``proposals``."""

    name, pipeline = "proposals", ProposalsPipeline
    golden = GoldenRule(
        stages=(
            "image",
            "region_masks",
            "segment_embeds",
            "no_object",
            "class_scores",
            "mask_logits",
        ),
        # One flipped mask pixel changes what CLIP is shown.
        slack={"class_scores": 10.0},
        raw_logits=False,
    )

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        assert bundle.regions is not None, "the family's bundles have them"
        super().__init__(bundle, config)
        self.preprocess = bundle.preprocess
        self.fusion = bundle.regions.fusion
        self.encoder, least = bundle.regions.encoder, config.min_region_score
        if least is not None and self.encoder is None:
            raise ArgumentError(
                f"min_region_score: expected None for {bundle.name}, which has no region encoder, "
                f"got {least:g}. Leave it out."
            )
        if self.encoder is not None:
            self.encoder = self.encoder if least is None else replace(self.encoder, min_score=least)
            self.graphs += ("region_encoder",)
            self.axes["regions"] = (1, self.encoder.batch, self.encoder.batch)
            self.prompt_sets += (
                PromptSet(
                    name=REGION_PROMPTS,
                    templates=self.encoder.templates,
                    bank="region_embeds",
                    golden="region_text_embeds",
                ),
            )

    in_one_part = False  # the host chooses the regions that are looked at, and weighs opinions

    def bind(self, vocabulary: Vocabulary, *, device: str = "cpu") -> BoundClasses:
        bound = super().bind(vocabulary, device=device)
        if bound.seen is None or not self.head.seen_bias:
            return bound
        bias = np.float32(self.head.seen_bias) * bound.seen.astype(np.float32)
        return replace(bound, bias=bias)


def class_probabilities(logits: FloatArray, no_object: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Softmax over classes, logits [P, Q], and "no object", logits [Q].

    Returns the probabilities of the classes [P, Q], and of being any class [Q]; NaN where a logit
    is NaN or positive infinity.
    """
    peak = np.maximum(logits.max(axis=0), no_object)
    with np.errstate(invalid="ignore"):  # infinity minus infinity: the caller checks for NaN
        terms, rest = np.exp(logits - peak), np.exp(no_object - peak)
    total = terms.sum(axis=0)
    return terms / (total + rest), total / (total + rest)


def fuse(
    by_text: FloatArray,
    by_region: FloatArray | None,
    fusion: str,
    seen: npt.NDArray[np.bool_] | None,
) -> FloatArray:
    """Weigh the class probabilities [P, Q] of segments and regions, by ``RegionSpec.fusion``.

    ``seen`` is bool [P]. Returns float32 [P, Q], in [0, 1]; columns do not sum to one.
    """
    if by_region is None or fusion == "segments":
        return by_text
    if fusion == "regions":
        return by_region
    fused: FloatArray = by_text**_OTHER * by_region**_TRUSTED
    if fusion == "seen_and_unseen" and seen is not None and seen.any():
        mean = by_region[seen].mean(axis=0)
        fused[seen] = by_text[seen] ** _TRUSTED * mean**_OTHER
    return fused
