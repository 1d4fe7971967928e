"""Read CLIP's weights from a file without torch, or the small ones that ship, or say why not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from zsseg_rt.common.arrays import is_half
from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files.clip_layouts import ONE_WIDTH, PRUNED, Settings, as_clip, settings_beside
from zsseg_rt.torch_files.shapes import (
    BLOCKS,
    IMAGE_TOWER,
    TEXT_TOWER,
    Array,
    Checked,
    Later,
    has_many_rows,
    some,
    under,
    whole,
)
from zsseg_rt.torch_files.shipped_clip import is_shipped, read_arrays
from zsseg_rt.torch_files.weights import as_float32, read_stored

T = TypeVar("T")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue in [0, 1], of OpenAI's CLIP."""

_VOCAB_SIZE = 49408
_TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
_UNUSED = {"attn_mask", "context_length", "input_resolution", "logit_bias", "logit_scale"}
_UNUSED |= {"vocab_size"}
_FLOATS = {"float16", "float32", "float64", "bfloat16"}
_BLOCK = r"transformer\.resblocks\.\d+\."
_TINYCLIP = {(256, 10), (512, 12), (640, 12)}  # width and blocks of the image tower
_OPENAI = {(768, 12), (1024, 24)}
_ANOTHER = "It is another model's file, or damaged: get a CLIP ViT's file from open_clip."

_POOL = """
probe 1 1 W
layernorm. W
attn.in_proj_ 3W W
attn.out_proj. W W
mlp.c_fc. N W
mlp.c_proj. W N
"""
_PE_IMAGE = IMAGE_TOWER + under("attn_pool.", _POOL)
_SIGLIP_IMAGE = f"""
conv1. W 3 P P
positional_embedding R W
ln_post. W
{BLOCKS}{under("attn_pool.", _POOL)}"""


class Tower(Mapping[str, Array]):
    """Tensors by key; those of a file are read from it whenever they are asked for."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors = tensors

    def __getitem__(self, key: str) -> Array:
        value = self.tensors[key]
        return value if has_many_rows(value) else whole(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@dataclass(frozen=True, kw_only=True)
class ClipTensors:
    """Weights of both towers, float32, whose names and shapes fit together."""

    visual: Tower  # Image tower: conv1.weight, transformer.resblocks.0...
    text: Tower  # Text tower: token_embedding.weight, transformer.resblocks.0...
    words: tuple[str, ...] = ()  # What class names may be made of; empty: anything
    # Further words that the text tower knows, if words are listed
    prompt_words: tuple[str, ...] = ()
    # The logarithm of the factor on cosines; None if it is not stored
    logit_scale: float | None = None
    settings: Settings = field(default_factory=Settings)  # What files beside the weights say

    @property
    def kind(self) -> Literal["clip", "pe", "siglip"]:
        """Whose towers they are."""
        if "attn_pool.probe" not in self.visual:
            return "clip"
        return "pe" if "class_embedding" in self.visual else "siglip"

    @property
    def embed_dim(self) -> int:
        """Width D of the joint space."""
        proj = self.text.get("text_projection", self.text.get("text_projection.bias"))
        assert proj is not None
        return int(proj.shape[-1])

    @property
    def num_parameters(self) -> int:
        """Numbers in both towers."""
        return sum(part.size for one in (self.visual, self.text) for part in one.tensors.values())

    def known_activation(self) -> str | None:
        """The MLPs' activation; None if nothing says so.

        Files beside the weights say it, or the sizes: TinyCLIP's have ``"gelu"``. OpenAI's sizes
        with weights that float16 holds exactly, as OpenAI published them, have ``"quick_gelu"``.
        """
        if self.settings.activation is not None:
            return self.settings.activation
        if self.kind != "clip":
            return "gelu" if self.kind == "pe" else "gelu_tanh"
        size = tower_sizes(self.visual)
        if size in _TINYCLIP and self.embed_dim == 512:
            return "gelu"
        is_openai = (self.words or size in _OPENAI) and is_half(self.visual["conv1.weight"])
        return "quick_gelu" if is_openai else None


def read_clip(source: str | Path) -> ClipTensors:
    """Read the weights of an image-text model with a ViT: CLIP, PE-Core or SigLIP."""
    path = Path(source)
    if is_shipped(source):
        arrays, words = read_arrays()
        visual, text = _towers(arrays, "demo")
        return ClipTensors(visual=visual, text=text, **words)
    tensors = read_clip_arrays(path, later=True)
    visual, text = _towers(tensors, path.name)
    sizes = {"vision": tower_sizes(visual), "text": tower_sizes(text)}
    scale = tensors.get("logit_scale")
    return ClipTensors(
        visual=visual,
        text=text,
        logit_scale=None if scale is None else float(np.ravel(whole(scale))[0]),
        settings=settings_beside(path, sizes),
    )


def read_clip_arrays(path: Path, *, later: bool = False) -> dict[str, Array]:
    """A file's weights under CLIP's names, float32, whatever they are."""
    return as_clip(read_floats(path, _is_used, later=later), path.name)


def tower_sizes(tensors: Mapping[str, Any]) -> tuple[int, int]:
    """Width and blocks of a tower under CLIP's names."""
    depth = len({key.split(".")[2] for key in tensors if key.startswith("transformer.")})
    return int(tensors["positional_embedding"].shape[-1]), depth


