"""Weights of the small encoders by their vectors' rule, in their home layout."""

from __future__ import annotations

import json
import math
import re
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt.networks import pooled
from zsseg_rt.networks.clip import ImageTower, TextTower
from zsseg_rt.torch_files.clip_layouts import as_clip

FILES = {
    "hfclip_small_public.npz": "clip",
    "tinyclip8m_real_public.npz": "clip",
    "siglip_small_public.npz": "siglip",
    "siglip2_b16_real_public.npz": "siglip",
    "pe_small_public.npz": "pe",
    "pe_s16_real_public.npz": "pe",
}
_HOME = {  # and the widths of both towers that are listed
    "clip": ("tinyclip_8m_16.transformers", 256, 256),
    "siglip": ("siglip2_b16_224.transformers", 768, 768),
    "pe": ("pe_core_s16_384.perception_models", 384, 512),
}


def drawn(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers that a text chooses, float64."""
    seed = zlib.crc32(text.encode()) & 0xFFFFFFFF
    return np.random.RandomState(seed).standard_normal(shape)


def image(salt: str, size_hw: tuple[int, int]) -> np.ndarray:
    """The normalised image, float32 [1, 3, H, W]."""
    name = f"{salt}input.image.{size_hw[0]}x{size_hw[1]}"
    return drawn(name, (3, *size_hw)).astype(np.float32)[None]


def shapes(shared: Path, kind: str, c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the home layout at the sizes of a configuration."""
    name, *widths = _HOME[kind]
    listed = json.loads((shared / "specs" / "small_encoders_keys.json").read_text())[name]
    patch, sized = c.get("patch", 16), {}
    for key, shape in listed.items():
        is_image = key.startswith("vis")
        part, old = c["vision" if is_image else "text"], widths[0 if is_image else 1]
        cells = (c["image"] // patch) ** 2 + (kind != "siglip")
        sizes = dict.fromkeys((32, 64, 77, 196, 197, 577), cells if is_image else c["context"])
        sizes |= {16: patch, 512: c.get("out"), 49408: c["vocab"], 256_000: c["vocab"]}
        sizes |= {old: part["width"], 3 * old: 3 * part["width"], 4 * old: part["mlp"]}
        new = tuple(sizes.get(size, size) for size in shape)
        if key == "text_projection":
            new = (part["width"], c["out"])
        layer = re.search(r"(layers|resblocks)\.(\d+)\.", key)
        for index in range(part["layers"] if layer is None or layer[2] == "0" else 0):
            sized[key.replace(layer[0], f"{layer[1]}.{index}.") if layer else key] = new
    return sized


def weight(salt: str, key: str, shape: tuple[int, ...], ids: np.ndarray) -> np.ndarray:
    """One tensor by the rule, float32; of a token table, only the rows of ``ids``."""
    if key.endswith("logit_scale"):
        return np.full(shape, math.log(50 if shape == () else 110), np.float32)
    if key.endswith("logit_bias"):
        return np.full(shape, -16, np.float32)
    if key.endswith("token_embedding.weight"):
        table = np.zeros(shape, np.float32)
        for row in np.unique(ids):
            table[row] = 0.5 * drawn(f"{salt}{key}:{row}", (shape[1],))
        return table
    numbers = drawn(salt + key, shape)
    if ("embedding" in key and "patch_embedding" not in key) or key.endswith("probe"):
        numbers = 0.5 * numbers
    elif len(shape) <= 1:
        numbers = 1 + 0.1 * numbers if key.endswith(".weight") else 0.1 * numbers
    else:
        numbers = numbers / math.sqrt(math.prod(shape[1:]))
    if key.endswith(("q_proj.weight", "k_proj.weight")):
        numbers = 1.5 * numbers
    elif key.endswith("in_proj_weight") and "attn_pool" not in key:
        numbers[: 2 * len(numbers) // 3] *= 1.5
    return numbers.astype(np.float32)


@cache
def parts(shared: Path, file: str) -> dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Configuration and vectors by part; files with one part call it ``""``."""
    with np.load(shared / "golden" / file) as vectors:
        arrays = {key: vectors[key] for key in vectors.files}
    config = json.loads(str(arrays.pop("config_json")))
    if "vision" in config:
        return {"": (config, arrays)}
    return {
        name: (c, {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith(f"{name}/")})
        for name, c in config.items()
    }


@cache
def towers(shared_dir: Path, file: str, part: str) -> tuple[Any, ...]:
    """Configuration, vectors, weights in the home layout, and both towers."""
    kind, (c, vectors) = FILES[file], parts(shared_dir, file)[part]
    listed, ids = shapes(shared_dir, kind, c), vectors["text/ids"]
    home = {key: weight(c["salt"], key, shape, ids) for key, shape in listed.items()}
    tensors = as_clip(dict(home), file)
    visual, text = {}, {}
    for key, value in tensors.items():
        if key.startswith("visual."):
            visual[key.removeprefix("visual.")] = value
        elif not key.startswith("logit"):
            text[key.removeprefix("text.")] = value
    activation = c.get("activation") or {"pe": "gelu", "siglip": "gelu_tanh"}[kind]
    image = {"tensors": visual, "num_heads": c["vision"]["heads"], "activation": activation}
    words = {"tensors": text, "num_heads": c["text"]["heads"], "activation": activation}
    tower = ImageTower(**image) if kind == "clip" else pooled.PooledTower(**image)
    words_tower = TextTower(**words) if kind != "siglip" else pooled.SiglipText(**words)
    return c, vectors, home, tower, words_tower


_TIMM = (
    (r"^visual\.conv1\.", "visual.patch_embed.proj."), (r"\.ln_pre\.", ".norm_pre."),
    (r"\.class_embedding$", ".cls_token"), (r"\.positional_embedding$", ".pos_embed"),
    (r"\.ln_post\.", ".norm."), (r"\.transformer\.resblocks\.", ".blocks."),
    (r"\.ln_(\d)\.", r".norm\1."), (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."),
    (r"attn_pool\.attn\.out_proj\.", "attn_pool.proj."), (r"\.layernorm\.", ".norm."),
    (r"\.attn\.in_proj_", ".attn.qkv."), (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.probe$", ".latent"), (r"^visual\.", "visual.trunk."),
)  # fmt: skip


def open_clips(weights: dict[str, Any], kind: str) -> dict[str, Any]:
    """The home layout's weights in open_clip's."""
    official = as_clip(dict(weights), "home")
    if kind == "clip":
        return {key.removeprefix("text."): value for key, value in official.items()}
    timm = {}
    for key, value in official.items():
        if not key.startswith("visual."):
            timm[key if key.startswith(("text.", "logit")) else f"text.{key}"] = value
        elif "attn_pool.attn.in_proj_" in key:
            end, third = key.rpartition("_")[2], len(value) // 3
            timm[f"visual.trunk.attn_pool.q.{end}"] = value[:third]
            timm[f"visual.trunk.attn_pool.kv.{end}"] = value[third:]
        elif key == "visual.proj":
            timm["visual.trunk.head.weight"] = value.T
            timm["visual.trunk.head.bias"] = np.zeros(value.shape[1], np.float32)
        else:
            if key in ("visual.class_embedding", "visual.positional_embedding"):
                value = value.reshape(1, -1, value.shape[-1])
            for pattern, name in _TIMM:
                key = re.sub(pattern, name, key)
            timm[key] = value
    return timm


@cache
def gemma_model() -> tuple[Any, dict[str, Any]]:
    """A part of Gemma's pieces and merges that cuts the texts below as the whole does."""
    path = Path(__file__).with_name("gemma_excerpt.json")
    excerpt = json.loads(path.read_text(encoding="utf-8"))
    pieces = {number: piece for piece, number in excerpt["pieces"].items()}
    vocab = {pieces.get(number, f"<absent {number}>"): number for number in range(256_000)}
    model = {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": excerpt["merges"]}
    return excerpt["texts"], model
