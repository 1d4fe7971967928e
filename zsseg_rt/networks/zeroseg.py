"""ZeroSeg's student over any :class:`Operations`: MAE's encoder, then GroupViT's two groupings.

Weights have the keys of :class:`zsseg_rt.models.zeroseg.model.ZeroSeg`. For one input size
positions are constants.

Source:
    Chen et al., "Exploring Open-Vocabulary Semantic Segmentation from CLIP Vision Encoder
    Distillation Only" (ZeroSeg), ICCV 2023; He et al., "Masked Autoencoders Are Scalable Vision
    Learners", CVPR 2022; Xu et al., "GroupViT", CVPR 2022.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zsseg_rt.networks.clip import Tensors, part_of, read_blocks, run_blocks
from zsseg_rt.networks.layers import activate, attend_to, read_linear, read_norm, resize_grid
from zsseg_rt.onnx.operations import Array, Linear, Operations, Value

_EPS = 1e-6  # of every layer norm
_TIMM_KEYS = {
    "norm1": "ln_1", "norm2": "ln_2", "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Student:
    """A ZeroSeg student."""

    tensors: Tensors  # Float32, with the keys of the torch model
    num_heads: int  # Attention heads of the encoder
    head_heads: int  # Attention heads of the segmentation head

    @property
    def patch_size(self) -> int:
        return int(self.tensors["encoder.patch_embed.proj.weight"].shape[-1])

    def positions(self, grid_hw: tuple[int, int]) -> Array:
        """Positions of class token and patches, bicubic, float32 [1 + N, W]."""
        rows: Array = self.tensors["encoder.pos_embed"][0]
        side = math.isqrt(len(rows) - 1)
        if grid_hw == (side, side):
            return rows
        resized = resize_grid(rows[1:].reshape(side, side, -1), grid_hw)
        return np.concatenate([rows[:1], resized.reshape(-1, rows.shape[1])])


def segments(ops: Operations, student: Student, image: Value) -> tuple[Value, Value, Value]:
    """The segments of an image [1, 3, H, W] of a fixed size.

    Returns:
        ``segment_embeds`` [1, G, D] and ``image_embed`` [1, D], not normalised; ``group_map``
        [1, G, gh, gw], each segment's share of every patch.
    """
    tensors = student.tensors
    size = student.patch_size
    grid_hw = (image.shape[2] // size, image.shape[3] // size)
    x = _encode(ops, student, image, grid_hw)
    x, tokens, first = _grouping_stage(ops, student, 0, x, None)
    groups, _, second = _grouping_stage(ops, student, 1, x, tokens)
    with ops.at("stages.2"):
        hidden = _run_blocks(ops, tensors, "seg.stages.2.blocks.", student.head_heads, groups)
        hidden = ops.layer_norm(hidden, read_norm(tensors, "seg.norm", _EPS))
    with ops.at("proj"):
        embeds = _project(ops, tensors, hidden)
        whole = _project(ops, tensors, ops.mean(hidden, 1))
    count, width = groups.shape[1], embeds.shape[2]
    group_map = ops.transpose(ops.matmul(first, second), (0, 2, 1))
    return (
        embeds,
        ops.reshape(whole, (whole.shape[0], width)),
        ops.reshape(group_map, (group_map.shape[0], count, *grid_hw)),
    )


def _encode(ops: Operations, student: Student, image: Value, grid_hw: tuple[int, int]) -> Value:
    """Patches after the encoder's last norm, [1, N, W]."""
    tensors, positions = student.tensors, student.positions(grid_hw)
    width = positions.shape[1]
    with ops.at("patch_embed"):
        patches = read_linear(tensors, "encoder.patch_embed.proj")
        x = ops.conv(image, patches, stride=student.patch_size)
        x = ops.transpose(ops.reshape(x, (image.shape[0], width, len(positions) - 1)), (0, 2, 1))
        x = ops.add(x, positions[1:])
    token = ops.repeat(tensors["encoder.cls_token"] + positions[:1], image)
    x = ops.concat((token, x), 1)
    x = _run_blocks(ops, tensors, "encoder.blocks.", student.num_heads, x)
    x = ops.slice(x, 1, 1, x.shape[1])
    with ops.at("norm"):
        return ops.layer_norm(x, read_norm(tensors, "encoder.norm", _EPS))


def _grouping_stage(
    ops: Operations, student: Student, stage: int, x: Value, before: Value
) -> tuple[Value, Value, Value]:
    """New segments, the group tokens, and each group's share of every input, [1, L, S]."""
    tensors, name = student.tensors, f"seg.stages.{stage}."
    group_token = tensors[f"{name}group_token"]
    with ops.at(f"stages.{stage}"):
        tokens = ops.repeat(group_token, x)
        if before is not None:
            projected = ops.layer_norm(before, read_norm(tensors, f"{name}group_projector.0", _EPS))
            projected = _token_mlp(ops, tensors, f"{name}group_projector.1", projected)
            tokens = ops.add(projected, group_token)
        joint = _run_blocks(
            ops, tensors, f"{name}blocks.", student.head_heads, ops.concat((x, tokens), 1)
        )
        count, total = x.shape[1], joint.shape[1]
        x, tokens = ops.slice(joint, 1, 0, count), ops.slice(joint, 1, count, total)
        with ops.at("grouping"):
            groups, shares = _group(ops, student, f"{name}grouping.", x, tokens)
    return groups, tokens, shares


