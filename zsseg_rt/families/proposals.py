"""ZegFormer: segments from one network, judged by their own embeddings and by CLIP's look at them.

CLIP is shown every segment's region, a few at a time. Regions with equal crops are encoded once,
and what CLIP sees in an empty mask is kept from frame to frame; neither changes any result.

Source: Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.arrays import Array, reshaped
from zsseg_rt.backends.base import ANY_PRECISION, Bounds, Session
from zsseg_rt.bundle import Bundle
from zsseg_rt.bundle_specs import PreprocessSpec, RegionEncoderSpec
from zsseg_rt.clock import StageClock
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ArgumentError, BackendError, BundleError
from zsseg_rt.families.base import BoundClasses, GoldenRule, Trace
from zsseg_rt.families.dense import class_axis
from zsseg_rt.families.fusion import class_probabilities, fuse
from zsseg_rt.families.masks import RegionVotes
from zsseg_rt.text.prompts import PromptSet
from zsseg_rt.text.vocabulary import Vocabulary
from zsseg_rt.workspace import Workspace

__all__ = ["REGION_PROMPTS", "ProposalsFamily", "distinct_crops"]

REGION_PROMPTS = "regions"
"""The prompt set of the region encoder."""

FloatArray = npt.NDArray[np.float32]


def distinct_crops(
    boxes: npt.NDArray[np.int32], style: str, num_pixels: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.intp]]:
    """Which regions have crops of their own.

    Args:
        boxes: int32 [Q, 5], of :func:`zsseg_rt.ops.mask_boxes`.
        style: What a crop shows.
        num_pixels: Pixels of the canvas.

    Returns:
        Regions with distinct crops, int32 [R], and for every region the index in that list of one
        whose crop equals its own, [Q].
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


