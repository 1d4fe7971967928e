"""The parts of vision and text transformers, over any :class:`Operations`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from zsseg_rt.onnx.operations import Array, Linear, Norm, Operations, Value
from zsseg_rt.onnx.runs import resize_matrix

Turn = Callable[[Value], Value]


class Block(NamedTuple):
    """Weights of one residual block; a layer scale is part of ``out`` and ``proj``."""

    norm_1: Norm
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    norm_2: Norm
    fc: Linear
    proj: Linear
    num_heads: int
    activation: str

    @property
    def scale(self) -> float:
        """Attention's factor on its scores, one over the root of a head's width."""
        return float((len(self.query.weight) // self.num_heads) ** -0.5)


def residual_block(
    ops: Operations,
    x: Value,
    block: Block,
    mask: Value | None = None,
    prompts: Array | None = None,
    num_queries: int | None = None,
    turn: Turn | None = None,
) -> Value:
    """``x += out(attend(norm_1(x))); x += mlp(norm_2(x))`` of tokens [B, N, W].

    A mask [N, N + P] or [B, 1, 1, N + P] is added to the scores; all tokens see constant prompts
    [1, P, W], behind their own keys; queries and keys [B, heads, N, w] are turned.
    """
    norm, (q, k, v) = ops.fold_norm(block.norm_1, (block.query, block.key, block.value))
    normed = ops.layer_norm(x, norm)
    asking = normed
    if num_queries is not None:
        x, asking = (ops.slice(tokens, 1, 0, num_queries) for tokens in (x, normed))

    def project(linear: Linear) -> Value:
        own = split_heads(ops, ops.linear(normed, linear), block.num_heads)
        if prompts is None:
            return own
        constant = ops.linear(ops.layer_norm(prompts, norm), linear)
        return ops.concat((own, ops.repeat(split_heads(ops, constant, block.num_heads), x)), 2)

    with ops.at("q_proj"):
        queries = split_heads(ops, ops.linear(asking, q, block.scale), block.num_heads)
    with ops.at("k_proj"):
        keys = project(k)
    with ops.at("v_proj"):
        values = project(v)
    if turn is not None:
        queries, keys = turn(queries), turn(keys)
    attended = merge_heads(ops, attend(ops, queries, keys, values, mask))
    with ops.at("out_proj"):
        mixed = ops.linear(attended, block.out)
    return mlp(ops, ops.add(x, mixed), block)


def projections(
    ops: Operations, block: Block, x: Value, products: Sequence[str]
) -> dict[str, Value]:
    """The projections of tokens [B, N, W] that ``products`` such as ``"qk"`` name, and ``"v"``."""
    linears = {"q": block.query, "k": block.key, "v": block.value}
    normed = ops.layer_norm(x, block.norm_1)
    parts = {}
    for index, name in enumerate(sorted({*"".join(products), "v"}, key="qkv".index)):
        with ops.at(f"projections.{index}"):
            parts[name] = split_heads(ops, ops.linear(normed, linears[name]), block.num_heads)
    return parts


def mlp(ops: Operations, x: Value, block: Block) -> Value:
    """``x + proj(activation(fc(norm_2(x))))``."""
    with ops.at("mlp"):
        norm, (fc,) = ops.fold_norm(block.norm_2, (block.fc,))
        normed = ops.layer_norm(x, norm)
        with ops.at("c_fc"):
            hidden = ops.linear(normed, fc)
        hidden = activate(ops, hidden, block.activation)
        with ops.at("c_proj"):
            update = ops.linear(hidden, block.proj)
    return ops.add(x, update)


def activate(ops: Operations, x: Value, activation: str) -> Value:
    """``"quick_gelu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``."""
    if activation == "quick_gelu":
        return ops.mul(x, ops.sigmoid(ops.mul(x, np.float32(1.702))))
    return ops.relu(x) if activation == "relu" else ops.gelu(x, tanh=activation == "gelu_tanh")


def attend(
    ops: Operations, queries: Value, keys: Value, values: Value, mask: Value | None = None
) -> Value:
    """``softmax(q k^T + mask) v`` of [B, heads, N, w], which backends run as one kernel."""
    with ops.at("attention"):
        scores = ops.matmul(queries, ops.transpose(keys, (0, 1, 3, 2)))
        scores = scores if mask is None else ops.add(scores, mask)
        return ops.matmul(ops.softmax(scores), values)


