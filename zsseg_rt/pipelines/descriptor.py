"""ZegCLIP and CLIP-RC: class queries, a decoder, similarity of queries and patches.

Source: Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation",
CVPR 2023: the mean over heads of the last layer's scaled attention logits is one dot product of
the full width, so the masks come from ``patch_text_similarity`` with ``normalize=False``. Zhang et
al., "Exploring Regional Clues in CLIP for Zero-Shot Semantic Segmentation", CVPR 2024: there is a
set of class queries for each region; the mean over regions commutes with the last product, so the
decoder graph ends with it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from zsseg_rt import ops
from zsseg_rt.backends.base import Array, Session
from zsseg_rt.bundle import Bundle
from zsseg_rt.errors import BundleError
from zsseg_rt.pipelines.base import BoundClasses, GraphLoader, Trace, seen_phrases
from zsseg_rt.pipelines.masks import ClassLogits
from zsseg_rt.vocabulary import Vocabulary
from zsseg_rt.workspace import StageClock, Workspace, reshaped

__all__ = ["DescriptorPipeline"]


class DescriptorPipeline:
    """Runs bundles of family ``descriptor``."""

    def __init__(self, bundle: Bundle, load: GraphLoader, workspace: Workspace) -> None:
        self._head = bundle.head
        self._workspace = workspace
        weight, bias = _read_projection(bundle)
        self._weight_host, self._bias_host = weight, bias
        self._weight, self._bias = workspace.place(weight), workspace.place(bias)
        self._image_encoder = load("image_encoder")
        self._decoder = load("decoder")

    @property
    def sessions(self) -> dict[str, Session]:
        """The loaded graphs by name."""
        return {"image_encoder": self._image_encoder, "decoder": self._decoder}

    def bind(self, vocabulary: Vocabulary) -> BoundClasses:
        """Place the text embeddings and compute the text half of the class queries."""
        text_queries = ops.relationship_descriptor_text(
            vocabulary.embeds, self._weight_host, self._bias_host
        )
        return BoundClasses(
            vocabulary=vocabulary,
            seen=seen_phrases(vocabulary.phrases, self._head),
            text_embeds=self._workspace.place(vocabulary.embeds),
            text_queries=self._workspace.place(text_queries),
        )

    def masks(
        self, image: Array, classes: BoundClasses, clock: StageClock, trace: Trace | None = None
    ) -> ClassLogits:
        """Decode every phrase's query and compare it with the patches; see :class:`Pipeline`."""
        stream, space = self._workspace.stream, self._workspace
        encoded = self._image_encoder.run({"image": image}, stream=stream)
        patch_embeds, cls_embed = encoded["patch_embeds"], encoded["cls_embed"]
        clock.mark("image_encoder")
        phrases, regions = len(classes.vocabulary.phrases), cls_embed.shape[0]
        queries = ops.relationship_descriptor(
            cls_embed,
            classes.text_embeds,
            self._weight,
            self._bias,
            text_queries=classes.text_queries,
            out=space.array("queries", (regions, phrases, self._bias.shape[0]), np.float32),
            stream=stream,
        )
        clock.mark("descriptor")
        decoded = self._decoder.run(
            {"queries": queries, "patch_embeds": patch_embeds}, stream=stream
        )
        clock.mark("decoder")
        patch_keys, class_embeds = decoded["patch_keys"], decoded["class_embeds"]
        logits = ops.patch_text_similarity(
            patch_keys,
            class_embeds,
            logit_scale=self._head.logit_scale,
            normalize=self._head.normalize,
            out=space.array("mask_logits", (1, phrases, patch_keys.shape[1]), np.float32),
            stream=stream,
        )
        clock.mark("similarity")
        mask_logits = reshaped(logits, (1, phrases, *self._head.grid_hw))
        if trace is not None:
            trace.update(encoded, **decoded, queries=queries, mask_logits=mask_logits)
        return ClassLogits(mask_logits=mask_logits)


def _read_projection(bundle: Bundle) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if bundle.weights is None:
        raise BundleError(f"{bundle.path / 'bundle.json'}: missing key 'weights'")
    path = bundle.open_path(bundle.weights)
    try:
        tensors = load_file(path)
        weight, bias = tensors["descriptor.weight"], tensors["descriptor.bias"]
    except (SafetensorError, KeyError, OSError) as exc:
        raise BundleError(f"{path}: expected descriptor.weight and .bias, got {exc}") from exc
    if weight.shape != (bias.shape[0], 2 * bundle.text.embed_dim):
        raise BundleError(
            f"{path}: descriptor.weight: expected shape ({bias.shape[0]}, "
            f"{2 * bundle.text.embed_dim}), got {weight.shape}"
        )
    return np.ascontiguousarray(weight, np.float32), np.ascontiguousarray(bias, np.float32)
