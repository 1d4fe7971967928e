"""Export ZegCLIP and CLIP-RC: family ``descriptor``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.common.checks import check_size
from zsseg_rt.errors import ArgumentError
from zsseg_rt.export.bundle_writer import ExportedModel
from zsseg_rt.export.golden import NUMBERED_NAMES, labels_golden, preprocess_frame
from zsseg_rt.export.graph_files import (
    MAX_CLASSES,
    WrittenGraph,
    image_network,
    provenance,
    written_graph,
)
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.export.text_side import TextSide, seen_names
from zsseg_rt.export.word_subset import weights_of
from zsseg_rt.networks.descriptor import (
    PromptedTower,
    cell_encoder,
    decoder,
    image_encoder,
    two_way_decoder,
    zegclip_descriptor,
)
from zsseg_rt.networks.layers import read_linear
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.onnx.operations import Linear, Value
from zsseg_rt.ops import reference

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class DescriptorParts:
    """A ZegCLIP or CLIP-RC split where the runtime's kernels take over.

    Attributes:
        tower: The image tower.
        head: Weights below ``decode_head.``.
        num_heads: Heads of the decoder.
    """

    tower: PromptedTower
    head: Tensors
    num_heads: int

    def projection(self) -> tuple[Linear, float]:
        """The descriptor's weights [Q, 2 D], and the factor of the last product."""
        if self.tower.num_cells:
            return read_linear(self.head, "q_proj"), 1.0
        return zegclip_descriptor(self.head, self.num_heads)

    def encode(self, ops: Any, image: Value) -> tuple[Value, Value]:
        """``patch_embeds`` [B, N, M] and ``cls_embed`` [R, D]: one row per cell or image."""
        if self.tower.num_cells:
            lateral = read_linear(self.head, "lateral_proj")
            return cell_encoder(ops, self.tower, image, lateral)
        return image_encoder(ops, self.tower, image)

    def decode(self, ops: Any, queries: Value, patch_embeds: Value) -> tuple[Value, Value]:
        """``class_embeds`` [B, C, E] and ``patch_keys`` [B, N, E] of queries [R, C, Q]."""
        function = two_way_decoder if self.tower.num_cells else decoder
        return function(ops, self.head, self.num_heads, queries, patch_embeds)


def export_descriptor(model: Any, options: ExportOptions) -> ExportedModel:
    """Split a ZegCLIP or CLIP-RC into a bundle's parts.

    Graphs and tensors: ``image_encoder``: ``image`` [1, 3, H, W] to ``patch_embeds`` [1, N, M]
    and ``cls_embed`` [R, D], one row per cell (ZegCLIP: one); ``decoder``: ``queries``
    [R, classes, E] and ``patch_embeds`` to ``class_embeds`` [1, classes, E] and ``patch_keys``
    [1, N, E]. Float16 graphs have those of
    :attr:`zsseg_rt.bundles.specs.FamilySpec.half_tensors` in float16; all others are float32.
    """
    size_hw = options.size_hw or model.size_hw
    _check(model, size_hw, options)
    parts = parts_of(model)
    text = TextSide(
        options,
        embed_dim=model.config.image_encoder.embed_dim,
        space="OpenAI CLIP ViT-B/16",
        tower=model.text_encoder,
    )
    projection, logit_scale = parts.projection()
    rule = model.label_rule
    seen = seen_names(rule.seen_classes, options.class_names)
    head = HeadSpec(
        logit_scale=logit_scale,
        normalize=False,
        activation=rule.activation,
        grid_hw=parts.tower.grid_hw(size_hw),
        seen=seen,
        seen_bias=float(rule.seen_bias) if seen else 0.0,
        max_classes=MAX_CLASSES,
        independent_queries=model.independent_queries,
        window_batch=options.window_batch,
    )
    preprocess = PreprocessSpec(size_hw=size_hw, mean=model.image_mean, std=model.image_std)
    names = list(options.class_names or NUMBERED_NAMES)[:MAX_CLASSES]
    return ExportedModel(
        family="descriptor",
        architecture=model.architecture,
        graphs={
            "image_encoder": image_network(
                parts.encode, size_hw, options.window_batch, ("patch_embeds", "cls_embed")
            ),
            "decoder": _decoder(parts, head, len(projection.weight)),
        },
        weights={
            "descriptor.weight": projection.weight,
            "descriptor.bias": np.asarray(projection.bias),
        },
        preprocess=preprocess,
        head=head,
        text=text,
        golden=partial(_golden, parts, preprocess, head, text, names),
        provenance=provenance(),
    )


def parts_of(model: Any) -> DescriptorParts:
    """The parts of a torch model, whose weights they share."""
    config, encoder = model.config, model.config.image_encoder
    tower = PromptedTower(
        tensors=weights_of(model.backbone),
        num_heads=encoder.num_heads,
        activation=encoder.activation,
        patch_stride=encoder.patch_stride,
    )
    return DescriptorParts(
        tower=tower, head=weights_of(model.decode_head), num_heads=config.decoder.num_heads
    )


def _check(model: Any, size_hw: tuple[int, int], options: ExportOptions) -> None:
    if options.window_batch > 1 and model.architecture == "clip_rc":
        raise ArgumentError(
            "window_batch: expected 1 for clip_rc, whose cells take the axis of windows, got "
            f"{options.window_batch}. Leave it out: windows then run one by one."
        )
    if options.size_hw is not None:
        check_size(size_hw, model.config.image_encoder.patch_size)
    model.backbone.grid_hw(size_hw)  # an exact CLIP-RC takes one size


def _decoder(parts: DescriptorParts, head: HeadSpec, query_dim: int) -> WrittenGraph:
    windows: int | str = 1 if head.window_batch == 1 else "windows"
    cells, patches = parts.tower.num_cells, head.grid_hw[0] * head.grid_hw[1]
    width = query_dim if cells else parts.tower.tensors["proj"].shape[1]
    inputs = {
        "queries": (cells or windows, "classes", query_dim),
        "patch_embeds": (windows, patches, width),
    }
    return written_graph(parts.decode, inputs, ("class_embeds", "patch_keys"))


def _golden(
    parts: DescriptorParts,
    preprocess: PreprocessSpec,
    head: HeadSpec,
    text: TextSide,
    names: Sequence[str],
) -> dict[str, npt.NDArray[Any]]:
    """Every intermediate, as NumPy computes it."""
    embeds, extra = text.embed_golden(names)
    image = preprocess_frame(preprocess)
    patch_embeds, cls_embed = parts.encode(Arrays(), image)
    (weight, bias), _ = parts.projection()
    queries = reference.relationship_descriptor(cls_embed, embeds, weight, np.asarray(bias))
    class_embeds, patch_keys = parts.decode(Arrays(), queries, patch_embeds)
    stages = {
        "image": image,
        "patch_embeds": patch_embeds,
        "cls_embed": cls_embed,
        "queries": queries,
        "class_embeds": class_embeds,
        "patch_keys": patch_keys,
        "text_embeds": embeds,
    }
    return stages | labels_golden(patch_keys, class_embeds, head, names) | extra
