"""Read CLIP's weights from a file without torch, or the small ones that ship, or say why not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from zsseg_rt.common.arrays import is_half
from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files.clip_layouts import Settings, as_clip, settings_beside
from zsseg_rt.torch_files.shapes import Array, Checked, Shapes, divisor, linear, norm, some
from zsseg_rt.torch_files.shipped_clip import is_shipped, read_arrays
from zsseg_rt.torch_files.weights import FileRows, read_safetensors_arrays, read_weights, unwrap

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
_TABLE = "token_embedding.weight"
_TINYCLIP = {(256, 10), (512, 12), (640, 12)}  # width and blocks of the image tower
_OPENAI = {(768, 12), (1024, 24)}
_ANOTHER = "It is another model's file, or damaged: get a CLIP ViT's file from open_clip."


@dataclass(frozen=True, kw_only=True)
class ClipTensors:
    """Weights of both towers, float32, whose names and shapes fit together."""

    visual: Mapping[str, Array]  # Image tower: conv1.weight, transformer.resblocks.0...
    text: Mapping[str, Array]  # Text tower: token_embedding.weight, transformer.resblocks.0...
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
        return sum(part.size for tower in (self.visual, self.text) for part in tower.values())

    def known_activation(self) -> str | None:
        """What the MLPs use; None if nothing says so.

        Files beside the weights say it, or the sizes: TinyCLIP's have ``"gelu"``. OpenAI's sizes
        with weights that float16 holds exactly, as OpenAI published them, have ``"quick_gelu"``.
        """
        if self.settings.activation is not None or self.kind == "clip":
            found = self.settings.activation
        else:
            found = "gelu" if self.kind == "pe" else "gelu_tanh"
        width, depth = tower_sizes(self.visual)
        if found is None and (width, depth) in _TINYCLIP and self.embed_dim == 512:
            found = "gelu"
        if found is None and (self.words or (width, depth) in _OPENAI):
            found = "quick_gelu" if is_half(self.visual["conv1.weight"]) else None
        return found


def read_clip(source: str | Path) -> ClipTensors:
    """Read the weights of an image-text model with a ViT: CLIP, PE-Core or SigLIP."""
    path = Path(source)
    if is_shipped(source):
        found = read_arrays()
        visual, text = _towers(found.state_dict, "demo")
        words, prompts = found.words, found.prompt_words
        return ClipTensors(visual=visual, text=text, words=words, prompt_words=prompts)
    tensors = as_clip(read_floats(path, _is_used), path.name)
    visual, text = _towers(tensors, path.name)
    sizes = {"vision": tower_sizes(visual), "text": tower_sizes(text)}
    scale = tensors.get("logit_scale")
    return ClipTensors(
        visual=visual,
        text=text,
        logit_scale=None if scale is None else float(np.ravel(scale)[0]),
        settings=settings_beside(path, sizes),
    )


def tower_sizes(tensors: Mapping[str, Array]) -> tuple[int, int]:
    """Width and blocks of a tower under CLIP's names."""
    depth = len({key.split(".")[2] for key in tensors if key.startswith("transformer.")})
    return int(tensors["positional_embedding"].shape[-1]), depth


