"""Weights of transformers, timm and TinyCLIP under CLIP's own names, and settings beside a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zsseg_rt.common.files import read_limited
from zsseg_rt.common.schema import parse_json
from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files.shapes import Array, Later, whole

_BLOCK_NAMES = (
    (r"\.(?:layer_norm|norm)(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
_TRANSFORMERS = (
    (r"^vision_model\.head\.attention\.", "visual.attn_pool.attn."),
    (r"^vision_model\.head\.", "visual.attn_pool."),
    (r"^text_model\.head\.", "text.text_projection."),
    (r"^vision_model\.", "visual."),
    (r"^text_model\.", "text."),
    (r"\.embeddings\.patch_embedding\.", ".conv1."),
    (r"\.embeddings\.position_embedding\.weight$", ".positional_embedding"),
    (r"\.embeddings\.", "."),
    (r"\.encoder\.layers\.", ".transformer.resblocks."),
    (r"\.pre_layrnorm\.", ".ln_pre."),  # spelt so
    (r"\.post_layernorm\.", ".ln_post."),
    (r"\.final_layer_norm\.", ".ln_final."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.in_proj_\1/"),
    (r"\.self_attn\.", ".attn."),
    *_BLOCK_NAMES,
)
_TIMM = (
    (r"^visual\.trunk\.", "visual."),
    (r"^visual\.patch_embed\.proj\.", "visual.conv1."),
    (r"^visual\.cls_token$", "visual.class_embedding"),
    (r"^visual\.pos_embed$", "visual.positional_embedding"),
    (r"^visual\.norm_pre\.", "visual.ln_pre."),
    (r"^visual\.norm\.", "visual.ln_post."),
    (r"^visual\.attn_pool\.latent$", "visual.attn_pool.probe"),
    (r"^visual\.attn_pool\.norm\.", "visual.attn_pool.layernorm."),
    (r"^visual\.attn_pool\.(q|kv)\.", r"visual.attn_pool.attn.in_proj_\1/"),
    (r"^visual\.attn_pool\.proj\.", "visual.attn_pool.attn.out_proj."),
    (r"^visual\.blocks\.", "visual.transformer.resblocks."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    *_BLOCK_NAMES,
)
_TINYCLIP = re.compile(r"(?:module\.)?_(?:image_encoder|text_encoder|logit_scale)\.(?:module\.)?")
_PARTS = ("q", "k", "kv", "v")  # as they are stacked, whatever the file's order
_TURNED = {
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "visual.head.weight": "visual.proj",
}
_RANKS = {"visual.class_embedding": 1, "visual.positional_embedding": 2}  # timm's have axes before
_NAFLEX = "a NaFlex SigLIP 2, for images of any shape"
_FIXED = "Take one of fixed size, such as siglip2-base-patch16-224."
_REFUSED = (
    (r"_without_ddp\.", "an auto-pruned TinyCLIP, whose blocks have widths of their own",
     "Take a TinyCLIP of one width: ViT-8M-16, 39M-16, 40M-32 or 61M-32."),
    (r"visual\.(layer\d|attnpool)\.", "a CLIP with a ResNet tower", "Take one with a ViT."),
    (r"^visual\.trunk\.embeds\.", _NAFLEX, _FIXED),
    (r"^(cls_token|pos_embed|patch_embed\.|blocks\.0\.)",
     "an image tower alone, as timm stores it",
     "Get the file with both towers, open_clip_model.safetensors."),
)  # fmt: skip


def as_clip(tensors: MutableMapping[str, Array], name: str) -> dict[str, Array]:
    """The weights under CLIP's names; those that are joined are taken out of ``tensors``."""
    for pattern, what, remedy in _REFUSED:
        if any(re.search(pattern, key) for key in tensors):
            raise CheckpointError(f"{name}: expected both towers of a CLIP, got {what}. {remedy}")
    rules: tuple[tuple[str, str], ...] = ()
    if any(key.startswith(("vision_model.", "text_model.")) for key in tensors):
        rules = _TRANSFORMERS
    elif any(key.startswith("visual.trunk.") for key in tensors):
        rules = _TIMM
    clip: dict[str, Any] = {}
    parts: dict[str, dict[str, Array]] = {}
    for key in list(tensors):
        new = _TINYCLIP.sub("", key, count=1) if _TINYCLIP.match(key) else key
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        value: Any = tensors[key]
        if rules and new in _TURNED:
            clip[_TURNED[new]] = _later(value.shape[::-1], np.transpose, [value])
        elif new == "visual.head.bias":
            if np.any(whole(value)):
                expected = f"{name}: {key}: expected zeros, as in PE-Core"
                raise CheckpointError(f"{expected}, got others. It is another model's.")
        elif "/" in new:
            start, _, rest = new.partition("/")
            target, part = start.rpartition("_")[0] + f"_{rest}", start.rpartition("_")[2]
            parts.setdefault(target, {})[part] = tensors.pop(key)
        elif not new.endswith(("position_ids", ".attn_mask")):
            while rules and value.ndim > _RANKS.get(new, value.ndim) and value.shape[0] == 1:
                value = whole(value)[0]
            clip[new] = value
    for target in list(parts):
        group = parts.pop(target)
        stack = [group[part] for part in _PARTS if part in group]
        shapes = {part.shape[1:] for part in stack}
        if sum(map(len, group)) == 3 and len(shapes) == 1 and stack[0].ndim:
            shape = (sum(part.shape[0] for part in stack), *shapes.pop())
            clip[target] = _later(shape, lambda *arrays: np.concatenate(arrays), stack)
        else:
            clip |= {f"{target} {part}": value for part, value in group.items()}
    if (patches := clip.get("visual.conv1.weight")) is not None and patches.ndim == 2:
        raise CheckpointError(f"{name}: expected both towers of a CLIP, got {_NAFLEX}. {_FIXED}")
    return clip


