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
_KEYS = {
    "clip": "tinyclip_8m_16.transformers",
    "siglip": "siglip2_b16_224.transformers",
    "pe": "pe_core_s16_384.perception_models",
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
    listed = json.loads((shared / "specs" / "small_encoders_keys.json").read_text())[_KEYS[kind]]
    sized: dict[str, tuple[int, ...]] = {}
    for key, shape in listed.items():
        part = c["vision" if re.match("vis", key) else "text"]
        if match := re.search(r"(?:layers|resblocks)\.(\d+)\.", key):
            for index in range(part["layers"] if match[1] == "0" else 0):
                name = key.replace(match[0], match[0].replace("0", str(index)))
                sized[name] = _resized(kind, key, shape, c, part)
        else:
            sized[key] = _resized(kind, key, shape, c, part)
    return sized


def _resized(
    kind: str, key: str, shape: list[int], c: dict[str, Any], part: dict[str, Any]
) -> tuple[int, ...]:
    width, mlp, patch = part["width"], part["mlp"], c.get("patch", 16)
    cells = (c["image"] // patch) ** 2
    if "token_embedding" in key:
        return (c["vocab"], width)
    if re.search(r"position(al)?_embedding", key):
        is_image = key.startswith("vis")
        return (cells + (kind != "siglip") if is_image else c["context"], width)
    if re.search(r"patch_embedding\.weight|conv1\.weight", key):
        return (width, 3, patch, patch)
    if key in ("visual.proj", "text_projection"):
        return (width, c["out"])
    if key in ("visual_projection.weight", "text_projection.weight"):
        return (c["out"], width)
    if re.search(r"(fc1|c_fc)\.", key):
        return (mlp, width)[: len(shape)]
    if re.search(r"(fc2|c_proj)\.", key):
        return (width, mlp)[: len(shape)]
    if "in_proj" in key:
        return (3 * width, width)[: len(shape)]
    if len(shape) == 3:
        return (1, 1, width)
    return (width,) * len(shape)


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


def open_clips(weights: dict[str, Any], kind: str) -> dict[str, Any]:
    """The home layout's weights in open_clip's."""
    official = as_clip(dict(weights), "home")
    if kind == "clip":
        return {key.removeprefix("text."): value for key, value in official.items()}
    timm = {}
    names = (
        (r"^visual\.conv1\.", "visual.patch_embed.proj."), (r"\.ln_pre\.", ".norm_pre."),
        (r"\.ln_post\.", ".norm."), (r"\.transformer\.resblocks\.", ".blocks."),
        (r"\.ln_(\d)\.", r".norm\1."), (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."),
        (r"attn_pool\.attn\.out_proj\.", "attn_pool.proj."), (r"\.layernorm\.", ".norm."),
        (r"\.attn\.in_proj_", ".attn.qkv."), (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"^visual\.", "visual.trunk."),
    )  # fmt: skip
    for key, value in official.items():
        if not key.startswith("visual."):
            timm[key if key.startswith(("text.", "logit")) else f"text.{key}"] = value
        elif "attn_pool.attn.in_proj_" in key:
            end = key.rpartition("_")[2]
            third = len(value) // 3
            timm[f"visual.trunk.attn_pool.q.{end}"] = value[:third]
            timm[f"visual.trunk.attn_pool.kv.{end}"] = value[third:]
        elif key == "visual.proj":
            timm["visual.trunk.head.weight"] = value.T
            timm["visual.trunk.head.bias"] = np.zeros(value.shape[1], np.float32)
        else:
            value = value[None, None] if key == "visual.class_embedding" else value
            value = value[None] if key == "visual.positional_embedding" else value
            key = {"visual.class_embedding": "visual.cls_token",
                   "visual.positional_embedding": "visual.pos_embed",
                   "visual.attn_pool.probe": "visual.attn_pool.latent"}.get(key, key)  # fmt: skip
            for pattern, name in names:
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