def check_heads(name: str, given: int | None, width: int) -> int:
    """Attention heads of a tower: as given, or one per 64 channels."""
    return divisor(name, max(1, width // 64) if given is None else given, width)


def read_floats(path: Path, is_used: Callable[[str], bool]) -> dict[str, Array]:
    """The weights that a file holds, as float32; those that are not used may be of any type."""
    if path.name.endswith(".index.json") or re.search(r"-\d{5}-of-\d{5}\.", path.name):
        raise CheckpointError(
            f"{path.name}: expected the whole weights, got a part of them or their list. Save them "
            "as one file: model.save_pretrained(FOLDER, max_shard_size='20GB')."
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a checkpoint file, found nothing. Check the path.")
    is_plain = path.suffix == ".safetensors"
    read = read_safetensors_arrays(path, _TABLE) if is_plain else read_weights(path)
    stored = unwrap(read, path.name)
    wrong = [
        f"{k} ({kind})" for k, (_, kind) in stored.items() if is_used(k) and kind not in _FLOATS
    ]
    if wrong:
        raise CheckpointError(
            f"{path.name}: expected weights of floating point, got {some(wrong)}. "
            "Save them as float32."
        )
    return {k: _float32(*v) for k, v in stored.items() if v[1] in _FLOATS}


def _is_used(key: str) -> bool:
    return key.removeprefix("text.") not in _UNUSED and not key.endswith("position_ids")


def _float32(array: Array, kind: str) -> Array:
    if isinstance(array, FileRows):
        return array
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
    if unknown or not (visual or text):
        raise CheckpointError(
            f"{name}: expected names of a CLIP ViT such as 'visual.conv1.weight', got "
            f"{some(unknown or list(tensors))}. {_ANOTHER}"
        )
    if not visual or not text:
        one, other = ("text", "image") if text else ("image", "text")
        raise CheckpointError(
            f"{name}: expected a text tower beside the image tower, got the {one} tower alone, "
            f"without an {other} tower. Get the file with both towers."
        )
    pruned = [k for t in (visual, text) for k, v in t.items() if _is_pruned(k, v)]
    if pruned:
        raise CheckpointError(
            f"{name}: expected attention as wide as its tower, got {some(pruned)}, as in "
            "auto-pruned TinyCLIPs. Take one of one width: ViT-8M-16, 39M-16, 40M-32 or 61M-32."
        )
    image = Checked(tensors=visual, where=f"{name}: visual", what=_WHAT, remedy=_ANOTHER)
    image.check(image_shapes(image))
    words = Checked(tensors=text, where=f"{name}: text", what=_WHAT, remedy=_ANOTHER)
    has_proj = "proj" in visual
    joint = visual["proj"].shape[1] if has_proj else visual["conv1.weight"].shape[0]
    words.check(_text_shapes(words, joint, is_siglip=not has_proj))
    return visual, text


def _is_pruned(key: str, value: Array) -> bool:
    return key.endswith("in_proj_weight") and (
        value.ndim == 2 and value.shape[0] != 3 * value.shape[1]
    )


def image_shapes(tower: Checked) -> Shapes:
    """Shapes of CLIP and PE-Core; of SigLIP, without a class token and a projection."""
    pooled = "attn_pool.probe" in tower.tensors
    classed = "class_embedding" in tower.tensors or not pooled
    width, _, patch, _ = tower.shape("conv1.weight", 4)
    rows = tower.shape("positional_embedding", 2)[0]
    side = math.isqrt(max(rows - classed, 0))
    if side < 1 or classed + side**2 != rows:
        raise CheckpointError(
            f"{tower.where}: positional_embedding: expected {'one row and ' * classed}those of a "
            f"square grid, got {rows} rows. {_ANOTHER}"
        )
    shapes = {
        "conv1.weight": (width, 3, patch, patch),
        "positional_embedding": (rows, width),
        **norm("ln_post", width),
        **tower.blocks(width),
    }
    if classed:
        proj = {"proj": (width, tower.shape("proj", 2)[1])}
        shapes |= {"class_embedding": (width,), **proj, **norm("ln_pre", width)}
    else:
        shapes["conv1.bias"] = (width,)
    if pooled:
        hidden = tower.shape("attn_pool.mlp.c_fc.weight", 2)[0]
        shapes |= {"attn_pool.probe": (1, 1, width), **norm("attn_pool.layernorm", width)}
        shapes |= linear("attn_pool.attn.in_proj_", 3 * width, width)
        shapes |= linear("attn_pool.attn.out_proj.", width, width)
        shapes |= linear("attn_pool.mlp.c_fc.", hidden, width)
        shapes |= linear("attn_pool.mlp.c_proj.", width, hidden)
    return shapes


def _text_shapes(tower: Checked, embed_dim: int, *, is_siglip: bool) -> Shapes:
    """``embed_dim`` is the image tower's; SigLIP's projection has a bias."""
    length, width = tower.shape("positional_embedding", 2)
    rows = tower.shape("token_embedding.weight", 2)[0]
    if rows != _VOCAB_SIZE and not is_siglip:
        raise CheckpointError(
            f"{tower.where}: token_embedding.weight: expected {_VOCAB_SIZE} rows, one for each "
            f"token of CLIP's tokenizer, got {rows}, another tokenizer's. Take a CLIP with the "
            "first one."
        )
    proj: Shapes = {"text_projection": (width, embed_dim)}
    return {
        "token_embedding.weight": (rows, width),
        "positional_embedding": (length, width),
        **(linear("text_projection.", embed_dim, width) if is_siglip else proj),
        **norm("ln_final", width),
        **tower.blocks(width),
    }
