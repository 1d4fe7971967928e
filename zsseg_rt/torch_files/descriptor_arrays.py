"""Read official checkpoints of ZegCLIP and CLIP-RC without torch, or say why not."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from zsseg_rt.errors import CheckpointError
from zsseg_rt.torch_files.clip_arrays import image_shapes, read_floats
from zsseg_rt.torch_files.shapes import Array, Checked, Shapes, linear, norm, some

IMAGE_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
IMAGE_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)
"""Of red, green and blue in [0, 1], as both systems were trained."""

# What official checkpoints hold and inference never reads.
_UNREAD = re.compile(
    r"decode_head\.(.*\.(self_attn|norm1)\..*|loss_decode\..*|recovery_decoder\..*)"
)
_STACKS = {"zegclip": ("decoder_1",), "clip_rc": ("decoder_q", "decoder_v")}
_REMEDY = "Check that the checkpoint is complete and from this architecture."


@dataclass(frozen=True, kw_only=True)
class DescriptorTensors:
    """Weights of a ZegCLIP or CLIP-RC, float32, whose names and shapes fit together."""

    visual: Mapping[str, Array]  # Image tower with prompts, and CLIP-RC's region_level_bridge
    head: Mapping[str, Array]  # Weights below decode_head. that inference reads
    text: Mapping[str, Array]  # Text tower; empty without one


def read_descriptor(path: Path, architecture: str) -> DescriptorTensors:
    """Read an official checkpoint of ``"zegclip"`` or ``"clip_rc"``."""
    parts: dict[str, dict[str, Array]] = {"backbone": {}, "decode_head": {}, "text_encoder": {}}
    unknown = []
    stored = read_floats(path, lambda key: not _UNREAD.fullmatch(key))
    for key, value in stored.items():
        if _UNREAD.fullmatch(key):
            continue
        part, _, rest = key.partition(".")
        if part in parts:
            parts[part][rest] = value
        else:
            unknown.append(key)
    visual, head, text = parts.values()
    if unknown or not visual or not head:
        raise CheckpointError(
            f"{path.name}: expected the keys of {architecture}, 'backbone.conv1.weight' and so "
            f"on, got {some(unknown or [*visual, *head, *text])}. {_REMEDY}"
        )

    def checked(part: str) -> Checked:
        return Checked(
            tensors=parts[part],
            where=path.name,
            what=architecture,
            remedy=_REMEDY,
            prefix=f"{part}.",
        )

    tower = checked("backbone")
    shapes = image_shapes(tower)
    width, embed_dim = shapes["proj"]
    tower.check(shapes | _prompts(tower, width, cells=architecture == "clip_rc"))
    decode_head = checked("decode_head")
    decode_head.check(_head(decode_head, embed_dim, architecture))
    if text:
        words = checked("text_encoder")
        words.check(_text(words, embed_dim))
    return DescriptorTensors(visual=visual, head=head, text=text)


def _text(tower: Checked, embed_dim: int) -> Shapes:
    """CLIP's text tower, with any number of tokens."""
    rows, width = tower.shape("token_embedding.weight", 2)
    return {
        "token_embedding.weight": (rows, width),
        "positional_embedding": (tower.shape("positional_embedding", 2)[0], width),
        "text_projection": (width, embed_dim),
        **norm("ln_final", width),
        **tower.blocks(width),
    }


def _prompts(tower: Checked, width: int, *, cells: bool) -> Shapes:
    layers, count, _ = tower.shape("deep_prompt_embeddings", 3)
    shapes = {
        "prompt_embeddings": (1, count, width),
        "deep_prompt_embeddings": (layers, count, width),
        **linear("prompt_proj.", width, width),
        **norm("prompt_norm", width),
    }
    if cells:
        number = tower.shape("region_level_bridge", 2)[0]
        if not number or math.isqrt(number) ** 2 != number:
            raise CheckpointError(
                f"{tower.where}: backbone.region_level_bridge: expected one row per cell of a "
                f"square grid, got {number} rows. {_REMEDY}"
            )
        shapes["region_level_bridge"] = (number, width)
    return shapes


def _head(head: Checked, embed_dim: int, architecture: str) -> Shapes:
    width, inputs = head.shape("q_proj.weight", 2)
    text_only = architecture == "zegclip" and inputs == embed_dim
    shapes = linear("q_proj.", width, embed_dim if text_only else 2 * embed_dim)
    memory = embed_dim
    if architecture == "clip_rc":
        shapes |= linear("lateral_proj.", width, 3 * embed_dim)
        memory = width
    for stack in _STACKS[architecture]:
        hidden = head.shape(f"{stack}.layers.0.linear1.weight", 2)[0]
        for number in range(head.depth(f"{stack}.layers.")):
            layer = f"{stack}.layers.{number}."
            shapes |= linear(f"{layer}multihead_attn.q.", width, width)
            shapes |= linear(f"{layer}multihead_attn.k.", width, memory)
            shapes |= linear(f"{layer}multihead_attn.v.", width, memory)
            shapes |= linear(f"{layer}multihead_attn.proj.", width, width)
            shapes |= linear(f"{layer}linear1.", hidden, width)
            shapes |= linear(f"{layer}linear2.", width, hidden)
            shapes |= norm(f"{layer}norm2", width) | norm(f"{layer}norm3", width)
    return shapes