class _RegionJudge:
    """Shows regions to the region encoder and compares what it sees with the classes."""

    def __init__(
        self,
        spec: RegionEncoderSpec,
        image: PreprocessSpec,
        session: Session,
        workspace: Workspace,
    ) -> None:
        self._spec, self._session, self._workspace = spec, session, workspace
        self._canvas_hw = image.size_hw
        self._blank: FloatArray | None = None  # what CLIP sees in an empty mask, [1, D]
        # From the segments' normalisation to the region encoder's, in one step.
        self._scale = [float(a / b) for a, b in zip(image.std, spec.std, strict=True)]
        self._offset = [
            float((a - b) / c) for a, b, c in zip(image.mean, spec.mean, spec.std, strict=True)
        ]

    def boxes(self, masks: Array) -> npt.NDArray[np.int32]:
        """Bounds of every mask [Q, h, w], int32 [Q, 5] in host memory."""
        workspace = self._workspace
        out = workspace.array("boxes", (masks.shape[0], 5), np.int32)
        return workspace.fetch(
            ops.mask_boxes(masks, self._canvas_hw, out=out, stream=workspace.stream)
        )

    def embeds(
        self, image: Array, masks: Array, boxes: npt.NDArray[np.int32], chosen: npt.NDArray[np.intp]
    ) -> FloatArray:
        """Embeddings of the chosen regions, float32 [len(chosen), D] in host memory."""
        height, width = self._canvas_hw
        own, places = distinct_crops(boxes[chosen], self._spec.style, height * width)
        regions = chosen[own].astype(np.int32)
        # The crop of an empty mask is blank in every frame (unless the style ignores masks).
        blank = np.flatnonzero((boxes[regions, 4] == 0) & (self._spec.style != "crop"))
        if len(blank) and self._blank is None:
            self._blank = self._encode(image, masks, boxes, regions[blank])
        shown = np.delete(regions, blank)
        batches = np.array_split(shown, max(1, -(-len(shown) // self._spec.batch)))
        rows = [self._encode(image, masks, boxes, batch) for batch in batches if len(batch)]
        if len(blank):
            assert self._blank is not None
            rows = [np.insert(np.concatenate([self._blank[:0], *rows]), blank, self._blank, axis=0)]
        seen: FloatArray = np.concatenate(rows)[places]
        return seen

    def _encode(
        self,
        image: Array,
        masks: Array,
        boxes: npt.NDArray[np.int32],
        regions: npt.NDArray[np.int32],
    ) -> FloatArray:
        spec, workspace = self._spec, self._workspace
        crops = ops.crop_regions(
            image,
            masks,
            np.ascontiguousarray(regions),
            np.ascontiguousarray(boxes[regions, :4]),
            side=spec.side,
            style=spec.style,
            scale=self._scale,
            offset=self._offset,
            out=workspace.array("crops", (len(regions), 3, spec.side, spec.side), np.float32),
            stream=workspace.stream,
        )
        encoded = self._session.run({"crops": crops}, stream=workspace.stream)
        return np.array(workspace.fetch(encoded["region_embeds"]))


class ProposalsFamily:
    """Bundles of family ``proposals``; see :class:`zsseg_rt.families.base.Family`."""

    name = "proposals"
    settings = ("min_region_score",)
    auto_precisions = ANY_PRECISION
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
        if bundle.regions is None:
            raise BundleError(f"{bundle.path / 'bundle.json'}: missing key 'regions'")
        self.head, self.preprocess = bundle.head, bundle.preprocess
        self.fusion = bundle.regions.fusion
        self.encoder = _encoder_spec(bundle, config.min_region_score)
        self.graphs: tuple[str, ...] = ("image_encoder",)
        self.axes: dict[str, Bounds] = class_axis(bundle.head)
        self.prompt_sets: tuple[PromptSet, ...] = (PromptSet(templates=bundle.text.templates),)
        if self.encoder is not None:
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

    captures = False  # the host chooses the regions that are looked at

    def rows_for(self, num_phrases: int) -> int:
        """No further rows: nothing is captured."""
        return num_phrases

    def bind(self, vocabulary: Vocabulary, *, device: str = "cpu") -> BoundClasses:
        """Lay out the calibration of seen classes."""
        seen = vocabulary.seen(self.head.seen)
        bias = None
        if seen is not None and self.head.seen_bias:
            bias = np.float32(self.head.seen_bias) * seen.astype(np.float32)
        return BoundClasses(
            vocabulary=vocabulary, seen=seen, text_embeds=vocabulary.embeds, bias=bias
        )

    def pipeline(self, sessions: Mapping[str, Session], workspace: Workspace) -> ProposalsPipeline:
        """Make the pipeline of one lane."""
        return ProposalsPipeline(self, sessions, workspace)


def _encoder_spec(bundle: Bundle, min_score: float | None) -> RegionEncoderSpec | None:
    encoder = None if bundle.regions is None else bundle.regions.encoder
    if min_score is None:
        return encoder
    if encoder is None:
        raise ArgumentError(
            f"min_region_score: expected None for {bundle.name}, which has no region encoder, got "
            f"{min_score:g}. Leave it out."
        )
    return replace(encoder, min_score=min_score)


class ProposalsPipeline:
    """Proposes segments and lets them vote; see :class:`zsseg_rt.families.base.Pipeline`."""

    def __init__(
        self, family: ProposalsFamily, sessions: Mapping[str, Session], workspace: Workspace
    ) -> None:
        self._family, self._head = family, family.head
        self._image_encoder = sessions["image_encoder"]
        self._workspace, self._canvas_hw = workspace, family.preprocess.size_hw
        self._judge: _RegionJudge | None = None
        if family.encoder is not None:
            self._judge = _RegionJudge(
                family.encoder, family.preprocess, sessions["region_encoder"], workspace
            )

    def adopt(self, classes: BoundClasses, *, num_rows: int | None = None) -> BoundClasses:
        """Copy the text embeddings and the calibration of seen classes."""
        upload, bias = self._workspace.upload, classes.bias
        return replace(
            classes,
            text_embeds=upload("text_embeds", classes.text_embeds),
            bias=None if bias is None else upload("bias", bias),
        )

    def masks(
        self, image: Array, classes: BoundClasses, clock: StageClock, trace: Trace | None = None
    ) -> RegionVotes:
        """Run the networks and fuse their opinions."""
        workspace = self._workspace
        proposed = self._image_encoder.run({"image": image}, stream=workspace.stream)
        clock.mark("image_encoder")
        masks = reshaped(proposed["region_masks"], proposed["region_masks"].shape[1:])
        logits, no_object = self._segment_logits(proposed, classes)
        by_text, objectness = class_probabilities(logits, no_object)
        clock.mark("similarity")
        by_region = None
        if self._judge is not None:
            by_region = self._ask(image, masks, classes, by_text, no_object, objectness)
            clock.mark("regions")
        scores = fuse(by_text, by_region, self._family.fusion, classes.seen)
        if not np.isfinite(scores).all():
            raise BackendError(
                "class_scores: expected finite numbers, got NaN or infinity at precision "
                f"{self._image_encoder.precision}. Use precision='float32' and run "
                "self_check()."
            )
        if trace is not None:
            trace.update(proposed, class_scores=workspace.place(scores))
        return RegionVotes(
            mask_logits=masks,
            class_scores=workspace.upload("class_scores", np.ascontiguousarray(scores)),
            canvas_hw=self._canvas_hw,
        )

    def _segment_logits(
        self, proposed: dict[str, Array], classes: BoundClasses
    ) -> tuple[FloatArray, FloatArray]:
        """The segments' logits of the classes [P, Q] and of "no object" [Q], in host memory."""
        embeds, workspace = proposed["segment_embeds"], self._workspace
        logits = ops.patch_text_similarity(
            embeds,
            classes.text_embeds,
            logit_scale=self._head.logit_scale,
            normalize=self._head.normalize,
            out=workspace.array(
                "logits", (1, len(classes.vocabulary.phrases), embeds.shape[1]), np.float32
            ),
            stream=workspace.stream,
        )
        return workspace.fetch(logits)[0], workspace.fetch(proposed["no_object"])[0]

    def _ask(
        self,
        image: Array,
        masks: Array,
        classes: BoundClasses,
        by_text: FloatArray,
        no_object: FloatArray,
        objectness: FloatArray,
    ) -> FloatArray:
        """The region encoder's class probabilities, or the segments' own where it is not asked."""
        spec, text = self._family.encoder, classes.vocabulary.prompt_embeds[REGION_PROMPTS]
        assert self._judge is not None
        assert spec is not None
        boxes = self._judge.boxes(masks)
        asked = np.ones(len(boxes), np.bool_)
        if spec.min_score > 0:
            # Empty masks are encoded once, and their soft masks vote: CLIP's opinion of them costs
            # next to nothing, yet matters.
            asked = (objectness >= spec.min_score) | (boxes[:, 4] == 0)
        chosen = np.flatnonzero(asked)
        by_region = by_text.copy()
        if len(chosen):
            planes = reshaped(image, image.shape[1:])
            embeds = self._judge.embeds(planes, masks, boxes, chosen)
            logits = np.float32(spec.logit_scale) * (text @ embeds.T)
            by_region[:, chosen] = class_probabilities(logits, no_object[chosen])[0]
        return by_region
