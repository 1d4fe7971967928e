"""TIPSv2's weights: the authors' ``.npz`` files, sorted under CLIP's names; without torch.

LayerScale becomes part of the projections before it. Beside CLIP's keys there are ``conv1.bias``
and ``register_embedding``, and no ``ln_pre`` and ``proj``.

Source:
    google-deepmind/tips, PyTorch part, commit 4db271d.
"""

from __future__ import annotations

import math
import re
import tokenize
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files.clip_layouts import as_clip
from zsseg_rt.torch_files.shapes import TEXT_TOWER, Array, Checked, divisor
from zsseg_rt.torch_files.weights import READING_ERRORS

PATCH = 14
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of a {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "a photo of many {}.",
    "a photo of {}s.",
)
"""The nine prompts that the authors evaluate with, TCL's."""

VISION = f"""
patch_embed.proj. W 3 {PATCH} {PATCH}
cls_token 1 1 W
pos_embed 1 R W
register_tokens 1 1 W
mask_token 1 W
norm. W
blocks.#.norm1. W
blocks.#.norm2. W
blocks.#.ls1.gamma W
blocks.#.ls2.gamma W
blocks.#.attn.qkv. 3W W
blocks.#.attn.proj. W W
blocks.#.mlp.fc1. M W
blocks.#.mlp.fc2. W M
"""
TEXT = re.sub(r"\n(positional_embedding|text_projection) .*", "", TEXT_TOWER)
_HEADS = {1152: 16}  # of SO/14; other towers have one per 64 channels
_WHAT = "a TIPSv2 tower"
_MOST_EXPANSION = 16  # weights hardly shrink in a zip file
_REMEDY = "Get the authors' tips_v2_oss_b14 or l14 files again."


@dataclass(frozen=True, kw_only=True)
class TipsTensors:
    """Weights of both towers, float32, whose names and shapes fit together."""

    visual: Mapping[str, Array]  # Image tower, under CLIP's keys
    text: Mapping[str, Array]  # Text tower, likewise; empty without one
    # What the authors' demonstration divides cosines by; None if it is not stored
    temperature: float | None = None

    @property
    def width(self) -> int:
        """Width of the towers and of the joint space."""
        return int(self.visual["class_embedding"].shape[0])

    @property
    def num_parameters(self) -> int:
        """Numbers in the authors' files, LayerScale and the unused mask token included."""
        count = sum(part.size for tower in (self.visual, self.text) for part in tower.values())
        scaled = sum(key.endswith("_proj.bias") for key in self.visual)  # two in each block
        return count + self.width * (scaled + 1)

    @property
    def grid_side(self) -> int:
        """Side of the square grid that positions are stored for."""
        return math.isqrt(len(self.visual["positional_embedding"]) - 1)


def read_tips(vision: str | Path, text: str | Path | None = None) -> TipsTensors:
    """Read the authors' files."""
    vision, text = Path(vision), None if text is None else Path(text)
    loaded = {} if text is None else _read(text)
    names = (vision.name, "text" if text is None else text.name)
    return sort_tips(_read(vision), loaded, names)


def sort_tips(
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    names: tuple[str, str] = ("vision", "text"),
) -> TipsTensors:
    """Check official keys and shapes, and sort them under CLIP's names."""
    vision, text = _arrays(vision), _arrays(text)
    tower = {key: value for key, value in text.items() if key != "temperature"}
    image = Checked(tensors=vision, where=names[0], what=_WHAT, remedy=_REMEDY)
    if any(".mlp.w12." in key for key in vision):
        raise CheckpointError(
            f"{names[0]}: expected MLPs of two layers (blocks.0.mlp.fc1), got SwiGLU "
            "(blocks.0.mlp.w12), as in TIPSv2 g/14, which is not supported. Use B/14 or L/14, "
            "which the authors found to label no worse."
        )
    sizes = image.check(VISION)
    image.check_square("pos_embed", sizes["R"])
    if tower:
        words = Checked(tensors=tower, where=names[1], what=_WHAT, remedy=_REMEDY)
        words.check(TEXT, T=sizes["W"])
    return TipsTensors(
        visual=_renamed(vision),
        text=tower,
        temperature=_temperature(text["temperature"], names[1]) if "temperature" in text else None,
    )


def heads_of(name: str, num_heads: int | None, width: int) -> int:
    """Attention heads of a tower: as given, or the published number."""
    return divisor(name, _HEADS.get(width) if num_heads is None else num_heads, width)


def _arrays(tensors: Mapping[str, Any]) -> dict[str, Array]:
    """Tensors of torch, which is not imported for it, as arrays."""
    return {
        key: np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        for key, value in tensors.items()
    }


def _read(path: Path) -> dict[str, Array]:
    try:
        with zipfile.ZipFile(path) as archive:
            claimed, size = sum(one.file_size for one in archive.infolist()), path.stat().st_size
        if claimed > _MOST_EXPANSION * size:
            raise ValueError(f"{claimed} bytes in a file of {size}")
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (tokenize.TokenError, *READING_ERRORS) as exc:
        raise CheckpointError(
            f"{path.name}: expected a TIPSv2 .npz file of plain arrays, got one that cannot be "
            f"read ({type(exc).__name__}: {str(exc)[:120]}). {_REMEDY}"
        ) from exc


def _temperature(value: Any, name: str) -> float:
    number = np.asarray(value)
    if number.size != 1 or number.dtype.kind != "f" or not 0 < float(number.reshape(())) < math.inf:
        raise CheckpointError(
            f"{name}: temperature: expected one number above 0, got {str(value)[:60]}. {_REMEDY}"
        )
    return float(number.reshape(()))


def _renamed(vision: Mapping[str, Array]) -> dict[str, Array]:
    """CLIP's names; LayerScale multiplies the rows of the projections before it."""
    tensors = {}
    for key, value in vision.items():
        match = re.match(r"(blocks\.\d+)\.(attn\.proj|mlp\.fc2)\.", key)
        if match:
            scale = vision[f"{match[1]}.ls{1 if match[2] == 'attn.proj' else 2}.gamma"]
            value = value * (scale if value.ndim == 1 else scale[:, None])
        if not key.endswith((".gamma", "mask_token")):
            tensors[f"visual.trunk.{key}"] = value
    named = {key.removeprefix("visual."): value for key, value in as_clip(tensors, _WHAT).items()}
    return named | {"register_embedding": named.pop("register_tokens")[0, 0]}
