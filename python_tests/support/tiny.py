"""Tiny random models in the official layout, built in milliseconds.

Values follow the rule of the reference vectors: they depend on a key's name only, so a test can
rebuild any tensor from its key and shape.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.golden_encoders import drawn
from zsseg_rt.models import from_official
from zsseg_rt.torch_files.official import CELLS, CROSS_LAYERS, PROMPTS
from zsseg_rt.torch_files.shapes import IMAGE_TOWER, TEXT_TOWER, expand, under

Gains = Iterable[tuple[str, float]]


def random_normal(name: str, shape: Iterable[int], salt: str = "") -> np.ndarray:
    """Float64 normal deviates that depend on ``salt + name`` and the shape."""
    return drawn(salt + name, tuple(shape))


def rule_tensor(key: str, shape: Iterable[int], salt: str = "", gains: Gains = ()) -> Tensor:
    """The reference rule's float32 value of one ``state_dict`` tensor."""
    shape = tuple(shape)
    if "empty_weight" in key:
        values = np.ones(shape)
        values[-1] = 0.1
        return torch.from_numpy(np.asarray(values, np.float32))
    values = random_normal(key, shape, salt)
    if len(shape) <= 1:
        values = 0.1 * values
        if key.endswith(".weight"):
            values += 1
    else:
        values /= np.sqrt(np.prod(shape[1:]))
    for substring, factor in gains:
        if substring in key:
            values *= factor
    return torch.from_numpy(np.asarray(values, np.float32))


def rule_state_dict(
    shapes: Mapping[str, Iterable[int]], salt: str = "", gains: Gains = ()
) -> dict[str, Tensor]:
    """A ``state_dict`` by the reference rule."""
    return {key: rule_tensor(key, shape, salt, gains) for key, shape in shapes.items()}


def text_embeds(num_classes: int, embed_dim: int, salt: str = "") -> Tensor:
    """Random class embeddings: unit rows, rounded to float16, as float32 ``[C, D]``."""
    rows = random_normal("input.text", (num_classes, embed_dim), salt)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(rows.astype(np.float16)).float()


def image(*shape: int, salt: str = "") -> Tensor:
    """A random normalised image ``[B, 3, H, W]``."""
    return torch.from_numpy(random_normal("input.image", shape, salt).astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """Sizes of a tiny ZegCLIP or CLIP-RC; the defaults are those of the small reference vectors."""

    width: int = 64
    num_heads: int = 4
    num_layers: int = 4
    patch_size: int = 16
    grid_side: int = 4
    embed_dim: int = 32
    num_prompts: int = 3
    num_cells: int = 4  # CLIP-RC's
    decoder_layers: int = 3
    decoder_heads: int = 4
    num_classes: int = 7
    text_vocab: int = 64
    text_length: int = 16
    text_heads: int = 4
    text_layers: int = 2
    seen: tuple[int, ...] = (0, 1, 3, 4, 6)

    @property
    def image_size(self) -> int:
        """Side of the native input, in pixels."""
        return self.grid_side * self.patch_size


Shapes = dict[str, tuple[int, ...]]


_LAYERS = (
    CROSS_LAYERS
    + "layers.#.self_attn.in_proj_ 3Q Q\nlayers.#.self_attn.out_proj. Q Q\nlayers.#.norm1. Q\n"
)
_RECOVERY = "linear_q_in. Q Q\nlinear_k_in. Q Q\nlinear_q_out. 2Q Q\nlinear_k_out. Q Q\n"
_RECOVERY += "".join(under(f"decouple_{side}.", _LAYERS.replace("layers.", "")) for side in "qv")
_HEADS = {
    "zegclip": "loss_decode.criterion.empty_weight E\n" + under("decoder_1.", _LAYERS),
    "clip_rc": "lateral_proj. Q 3D\n"
    + under("decoder_q.", _LAYERS)
    + under("decoder_v.", _LAYERS)
    + under("recovery_decoder.", _RECOVERY),
}


def expanded(table: str, sizes: TinySizes) -> Shapes:
    """Every key of a table with its shape."""
    width, dim = sizes.width, sizes.embed_dim
    letters = {
        "W": width, "M": 4 * width, "P": sizes.patch_size, "R": 1 + sizes.grid_side**2, "D": dim,
        "X": sizes.num_prompts, "Y": sizes.num_layers - 1, "C": sizes.num_cells, "T": dim,
        "F": 4 * dim, "V": sizes.text_vocab, "L": sizes.text_length, "Q": dim, "K": dim,
        "H": 4 * dim, "E": len(sizes.seen) + 1,
    }  # fmt: skip

    def depth(prefix: str) -> int:
        if "decode_head" in prefix:
            return 1 if "recovery" in prefix else sizes.decoder_layers
        return sizes.text_layers if prefix.startswith(("text", "transformer")) else sizes.num_layers

    return expand(table, letters, depth)


def _state_dict(
    architecture: str, sizes: TinySizes | None = None, salt: str = ""
) -> dict[str, Tensor]:
    """A tiny official checkpoint's ``state_dict``, lively enough for its masks to differ."""
    sizes, is_zegclip = sizes or TinySizes(), architecture == "zegclip"
    table = under("backbone.", IMAGE_TOWER + PROMPTS + ("" if is_zegclip else CELLS))
    table += under("decode_head.", "q_proj. Q 2D\n" + _HEADS[architecture])
    table += under("text_encoder.", TEXT_TOWER)
    last_norm = f"decoder_q.layers.{sizes.decoder_layers - 1}.norm3."
    gain = ("multihead_attn.k.weight", sizes.embed_dim**0.5)
    if not is_zegclip:
        gain = (last_norm, 0.1 * (512 / sizes.embed_dim) ** 0.5)
    return rule_state_dict(expanded(table, sizes), salt, [gain])


zegclip_state_dict, clip_rc_state_dict = (partial(_state_dict, name) for name in _HEADS)


def zegclip_config(sizes: TinySizes | None = None) -> dict[str, object]:
    """The arguments of ``from_official`` that shapes do not tell."""
    sizes = sizes or TinySizes()
    return {
        "num_heads": sizes.num_heads,
        "decoder_heads": sizes.decoder_heads,
        "text_heads": sizes.text_heads,
        "seen_classes": sizes.seen,
    }


def _model(
    architecture: str, sizes: TinySizes | None = None, salt: str = "", **config: object
) -> Any:
    """A tiny model with text tower, in evaluation mode."""
    weights = _state_dict(architecture, sizes, salt)
    return from_official(architecture, weights, **zegclip_config(sizes) | config)


zegclip_model, clip_rc_model = (partial(_model, name) for name in _HEADS)


def clip_state_dict(sizes: TinySizes | None = None, salt: str = "") -> dict[str, Tensor]:
    """A tiny CLIP ViT in OpenAI's layout."""
    sizes = sizes or TinySizes()
    return rule_state_dict(expanded(under("visual.", IMAGE_TOWER) + TEXT_TOWER, sizes), salt)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts hold equal tensors under the same names."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
