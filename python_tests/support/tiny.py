"""Tiny random models in the official layout, built in milliseconds.

Values follow the rule of the reference vectors: they depend on a key's name only, so a test can
rebuild any tensor from its key and shape.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from zsseg_rt.models import from_official
from zsseg_rt.models.descriptor.model import ClipRC, ZegCLIP

Gains = Iterable[tuple[str, float]]


def random_normal(name: str, shape: Iterable[int], salt: str = "") -> np.ndarray:
    """Float64 normal deviates that depend on ``salt + name`` and the shape."""
    seed = zlib.crc32((salt + name).encode()) & 0xFFFFFFFF
    return np.random.RandomState(seed).standard_normal(tuple(shape))


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
    seen: tuple[int, ...] = field(default=(0, 1, 3, 4, 6))

    @property
    def image_size(self) -> int:
        """Side of the native input, in pixels."""
        return self.grid_side * self.patch_size


def _tower_shapes(prefix: str, width: int, num_layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(num_layers):
        block = f"{prefix}transformer.resblocks.{index}."
        shapes |= {
            block + "attn.in_proj_weight": (3 * width, width),
            block + "attn.in_proj_bias": (3 * width,),
            block + "attn.out_proj.weight": (width, width),
            block + "attn.out_proj.bias": (width,),
            block + "mlp.c_fc.weight": (4 * width, width),
            block + "mlp.c_fc.bias": (4 * width,),
            block + "mlp.c_proj.weight": (width, 4 * width),
            block + "mlp.c_proj.bias": (width,),
        }
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.{part}": (width,) for part in ("weight", "bias")}
    return shapes


def visual_shapes(prefix: str, sizes: TinySizes) -> dict[str, tuple[int, ...]]:
    """Every key of a CLIP's image tower with its shape."""
    width = sizes.width
    shapes = {
        prefix + "class_embedding": (width,),
        prefix + "positional_embedding": (1 + sizes.grid_side**2, width),
        prefix + "proj": (width, sizes.embed_dim),
        prefix + "conv1.weight": (width, 3, sizes.patch_size, sizes.patch_size),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"{prefix}{norm}.{part}": (width,) for part in ("weight", "bias")}
    return shapes | _tower_shapes(prefix, width, sizes.num_layers)


def _text_shapes(prefix: str, sizes: TinySizes) -> dict[str, tuple[int, ...]]:
    width = sizes.embed_dim
    return {
        prefix + "positional_embedding": (sizes.text_length, width),
        prefix + "text_projection": (width, sizes.embed_dim),
        prefix + "token_embedding.weight": (sizes.text_vocab, width),
        prefix + "ln_final.weight": (width,),
        prefix + "ln_final.bias": (width,),
    } | _tower_shapes(prefix, width, sizes.text_layers)


