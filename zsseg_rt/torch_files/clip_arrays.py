"""Read CLIP's weights from a .safetensors file, or the small ones that ship, or say why not."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import is_half
from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files.shipped_clip import is_shipped, read_arrays

Array = npt.NDArray[Any]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue in [0, 1], of OpenAI's CLIP."""

_VOCAB_SIZE = 49408
_TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
_UNUSED = {"attn_mask", "context_length", "input_resolution", "logit_bias", "logit_scale"}
_UNUSED |= {"vocab_size"}
_FLOATS = {"F16", "F32", "F64"}
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")
_LISTED = 4
_ANOTHER = "It is another model's file, or damaged: get a CLIP ViT's .safetensors from open_clip."


@dataclass(frozen=True, kw_only=True)
class ClipTensors:
    """Weights of both towers, float32, whose names and shapes fit together.

    Attributes:
        visual: Image tower: ``conv1.weight``, ``transformer.resblocks.0...``.
        text: Text tower: ``token_embedding.weight``, ``transformer.resblocks.0...``.
        words: What class names may be made of; empty: anything.
        prompt_words: Further words that the text tower knows, if ``words`` are listed.
    """

    visual: Mapping[str, Array]
    text: Mapping[str, Array]
    words: tuple[str, ...] = ()
    prompt_words: tuple[str, ...] = ()

    @property
    def embed_dim(self) -> int:
        """Width D of the joint space."""
        return int(self.visual["proj"].shape[1])

    @property
    def num_parameters(self) -> int:
        """Numbers in both towers."""
        return sum(part.size for tower in (self.visual, self.text) for part in tower.values())

    def likely_activation(self) -> str:
        """What the MLPs use, which a file does not say.

        OpenAI published weights that float16 holds exactly, with ``"quick_gelu"``; most others
        are float32 with ``"gelu"``.
        """
        return "quick_gelu" if is_half(self.visual["conv1.weight"]) else "gelu"


def read_clip(source: str | Path) -> ClipTensors:
    """Read the weights of a CLIP ViT with a class token.

    Args:
        source: A .safetensors file with open_clip's names, or ``"demo"``.

    Raises:
        CheckpointError: It cannot be read, holds another model, or no text tower.
    """
    path = Path(source)
    if is_shipped(source):
        found = read_arrays()
        visual, text = _towers(found.state_dict, "demo")
        words, prompts = found.words, found.prompt_words
        return ClipTensors(visual=visual, text=text, words=words, prompt_words=prompts)
    visual, text = _towers(_read(path), path.name)
    return ClipTensors(visual=visual, text=text)


def check_heads(name: str, given: int | None, width: int) -> int:
    """Attention heads of a tower: as given, or one per 64 channels."""
    heads = max(1, width // 64) if given is None else given
    if heads < 1 or width % heads:
        raise CheckpointError(
            f"{name}: expected a divisor of the width {width}, got {heads}. "
            "Give the number that the weights were trained with."
        )
    return heads


def _read(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: expected a CLIP's .safetensors file. Check the path.")
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path.name}: expected a .safetensors file, got another ending. Archives and pickles "
            "are read with torch: give them as --pretrained."
        )
    try:
        with safe_open(path, framework="np") as file:
            keys = list(file.keys())
            kinds = {key: file.get_slice(key).get_dtype() for key in keys}
            wrong = [f"{k} ({kinds[k]})" for k in keys if kinds[k] not in _FLOATS and _is_used(k)]
            if wrong:
                raise CheckpointError(
                    f"{path.name}: expected weights in float32 or float16, got {_some(wrong)}. "
                    "Save them as float32."
                )
            return {k: _float32(file.get_tensor(k)) for k in keys if kinds[k] in _FLOATS}
    except (SafetensorError, OSError, ValueError) as exc:
        raise CheckpointError(
            f"{path.name}: expected a .safetensors file, got one that cannot be read "
            f"({type(exc).__name__}: {str(exc)[:120]}). Get the file again."
        ) from exc


def _is_used(key: str) -> bool:
    return key.removeprefix("text.") not in _UNUSED


def _float32(array: Array) -> Array:
    return np.ascontiguousarray(array, np.float32)


