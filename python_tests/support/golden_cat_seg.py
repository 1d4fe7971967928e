"""The reference vectors of CAT-Seg, with the models of their rule."""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support import tiny
from support.golden import config_of, load
from zsseg_rt.models import from_official
from zsseg_rt.torch_files.official import CAT_SEG, split
from zsseg_rt.torch_files.shapes import IMAGE_TOWER, TEXT_TOWER, expand, under

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


@cache
def build(shared_dir: Path, name: str) -> Any:
    """The model of a file."""
    vectors = load(shared_dir, name)
    config = config_of(vectors)
    shapes = official_shapes(config)
    assert set(shapes) == set(vectors["sd_keys"].tolist())
    weights = tiny.rule_state_dict(shapes, config["salt"], config["gains"])
    settings = {"num_heads": config["heads"], "window": config["window"], "view": config["res"]}
    return from_official("cat_seg", weights, **settings)


def text_bank(count: int, config: dict[str, Any]) -> Tensor:
    """The rule's class embeddings."""
    rows = tiny.random_normal(f"input.text.{count}", (count, config["embed"]), config["salt"])
    return torch.from_numpy((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("float32"))


def image_u8(*shape: int) -> np.ndarray:
    """The rule's picture."""
    seed = zlib.crc32(b"input.image_u8") & 0xFFFFFFFF
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def normalised(images: np.ndarray, config: dict[str, Any]) -> Tensor:
    """Pictures uint8 ``[B, H, W, 3]`` as the network's input."""
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - mean) / std


def official_shapes(config: dict[str, Any]) -> tiny.Shapes:
    """Shapes of all tensors of these sizes by official key, but the masks."""
    width, text, patch, hidden = (config[n] for n in ("v_width", "t_width", "patch", "hidden"))
    (first, second), (near, far), (two, four) = config["dec"], config["dgp"], config["dg"]
    sizes = {
        "D": config["embed"], "W": width, "M": 4 * width, "P": patch,
        "R": 1 + (config["clip_res"] // patch) ** 2, "T": text, "F": 4 * text, "V": 49408, "L": 77,
        "H": hidden, "G": config["ga"], "Y": config["gt"], "A": first, "B": second, "J": near,
        "K": far, "U": two, "X": four, "Q": hidden - near, "S": first - far,
    }  # fmt: skip
    towers = under(f"{CLIP}visual.", split(IMAGE_TOWER)) + under(CLIP, split(TEXT_TOWER))
    return expand(
        CAT_SEG + towers + f"{CLIP}logit_scale",
        sizes,
        lambda prefix: config["v_layers" if "visual" in prefix else "t_layers"],
    )