def read_floats(
    path: Path, is_used: Callable[[str], bool], *, later: bool = False, part: bool = False
) -> dict[str, Array]:
    """The weights that a file holds, as float32; those that are not used may be of any type.

    ``later`` and ``part`` as for :func:`zsseg_rt.torch_files.weights.read_stored`.
    """
    stored: dict[str, Any] = read_stored(path, later=later, part=part)
    wrong = [
        f"{k} ({kind})" for k, (_, kind) in stored.items() if is_used(k) and kind not in _FLOATS
    ]
    if wrong:
        raise CheckpointError(
            f"{path.name}: expected weights of floating point, got {some(wrong)}. "
            "Save them as float32."
        )
    floats: dict[str, Any] = {}
    for key in list(stored):
        array, kind = stored.pop(key)  # memory holds each once
        if isinstance(array, Later):
            floats[key] = array
        elif kind in _FLOATS:
            floats[key] = as_float32(array, kind)
    return floats


def _is_used(key: str) -> bool:
    return key.removeprefix("text.") not in _UNUSED and not key.endswith("position_ids")


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


def _towers(tensors: Mapping[str, Any], name: str) -> tuple[Tower, Tower]:
    """Sort tensors by tower, and check both."""
    visual, text, unknown = sort_by_tower(tensors)
    if unknown or not (visual or text):
        raise CheckpointError(
            f"{name}: expected names of a CLIP ViT such as 'visual.conv1.weight', got "
            f"{some(unknown or list(tensors))}. {_ANOTHER}"
        )
    if not visual or not text:
        one, other = ("the text tower", "image") if text else ("the image tower", "text")
        raise CheckpointError(
            f"{name}: expected both towers of a CLIP, got {one} alone, without the {other} tower. "
            "Get the file with both towers."
        )
    if _is_pruned(visual) or _is_pruned(text):
        raise CheckpointError(f"{name}: expected both towers of a CLIP, got {PRUNED}. {ONE_WIDTH}")
    towers = {f"visual.{key}": value for key, value in visual.items()} | text
    pooled, classed = "attn_pool.probe" in visual, "class_embedding" in visual
    is_siglip = pooled and not classed
    image = _SIGLIP_IMAGE if is_siglip else _PE_IMAGE if pooled else IMAGE_TOWER
    words = TEXT_TOWER
    if is_siglip:  # which projects with a bias, to the image tower's width
        words = words.replace("text_projection T D", "text_projection. W T")
    file = Checked(tensors=towers, where=name, what="a CLIP ViT", remedy=_ANOTHER)
    sizes = file.check(under("visual.", image) + words)
    file.check_square("visual.positional_embedding", sizes["R"], others=not is_siglip)
    if sizes["V"] != _VOCAB_SIZE and not is_siglip:
        raise CheckpointError(
            f"{name}: token_embedding.weight: expected {_VOCAB_SIZE} rows, one for each token of "
            f"CLIP's tokenizer, got {sizes['V']}, another tokenizer's. Take a CLIP with the first "
            "one."
        )
    return Tower(visual), Tower(text)


def _is_pruned(tower: Mapping[str, Any]) -> bool:
    """Whether blocks lack their attention, or differ in the shapes of their layers."""
    queries, hidden = (
        [value.shape for key, value in tower.items() if re.fullmatch(_BLOCK + part, key)]
        for part in (r"attn\.in_proj_weight", r"mlp\.c_fc\.weight")
    )
    widths = {shape[0] / 3 / shape[1] for shape in queries if len(shape) == 2 and shape[1]}
    return bool(hidden) and (
        len({*hidden}) > 1 or widths != {1.0} or not 0 < len(hidden) == len(queries)
    )
