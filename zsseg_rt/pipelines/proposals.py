"""ZegFormer: segments from one network, judged by their own embeddings and by CLIP's look at them.

CLIP is shown every segment's region, a few at a time. Regions whose crops are equal share one look,
and what CLIP sees in an empty mask is kept from frame to frame; that changes no result.

Source: Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.backends.base import Array, Session
from zsseg_rt.bundle import Bundle, PreprocessSpec
from zsseg_rt.errors import ArgumentError, BackendError, BundleError
from zsseg_rt.pipelines.base import BoundClasses, GraphLoader, Trace, seen_phrases
from zsseg_rt.pipelines.fusion import class_probabilities, fuse
from zsseg_rt.pipelines.masks import RegionVotes
from zsseg_rt.region_spec import RegionEncoderSpec
from zsseg_rt.vocabulary import Vocabulary
from zsseg_rt.workspace import StageClock, Workspace, reshaped

__all__ = ["ProposalsPipeline", "distinct_crops", "with_min_score"]

FloatArray = npt.NDArray[np.float32]


def with_min_score(bundle: Bundle, min_score: float | None) -> Bundle:
    """The bundle with another ``min_score``; itself for None.

    Raises:
        ArgumentError: The bundle has no region encoder.
    """
    if min_score is None:
        return bundle
    if bundle.regions is None or bundle.regions.encoder is None:
        raise ArgumentError(
            f"min_region_score: expected None for {bundle.name}, whose family has no region "
            f"encoder, got {min_score:g}. Leave it out."
        )
    encoder = replace(bundle.regions.encoder, min_score=min_score)
    return replace(bundle, regions=replace(bundle.regions, encoder=encoder))


def distinct_crops(
    boxes: npt.NDArray[np.int32], style: str, num_pixels: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.intp]]:
    """Which regions have crops of their own.

    Args:
        boxes: int32 [Q, 5], of :func:`zsseg_rt.ops.mask_boxes`.
        style: What a crop shows.
        num_pixels: Pixels of the canvas.

    Returns:
        Regions with distinct crops, int32 [R], and for every region the place in that list of one
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
        space = self._workspace
        out = space.array("boxes", (masks.shape[0], 5), np.int32)
        return space.fetch(ops.mask_boxes(masks, self._canvas_hw, out=out, stream=space.stream))

    def embeds(
        self, image: Array, masks: Array, boxes: npt.NDArray[np.int32], chosen: npt.NDArray[np.intp]
    ) -> FloatArray:
        """Embeddings of the chosen regions, float32 [len(chosen), D] in host memory."""
        height, width = self._canvas_hw
        own, places = distinct_crops(boxes[chosen], self._spec.style, height * width)
        regions = chosen[own].astype(np.int32)
        # The crop of an empty mask is blank in every frame (except where masks do not cut it).
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
        spec, space = self._spec, self._workspace
        crops = ops.crop_regions(
            image,
            masks,
            np.ascontiguousarray(regions),
            np.ascontiguousarray(boxes[regions, :4]),
            side=spec.side,
            style=spec.style,
            scale=self._scale,
            offset=self._offset,
            out=space.array("crops", (len(regions), 3, spec.side, spec.side), np.float32),
            stream=space.stream,
        )
        encoded = self._session.run({"crops": crops}, stream=space.stream)
        return np.array(space.fetch(encoded["region_embeds"]))


