"""Other layouts of image-text weights under CLIP's own names, and the settings beside a file.

Transformers' (``CLIPModel``, ``SiglipModel``), timm's image towers in open_clip's files, and the
authors' files of TinyCLIP. Decided by keys: names of files tell little.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zsseg_rt.common.files import read_limited
from zsseg_rt.common.schema import parse_json
from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files.shapes import Array

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
_REFUSED = (
    (r"_without_ddp\.", "an auto-pruned TinyCLIP, whose blocks have widths of their own",
     "Take a TinyCLIP of one width: ViT-8M-16, 39M-16, 40M-32 or 61M-32."),
    (r"visual\.(layer\d|attnpool)\.", "a CLIP with a ResNet tower", "Take one with a ViT."),
    (r"^(cls_token|pos_embed|patch_embed\.|blocks\.0\.)",
     "an image tower alone, as timm stores it",
     "Get the file with both towers, open_clip_model.safetensors."),
)  # fmt: skip


def as_clip(tensors: MutableMapping[str, Array], name: str) -> dict[str, Array]:
    """The same weights under CLIP's names, ``visual.`` before those of the image tower.

    Tensors that are joined are taken out of ``tensors``, so that memory holds them once.
    """
    for pattern, what, remedy in _REFUSED:
        if any(re.search(pattern, key) for key in tensors):
            raise CheckpointError(f"{name}: expected both towers of a CLIP, got {what}. {remedy}")
    rules: tuple[tuple[str, str], ...] = ()
    if is_transformers(tensors):
        rules = _TRANSFORMERS
        _refuse_naflex(tensors, name)
    elif any(key.startswith("visual.trunk.") for key in tensors):
        rules = _TIMM
    made: dict[str, Array] = {}
    parts: dict[str, dict[str, Array]] = {}
    for key in list(tensors):
        new = _TINYCLIP.sub("", key, count=1) if _TINYCLIP.match(key) else key
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        value = tensors[key]
        if rules and new in _TURNED:
            made[_TURNED[new]] = np.ascontiguousarray(value.T)
        elif new == "visual.head.bias":
            _check_zero(value, key, name)
        elif "/" in new:
            start, _, rest = new.partition("/")
            target, part = start.rpartition("_")[0] + f"_{rest}", start.rpartition("_")[2]
            parts.setdefault(target, {})[part] = tensors.pop(key)
            if sum(map(len, parts[target])) == 3:
                held = parts.pop(target)
                made[target] = np.concatenate([held[one] for one in _PARTS if one in held])
        elif not new.endswith("position_ids"):
            made[new] = _without_front_axes(new, value) if rules else value
    made |= {f"{key} {part}": v for key, held in parts.items() for part, v in held.items()}
    return made


def is_transformers(tensors: Mapping[str, Any]) -> bool:
    """Whether the keys are those of the package transformers."""
    return any(key.startswith(("vision_model.", "text_model.")) for key in tensors)


def _refuse_naflex(tensors: Mapping[str, Array], name: str) -> None:
    patches = tensors.get("vision_model.embeddings.patch_embedding.weight")
    if patches is not None and patches.ndim == 2:
        raise CheckpointError(
            f"{name}: expected patches that a convolution makes, got a NaFlex SigLIP 2, for images "
            "of any shape. Take one of fixed size, such as siglip2-base-patch16-224."
        )


def _check_zero(value: Array, key: str, name: str) -> None:
    if np.any(value):
        raise CheckpointError(
            f"{name}: {key}: expected zeros, as in PE-Core, got others. It is another model's."
        )


def _without_front_axes(key: str, value: Array) -> Array:
    """Class token and positions without the axis that timm stores for images."""
    if key in ("visual.class_embedding", "visual.positional_embedding") and value.shape[0] == 1:
        return value.reshape(value.shape[2:] if value.shape[1] == 1 else value.shape[1:])
    return value


class Settings(NamedTuple):
    """What files beside a weights file say; None and empty: nothing."""

    activation: str | None = None
    num_heads: int | None = None
    text_heads: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_CLASSES: dict[str, dict[str, tuple[Any, ...]]] = {
    "clip": {"vision": ("quick_gelu", 12, 768, 12), "text": ("quick_gelu", 8, 512, 12)},
    "siglip": {
        "vision": ("gelu_pytorch_tanh", 12, 768, 12),
        "text": ("gelu_pytorch_tanh", 12, 768, 12),
    },
}  # transformers' defaults of what follows, by model_type
_KEYS = ("hidden_act", "num_attention_heads", "hidden_size", "num_hidden_layers")
_MOST_BYTES = 1 << 20


def settings_beside(path: Path, sizes: Mapping[str, tuple[int, int]]) -> Settings:
    """What ``config.json`` and ``preprocessor_config.json``, or open_clip's file, say.

    A file called ``open_clip_...`` is open_clip's: some repositories hold both.
    """
    config, own = (path.with_name(name) for name in ("config.json", "open_clip_config.json"))
    if own.is_file() and (path.name.startswith("open_clip") or not config.is_file()):
        return _read(own, _open_clip_settings) or Settings()

    def read(raw: Any) -> Settings:
        return _config_settings(raw, sizes)

    found = _read(config, read) or Settings()
    colours = _read(path.with_name("preprocessor_config.json"), _preprocessor_settings)
    return found if colours is None else found._replace(mean=colours.mean, std=colours.std)


def _read(path: Path, make: Callable[[Any], Settings]) -> Settings | None:
    if not path.is_file():
        return None
    try:
        return make(parse_json(read_limited(path, max_bytes=_MOST_BYTES)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
        raise CheckpointError(
            f"{path.name}: expected the settings of the weights beside it, got {str(exc)[:200]}. "
            "Get the file of the same repository, or move it away and give --activation and "
            "--num-heads."
        ) from exc


def _config_settings(raw: Any, sizes: Mapping[str, tuple[int, int]]) -> Settings:
    stated = {"model_type", *(f"{tower}_config{end}" for tower in sizes for end in ("", "_dict"))}
    if raw and not stated & raw.keys():
        return Settings()  # another program's, such as our small CLIP's training
    kind = raw.get("model_type", "clip")
    if kind not in _CLASSES:
        raise ValueError(f"model_type {kind!r:.40} instead of 'clip' or 'siglip'")
    found = []
    for tower, defaults in _CLASSES[kind].items():
        config = dict(zip(_KEYS, defaults, strict=True))
        for part in (f"{tower}_config", f"{tower}_config_dict"):  # the old name overrides
            config |= raw.get(part) or {}
        size = (config["hidden_size"], config["num_hidden_layers"])
        if size != sizes[tower]:
            raise ValueError(
                f"a {tower} tower of width {size[0]} with {size[1]} blocks, where the weights have "
                f"width {sizes[tower][0]} and {sizes[tower][1]} blocks"
            )
        found.append((config["hidden_act"], int(config["num_attention_heads"])))
    (activation, heads), (other, text_heads) = found
    if activation != other or activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act {activation!r:.40} and {other!r:.40}, which is not supported")
    return Settings(_ACTIVATIONS[activation], heads, text_heads)


def _open_clip_settings(raw: Any) -> Settings:
    model, colours = raw["model_cfg"], raw.get("preprocess_cfg") or {}
    activation = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    mean, std = _triple(colours.get("mean")), _triple(colours.get("std"))
    heads = model.get("text_cfg", {}).get("heads")
    return Settings(activation, None, None if heads is None else int(heads), mean, std)


def _preprocessor_settings(raw: Any) -> Settings:
    return Settings(mean=_triple(raw.get("image_mean")), std=_triple(raw.get("image_std")))


def _triple(values: Any) -> tuple[float, ...]:
    if values is None:
        return ()
    made = tuple(float(value) for value in values)
    if len(made) != 3:
        raise ValueError(f"{len(made)} numbers for three colours")
    return made
