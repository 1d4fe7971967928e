"""Export dense CLIP, as it is or fine-tuned: family ``dense``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy.typing as npt
import torch

from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.common.checks import check_size
from zsseg_rt.export.bundle_writer import ExportedModel
from zsseg_rt.export.golden import (
    GOLDEN_NAMES,
    GOLDEN_TEMPLATES,
    dense_golden,
    preprocess_frame,
)
from zsseg_rt.export.graph_files import MAX_CLASSES, WrittenGraph, image_network
from zsseg_rt.export.onnx import provenance
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.export.text_side import TextSide, clip_text_side, seen_names
from zsseg_rt.models.dense.aggregating import AggregatingEncoder
from zsseg_rt.models.dense.dense_clip import DenseCLIP
from zsseg_rt.networks.aggregating import check_grid
from zsseg_rt.networks.clip import ImageTower
from zsseg_rt.networks.heads import dense_embeds


def export_dense_clip(model: DenseCLIP, options: ExportOptions) -> ExportedModel:
    """Cut dense CLIP or the trained cosine head into a bundle's parts."""
    size_hw = options.size_hw or model.config.size_hw
    check_size(size_hw, model.config.image_encoder.patch_size)
    text = clip_text_side(
        options,
        embed_dim=model.config.image_encoder.embed_dim,
        tower=model.text_encoder,
        templates=model.config.templates,
    )
    preprocess = PreprocessSpec(size_hw=size_hw, mean=model.image_mean, std=model.image_std)
    head = _head_spec(model, size_hw, options)
    return ExportedModel(
        family="dense",
        architecture=model.description,
        graphs={"image_encoder": _image_encoder(model, size_hw, options.window_batch)},
        preprocess=preprocess,
        head=head,
        text=text,
        golden=partial(_golden, model, head, preprocess, text, options.class_names or GOLDEN_NAMES),
        provenance=provenance(),
    )


def _image_encoder(model: DenseCLIP, size_hw: tuple[int, int], window_batch: int) -> WrittenGraph:
    """Written operation by operation, as from a file of weights."""
    encoder = model.image_encoder
    options: dict[str, Any] = {"position": encoder.position, "prior_std": encoder.prior_std}
    if isinstance(encoder, AggregatingEncoder):
        check_grid(encoder.pm, encoder.grid_hw(size_hw))
        options["aggregation"] = encoder.settings
    head = model.config.head
    encode = partial(dense_embeds, tower=tower_of(model), head=head, **options)
    return image_network(encode, size_hw, window_batch)


def tower_of(model: DenseCLIP) -> ImageTower:
    """The weights of a model's image tower, what it trained after it included."""
    encoder, config = model.image_encoder, model.config.image_encoder
    weights = encoder.state_dict() | {"proj": encoder.patch_proj()}
    return ImageTower(
        tensors={key: value.detach().numpy() for key, value in weights.items()},
        num_heads=config.num_heads,
        activation=config.activation,
    )


@torch.no_grad()
def _head_spec(model: DenseCLIP, size_hw: tuple[int, int], options: ExportOptions) -> HeadSpec:
    seen = seen_names(model.seen_classes, options.class_names)
    return HeadSpec(
        logit_scale=float(model.logit_scale),
        normalize=True,
        activation=model.score_activation,
        grid_hw=model.image_encoder.grid_hw(size_hw),
        seen=seen,
        seen_bias=model.seen_bias if seen else 0.0,
        unknown_below=model.config.unknown_below,
        max_classes=MAX_CLASSES,
        window_batch=options.window_batch,
    )


@torch.no_grad()
def _golden(
    model: DenseCLIP,
    head: HeadSpec,
    preprocess: PreprocessSpec,
    text: TextSide,
    class_names: Sequence[str],
) -> dict[str, npt.NDArray[Any]]:
    """Every intermediate of the unfolded model, so that folding is checked too."""
    names = list(class_names)[:MAX_CLASSES]
    embeds, extra = text.embed_golden(names, text.templates[:GOLDEN_TEMPLATES])
    image = preprocess_frame(preprocess)
    patch_embeds = model.image_encoder(torch.from_numpy(image)).patch_embeds.numpy()
    return dense_golden(image, patch_embeds, head, (names, embeds)) | extra