def attend_to(
    ops: Operations,
    inputs: Sequence[Value],
    linears: Sequence[Linear | None],
    out: Linear,
    num_heads: int,
) -> Value:
    """Attention of three projected inputs [B, N, W]; queries may have been projected before."""
    scale, parts = (inputs[0].shape[2] // num_heads) ** -0.5, list[Value]()
    for value, linear in zip(inputs, linears, strict=True):
        factor = 1.0 if parts else scale
        part = value if linear is None else ops.linear(value, linear, factor)
        part = split_heads(ops, part, num_heads)
        parts.append(ops.mul(part, np.float32(factor)) if linear is None else part)
    return ops.linear(merge_heads(ops, attend(ops, *parts)), out)


def split_heads(ops: Operations, x: Value, num_heads: int) -> Value:
    """[B, N, W] to [B, num_heads, N, W / num_heads]."""
    batch, count, width = x.shape
    cut = ops.reshape(x, (batch, count, num_heads, width // num_heads))
    return ops.transpose(cut, (0, 2, 1, 3))


def merge_heads(ops: Operations, x: Value) -> Value:
    """[B, heads, N, w] to [B, N, heads * w]."""
    batch, heads, count, width = x.shape
    return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (batch, count, heads * width))


def group_norm(ops: Operations, x: Value, norm: Norm, num_groups: int) -> Value:
    """Normalise maps [B, C, h, w] over groups of channels, as PyTorch's GroupNorm."""
    # Only figures per channel are reshaped, never the maps: OpenVINO would bring the maps of its
    # convolutions into another order around an instance norm, a fifth of CAT-Seg's head.
    batch, channels = x.shape[:2]
    inside = channels // num_groups
    grouped, spread = (batch, num_groups, inside), (batch, channels, 1, 1)
    with ops.at("float32"):
        means = ops.mean(ops.reshape(ops.mean(x, 2, 3), grouped), 2)
        shift = ops.reshape(ops.sub(np.zeros((1, 1, inside), np.float32), means), spread)
    x = ops.add(x, shift)
    with ops.at("float32"):
        root = np.float32((x.shape[2] * x.shape[3]) ** -0.5)  # keeps sizes small before squaring
        sizes = ops.reshape(ops.mul(ops.norm(x, 2, 3), root), grouped)
        variance = ops.add(ops.mean(ops.mul(sizes, sizes), 2), np.float32(norm.eps))
        weight = np.asarray(norm.weight).reshape(1, num_groups, inside)
        scale = ops.reshape(ops.div(weight, ops.sqrt(variance)), spread)
    return ops.add(ops.mul(x, scale), np.asarray(norm.bias)[:, None, None])


def unit(ops: Operations, x: Value) -> Value:
    """Divide by the L2 norm over the last axis."""
    return ops.div(x, ops.norm(x, -1))


def read_norm(tensors: Mapping[str, Any], name: str, eps: float = 1e-5) -> Norm:
    """The norm called ``NAME.weight`` and ``NAME.bias``."""
    return Norm(tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)


def read_linear(tensors: Mapping[str, Any], name: str) -> Linear:
    """The projection called ``NAME.weight`` and ``NAME.bias``."""
    return Linear(tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def thirds(rows: Any) -> list[Any]:
    """Three equal parts of an array, or of a tensor."""
    count = len(rows) // 3
    return [rows[start : start + count] for start in (0, count, 2 * count)]


def read_block(
    tensors: Mapping[str, Any], name: str, num_heads: int, activation: str, eps: float = 1e-5
) -> Block:
    """A block with the keys of CLIP's checkpoints; q, k and v may be rows of ``in_proj``."""
    at = f"{name}.attn."
    if f"{at}in_proj_weight" in tensors:
        weights = thirds(tensors[f"{at}in_proj_weight"])
    else:
        weights = [tensors[f"{at}{part}_proj_weight"] for part in "qkv"]
    biases = thirds(tensors[f"{name}.attn.in_proj_bias"])
    query, key, value = map(Linear, weights, biases)
    return Block(
        norm_1=read_norm(tensors, f"{name}.ln_1", eps),
        query=query,
        key=key,
        value=value,
        out=read_linear(tensors, f"{name}.attn.out_proj"),
        norm_2=read_norm(tensors, f"{name}.ln_2", eps),
        fc=read_linear(tensors, f"{name}.mlp.c_fc"),
        proj=read_linear(tensors, f"{name}.mlp.c_proj"),
        num_heads=num_heads,
        activation=activation,
    )


def resize_grid(
    grid: Array,
    size_hw: tuple[int, int],
    mode: str = "bicubic",
    *,
    antialias: bool = False,
    beyond: float = 0.0,
) -> Array:
    """Resize [g, g, W] as torch's ``interpolate(..., align_corners=False)`` does, to float32.

    ``beyond`` 0.1 is torch's ``scale_factor=(size + 0.1) / g``, as SCLIP's code resizes.
    """
    table = grid.detach().cpu().float() if hasattr(grid, "detach") else grid  # torch's
    rule = {
        "mode": {"bilinear": "linear", "bicubic": "cubic"}[mode],
        "antialias": antialias,
        "cubic_coeff_a": -0.5 if antialias else -0.75,
        "exclude_outside": antialias,
    }
    resized = np.asarray(table, np.float64)
    for axis, size in enumerate(size_hw):
        old = grid.shape[axis]
        rows = resize_matrix(old, size, (size + beyond) / old, rule)
        resized = np.moveaxis(np.tensordot(rows, resized, (1, axis)), 0, axis)
    return resized.astype(np.float32)