def _towers(tensors: Mapping[str, Array], name: str) -> tuple[dict[str, Array], dict[str, Array]]:
    """Sort tensors by tower, and check both."""
    visual, text, unknown = {}, {}, []
    for key, value in tensors.items():
        bare = key.removeprefix("text.")
        if key.startswith("visual."):
            visual[key.removeprefix("visual.")] = value
        elif bare.startswith(_TEXT):
            text[bare] = value
        elif bare not in _UNUSED:
            unknown.append(key)
    if unknown or not visual:
        raise CheckpointError(
            f"{name}: expected names of a CLIP ViT such as 'visual.conv1.weight', got "
            f"{_some(unknown or list(tensors))}. {_ANOTHER}"
        )
    if not text:
        raise CheckpointError(
            f"{name}: expected a text tower beside the image tower, got none. "
            "Class names need it: get the file with both towers."
        )
    _check(visual, _image_shapes(visual, name), f"{name}: visual")
    _check(text, _text_shapes(text, visual["proj"].shape[1], name), f"{name}: text")
    return visual, text


def _image_shapes(tensors: Mapping[str, Array], name: str) -> dict[str, tuple[int, ...]]:
    width, _, patch, _ = _shape(tensors, "conv1.weight", 4, name)
    rows = _shape(tensors, "positional_embedding", 2, name)[0]
    side = math.isqrt(max(rows - 1, 0))
    if side < 1 or 1 + side**2 != rows:
        raise CheckpointError(
            f"{name}: visual.positional_embedding: expected one row and those of a square grid, "
            f"got {rows} rows. {_ANOTHER}"
        )
    return {
        "conv1.weight": (width, 3, patch, patch),
        "class_embedding": (width,),
        "positional_embedding": (rows, width),
        "proj": (width, _shape(tensors, "proj", 2, name)[1]),
        **_norm("ln_pre", width),
        **_norm("ln_post", width),
        **_blocks(tensors, width, name),
    }


def _text_shapes(
    tensors: Mapping[str, Array], embed_dim: int, name: str
) -> dict[str, tuple[int, ...]]:
    length, width = _shape(tensors, "positional_embedding", 2, name)
    return {
        "token_embedding.weight": (_VOCAB_SIZE, width),
        "positional_embedding": (length, width),
        "text_projection": (width, embed_dim),
        **_norm("ln_final", width),
        **_blocks(tensors, width, name),
    }


def _blocks(tensors: Mapping[str, Array], width: int, name: str) -> dict[str, tuple[int, ...]]:
    numbers = {int(found[1]) for key in tensors if (found := _BLOCK.match(key))}
    first = "transformer.resblocks.0.mlp.c_fc.weight"
    hidden = _shape(tensors, first, 2, name)[0]
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(len(numbers)):
        block = f"transformer.resblocks.{number}"
        shapes |= _norm(f"{block}.ln_1", width) | _norm(f"{block}.ln_2", width)
        for part, rows, columns in (
            ("attn.out_proj.", width, width),
            ("attn.in_proj_", 3 * width, width),
            ("mlp.c_fc.", hidden, width),
            ("mlp.c_proj.", width, hidden),
        ):
            shapes[f"{block}.{part}weight"] = (rows, columns)
            shapes[f"{block}.{part}bias"] = (rows,)
    return shapes


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _shape(tensors: Mapping[str, Array], key: str, axes: int, name: str) -> tuple[int, ...]:
    shape = tensors[key].shape if key in tensors else None
    if shape is None or len(shape) != axes:
        raise CheckpointError(
            f"{name}: {key}: expected a tensor of {axes} axes, got "
            f"{'none' if shape is None else list(shape)}. {_ANOTHER}"
        )
    return tuple(shape)


def _check(tensors: Mapping[str, Array], shapes: Mapping[str, Any], where: str) -> None:
    wrong = [f"{key} missing" for key in shapes if key not in tensors]
    wrong += [f"{key} unknown" for key in tensors if key not in shapes]
    for key, shape in shapes.items():
        if key in tensors and tensors[key].shape != shape:
            wrong.append(f"{key} {list(tensors[key].shape)} instead of {list(shape)}")
    if wrong:
        raise CheckpointError(
            f"{where}: expected the {len(shapes)} tensors of a CLIP ViT, got {_some(wrong)}. "
            f"{_ANOTHER}"
        )
    broken = [key for key, value in tensors.items() if not np.isfinite(value).all()]
    if broken:
        raise CheckpointError(
            f"{where}: expected finite weights, got NaN or infinity in {_some(broken)}. "
            "Get the file again."
        )


def _some(items: list[str]) -> str:
    listed = ", ".join(item[:100] for item in items[:_LISTED]) or "none"
    return listed + (f" and {len(items) - _LISTED} more" if len(items) > _LISTED else "")
