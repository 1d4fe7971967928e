"""ZegCLIP and CLIP-RC: class queries, a decoder, similarity of queries and patches.

Source: Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation",
CVPR 2023: the mean over heads of the last layer's scaled attention logits is one dot product of
the full width, so the masks come from ``patch_text_similarity`` with ``normalize=False``. Zhang et
al., "Exploring Regional Clues in CLIP for Zero-Shot Semantic Segmentation", CVPR 2024: there is a
set of class queries for each region; the mean over regions commutes with the last product, so the
decoder graph ends with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.backends.base import Session
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.common.arrays import Array, dtype_of
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import BundleError
from zsseg_rt.runtime.families.base import (
    BoundClasses,
    ClassLogits,
    Family,
    FrameState,
    GoldenRule,
    Pipeline,
    adopt_rows,
    bucket_of,
    read_weights,
    repeated_rows,
)
from zsseg_rt.runtime.workspace import Workspace
from zsseg_rt.text.vocabulary import Vocabulary

_QUERY_DTYPES = ("float32", "float16")
_Projection = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


class DescriptorPipeline(Pipeline):
    """Decodes a query per phrase.

    Where graphs give ``cls_embed`` and take ``queries`` in float16, text embeddings and the weight
    are rounded to float16 beside them, once. The queries' text half stays float32.
    """

    # The text half of float16 factors would differ more: ZegCLIP as trained for the demo, 40
    # scenes: labels of float16 graphs differ from float32 graphs' by 2.6e-4 with float32 queries,
    # 2.6e-4 with these, 2.7e-4 with such a text half; queries by 3.9e-5, 5.7e-5 and 2.7e-4.

    of_cells = True

    def __init__(
        self, family: DescriptorFamily, sessions: Mapping[str, Session], workspace: Workspace
    ) -> None:
        super().__init__(family, sessions, workspace)
        self._decoder = sessions["decoder"]
        self._dtype = _dtype_of_queries(self._image_encoder, self._decoder)
        self._weight, self._bias = map(workspace.place, family.projection)
        self._image_weight = self._weight
        if self._dtype != "float32":
            self._image_weight = workspace.place(family.projection[0].astype(self._dtype))

    def adopt(self, classes: BoundClasses, *, num_rows: int | None = None) -> BoundClasses:
        """Copy the text embeddings; on a GPU, compute the text half of the class queries there."""
        workspace = self._workspace
        adopted = adopt_rows(classes, num_rows, workspace, text_dtype=self._dtype)
        if workspace.device == "cpu":
            return adopted
        rows, text_embeds = adopted.text_embeds.shape[0], adopted.text_embeds
        if self._dtype != "float32":
            exact = repeated_rows(classes.text_embeds, rows)
            text_embeds = workspace.upload("text_embeds float32", exact)
        text_queries = ops.relationship_descriptor_text(
            text_embeds,
            self._weight,
            self._bias,
            out=workspace.array("text_queries", (rows, self._bias.shape[0]), np.float32),
            stream=workspace.stream,
        )
        return replace(adopted, text_queries=text_queries)

    def masks(self, state: FrameState) -> ClassLogits:
        encoded = self._encode(state.image)
        queries = self._queries(encoded["cls_embed"], state.classes)
        self._clock.mark("descriptor")
        feeds = {"queries": queries, "patch_embeds": encoded["patch_embeds"]}
        decoded = self._decoder.run(feeds, stream=self._workspace.stream)
        self._clock.mark("decoder")
        masks = self._compare(decoded["patch_keys"], decoded["class_embeds"])
        if state.trace is not None:
            state.trace.update(encoded, **decoded, queries=queries, mask_logits=masks.mask_logits)
        return masks

    def _queries(self, cls_embed: Array, classes: BoundClasses) -> Array:
        rows = (cls_embed.shape[0], classes.text_embeds.shape[0], self._bias.shape[0])
        return ops.relationship_descriptor(
            cls_embed,
            classes.text_embeds,
            self._image_weight,
            self._bias,
            text_queries=classes.text_queries,
            out=self._workspace.array("queries", rows, self._dtype),
            workspace=self._workspace.products(),
            stream=self._workspace.stream,
        )


class DescriptorFamily(Family):
    """Bundles of family ``descriptor``."""

    name, pipeline = "descriptor", DescriptorPipeline
    graphs = ("image_encoder", "decoder")
    golden = GoldenRule(
        stages=(
            "image",
            "patch_embeds",
            "cls_embed",
            "queries",
            "class_embeds",
            "patch_keys",
            "mask_logits",
        ),
        raw_logits=True,
    )

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        super().__init__(bundle, config)
        self.projection = _read_projection(bundle)
        stated = bundle.head.independent_queries
        # Bundles before this key are of two architectures.
        self._independent = bundle.architecture == "zegclip" if stated is None else stated

    def rows_for(self, num_phrases: int) -> int:
        """ZegCLIP's queries never meet. CLIP-RC's patches attend to all, so none may be added."""
        return bucket_of(num_phrases, self.head.max_classes) if self._independent else num_phrases

    def bind(self, vocabulary: Vocabulary, *, device: str = "cpu") -> BoundClasses:
        """Compute the text half of the class queries; on a GPU each lane does."""
        bound = super().bind(vocabulary, device=device)
        if device != "cpu":
            return bound
        queries = ops.relationship_descriptor_text(vocabulary.embeds, *self.projection)
        return replace(bound, text_queries=queries)


def _dtype_of_queries(image_encoder: Session, decoder: Session) -> str:
    """The dtype between graphs: of what the encoder gives of an image, and of the queries."""
    dtype = dtype_of("cls_embed", image_encoder.outputs)
    wanted = dtype_of("queries", decoder.inputs)
    if dtype != wanted or dtype not in _QUERY_DTYPES:
        raise BundleError(
            f"cls_embed and queries: expected both {' or both '.join(_QUERY_DTYPES)}, got {dtype} "
            f"and {wanted}. Export the bundle again."
        )
    return dtype


def _read_projection(bundle: Bundle) -> _Projection:
    weight, bias = read_weights(bundle, ("descriptor.weight", "descriptor.bias"))
    if weight.shape != (bias.shape[0], 2 * bundle.text.embed_dim):
        raise BundleError(
            f"{bundle.path}: descriptor.weight: expected shape ({bias.shape[0]}, "
            f"{2 * bundle.text.embed_dim}), got {weight.shape}. Export the bundle again."
        )
    return weight, bias