def _group(
    ops: Operations, student: Student, name: str, x: Value, tokens: Value
) -> tuple[Value, Value]:
    """GroupViT's grouping block: each input goes to one group, whose values are averaged."""
    tensors = student.tensors

    def norm(part: str, value: Value) -> Value:
        return ops.layer_norm(value, read_norm(tensors, name + part, _EPS))

    tokens = _token_mlp(ops, tensors, f"{name}mlp_inter", norm("norm_tokens", tokens))
    groups, x = norm("norm_post_tokens", tokens), norm("norm_x", x)
    with ops.at("pre_assign_attn"):
        groups = _attend_to(ops, student, f"{name}pre_assign_attn.", groups, x)
    with ops.at("assign"):
        gathered, shares = _assign(ops, student, f"{name}assign.", groups, x)
    new = ops.add(gathered, groups)
    update = _mlp(ops, tensors, f"{name}mlp_channels", norm("norm_new_x", new))
    return ops.add(new, update), shares


def _attend_to(ops: Operations, student: Student, name: str, query: Value, memory: Value) -> Value:
    """Group tokens attend to the inputs; the norm comes at the end, not before."""
    tensors, parts = student.tensors, ("q_proj", "k_proj", "v_proj", "proj")
    *linears, out = (read_linear(tensors, f"{name}attn.{part}") for part in parts)
    mixed = attend_to(ops, (query, memory, memory), linears, out, student.head_heads)
    query = ops.add(query, mixed)
    normed = ops.layer_norm(query, read_norm(tensors, f"{name}norm2", _EPS))
    query = ops.add(query, _mlp(ops, tensors, f"{name}mlp", normed))
    return ops.layer_norm(query, read_norm(tensors, f"{name}norm_post", _EPS))


def _assign(
    ops: Operations, student: Student, name: str, groups: Value, x: Value
) -> tuple[Value, Value]:
    """The projected mean of each group's inputs [1, S, C], and soft shares [1, L, S]."""
    tensors, count = student.tensors, groups.shape[1]
    queries = ops.linear(groups, read_linear(tensors, f"{name}q_proj"))
    keys = ops.linear(x, read_linear(tensors, f"{name}k_proj"))
    values = ops.linear(x, read_linear(tensors, f"{name}v_proj"))
    scores = ops.matmul(keys, ops.transpose(queries, (0, 2, 1)))
    scores = ops.mul(scores, np.float32(groups.shape[2] ** -0.5))
    one_hot = ops.equal(ops.arg_max(scores), np.arange(count)[None, None])
    hard = ops.transpose(ops.cast(one_hot, "float32"), (0, 2, 1))
    sizes = ops.add(ops.sum(hard, -1), np.float32(1.0))
    gathered = ops.matmul(ops.div(hard, sizes), values)
    return ops.linear(gathered, read_linear(tensors, f"{name}proj")), ops.softmax(scores)


def _run_blocks(ops: Operations, tensors: Tensors, name: str, heads: int, x: Value) -> Value:
    """Blocks with timm's keys."""
    renamed = {}
    for key, value in part_of(tensors, name).items():
        for timms, clips in _TIMM_KEYS.items():
            key = key.replace(timms, clips)
        renamed[f"transformer.resblocks.{key}"] = value
    return run_blocks(ops, read_blocks(renamed, heads, "gelu", _EPS), x)[-1]


def _mlp(ops: Operations, tensors: Tensors, name: str, x: Value) -> Value:
    linears: Sequence[Linear] = [read_linear(tensors, f"{name}.{part}") for part in ("fc1", "fc2")]
    return ops.linear(activate(ops, ops.linear(x, linears[0]), "gelu"), linears[1])


def _token_mlp(ops: Operations, tensors: Tensors, name: str, x: Value) -> Value:
    """An MLP over the token axis, [B, S, C] to [B, S', C]."""
    return ops.transpose(_mlp(ops, tensors, name, ops.transpose(x, (0, 2, 1))), (0, 2, 1))


def _project(ops: Operations, tensors: Tensors, tokens: Value) -> Value:
    """Tokens [B, N, C] in the teacher's space, [B, N, D]."""
    hidden = activate(ops, ops.linear(tokens, read_linear(tensors, "seg.proj.0")), "gelu")
    return ops.linear(hidden, read_linear(tensors, "seg.proj.2"))
