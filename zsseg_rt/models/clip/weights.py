"""CLIP's towers, built from weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from zsseg_rt.models.clip.towers import (
    ImageEncoder,
    ImageEncoderConfig,
    TextEncoder,
    TextEncoderConfig,
    resize_positional_embedding,
)
from zsseg_rt.torch_files.checkpoints import Sizes, load_weights
from zsseg_rt.torch_files.clip_weights import Activation, ClipWeights

C = TypeVar("C")
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def image_config(weights: ClipWeights) -> ImageEncoderConfig:
    """Sizes of the image tower; it has no prompts."""
    sizes = Sizes(weights.visual, "CLIP")
    return image_encoder_config(sizes, "", weights.num_heads, weights.activation)


def text_config(weights: ClipWeights) -> TextEncoderConfig:
    """Sizes of the text tower."""
    sizes = Sizes(weights.text, "CLIP")
    config = text_encoder_config(sizes, "", weights.text_heads, weights.activation)
    return replace(config, words=weights.words, prompt_words=weights.prompt_words)


def image_encoder_config(
    sizes: Sizes,
    prefix: str = "",
    num_heads: int | None = None,
    activation: Activation = "quick_gelu",
) -> ImageEncoderConfig:
    """Read an image tower's sizes from shapes; it has no prompts."""
    width, _, patch_size, _ = sizes.of(prefix + "conv1.weight", 4)
    return ImageEncoderConfig(
        width=width,
        num_layers=sizes.count(prefix + "transformer.resblocks."),
        num_heads=sizes.heads("num_heads", num_heads, width),
        mlp_width=sizes.of(prefix + "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        embed_dim=sizes.of(prefix + "proj", 2)[1],
        patch_size=patch_size,
        grid_side=sizes.grid_side(prefix + "positional_embedding", 2),
        activation=activation,
        num_prompts=0,
        num_deep_prompts=0,
    )


def text_encoder_config(
    sizes: Sizes,
    prefix: str = "",
    num_heads: int | None = None,
    activation: Activation = "quick_gelu",
) -> TextEncoderConfig:
    """Read a text tower's sizes from shapes."""
    vocab_size, width = sizes.of(prefix + "token_embedding.weight", 2)
    return TextEncoderConfig(
        vocab_size=vocab_size,
        context_length=sizes.of(prefix + "positional_embedding", 2)[0],
        width=width,
        num_layers=sizes.count(prefix + "transformer.resblocks."),
        num_heads=sizes.heads("text_heads", num_heads, width),
        mlp_width=sizes.of(prefix + "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        embed_dim=sizes.of(prefix + "text_projection", 2)[1],
        activation=activation,
    )


def load_into(
    make: Callable[[C], M],
    config: C,
    state_dict: Mapping[str, Tensor],
    *,
    architecture: str,
    ignored: Sequence[str] = (),
) -> M:
    """A module of these sizes with copies of these weights, in evaluation mode."""
    with torch.device("meta"):
        model = make(config)
    load_weights(model, state_dict, architecture=architecture, ignored=ignored)
    return model.eval()


def start_from_clip(model: M, weights: ClipWeights, image: str = "image_encoder") -> M:
    """Copy CLIP's towers into a model, its positions resized to the model's grid."""
    tower, name = getattr(model, image), "positional_embedding"
    grid_hw = (tower.config.grid_side,) * 2
    rows = resize_positional_embedding(weights.visual[name], grid_hw, tower.position_mode)
    towers = {image: {**weights.visual, name: rows}, "text_encoder": weights.text}
    load_weights(model, model.state_dict() | by_tower(towers), architecture="CLIP")
    return model.eval()


def by_tower(towers: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """The weights of several towers, with the towers' names before their keys."""
    return {f"{name}.{key}": v for name, tower in towers.items() for key, v in tower.items()}


def build_image_encoder(weights: ClipWeights) -> ImageEncoder:
    """Build the plain image tower, in evaluation mode.

    Raises:
        CheckpointError: The weights are not a ViT's.
    """
    what = "CLIP's image tower"
    encoder = load_into(ImageEncoder, image_config(weights), weights.visual, architecture=what)
    return encoder.requires_grad_(False)


def build_text_encoder(weights: ClipWeights) -> TextEncoder:
    """Build the text tower, in evaluation mode.

    Raises:
        CheckpointError: The weights are not a CLIP text transformer's.
    """
    what = "CLIP's text tower"
    encoder = load_into(TextEncoder, text_config(weights), weights.text, architecture=what)
    return encoder.requires_grad_(False)
