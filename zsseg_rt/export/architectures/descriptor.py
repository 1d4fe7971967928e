"""Export ZegCLIP and CLIP-RC: family ``descriptor``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.common.checks import check_size
from zsseg_rt.errors import ArgumentError
from zsseg_rt.export.bundle_writer import ExportedModel
from zsseg_rt.export.folded.descriptor import InferenceParts, fold_descriptor
from zsseg_rt.export.golden import NUMBERED_NAMES, as_numpy, golden_frame, preprocess_frame
from zsseg_rt.export.graph_files import MAX_CLASSES
from zsseg_rt.export.onnx import GraphExport, image_graph, provenance, windows_open
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.export.text_side import TextSide, seen_names
from zsseg_rt.models import functional
from zsseg_rt.models.descriptor.model import DescriptorModel


def export_descriptor(model: DescriptorModel, options: ExportOptions) -> ExportedModel:
    """Split a ZegCLIP or CLIP-RC into a bundle's parts.

    Graphs and tensors: ``image_encoder``: ``image`` [1, 3, H, W] to ``patch_embeds`` [1, N, M]
    and ``cls_embed`` [R, D], one row per cell (ZegCLIP: one); ``decoder``: ``queries``
    [R, classes, E] and ``patch_embeds`` to ``class_embeds`` [1, classes, E] and ``patch_keys``
    [1, N, E]. Float16 graphs have those of
    :attr:`zsseg_rt.bundles.specs.FamilySpec.half_tensors` in float16; all others are float32.
    """
    encoder = model.config.image_encoder
    if options.window_batch > 1 and model.architecture == "clip_rc":
        raise ArgumentError(
            "window_batch: expected 1 for clip_rc, whose cells take the axis of windows, got "
            f"{options.window_batch}. Leave it out: windows then run one by one."
        )
    if options.size_hw is not None:
        check_size(options.size_hw, encoder.patch_size)
    text = TextSide(
        options,
        embed_dim=encoder.embed_dim,
        space="OpenAI CLIP ViT-B/16",
        tower=model.text_encoder,
    )
    parts = fold_descriptor(model, options.size_hw)
    head = _head_spec(model, parts, options)
    preprocess = PreprocessSpec(size_hw=parts.size_hw, mean=model.image_mean, std=model.image_std)
    names = list(options.class_names or NUMBERED_NAMES)[:MAX_CLASSES]
    outputs = ("patch_embeds", "cls_embed")
    return ExportedModel(
        family="descriptor",
        architecture=model.architecture,
        graphs={
            "image_encoder": image_graph(
                parts.image_encoder, parts.size_hw, outputs, options.window_batch
            ),
            "decoder": _decoder(parts, options.window_batch),
        },
        weights={
            "descriptor.weight": parts.descriptor_weight.numpy(),
            "descriptor.bias": parts.descriptor_bias.numpy(),
        },
        preprocess=preprocess,
        head=head,
        text=text,
        golden=partial(_golden, model, parts, preprocess, head, text, names),
        provenance=provenance(),
    )


def _decoder(parts: InferenceParts, window_batch: int) -> GraphExport:
    query_dim = parts.descriptor_weight.shape[0]
    num_patches = parts.grid_hw[0] * parts.grid_hw[1]
    windows = windows_open(window_batch, "queries", "patch_embeds")
    return GraphExport(
        module=parts.decoder,
        inputs={
            "queries": torch.zeros(parts.num_cells * window_batch, 3, query_dim),
            "patch_embeds": torch.zeros(window_batch, num_patches, parts.memory_dim),
        },
        outputs=("class_embeds", "patch_keys"),
        dynamic={
            "queries": {**windows.get("queries", {}), 1: ("classes", MAX_CLASSES)},
            "patch_embeds": windows.get("patch_embeds", {}),
        },
    )


def _head_spec(model: DescriptorModel, parts: InferenceParts, options: ExportOptions) -> HeadSpec:
    config = model.config
    seen = seen_names(() if config.self_trained else config.seen_classes, options.class_names)
    return HeadSpec(
        logit_scale=float(parts.logit_scale),
        normalize=False,
        activation=config.score_activation,
        grid_hw=parts.grid_hw,
        seen=seen,
        seen_bias=float(config.seen_bias) if seen else 0.0,
        max_classes=MAX_CLASSES,
        independent_queries=model.independent_queries,
        window_batch=options.window_batch,
    )


@torch.no_grad()
def _golden(
    model: DescriptorModel,
    parts: InferenceParts,
    preprocess: PreprocessSpec,
    head: HeadSpec,
    text: TextSide,
    names: Sequence[str],
) -> dict[str, npt.NDArray[Any]]:
    """Every intermediate of the model as trained, from its own forward pass.

    ``image``, ``patch_embeds``, ``cls_embed`` and ``mask_logits`` do not come from the folded
    parts, so that an error in the folding shows.
    """
    frame, (embeds, extra) = golden_frame(), text.embed_golden(names)
    image = torch.from_numpy(preprocess_frame(preprocess))
    text_embeds = torch.from_numpy(embeds)
    output = model(image, text_embeds)
    patch_embeds, cls_embed = model.encoder_outputs(output)
    queries = functional.relationship_descriptor(
        cls_embed, text_embeds, parts.descriptor_weight, parts.descriptor_bias
    )
    class_embeds, patch_keys = parts.decoder(queries, patch_embeds)
    seen = torch.tensor([name in head.seen for name in names])
    labels, scores = functional.upsample_argmax(
        output.mask_logits,
        (frame.shape[0], frame.shape[1]),
        activation=model.label_rule.activation,
        seen=seen if head.seen else None,
        seen_bias=head.seen_bias,
        with_scores=True,
    )
    assert scores is not None
    arrays = {
        "image": image,
        "patch_embeds": patch_embeds,
        "cls_embed": cls_embed,
        "queries": queries,
        "class_embeds": class_embeds,
        "patch_keys": patch_keys,
        "mask_logits": output.mask_logits,
        "labels": labels[0],
        "scores": scores[0],
    }
    given = {"frame": frame, "class_names": np.array(list(names)), "text_embeds": embeds}
    return as_numpy(arrays) | given | extra
