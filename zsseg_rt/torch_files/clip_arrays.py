"""CLIP's weights without torch: of a file, or the small one that ships; names of spaces."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from zsseg_rt.common.arrays import is_half
from zsseg_rt.common.files import sha256_of
from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files.clip_layouts import Settings, as_clip, settings_beside
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
from zsseg_rt.torch_files.weights import as_float32, read_stored

T = TypeVar("T")
SHIPPED = "demo"
"""The name of the small CLIP that ships, as a source of weights."""
SHIPPED_FILE = Path(__file__).parents[1] / "models/clip/demo.safetensors"
_SHIPPED_SPACE = "small CLIP of the synthetic world"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue in [0, 1], of OpenAI's CLIP."""

_VOCAB_SIZE = 49408
_TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
_UNUSED = {"attn_mask", "context_length", "input_resolution", "logit_bias", "logit_scale"}
_UNUSED |= {"vocab_size"}
_FLOATS = {"float16", "float32", "float64", "bfloat16"}
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

    def named(self) -> dict[str, Array]:
        """Both towers under OpenAI's names, without the factor on cosines."""
        return {**{f"visual.{key}": value for key, value in self.visual.items()}, **self.text}

    @property
    def num_parameters(self) -> int:
        """Numbers in both towers."""
        return sum(part.size for one in (self.visual, self.text) for part in one.tensors.values())

    def known_activation(self) -> str | None:
        """The MLPs' activation by files beside the weights, or by sizes; None if nothing says so.

        OpenAI's sizes with weights that float16 holds exactly, as published, have ``"quick_gelu"``.
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


def is_shipped(source: str | Path) -> bool:
    """Whether a source is the name of the small CLIP that ships, and no file is called so."""
    return str(source) == SHIPPED and not Path(source).is_file()


def read_clip(source: str | Path, *, any_vocabulary: bool = False) -> ClipTensors:
    """Read a CLIP, PE-Core or SigLIP; CLIP's tokenizer is CLIP's own unless ``any_vocabulary``."""
    path = Path(source)
    if is_shipped(source):
        arrays, words = read_shipped()
        return replace(sort_by_tower(arrays, SHIPPED), **words)
    tensors = as_clip(read_floats(path, _is_used, later=True), path.name)
    weights = sort_by_tower(tensors, path.name, any_vocabulary=any_vocabulary)
    sizes = {"vision": tower_sizes(weights.visual), "text": tower_sizes(weights.text)}
    return replace(weights, settings=settings_beside(path, sizes))


def read_shipped(path: Path = SHIPPED_FILE) -> tuple[dict[str, Array], dict[str, Any]]:
    """A packed CLIP's arrays by open_clip's keys, and fields of :class:`ClipTensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            words = json.loads((file.metadata() or {})["words"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        rows, ids = tensors["token_embedding.weight"], tensors.pop("token_ids")
        table = np.zeros((_VOCAB_SIZE, rows.shape[1]), np.float32)
        table[ids] = rows
    except (OSError, SafetensorError, KeyError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected the small CLIP that ships with the package, got {error!r}. Install "
            "the package again, or make it with tools/make_demo.py."
        ) from error
    arrays = {key: t.astype(np.float32) for key, t in tensors.items()}
    names, prompts = tuple(words["names"]), tuple(words["prompts"])
    fields = {"words": names, "prompt_words": prompts}
    return arrays | {"token_embedding.weight": table}, fields


def tower_sizes(tensors: Mapping[str, Any]) -> tuple[int, int]:
    """Width and blocks of a tower under CLIP's names."""
    depth = len({key.split(".")[2] for key in tensors if key.startswith("transformer.")})
    return int(tensors["positional_embedding"].shape[-1]), depth


def read_floats(
    path: Path, is_used: Callable[[str], bool] = lambda _: True, *, later: bool = False
) -> dict[str, Array]:
    """The used weights as float32; ``later`` as for :func:`read_stored`."""
    read: dict[str, Any] = read_stored(path, later=later)
    stored = {key: read[key] for key in read if is_used(key)}
    if wrong := [f"{k} ({kind})" for k, (_, kind) in stored.items() if kind not in _FLOATS]:
        raise CheckpointError(
            f"{path.name}: expected weights of floating point, got {some(wrong)}. "
            "Save them as float32."
        )
    read.clear()  # memory holds each once
    floats: dict[str, Any] = {}
    for key in list(stored):
        array, kind = stored.pop(key)
        floats[key] = array if isinstance(array, Later) else as_float32(array, kind)
    return floats


def _is_used(key: str) -> bool:
    bare = key.removeprefix("text.")
    return bare == "logit_scale" or (bare not in _UNUSED and not key.endswith("position_ids"))


def sort_by_tower(
    tensors: Mapping[str, Any], name: str, *, any_vocabulary: bool = False
) -> ClipTensors:
    """Sort tensors under CLIP's names by tower, and check both towers."""
    visual, text, unknown = {}, {}, []
    for key, value in tensors.items():
        bare = key.removeprefix("text.")
        if key.startswith("visual."):
            visual[key.removeprefix("visual.")] = value
        elif bare.startswith(_TEXT):
            text[bare] = value
        elif bare not in _UNUSED:
            unknown.append(key)
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
    if sizes["V"] != _VOCAB_SIZE and not (is_siglip or any_vocabulary):
        raise CheckpointError(
            f"{name}: token_embedding.weight: expected {_VOCAB_SIZE} rows, one for each token of "
            f"CLIP's tokenizer, got {sizes['V']}, another tokenizer's. Take a CLIP with the first "
            "one."
        )
    scale = tensors.get("logit_scale")
    return ClipTensors(
        visual=Tower(visual),
        text=Tower(text),
        logit_scale=None if scale is None else float(np.ravel(whole(scale))[0]),
    )


# --- names of joint image-text spaces ---

# OpenAI's own archives, by the SHA-256 that their addresses contain.
OPENAI_FILES = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B-32",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B-16",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L-14",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L-14-336",
}


def describe_space(source: str | Path, architecture: str = "ViT-B-16") -> str:
    """Name the space of CLIP weights, to tell two spaces apart.

    Example:
        >>> describe_space("openai", "ViT-L-14-336"), describe_space("laion2b_s34b_b88k")
        ('OpenAI CLIP ViT-L/14@336px', 'CLIP ViT-B-16 laion2b_s34b_b88k')
    """
    path = Path(source)
    if is_shipped(source):
        return _SHIPPED_SPACE
    if path.is_file():
        digest = sha256_of(path)
        name = OPENAI_FILES.get(digest)
        return _openai_name(name) if name else f"CLIP {_file_name(path, digest)}"
    if str(source) == "openai":
        return _openai_name(architecture.removesuffix("-quickgelu"))
    return f"CLIP {architecture} {source}"


def describe_rows(path: str | Path) -> str:
    """Name the space of embeddings in a file about which nothing else is known."""
    return f"rows of {_file_name(Path(path), sha256_of(Path(path)))}"


def _file_name(path: Path, digest: str) -> str:
    return f"{path.name} (SHA-256 {digest[:12]})"


def _openai_name(architecture: str) -> str:
    """OpenAI's spelling of open_clip's name."""
    match = re.fullmatch(r"(ViT-\w)-(\d+)(?:-(\d+))?", architecture)
    if match is None:
        return f"OpenAI CLIP {architecture}"
    size, patch, side = match.groups()
    return f"OpenAI CLIP {size}/{patch}" + (f"@{side}px" if side else "")
