"""Read CLIP's weights from a file without torch, or the small ones that ship, or say why not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from zsseg_rt.common.arrays import is_half
from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files.shapes import Array, Checked, Shapes, divisor, norm, some
from zsseg_rt.torch_files.shipped_clip import is_shipped, read_arrays
from zsseg_rt.torch_files.weights import read_safetensors, read_weights, unwrap

T = TypeVar("T")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue in [0, 1], of OpenAI's CLIP."""

_VOCAB_SIZE = 49408
_TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
_UNUSED = {"attn_mask", "context_length", "input_resolution", "logit_bias", "logit_scale"}
_UNUSED |= {"vocab_size"}
_FLOATS = {"float16", "float32", "float64", "bfloat16"}
_WHAT = "a CLIP ViT"
_ANOTHER = "It is another model's file, or damaged: get a CLIP ViT's file from open_clip."


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
        source: A file with open_clip's names, of any kind that
            :func:`zsseg_rt.torch_files.weights.read_weights` reads or ``.safetensors``, or
            ``"demo"``.

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
    return divisor(name, max(1, width // 64) if given is None else given, width)


def _read(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a CLIP's file, found nothing. Check the path.")
    is_plain = path.suffix == ".safetensors"
    stored = unwrap(read_safetensors(path, "np")[0] if is_plain else read_weights(path), path.name)
    wrong = [
        f"{k} ({kind})" for k, (_, kind) in stored.items() if _is_used(k) and kind not in _FLOATS
    ]
    if wrong:
        raise CheckpointError(
            f"{path.name}: expected weights of floating point, got {some(wrong)}. "
            "Save them as float32."
        )
    return {k: _float32(*v) for k, v in stored.items() if v[1] in _FLOATS}


def _is_used(key: str) -> bool:
    return key.removeprefix("text.") not in _UNUSED


def _float32(array: Array, kind: str) -> Array:
    if kind == "bfloat16":  # the upper half of a float32's bits
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(array, np.float32)


def sort_by_tower(tensors: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T], list[str]]:
    """The image tower's tensors, the text tower's, and the keys that no CLIP has."""
    visual, text, unknown = {}, {}, []
    for key, value in tensors.items():
        bare = key.removeprefix("text.")
        if key.startswith("visual."):
            visual[key.removeprefix("visual.")] = value
        elif bare.startswith(_TEXT):
            text[bare] = value
        elif bare not in _UNUSED:
            unknown.append(key)
    return visual, text, unknown


def _towers(tensors: Mapping[str, Array], name: str) -> tuple[dict[str, Array], dict[str, Array]]:
    """Sort tensors by tower, and check both."""
    visual, text, unknown = sort_by_tower(tensors)
    if unknown or not visual:
        raise CheckpointError(
            f"{name}: expected names of a CLIP ViT such as 'visual.conv1.weight', got "
            f"{some(unknown or list(tensors))}. {_ANOTHER}"
        )
    if not text:
        raise CheckpointError(
            f"{name}: expected a text tower beside the image tower, got none. "
            "Class names need it: get the file with both towers."
        )
    image = Checked(tensors=visual, where=f"{name}: visual", what=_WHAT, remedy=_ANOTHER)
    image.check(_image_shapes(image))
    words = Checked(tensors=text, where=f"{name}: text", what=_WHAT, remedy=_ANOTHER)
    words.check(_text_shapes(words, visual["proj"].shape[1]))
    return visual, text


def _image_shapes(tower: Checked) -> Shapes:
    width, _, patch, _ = tower.shape("conv1.weight", 4)
    rows = tower.shape("positional_embedding", 2)[0]
    side = math.isqrt(max(rows - 1, 0))
    if side < 1 or 1 + side**2 != rows:
        raise CheckpointError(
            f"{tower.where}: positional_embedding: expected one row and those of a square grid, "
            f"got {rows} rows. {_ANOTHER}"
        )
    return {
        "conv1.weight": (width, 3, patch, patch),
        "class_embedding": (width,),
        "positional_embedding": (rows, width),
        "proj": (width, tower.shape("proj", 2)[1]),
        **norm("ln_pre", width),
        **norm("ln_post", width),
        **tower.blocks(width),
    }


def _text_shapes(tower: Checked, embed_dim: int) -> Shapes:
    length, width = tower.shape("positional_embedding", 2)
    return {
        "token_embedding.weight": (_VOCAB_SIZE, width),
        "positional_embedding": (length, width),
        "text_projection": (width, embed_dim),
        **norm("ln_final", width),
        **tower.blocks(width),
    }