def _linear_shapes(
    prefix: str, linears: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
    return shapes


def _layer_shapes(layer: str, dim: int) -> dict[str, tuple[int, ...]]:
    """One decoder layer, with the tensors that are never read."""
    linears = {f"multihead_attn.{name}": (dim, dim) for name in ("q", "k", "v", "proj")}
    linears |= {"linear1": (4 * dim, dim), "linear2": (dim, 4 * dim)}
    linears |= {"self_attn.out_proj": (dim, dim)}
    shapes = _linear_shapes(layer, linears) | {
        layer + "self_attn.in_proj_weight": (3 * dim, dim),
        layer + "self_attn.in_proj_bias": (3 * dim,),
    }
    for norm in ("norm1", "norm2", "norm3"):
        shapes |= {f"{layer}{norm}.{part}": (dim,) for part in ("weight", "bias")}
    return shapes


def _decoder_shapes(sizes: TinySizes) -> dict[str, tuple[int, ...]]:
    dim = sizes.embed_dim
    shapes: dict[str, tuple[int, ...]] = {
        "decode_head.q_proj.weight": (dim, 2 * dim),
        "decode_head.q_proj.bias": (dim,),
        "decode_head.loss_decode.criterion.empty_weight": (len(sizes.seen) + 1,),
    }
    for index in range(sizes.decoder_layers):
        shapes |= _layer_shapes(f"decode_head.decoder_1.layers.{index}.", dim)
    return shapes


def _cell_decoder_shapes(sizes: TinySizes) -> dict[str, tuple[int, ...]]:
    dim, head = sizes.embed_dim, "decode_head."
    shapes = _linear_shapes(head, {"q_proj": (dim, 2 * dim), "lateral_proj": (dim, 3 * dim)})
    for index in range(sizes.decoder_layers):
        shapes |= _layer_shapes(f"{head}decoder_q.layers.{index}.", dim)
        shapes |= _layer_shapes(f"{head}decoder_v.layers.{index}.", dim)
    recovery = head + "recovery_decoder."
    for side in ("q", "v"):
        shapes |= _layer_shapes(f"{recovery}decouple_{side}.0.", dim)
    names = {"linear_q_in": dim, "linear_k_in": dim, "linear_q_out": 2 * dim, "linear_k_out": dim}
    return shapes | _linear_shapes(recovery, {name: (rows, dim) for name, rows in names.items()})


def _prompted_shapes(sizes: TinySizes) -> dict[str, tuple[int, ...]]:
    width, count = sizes.width, sizes.num_prompts
    return visual_shapes("backbone.", sizes) | {
        "backbone.prompt_embeddings": (1, count, width),
        "backbone.deep_prompt_embeddings": (sizes.num_layers - 1, count, width),
        "backbone.prompt_proj.weight": (width, width),
        "backbone.prompt_proj.bias": (width,),
        "backbone.prompt_norm.weight": (width,),
        "backbone.prompt_norm.bias": (width,),
    }


def zegclip_shapes(sizes: TinySizes | None = None) -> dict[str, tuple[int, ...]]:
    """Every key of an official checkpoint with its shape."""
    sizes = sizes or TinySizes()
    text = _text_shapes("text_encoder.", sizes)
    return _prompted_shapes(sizes) | _decoder_shapes(sizes) | text


def clip_rc_shapes(sizes: TinySizes | None = None) -> dict[str, tuple[int, ...]]:
    """Every key of an official CLIP-RC checkpoint with its shape."""
    sizes = sizes or TinySizes()
    bridge = {"backbone.region_level_bridge": (sizes.num_cells, sizes.width)}
    text = _text_shapes("text_encoder.", sizes)
    return _prompted_shapes(sizes) | bridge | _cell_decoder_shapes(sizes) | text


def zegclip_state_dict(sizes: TinySizes | None = None, salt: str = "") -> dict[str, Tensor]:
    """A tiny official checkpoint's ``state_dict``, lively enough for its masks to differ."""
    sizes = sizes or TinySizes()
    gains = [("multihead_attn.k.weight", sizes.embed_dim**0.5)]
    return rule_state_dict(zegclip_shapes(sizes), salt, gains)


def zegclip_config(sizes: TinySizes | None = None) -> dict[str, object]:
    """The arguments of ``from_official`` that shapes do not tell."""
    sizes = sizes or TinySizes()
    return {
        "num_heads": sizes.num_heads,
        "decoder_heads": sizes.decoder_heads,
        "text_heads": sizes.text_heads,
        "seen_classes": sizes.seen,
    }


def zegclip_model(sizes: TinySizes | None = None, salt: str = "", **config: object) -> ZegCLIP:
    """A tiny ZegCLIP with text tower, in evaluation mode."""
    arguments = zegclip_config(sizes) | config
    model = from_official("zegclip", zegclip_state_dict(sizes, salt), **arguments)
    assert isinstance(model, ZegCLIP)
    return model


def clip_rc_state_dict(sizes: TinySizes | None = None, salt: str = "") -> dict[str, Tensor]:
    """A tiny official CLIP-RC checkpoint's ``state_dict``."""
    sizes = sizes or TinySizes()
    last_norm = f"decoder_q.layers.{sizes.decoder_layers - 1}.norm3."
    gains = [(last_norm, 0.1 * (512 / sizes.embed_dim) ** 0.5)]
    return rule_state_dict(clip_rc_shapes(sizes), salt, gains)


def clip_rc_model(sizes: TinySizes | None = None, salt: str = "", **config: object) -> ClipRC:
    """A tiny CLIP-RC with text tower, in evaluation mode."""
    arguments = zegclip_config(sizes) | config
    model = from_official("clip_rc", clip_rc_state_dict(sizes, salt), **arguments)
    assert isinstance(model, ClipRC)
    return model


def clip_state_dict(sizes: TinySizes | None = None, salt: str = "") -> dict[str, Tensor]:
    """A tiny CLIP ViT in OpenAI's layout."""
    sizes = sizes or TinySizes()
    shapes = visual_shapes("visual.", sizes) | _text_shapes("", sizes)
    return rule_state_dict(shapes, salt)
