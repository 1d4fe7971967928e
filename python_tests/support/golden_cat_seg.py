"""The reference vectors of CAT-Seg, with the models of their rule."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support import tiny
from support.golden import config_of, load
from zsseg_rt.models import from_official

CLIP = "sem_seg_head.predictor.clip_model."
HEAD = "sem_seg_head.predictor.transformer."


TINY = {
    "embed": 32, "clip_res": 64, "v_layers": 4, "v_width": 32, "patch": 16, "t_width": 64,
    "t_layers": 1, "gt": 12, "ga": 8, "dec": [32, 16], "dg": [24, 20], "dgp": [8, 4],
    "hidden": 16,
}  # fmt: skip
TINY_SETTINGS = {"num_heads": 2, "window": 3, "taps": (0, 2), "view": 96, "padding": 8}


@cache
def tiny_weights() -> dict[str, Tensor]:
    """The ``state_dict`` of a tiny model, by the rule."""
    return tiny.rule_state_dict(official_shapes(TINY))


def tiny_model(**settings: Any) -> Any:
    """A tiny model."""
    return from_official("cat_seg", tiny_weights(), **(TINY_SETTINGS | settings))


def small_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What ``from_official`` cannot read from shapes."""
    return {"num_heads": config["heads"], "window": config["window"], "view": config["res"]}


@cache
def shapes_of(shared_dir: Path, name: str = "catseg_small_enc_public.npz") -> dict[str, Any]:
    """Shapes of a file's tensors by official key."""
    vectors = load(shared_dir, name)
    found = official_shapes(config_of(vectors))
    keys = [str(key) for key in vectors["sd_keys"]]
    assert set(found) == set(keys)
    return {key: found[key] for key in keys}


def state_dict(shared_dir: Path, name: str = "catseg_small_enc_public.npz") -> dict[str, Tensor]:
    """The official ``state_dict`` of a file's rule."""
    config = config_of(load(shared_dir, name))
    return tiny.rule_state_dict(shapes_of(shared_dir, name), config["salt"], config["gains"])


def build(shared_dir: Path, name: str = "catseg_small_enc_public.npz", **settings: Any) -> Any:
    """The model of a file."""
    config = config_of(load(shared_dir, name))
    return from_official(
        "cat_seg", state_dict(shared_dir, name), **(small_settings(config) | settings)
    )


def text_bank(count: int, config: dict[str, Any]) -> Tensor:
    """The rule's class embeddings."""
    rows = tiny.random_normal(f"input.text.{count}", (count, config["embed"]), config["salt"])
    return torch.from_numpy((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("float32"))


def image_u8(shape: tuple[int, ...], salt: str = "") -> np.ndarray:
    """The rule's picture."""
    import zlib

    seed = zlib.crc32((salt + "input.image_u8").encode()) & 0xFFFFFFFF
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def normalised(pictures: np.ndarray, config: dict[str, Any]) -> Tensor:
    """Pictures uint8 ``[B, H, W, 3]`` as the network's input."""
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() - mean) / std