def _later(shape: tuple[int, ...], make: Callable[..., Array], parts: Sequence[Any]) -> Any:
    """Make an array of others: at once, or later if one of them is a later one."""

    def array() -> Array:
        return np.ascontiguousarray(make(*map(whole, parts)))

    return Later(shape, array) if any(isinstance(part, Later) for part in parts) else array()


class Settings(NamedTuple):
    """Settings from files beside a weights file; None and empty: not said."""

    activation: str | None = None
    num_heads: int | None = None
    text_heads: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_KEYS = ("hidden_act", "num_attention_heads", "hidden_size", "num_hidden_layers")
_SIGLIP = ("gelu_pytorch_tanh", 12, 768, 12)
_DEFAULTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "clip": {"vision": ("quick_gelu", 12, 768, 12), "text": ("quick_gelu", 8, 512, 12)},
    "siglip": {"vision": _SIGLIP, "text": _SIGLIP},
}  # transformers' values of _KEYS, by model_type
_MOST_BYTES = 1 << 20


def settings_beside(path: Path, sizes: Mapping[str, tuple[int, int]]) -> Settings:
    """Read ``config.json`` and the like; ``sizes`` are each tower's width and blocks."""
    config, own = (path.with_name(name) for name in ("config.json", "open_clip_config.json"))
    # A file called open_clip_... is open_clip's: some repositories hold both.
    if own.is_file() and (path.name.startswith("open_clip") or not config.is_file()):
        return _read(own, _open_clip_settings)
    beside = _read(path.with_name("preprocessor_config.json"), _preprocessor_settings)
    settings = _read(config, lambda raw: _config_settings(raw, sizes))
    return settings._replace(mean=beside.mean, std=beside.std)


def _read(path: Path, make: Callable[[dict[str, Any]], Settings]) -> Settings:
    if not path.is_file():
        return Settings()
    try:
        raw = parse_json(read_limited(path, max_bytes=_MOST_BYTES))
        if not isinstance(raw, dict):
            raise ValueError("no JSON object")
        return make(raw)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
        reason = f"no key {exc}" if isinstance(exc, KeyError) else str(exc)[:200]
        raise CheckpointError(
            f"{path.name}: expected the settings of the weights beside it, got {reason}. "
            "Get the file of the same repository, or move it away and give --activation and "
            "--num-heads."
        ) from exc


def _config_settings(raw: dict[str, Any], sizes: Mapping[str, tuple[int, int]]) -> Settings:
    stated = {"model_type", *(f"{tower}_config{end}" for tower in sizes for end in ("", "_dict"))}
    if raw and not stated & raw.keys():
        return Settings()  # another program's, such as our small CLIP's training
    kind = raw.get("model_type", "clip")
    if kind not in _DEFAULTS:
        raise ValueError(f"model_type {kind!r:.40} instead of 'clip' or 'siglip'")
    towers = []
    for tower, defaults in _DEFAULTS[kind].items():
        config = dict(zip(_KEYS, defaults, strict=True))
        for part in (f"{tower}_config", f"{tower}_config_dict"):  # the old name overrides
            config |= raw.get(part) or {}
        size = (config["hidden_size"], config["num_hidden_layers"])
        if size != sizes[tower]:
            raise ValueError(
                f"a {tower} tower of width {size[0]} with {size[1]} blocks, where the weights have "
                f"width {sizes[tower][0]} and {sizes[tower][1]} blocks"
            )
        towers.append((config["hidden_act"], int(config["num_attention_heads"])))
    (activation, heads), (other, text_heads) = towers
    if activation != other or activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act {activation!r:.40} and {other!r:.40}, which is not supported")
    return Settings(_ACTIVATIONS[activation], heads, text_heads)


def _open_clip_settings(raw: dict[str, Any]) -> Settings:
    model, colours = raw["model_cfg"], raw.get("preprocess_cfg") or {}
    activation = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    heads = model.get("text_cfg", {}).get("heads")
    return Settings(
        activation,
        text_heads=None if heads is None else int(heads),
        mean=_triple(colours.get("mean")),
        std=_triple(colours.get("std")),
    )


def _preprocessor_settings(raw: dict[str, Any]) -> Settings:
    return Settings(mean=_triple(raw.get("image_mean")), std=_triple(raw.get("image_std")))


def _triple(values: Any) -> tuple[float, ...]:
    numbers = () if values is None else tuple(float(value) for value in values)
    if len(numbers) not in (0, 3):
        raise ValueError(f"{len(numbers)} numbers for three colours")
    return numbers