class ProposalsPipeline:
    """Runs bundles of family ``proposals``."""

    def __init__(self, bundle: Bundle, load: GraphLoader, workspace: Workspace) -> None:
        if bundle.regions is None:
            raise BundleError(f"{bundle.path / 'bundle.json'}: missing key 'regions'")
        self._head, self._regions = bundle.head, bundle.regions
        self._workspace, self._canvas_hw = workspace, bundle.preprocess.size_hw
        self._sessions = {"image_encoder": load("image_encoder")}
        self._judge: _RegionJudge | None = None
        encoder = bundle.regions.encoder
        if encoder is not None:
            session = self._sessions["region_encoder"] = load("region_encoder")
            self._judge = _RegionJudge(encoder, bundle.preprocess, session, workspace)

    @property
    def sessions(self) -> dict[str, Session]:
        """The loaded graphs by name."""
        return self._sessions

    def bind(self, vocabulary: Vocabulary) -> BoundClasses:
        """Place the text embeddings and the calibration of seen classes on the device."""
        seen = seen_phrases(vocabulary.phrases, self._head)
        bias = None
        if seen is not None and self._head.seen_bias:
            bias = self._workspace.place(np.float32(self._head.seen_bias) * seen.astype(np.float32))
        return BoundClasses(
            vocabulary=vocabulary,
            seen=seen,
            text_embeds=self._workspace.place(vocabulary.embeds),
            bias=bias,
        )

    def masks(
        self, image: Array, classes: BoundClasses, clock: StageClock, trace: Trace | None = None
    ) -> RegionVotes:
        """Propose segments and let them vote; see :class:`Pipeline`."""
        space = self._workspace
        proposed = self._sessions["image_encoder"].run({"image": image}, stream=space.stream)
        clock.mark("image_encoder")
        masks = reshaped(proposed["region_masks"], proposed["region_masks"].shape[1:])
        logits, no_object = self._segment_logits(proposed, classes)
        by_text, objectness = class_probabilities(logits, no_object)
        clock.mark("similarity")
        by_region = None
        if self._judge is not None:
            by_region = self._ask(image, masks, classes, by_text, no_object, objectness)
            clock.mark("regions")
        scores = fuse(by_text, by_region, self._regions.fusion, classes.seen)
        if not np.isfinite(scores).all():
            raise BackendError(
                "class_scores: expected finite numbers, got NaN or infinity at precision "
                f"{self._sessions['image_encoder'].precision}. Use precision='float32' and run "
                "self_check()."
            )
        if trace is not None:
            trace.update(proposed, class_scores=space.place(scores))
        return RegionVotes(
            mask_logits=masks,
            class_scores=space.upload("class_scores", np.ascontiguousarray(scores)),
            canvas_hw=self._canvas_hw,
        )

    def _segment_logits(
        self, proposed: dict[str, Array], classes: BoundClasses
    ) -> tuple[FloatArray, FloatArray]:
        """The segments' logits of the classes [P, Q] and of "no object" [Q], in host memory."""
        embeds, space = proposed["segment_embeds"], self._workspace
        logits = ops.patch_text_similarity(
            embeds,
            classes.text_embeds,
            logit_scale=self._head.logit_scale,
            normalize=self._head.normalize,
            out=space.array(
                "logits", (1, len(classes.vocabulary.phrases), embeds.shape[1]), np.float32
            ),
            stream=space.stream,
        )
        return space.fetch(logits)[0], space.fetch(proposed["no_object"])[0]

    def _ask(
        self,
        image: Array,
        masks: Array,
        classes: BoundClasses,
        by_text: FloatArray,
        no_object: FloatArray,
        objectness: FloatArray,
    ) -> FloatArray:
        """The region encoder's class probabilities; where it is not asked, the segments' own."""
        spec, text = self._regions.encoder, classes.vocabulary.region_embeds
        assert self._judge is not None
        assert spec is not None
        assert text is not None
        boxes = self._judge.boxes(masks)
        asked = np.ones(len(boxes), np.bool_)
        if spec.min_score > 0:
            # Empty masks share one look, and their soft masks vote: CLIP's opinion of them costs
            # next to nothing and matters.
            asked = (objectness >= spec.min_score) | (boxes[:, 4] == 0)
        chosen = np.flatnonzero(asked)
        by_region = by_text.copy()
        if len(chosen):
            planes = reshaped(image, image.shape[1:])
            embeds = self._judge.embeds(planes, masks, boxes, chosen)
            logits = np.float32(spec.logit_scale) * (text @ embeds.T)
            by_region[:, chosen] = class_probabilities(logits, no_object[chosen])[0]
        return by_region
