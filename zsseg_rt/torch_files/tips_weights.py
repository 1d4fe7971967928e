"""TIPSv2's weights: the authors' ``.npz`` files, sorted under CLIP's names; without torch.

The image tower is DINOv2's ViT, whose blocks compute what CLIP's do once LayerScale is part of the
projections before it. So both towers get CLIP's keys, with three more: ``conv1.bias``,
``register_embedding``, and no ``ln_pre`` and ``proj``.

Source:
    google-deepmind/tips, PyTorch part, commit 4db271d.
"""

from __future__ import annotations

import math
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import CheckpointError

Array = npt.NDArray[Any]

PATCH = 14
CONTEXT_LENGTH = 64  # tokens per prompt
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

_HEADS = {1152: 16}  # of SO/14; other towers have one per 64 channels
_LISTED = 4
_MOST_EXPANSION = 16  # weights hardly shrink in a zip file
# What zipfile and NumPy raise on damaged files.
_READING_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
_REMEDY = "Get the authors' tips_v2_oss_b14 or l14 files again."


@dataclass(frozen=True, kw_only=True)
class TipsTensors:
    """Weights of both towers, float32, whose names and shapes fit together.

    Attributes:
        visual: Image tower, under CLIP's keys.
        text: Text tower, likewise; empty without one.
        temperature: What the authors' demonstration divides cosines by; None if it is not stored.
    """

    visual: Mapping[str, Array]
    text: Mapping[str, Array]
    temperature: float | None = None

    @property
    def width(self) -> int:
        """Width of the towers and of the joint space."""
        return int(self.visual["class_embedding"].shape[0])

    @property
    def num_parameters(self) -> int:
        """Numbers in the authors' files, LayerScale and the unused mask token included."""
        held = sum(part.size for tower in (self.visual, self.text) for part in tower.values())
        depth = _depth(self.visual, r"transformer\.resblocks\.(\d+)\.")
        return held + self.width * (2 * depth + 1)

    @property
    def grid_side(self) -> int:
        """Side of the square grid that positions are stored for."""
        return math.isqrt(len(self.visual["positional_embedding"]) - 1)


def read_tips(vision: str | Path, text: str | Path | None = None) -> TipsTensors:
    """Read the authors' files.

    Args:
        vision: ``tips_v2_oss_b14_vision.npz`` or its like.
        text: The text tower of the same size; None: no class names, only embeddings.

    Raises:
        CheckpointError: A file cannot be read, holds pickles, or another model.
    """
    vision, text = Path(vision), None if text is None else Path(text)
    loaded = {} if text is None else _read(text)
    names = (vision.name, "text" if text is None else text.name)
    return sort_tips(_read(vision), loaded, names)


def sort_tips(
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    names: tuple[str, str] = ("vision", "text"),
) -> TipsTensors:
    """Check official keys and shapes, and sort them under CLIP's names.

    Shapes:
        vision: Official keys, float32 arrays or tensors: ``cls_token``, ``blocks.0...``.
        text: Official keys, likewise, and ``temperature``; may be empty.
    """
    vision, text = _arrays(vision), _arrays(text)
    given = {key: value for key, value in text.items() if key != "temperature"}
    shapes = _image_shapes(vision, names[0])
    _check(vision, shapes, names[0])
    if given:
        _check(given, _text_shapes(given, shapes["norm.weight"][0], names[1]), names[1])
    return TipsTensors(
        visual=_renamed(vision),
        text=given,
        temperature=_temperature(text["temperature"], names[1]) if "temperature" in text else None,
    )


