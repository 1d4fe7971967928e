"""Export ZeroSeg: family ``segment_tokens``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec, SegmentSpec
from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.export.bundle_writer import ExportedModel
from zsseg_rt.export.folded.zeroseg import FoldedZeroSeg
from zsseg_rt.export.golden import GOLDEN_NAMES, golden_frame, preprocess_frame
from zsseg_rt.export.graph_files import MAX_CLASSES
from zsseg_rt.export.onnx import image_graph, provenance
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.export.text_side import TextSide
from zsseg_rt.models.zeroseg.model import ZeroSeg


def export_zeroseg(model: ZeroSeg, options: ExportOptions) -> ExportedModel:
    """Split a ZeroSeg into a bundle's parts; the text tower is its teacher's."""
    folded = FoldedZeroSeg(model, options.size_hw or model.config.size_hw)
    text = TextSide(
        options,
        embed_dim=model.config.embed_dim,
        templates=model.config.templates,
        space="OpenAI CLIP ViT-L/14",
        tower=model.text_encoder,
    )
    preprocess = PreprocessSpec(size_hw=folded.size_hw, mean=model.image_mean, std=model.image_std)
    outputs = ("segment_embeds", "image_embed", "group_map")
    return ExportedModel(
        family="segment_tokens",
        architecture=model.architecture,
        graphs={"image_encoder": image_graph(folded, folded.size_hw, outputs)},
        preprocess=preprocess,
        head=_head_spec(model, folded),
        sections={"segments": _segment_spec(model)},
        text=text,
        golden=partial(_golden, model, preprocess, text, options.class_names or GOLDEN_NAMES),
        provenance=provenance(),
    )


def _head_spec(model: ZeroSeg, folded: FoldedZeroSeg) -> HeadSpec:
    return HeadSpec(
        logit_scale=model.config.rule.logit_scale,
        normalize=True,
        activation="none",
        grid_hw=folded.grid_hw,
        unknown_below=model.config.background_threshold,
        max_classes=MAX_CLASSES,
    )


def _segment_spec(model: ZeroSeg) -> SegmentSpec:
    return SegmentSpec(
        num_segments=model.config.group_tokens[1],
        top_k=model.config.rule.top_k,
        plain_cosine=model.config.rule.plain_cosine,
    )


@torch.no_grad()
def _golden(
    model: ZeroSeg, preprocess: PreprocessSpec, text: TextSide, class_names: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    """Every intermediate of the unfolded model, so that folding is checked too."""
    names = list(class_names)[:MAX_CLASSES]
    embeds, extra = text.embed_golden(names)
    frame, image = golden_frame(), preprocess_frame(preprocess)
    tokens = model(torch.from_numpy(image))
    labels, scores = model.segment(
        torch.from_numpy(image), torch.from_numpy(embeds), (frame.shape[0], frame.shape[1])
    )
    unknown_as = label_dtype(len(names))  # -1 becomes the largest value
    return {
        "frame": frame,
        "class_names": np.array(names),
        "text_embeds": embeds,
        "image": image,
        "segment_embeds": tokens.segment_embeds.numpy(),
        "image_embed": tokens.image_embed.numpy(),
        "group_map": tokens.group_map.numpy(),
        "mask_logits": tokens.group_map.numpy(),
        "labels": labels[0].numpy().astype(unknown_as),
        "scores": scores[0].numpy(),
    } | extra
