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


def official_shapes(config: dict[str, Any]) -> tiny.Shapes:
    """Shapes of all tensors of these sizes by official key, but the masks."""
    embed, width, text = config["embed"], config["v_width"], config["t_width"]
    patch = config["patch"]
    cells = (config["clip_res"] // patch) ** 2
    rows = {
        "positional_embedding": (77, text), "text_projection": (text, embed), "logit_scale": (),
        "token_embedding.weight": (49408, text), "ln_final.*": (text,),
        "visual.class_embedding": (width,), "visual.positional_embedding": (cells + 1, width),
        "visual.proj": (width, embed), "visual.conv1.weight": (width, 3, patch, patch),
        "visual.ln_pre.*": (width,), "visual.ln_post.*": (width,),
    }  # fmt: skip
    return {
        **tiny.shapes_at(CLIP, rows),
        **tiny.tower_shapes(f"{CLIP}visual.", width, config["v_layers"], split=True),
        **tiny.tower_shapes(CLIP, text, config["t_layers"], split=True),
        **_head_shapes(config),
    }


def _head_shapes(config: dict[str, Any]) -> tiny.Shapes:
    embed, width, hidden = config["embed"], config["v_width"], config["hidden"]
    (up1, up2), (near, far), ga = config["dg"], config["dgp"], config["ga"]
    rows = {
        "conv1.*": (hidden, 1, 7, 7), "guidance_projection.0.*": (ga, embed, 3, 3),
        "text_guidance_projection.0.*": (config["gt"], embed),
        "decoder_guidance_projection.0.0.*": (near, up1, 3, 3),
        "decoder_guidance_projection.1.0.*": (far, up2, 3, 3),
        "head.*": (1, config["dec"][1], 3, 3),
    }  # fmt: skip
    found = {
        **_up("upsample1", width, up1, 2),
        **_up("upsample2", width, up2, 4),
        **tiny.shapes_at(HEAD, rows),
    }
    inputs = hidden
    for stage, (outputs, guide) in enumerate(zip(config["dec"], config["dgp"], strict=True), 1):
        stem = f"{HEAD}decoder{stage}."
        found |= _up(stem + "up", inputs, inputs - guide, 2)
        for place, channels in ((0, inputs), (3, outputs)):
            conv = {f"{place}.weight": (outputs, channels, 3, 3), f"{place + 1}.*": (outputs,)}
            found |= tiny.shapes_at(f"{stem}conv.double_conv.", conv)
        inputs = outputs
    for layer in range(2):
        found |= _layer_shapes(f"{HEAD}layers.{layer}.", hidden, ga, config["gt"])
    return found


def _up(key: str, inputs: int, outputs: int, side: int) -> tiny.Shapes:
    """A transposed convolution, whose bias is as long as its second axis."""
    return {f"{key}.weight": (inputs, outputs, side, side), f"{key}.bias": (outputs,)}


def _layer_shapes(stem: str, hidden: int, ga: int, gt: int) -> tiny.Shapes:
    square = (hidden, hidden)
    rows = {
        "swin_block.guidance_norm.*": (ga,), "attention.padding_tokens": (1, 1, hidden),
        "attention.padding_guidance": (1, 1, gt), "attention.attention.v.*": square,
        "attention.attention.q.*": (hidden, hidden + gt),
        "attention.attention.k.*": (hidden, hidden + gt),
        "attention.MLP.0.*": (4 * hidden, hidden), "attention.MLP.2.*": (hidden, 4 * hidden),
        "attention.norm1.*": (hidden,), "attention.norm2.*": (hidden,),
    }  # fmt: skip
    for block in ("swin_block.block_1.", "swin_block.block_2."):
        swin = {
            "norm1.*": (hidden,), "norm2.*": (hidden,), "attn.q.*": (hidden, hidden + ga),
            "attn.k.*": (hidden, hidden + ga), "attn.v.*": square, "attn.proj.*": square,
            "mlp.fc1.*": (4 * hidden, hidden), "mlp.fc2.*": (hidden, 4 * hidden),
        }  # fmt: skip
        rows |= {block + name: shape for name, shape in swin.items()}
    return tiny.shapes_at(stem, rows)