def heads_of(name: str, given: int | None, width: int) -> int:
    """Attention heads of a tower: as given, or the published number."""
    heads = _HEADS.get(width, max(1, width // 64)) if given is None else given
    if heads < 1 or width % heads:
        raise CheckpointError(
            f"{name}: expected a divisor of the width {width}, got {heads}. "
            "Give the number that the weights were trained with."
        )
    return heads


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
    except _READING_ERRORS as exc:
        raise CheckpointError(
            f"{path.name}: expected a TIPSv2 .npz file of plain arrays, got one that cannot be "
            f"read ({type(exc).__name__}: {str(exc)[:120]}). {_REMEDY}"
        ) from exc


def _image_shapes(tensors: Mapping[str, Array], name: str) -> dict[str, tuple[int, ...]]:
    if any(".mlp.w12." in key for key in tensors):
        raise CheckpointError(
            f"{name}: expected MLPs of two layers (blocks.0.mlp.fc1), got SwiGLU "
            "(blocks.0.mlp.w12), as in TIPSv2 g/14, which is not supported. Use B/14 or L/14, "
            "which the authors found to label no worse."
        )
    width = _shape(tensors, "patch_embed.proj.weight", 4, name)[0]
    hidden = _shape(tensors, "blocks.0.mlp.fc1.weight", 2, name)[0]
    rows = _shape(tensors, "pos_embed", 3, name)[1]
    if math.isqrt(rows - 1) ** 2 + 1 != rows:
        raise CheckpointError(
            f"{name}: pos_embed: expected one row and those of a square grid, got {rows}. {_REMEDY}"
        )
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, rows, width),
        "register_tokens": (1, 1, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        **_norm("norm", width),
    }
    for block in range(_depth(tensors, r"blocks\.(\d+)\.")):
        at = f"blocks.{block}"
        shapes |= _norm(f"{at}.norm1", width) | _norm(f"{at}.norm2", width)
        shapes |= {f"{at}.ls1.gamma": (width,), f"{at}.ls2.gamma": (width,)}
        shapes |= _linear(f"{at}.attn.qkv.", 3 * width, width)
        shapes |= _linear(f"{at}.attn.proj.", width, width)
        shapes |= _linear(f"{at}.mlp.fc1.", hidden, width)
        shapes |= _linear(f"{at}.mlp.fc2.", width, hidden)
    return shapes


def _text_shapes(tensors: Mapping[str, Array], width: int, name: str) -> dict[str, tuple[int, ...]]:
    rows = _shape(tensors, "token_embedding.weight", 2, name)[0]
    hidden = _shape(tensors, "transformer.resblocks.0.mlp.c_fc.weight", 2, name)[0]
    shapes = {"token_embedding.weight": (rows, width), **_norm("ln_final", width)}
    for block in range(_depth(tensors, r"transformer\.resblocks\.(\d+)\.")):
        at = f"transformer.resblocks.{block}"
        shapes |= _norm(f"{at}.ln_1", width) | _norm(f"{at}.ln_2", width)
        shapes |= _linear(f"{at}.attn.in_proj_", 3 * width, width)
        shapes |= _linear(f"{at}.attn.out_proj.", width, width)
        shapes |= _linear(f"{at}.mlp.c_fc.", hidden, width)
        shapes |= _linear(f"{at}.mlp.c_proj.", width, hidden)
    return shapes


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, outs: int, ins: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}weight": (outs, ins), f"{name}bias": (outs,)}


def _depth(tensors: Mapping[str, Array], pattern: str) -> int:
    return len({found[1] for key in tensors if (found := re.match(pattern, key))})


def _shape(tensors: Mapping[str, Array], key: str, axes: int, name: str) -> tuple[int, ...]:
    shape = tensors[key].shape if key in tensors else None
    if shape is None or len(shape) != axes:
        raise CheckpointError(
            f"{name}: {key}: expected a tensor of {axes} axes, as in TIPSv2, got "
            f"{'none' if shape is None else list(shape)}. {_REMEDY}"
        )
    return tuple(shape)


def _check(tensors: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    wrong = [f"{key} missing" for key in shapes if key not in tensors]
    wrong += [f"{key} unknown" for key in tensors if key not in shapes]
    for key, shape in shapes.items():
        if key in tensors and tensors[key].shape != shape:
            wrong.append(f"{key} {list(tensors[key].shape)} instead of {list(shape)}")
        elif key in tensors and tensors[key].dtype != np.float32:
            wrong.append(f"{key} {tensors[key].dtype} instead of float32")
        elif key in tensors and not np.isfinite(tensors[key]).all():
            wrong.append(f"NaN or infinity in {key}")
    if wrong:
        listed = ", ".join(wrong[:_LISTED])
        more = f" and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise CheckpointError(
            f"{name}: expected the {len(shapes)} finite tensors of a TIPSv2 tower, got {listed}"
            f"{more}. {_REMEDY}"
        )


def _temperature(value: Any, name: str) -> float:
    found = np.asarray(value)
    if found.size != 1 or found.dtype.kind != "f" or not 0 < float(found.reshape(())) < math.inf:
        raise CheckpointError(
            f"{name}: temperature: expected one number above 0, got {str(value)[:60]}. {_REMEDY}"
        )
    return float(found.reshape(()))


_NAMES = (
    (r"^patch_embed\.proj\.", "conv1."),
    (r"^norm\.", "ln_post."),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm(\d)\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def _renamed(vision: Mapping[str, Array]) -> dict[str, Array]:
    """CLIP's names; LayerScale multiplies the rows of the projections before it."""
    made = {
        "class_embedding": vision["cls_token"][0, 0],
        "positional_embedding": vision["pos_embed"][0],
        "register_embedding": vision["register_tokens"][0, 0],
    }
    for key, value in vision.items():
        found = re.match(r"(blocks\.\d+)\.(attn\.proj|mlp\.fc2)\.", key)
        if found:
            scale = vision[f"{found[1]}.ls{1 if found[2] == 'attn.proj' else 2}.gamma"]
            value = value * (scale if value.ndim == 1 else scale[:, None])
        if re.match(r"(patch_embed|norm|blocks)\.", key) and not key.endswith(".gamma"):
            for pattern, name in _NAMES:
                key = re.sub(pattern, name, key)
            made[key] = value
    return made
