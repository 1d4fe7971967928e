"""Export dense CLIP, as it is or fine-tuned: family ``dense``."""

from __future__ import annotations

from functools import partial
from typing import Any

from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.common.checks import check_size
from zsseg_rt.export.bundle_writer import ExportedModel
from zsseg_rt.export.clip_file import written_model
from zsseg_rt.export.golden import GOLDEN_NAMES, golden_names
from zsseg_rt.export.graph_files import MAX_CLASSES, weights_of
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.export.text_side import clip_text_side, seen_names
from zsseg_rt.networks.aggregating import RULES_OF_OUTLIERS, check_grid
from zsseg_rt.networks.clip import ImageTower
from zsseg_rt.networks.heads import dense_embeds


def export_dense_clip(model: Any, options: ExportOptions) -> ExportedModel:
    """Cut dense CLIP or the trained cosine head into a bundle's parts."""
    size_hw = options.size_hw or model.config.size_hw
    check_size(size_hw, model.config.image_encoder.patch_size)
    text = clip_text_side(
        options,
        embed_dim=model.config.image_encoder.embed_dim,
        tower=model.text_encoder,
        templates=model.config.templates,
    )
    tower, chosen = tower_of(model), model.config.head
    settings: dict[str, Any] = getattr(model.image_encoder, "options", {})
    if aggregation := settings.get("aggregation"):
        check_grid(aggregation.pm or RULES_OF_OUTLIERS[chosen], tower.grid_hw(size_hw))
    seen = seen_names(model.seen_classes, options.class_names)
    head = HeadSpec(
        logit_scale=float(model.logit_scale),
        normalize=True,
        activation=model.score_activation,
        grid_hw=tower.grid_hw(size_hw),
        seen=seen,
        seen_bias=model.seen_bias if seen else 0.0,
        unknown_below=model.config.unknown_below,
        max_classes=MAX_CLASSES,
        window_batch=options.window_batch,
    )
    preprocess = PreprocessSpec(size_hw=size_hw, mean=model.image_mean, std=model.image_std)
    encode = partial(dense_embeds, tower=tower, head=chosen, **settings)
    names = golden_names(options.class_names, GOLDEN_NAMES)
    return written_model(encode, head, preprocess, text, names, architecture=model.description)


def tower_of(model: Any) -> ImageTower:
    """The weights of a model's image tower, what it trained after it included."""
    encoder, config = model.image_encoder, model.config.image_encoder
    tensors = weights_of(encoder)
    if trained := getattr(encoder, "patch_proj", None):
        tensors |= {"proj": trained().detach().cpu().numpy()}
    return ImageTower(
        tensors=tensors,
        num_heads=config.num_heads,
        activation=config.activation,
    )
