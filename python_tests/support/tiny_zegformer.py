"""Tiny random ZegFormers in the official layout, by the rule of their reference vectors."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support import tiny
from zsseg_rt.models import from_official
from zsseg_rt.models.clip.towers import ImageEncoderConfig, TextEncoderConfig
from zsseg_rt.models.zegformer.decoder import QueryDecoderConfig, ResNetConfig
from zsseg_rt.models.zegformer.model import ZegFormer, ZegFormerConfig

CLIP = "sem_seg_head.predictor.clip_model."
NUM_CLASSES = 7
SEEN = (0, 1, 2, 3, 4)


def rule_tensor(key: str, shape: Iterable[int], salt: str = "") -> Tensor:
    """The reference rule's float32 value of one ``state_dict`` tensor."""
    shape = tuple(shape)
    if key.endswith("logit_scale"):
        return torch.full(shape, math.log(100.0))
    if "empty_weight" in key:
        return torch.tensor([1.0] * (shape[0] - 1) + [0.1])
    values = tiny.random_normal(key, shape, salt)
    if len(shape) <= 1:
        values *= 0.02
        if key.endswith("running_var"):
            values = 1 + np.abs(values)
        elif key.endswith(".weight"):
            values += 1
    elif key.endswith("predictor.query_embed.weight"):
        values *= 3
    else:
        of_words = "clip_model.transformer" in key
        gains = {"in_proj_weight": 1 if of_words else 2, "mask_embed.layers.2.weight": 2}
        gains["out_proj.weight"] = 3 if of_words else 1
        gain = next((gains[end] for end in gains if key.endswith(end)), 1)
        values *= gain / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


def rule_state_dict(shapes: Mapping[str, Iterable[int]], salt: str = "") -> dict[str, Tensor]:
    """A ``state_dict`` by the reference rule."""
    return {key: rule_tensor(key, shape, salt) for key, shape in shapes.items()}


def config(**changes: object) -> ZegFormerConfig:
    """Sizes of the small reference vectors, except for CLIP, which is smaller still."""
    visual = ImageEncoderConfig(
        width=64, num_layers=2, num_heads=1, mlp_width=256, embed_dim=48, patch_size=8, grid_side=4
    )
    text = TextEncoderConfig(
        vocab_size=64, context_length=16, width=64, num_layers=1, num_heads=1, mlp_width=256,
        embed_dim=48,
    )  # fmt: skip
    decoder = QueryDecoderConfig(
        conv_dim=64, mask_dim=32, hidden_dim=64, num_queries=8, num_layers=2, num_heads=4,
        ffn_dim=128, embed_dim=48,
    )  # fmt: skip
    base = ZegFormerConfig(
        backbone=ResNetConfig(stem_width=8, widths=(8, 16, 32, 64), depths=(1, 2, 1, 2)),
        decoder=decoder,
        clip_image=visual,
        clip_text=text,
        seen_classes=SEEN,
    )
    return replace(base, **changes)


def state_dict(salt: str = "") -> dict[str, Tensor]:
    """A tiny official evaluation checkpoint's ``state_dict``."""
    with torch.device("meta"):
        shapes = {key: tuple(v.shape) for key, v in ZegFormer(config()).state_dict().items()}
    shapes["criterion.empty_weight"] = (len(SEEN) + 1,)
    return rule_state_dict(shapes, salt)


def model(salt: str = "", **settings: object) -> Any:
    """A tiny ZegFormer in evaluation mode."""
    arguments = {"seen_classes": SEEN, "num_heads": 4} | settings
    return from_official("zegformer", state_dict(salt), **arguments)


def image(height: int, width: int, salt: str = "") -> Tensor:
    """A random smooth RGB picture, uint8 ``[3, height, width]``."""
    coarse = torch.from_numpy(tiny.random_normal("picture", (1, 3, 6, 8), salt).astype(np.float32))
    values = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0]
    return (values * 60 + 128).clamp(0, 255).to(torch.uint8)


def text_features(salt: str = "", num_classes: int = NUM_CLASSES) -> Tensor:
    """Random unit-norm class embeddings."""
    return tiny.text_embeds(num_classes, 48, salt)