def _tower(prefix: str, width: int, layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for index in range(layers):
        stem = f"{prefix}transformer.resblocks.{index}."
        found |= {f"{stem}attn.{name}_proj_weight": (width, width) for name in "qkv"}
        found |= {
            f"{stem}attn.in_proj_bias": (3 * width,),
            **_linear(f"{stem}attn.out_proj", width, width),
            **_linear(f"{stem}mlp.c_fc", width, 4 * width),
            **_linear(f"{stem}mlp.c_proj", 4 * width, width),
            **_norm(f"{stem}ln_1", width),
            **_norm(f"{stem}ln_2", width),
        }
    return found


def _linear(key: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{key}.weight": (outputs, inputs), f"{key}.bias": (outputs,)}


def _norm(key: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{key}.weight": (width,), f"{key}.bias": (width,)}


def _conv(key: str, *shape: int, bias: int = 0) -> dict[str, tuple[int, ...]]:
    return {f"{key}.weight": shape} | ({f"{key}.bias": (bias,)} if bias else {})


def official_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of these sizes by official key, but the masks."""
    embed, width, text = config["embed"], config["v_width"], config["t_width"]
    patch = config["patch"]
    visual = CLIP + "visual."
    return {
        CLIP + "positional_embedding": (77, text),
        CLIP + "text_projection": (text, embed),
        CLIP + "logit_scale": (),
        CLIP + "token_embedding.weight": (49408, text),
        visual + "class_embedding": (width,),
        visual + "positional_embedding": ((config["clip_res"] // patch) ** 2 + 1, width),
        visual + "proj": (width, embed),
        visual + "conv1.weight": (width, 3, patch, patch),
        **_norm(visual + "ln_pre", width),
        **_norm(visual + "ln_post", width),
        **_norm(CLIP + "ln_final", text),
        **_tower(visual, width, config["v_layers"]),
        **_tower(CLIP, text, config["t_layers"]),
        **_head_shapes(config),
    }


def _head_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    embed, width, hidden = config["embed"], config["v_width"], config["hidden"]
    (up1, up2), (near, far) = config["dg"], config["dgp"]
    found = {
        **_conv("upsample1", width, up1, 2, 2, bias=up1),
        **_conv("upsample2", width, up2, 4, 4, bias=up2),
        **_conv(HEAD + "conv1", hidden, 1, 7, 7, bias=hidden),
        **_conv(HEAD + "guidance_projection.0", config["ga"], embed, 3, 3, bias=config["ga"]),
        **_linear(HEAD + "text_guidance_projection.0", embed, config["gt"]),
        **_conv(HEAD + "decoder_guidance_projection.0.0", near, up1, 3, 3, bias=near),
        **_conv(HEAD + "decoder_guidance_projection.1.0", far, up2, 3, 3, bias=far),
        **_conv(HEAD + "head", 1, config["dec"][1], 3, 3, bias=1),
    }
    inputs = hidden
    for stage, (outputs, guide) in enumerate(zip(config["dec"], config["dgp"], strict=True), 1):
        stem = f"{HEAD}decoder{stage}."
        found |= _conv(stem + "up", inputs, inputs - guide, 2, 2, bias=inputs - guide)
        for place, channels in ((0, inputs), (3, outputs)):
            found |= _conv(f"{stem}conv.double_conv.{place}", outputs, channels, 3, 3)
            found |= _norm(f"{stem}conv.double_conv.{place + 1}", outputs)
        inputs = outputs
    for layer in range(2):
        found |= _layer_shapes(f"{HEAD}layers.{layer}.", hidden, config["ga"], config["gt"])
    return found


def _layer_shapes(stem: str, hidden: int, ga: int, gt: int) -> dict[str, tuple[int, ...]]:
    classes = stem + "attention."
    found = {
        **_norm(stem + "swin_block.guidance_norm", ga),
        classes + "padding_tokens": (1, 1, hidden),
        classes + "padding_guidance": (1, 1, gt),
        **_linear(classes + "attention.q", hidden + gt, hidden),
        **_linear(classes + "attention.k", hidden + gt, hidden),
        **_linear(classes + "attention.v", hidden, hidden),
        **_linear(classes + "MLP.0", hidden, 4 * hidden),
        **_linear(classes + "MLP.2", 4 * hidden, hidden),
        **_norm(classes + "norm1", hidden),
        **_norm(classes + "norm2", hidden),
    }
    for block in ("block_1.", "block_2."):
        swin = f"{stem}swin_block.{block}"
        found |= {
            **_norm(swin + "norm1", hidden),
            **_norm(swin + "norm2", hidden),
            **_linear(swin + "attn.q", hidden + ga, hidden),
            **_linear(swin + "attn.k", hidden + ga, hidden),
            **_linear(swin + "attn.v", hidden, hidden),
            **_linear(swin + "attn.proj", hidden, hidden),
            **_linear(swin + "mlp.fc1", hidden, 4 * hidden),
            **_linear(swin + "mlp.fc2", 4 * hidden, hidden),
        }
    return found
