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


Shapes = dict[str, tuple[int, ...]]


def shapes_at(prefix: str, rows: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Rows below a prefix; a name with a star stands for ``weight``, and for a ``bias`` as long."""
    shapes: Shapes = {}
    for name, shape in rows.items():
        key = prefix + name
        if name.endswith("*"):
            shapes |= {f"{key[:-1]}weight": shape, f"{key[:-1]}bias": shape[:1]}
        else:
            shapes[key] = shape
    return shapes


def tower_shapes(prefix: str, width: int, num_layers: int) -> Shapes:
    """CLIP's blocks."""
    rows: Shapes = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,), "attn.out_proj.*": (width, width),
        "mlp.c_fc.*": (4 * width, width), "mlp.c_proj.*": (width, 4 * width),
        "ln_1.*": (width,), "ln_2.*": (width,),
    }  # fmt: skip
    blocks = (f"{prefix}transformer.resblocks.{index}." for index in range(num_layers))
    return {key: shape for block in blocks for key, shape in shapes_at(block, rows).items()}


def visual_shapes(prefix: str, sizes: TinySizes) -> Shapes:
    """Every key of a CLIP's image tower with its shape."""
    width, patch = sizes.width, sizes.patch_size
    rows = {
        "class_embedding": (width,), "positional_embedding": (1 + sizes.grid_side**2, width),
        "proj": (width, sizes.embed_dim), "conv1.weight": (width, 3, patch, patch),
        "ln_pre.*": (width,), "ln_post.*": (width,),
    }  # fmt: skip
    return shapes_at(prefix, rows) | tower_shapes(prefix, width, sizes.num_layers)


def _text_shapes(prefix: str, sizes: TinySizes) -> Shapes:
    width = sizes.embed_dim
    rows = {
        "positional_embedding": (sizes.text_length, width), "text_projection": (width, width),
        "token_embedding.weight": (sizes.text_vocab, width), "ln_final.*": (width,),
    }  # fmt: skip
    return shapes_at(prefix, rows) | tower_shapes(prefix, width, sizes.text_layers)


def _layers(stem: str, count: int, dim: int) -> Shapes:
    """Decoder layers, with the tensors that are never read."""
    rows: Shapes = {f"multihead_attn.{name}.*": (dim, dim) for name in ("q", "k", "v", "proj")}
    rows |= {
        "linear1.*": (4 * dim, dim), "linear2.*": (dim, 4 * dim),
        "self_attn.out_proj.*": (dim, dim), "self_attn.in_proj_bias": (3 * dim,),
        "self_attn.in_proj_weight": (3 * dim, dim),
        "norm1.*": (dim,), "norm2.*": (dim,), "norm3.*": (dim,),
    }  # fmt: skip
    return {k: v for n in range(count) for k, v in shapes_at(f"{stem}{n}.", rows).items()}


def _decoder_shapes(sizes: TinySizes) -> Shapes:
    dim, head = sizes.embed_dim, "decode_head."
    empty = {"loss_decode.criterion.empty_weight": (len(sizes.seen) + 1,)}
    own = shapes_at(head, {"q_proj.*": (dim, 2 * dim), **empty})
    return own | _layers(f"{head}decoder_1.layers.", sizes.decoder_layers, dim)


def _cell_decoder_shapes(sizes: TinySizes) -> Shapes:
    dim, count, head = sizes.embed_dim, sizes.decoder_layers, "decode_head."
    shapes = shapes_at(head, {"q_proj.*": (dim, 2 * dim), "lateral_proj.*": (dim, 3 * dim)})
    names = {"linear_q_in": dim, "linear_k_in": dim, "linear_q_out": 2 * dim, "linear_k_out": dim}
    recovery = {f"{name}.*": (rows, dim) for name, rows in names.items()}
    shapes |= shapes_at(f"{head}recovery_decoder.", recovery)
    for side in ("q", "v"):
        shapes |= _layers(f"{head}decoder_{side}.layers.", count, dim)
        shapes |= _layers(f"{head}recovery_decoder.decouple_{side}.", 1, dim)
    return shapes


def _prompted_shapes(sizes: TinySizes) -> Shapes:
    width, count = sizes.width, sizes.num_prompts
    rows = {
        "prompt_embeddings": (1, count, width), "prompt_proj.*": (width, width),
        "deep_prompt_embeddings": (sizes.num_layers - 1, count, width), "prompt_norm.*": (width,),
    }  # fmt: skip
    return visual_shapes("backbone.", sizes) | shapes_at("backbone.", rows)


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


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts hold equal tensors under the same names."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
