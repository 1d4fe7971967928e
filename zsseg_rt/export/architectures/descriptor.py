"""Export ZegCLIP and CLIP-RC: family ``descriptor``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.common.checks import check_size
from zsseg_rt.export.bundle_writer import ExportedModel, write_model_bundle
from zsseg_rt.export.golden import labels_golden, preprocess_frame
from zsseg_rt.export.graph_files import (
    image_network,
    weights_of,
    written_graph,
)
from zsseg_rt.export.options import COMMON_OPTIONS, ExportOptions, read_options
from zsseg_rt.export.text_side import TextSide, clip_text, seen_names
from zsseg_rt.networks.descriptor import (
    PromptedTower,
    cell_encoder,
    decoder,
    image_encoder,
    two_way_decoder,
    zegclip_descriptor,
)
from zsseg_rt.networks.layers import read_linear
from zsseg_rt.networks.text import WrittenText
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.onnx.operations import Linear, Value
from zsseg_rt.ops import reference
from zsseg_rt.torch_files.official import IMAGE_MEAN, IMAGE_STD, read_descriptor
from zsseg_rt.torch_files.shapes import divisor

Tensors = Mapping[str, npt.NDArray[Any]]

_FILE_OPTIONS = COMMON_OPTIONS | {"class_names", "size_hw"}
_DECODER_HEADS = 8  # of both systems
_SEEN_BIAS = 0.1  # by which the official systems lower probabilities of seen classes


@dataclass(frozen=True, kw_only=True)
class DescriptorParts:
    """A ZegCLIP or CLIP-RC split where the runtime's kernels take over."""

    tower: PromptedTower  # The image tower
    head: Tensors  # Weights below decode_head.
    num_heads: int  # Heads of the decoder

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


def export_descriptor_file(
    file: str | Path,
    path: str | Path,
    architecture: str,
    *,
    seen_classes: Sequence[int] = (),
    **options: Any,
) -> Path:
    """Write a bundle of an official checkpoint, without torch.

    ``seen_classes`` are the rows of ``class_names`` whose scores are lowered.
    """
    export_options = read_options(options, _FILE_OPTIONS, architecture)

    def cut() -> ExportedModel:
        parts, text = _read_parts(Path(file), architecture)
        return _cut(parts, text, seen_classes, _SEEN_BIAS, export_options)

    return write_model_bundle(Path(path), cut, export_options)


def _read_parts(file: Path, architecture: str) -> tuple[DescriptorParts, WrittenText | None]:
    visual, weights, text = read_descriptor(file, architecture)
    tower = PromptedTower(
        tensors=visual,
        num_heads=divisor("num_heads", None, visual["proj"].shape[0]),
        activation="quick_gelu",
    )
    heads = divisor("decoder_heads", _DECODER_HEADS, len(weights["q_proj.weight"]))
    parts = DescriptorParts(tower=tower, head=weights, num_heads=heads)
    return parts, clip_text(text)


def export_descriptor(model: Any, options: ExportOptions) -> ExportedModel:
    """Split a ZegCLIP or CLIP-RC in torch into a bundle's parts."""
    rule, parts = model.label_rule, parts_of(model)
    return _cut(parts, model.text_encoder, rule.seen_classes, float(rule.seen_bias), options)


def _cut(
    parts: DescriptorParts,
    tower: Any,
    seen_classes: Sequence[int],
    seen_bias: float,
    options: ExportOptions,
) -> ExportedModel:
    size_hw = _checked_size(parts.tower, options)
    text = TextSide(
        options,
        embed_dim=parts.tower.tensors["proj"].shape[1],
        space="OpenAI CLIP ViT-B/16",
        tower=tower,
    )
    projection, logit_scale = parts.projection()
    seen = seen_names(seen_classes, options.class_names)
    head = HeadSpec(
        logit_scale=logit_scale,
        normalize=False,
        activation="sigmoid",
        grid_hw=parts.tower.grid_hw(size_hw),
        seen=seen,
        seen_bias=seen_bias if seen else 0.0,
        independent_queries=not parts.tower.num_cells,
    )
    preprocess = PreprocessSpec(size_hw=size_hw, mean=IMAGE_MEAN, std=IMAGE_STD)
    cells, query_dim = parts.tower.num_cells, len(projection.weight)
    width = query_dim if cells else parts.tower.tensors["proj"].shape[1]
    inputs = {
        "queries": (cells or 1, "classes", query_dim),
        "patch_embeds": (1, head.grid_hw[0] * head.grid_hw[1], width),
    }
    return ExportedModel(
        family="descriptor",
        architecture="clip_rc" if parts.tower.num_cells else "zegclip",
        graphs={
            "image_encoder": image_network(parts.encode, size_hw, ("patch_embeds", "cls_embed")),
            "decoder": written_graph(parts.decode, inputs, ("class_embeds", "patch_keys")),
        },
        weights={
            "descriptor.weight": projection.weight,
            "descriptor.bias": np.asarray(projection.bias),
        },
        preprocess=preprocess,
        head=head,
        text=text,
        golden=partial(_golden, parts),
    )


def _checked_size(tower: PromptedTower, options: ExportOptions) -> tuple[int, int]:
    """The input size; patches must fill one that was asked for."""
    if options.size_hw is None:
        return (tower.grid_side * tower.stride,) * 2
    check_size(options.size_hw, tower.patch_size)
    return options.size_hw


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


def _golden(
    parts: DescriptorParts, model: ExportedModel, names: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    """Every intermediate, as NumPy computes it."""
    embeds, extra = model.text.embed(names)
    image = preprocess_frame(model.preprocess)
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
    return stages | labels_golden(patch_keys, class_embeds, model.head, names) | extra
