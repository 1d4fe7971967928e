"""CLIP's towers, built from weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from zsseg_rt.models.clip.towers import (
    ImageEncoder,
    ImageEncoderConfig,
    TextEncoder,
    TextEncoderConfig,
)
from zsseg_rt.torch_files.checkpoints import Sizes, load_weights
from zsseg_rt.torch_files.clip_weights import Activation, ClipWeights

_M = TypeVar("_M", bound=nn.Module)


def image_config(weights: ClipWeights) -> ImageEncoderConfig:
    """Sizes of the image tower; it has no prompts."""
    sizes = Sizes(weights.visual, "CLIP")
    return image_encoder_config(sizes, "", weights.num_heads, weights.activation)


def text_config(weights: ClipWeights) -> TextEncoderConfig:
    """Sizes of the text tower."""
    sizes = Sizes(weights.text, "CLIP")
    found = text_encoder_config(sizes, "", weights.text_heads, weights.activation)
    return replace(found, words=weights.words, prompt_words=weights.prompt_words)


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


def build_image_encoder(weights: ClipWeights) -> ImageEncoder:
    """Build the plain image tower, in evaluation mode.

    Raises:
        CheckpointError: The weights are not a ViT's.
    """
    with torch.device("meta"):
        encoder = ImageEncoder(image_config(weights))
    load_weights(encoder, weights.visual, architecture="CLIP's image tower")
    return _frozen(encoder)


def build_text_encoder(weights: ClipWeights) -> TextEncoder:
    """Build the text tower.

    Args:
        weights: CLIP weights.

    Returns:
        The tower, in evaluation mode.

    Raises:
        CheckpointError: The weights are not a CLIP text transformer's.
    """
    with torch.device("meta"):
        encoder = TextEncoder(text_config(weights))
    load_weights(encoder, weights.text, architecture="CLIP's text tower")
    return _frozen(encoder)


def _frozen(module: _M) -> _M:
    return module.eval().requires_grad_(False)
