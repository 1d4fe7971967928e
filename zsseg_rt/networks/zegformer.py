"""ZegFormer over any :class:`Operations`: segments of an image, and CLIP's view of regions.

Batch norms are folded into their convolutions. What follows from the queries alone, up to the
result of their first self-attention, becomes a constant of the graph.

Source:
    Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from zsseg_rt.networks.clip import ImageTower, Tensors, embed_patches, part_of, project, run_blocks
from zsseg_rt.networks.layers import (
    attend_to,
    group_norm,
    read_linear,
    read_norm,
    residual_block,
    thirds,
    unit,
)
from zsseg_rt.onnx.operations import Array, Linear, Operations, Value

# In 0..255, as the official configuration states them.
IMAGE_MEAN = (123.675, 116.28, 103.53)
IMAGE_STD = (58.395, 57.12, 57.375)
REGION_MEAN = (122.7709383, 116.7460125, 104.09373615)
REGION_STD = (68.5005327, 66.6321579, 70.3231630)

STRIDE = 4  # of the masks
_COARSEST = 32  # the backbone's last stride
GROUPS = 32  # of every norm in the pixel decoder
_EPS = 1e-5
_HEAD = "sem_seg_head.predictor."
CLIP = f"{_HEAD}clip_model."


@dataclass(frozen=True, kw_only=True)
class ZegFormerNetwork:
    """ZegFormer's weights, and what shapes do not tell."""

    tensors: Tensors  # With the official keys, float32
    num_heads: int = 8  # Heads of the query decoder
    clip_heads: int = 12  # Heads of CLIP's image tower
    activation: str = "quick_gelu"  # Of its MLPs

    @cached_property
    def clip(self) -> ImageTower:
        return ImageTower(
            tensors=part_of(self.tensors, f"{CLIP}visual."),
            num_heads=self.clip_heads,
            activation=self.activation,
        )

    @cached_property
    def predictor(self) -> Tensors:
        """The weights of the queries and of what is read from them."""
        return part_of(self.tensors, _HEAD)

    @property
    def region_side(self) -> int:
        """Side in pixels of the images that CLIP's image tower was trained on."""
        return self.clip.grid_side * self.clip.patch_size

    @property
    def num_queries(self) -> int:
        return len(self.predictor["query_embed.weight"])

    @property
    def embed_dim(self) -> int:
        return int(self.predictor["bg_feature"].shape[1])

    def count(self, prefix: str) -> int:
        """How many numbered parts there are under a prefix."""
        return len({k[len(prefix) :].split(".")[0] for k in self.tensors if k.startswith(prefix)})


def propose(ops: Operations, network: ZegFormerNetwork, image: Value) -> dict[str, Value]:
    """Segments of an image [1, 3, H, W]; text is not used.

    Returns:
        ``region_masks`` [1, Q, H / 4, W / 4], ``segment_embeds`` [1, Q, D], unit norm, and
        ``no_object`` [1, Q], the last class logit.
    """
    t, (height, width) = network.predictor, image.shape[2:]
    maps = backbone(ops, network, image)
    with ops.at("input_proj"):
        memory = ops.conv(maps[-1], read_linear(t, "input_proj"))
        cells = (height // _COARSEST) * (width // _COARSEST)
        memory = ops.reshape(memory, (1, memory.shape[1], cells))
        memory = ops.transpose(memory, (0, 2, 1))
    queries = _decode(ops, network, memory, (height // _COARSEST, width // _COARSEST))
    features = _pixel_decoder(ops, network, maps)
    with ops.at("mask_embed"):
        embeds, depth = queries, network.count(f"{_HEAD}mask_embed.layers.")
        for index in range(depth):
            embeds = ops.linear(embeds, read_linear(t, f"mask_embed.layers.{index}"))
            embeds = ops.relu(embeds) if index < depth - 1 else embeds
        grid_hw = (height // STRIDE, width // STRIDE)
        pixels = ops.reshape(features, (*features.shape[:2], math.prod(grid_hw)))
        masks = ops.reshape(ops.matmul(embeds, pixels), (1, network.num_queries, *grid_hw))
    with ops.at("projection_layer"):
        segments = unit(ops, ops.linear(queries, read_linear(t, "projection_layer")))
    with ops.at("no_object"):
        nothing = ops.linear(segments, Linear(np.exp(t["logit_scale"]) * t["bg_feature"]))
    return {
        "region_masks": masks,
        "segment_embeds": segments,
        "no_object": ops.reshape(nothing, (1, network.num_queries)),
    }


def backbone(ops: Operations, network: ZegFormerNetwork, image: Value) -> list[Value]:
    """A ResNet's map after each stage, at strides 4, 8, 16 and 32; strides are in 3x3 kernels."""
    tensors = part_of(network.tensors, "backbone.")
    with ops.at("backbone.stem"):
        x = ops.relu(ops.conv(image, _folded(tensors, "stem.conv1"), stride=2, pad=3))
        x = ops.max_pool(x, 3, stride=2, pad=1)
    maps = []
    for stage in range(2, 2 + len({key.split(".")[0] for key in tensors} - {"stem"})):
        for index in range(network.count(f"backbone.res{stage}.")):
            stride = 2 if stage > 2 and index == 0 else 1
            with ops.at(f"backbone.res{stage}.{index}"):
                x = _bottleneck(ops, tensors, f"res{stage}.{index}", x, stride)
        maps.append(x)
    return maps


def _bottleneck(ops: Operations, tensors: Tensors, name: str, x: Value, stride: int) -> Value:
    """1x1, 3x3 with the stride, 1x1; the shortcut is projected where channels change."""
    out = ops.relu(ops.conv(x, _folded(tensors, f"{name}.conv1")))
    out = ops.relu(ops.conv(out, _folded(tensors, f"{name}.conv2"), stride=stride, pad=1))
    out = ops.conv(out, _folded(tensors, f"{name}.conv3"))
    if f"{name}.shortcut.weight" in tensors:
        x = ops.conv(x, _folded(tensors, f"{name}.shortcut"), stride=stride)
    return ops.relu(ops.add(out, x))


def _folded(tensors: Tensors, name: str) -> Linear:
    """A convolution that scales and shifts as its frozen batch norm does."""
    weight, bias, mean, variance = (
        tensors[f"{name}.norm.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / np.sqrt(variance + np.float32(_EPS))
    kernel = tensors[f"{name}.weight"] * scale[:, None, None, None]
    return Linear(kernel, bias - mean * scale)


def _pixel_decoder(ops: Operations, network: ZegFormerNetwork, maps: list[Value]) -> Value:
    """Mask features [1, ., H / 4, W / 4] of the backbone's maps, finest first."""
    tensors, y = part_of(network.tensors, "sem_seg_head.pixel_decoder."), maps[-1]

    def normed(name: str, x: Value, pad: int) -> Value:
        with ops.at(f"pixel_decoder.{name}"):
            x = ops.conv(x, Linear(tensors[f"{name}.weight"]), pad=pad)
            return group_norm(ops, x, read_norm(tensors, f"{name}.norm"), GROUPS)

    for level in range(len(maps), 0, -1):
        if level < len(maps):
            y = ops.add(normed(f"adapter_{level}", maps[level - 1], 0), ops.double(y))
        y = ops.relu(normed(f"layer_{level}", y, 1))
    with ops.at("pixel_decoder.mask_features"):
        return ops.conv(y, read_linear(tensors, "mask_features"), pad=1)


def _decode(
    ops: Operations, network: ZegFormerNetwork, memory: Value, grid_hw: tuple[int, int]
) -> Value:
    """Queries [1, Q, W] after the last layer; they start at zero, told apart by positions."""
    tensors = part_of(network.predictor, "transformer.decoder.")
    positions = network.predictor["query_embed.weight"][None]
    keys = ops.add(memory, sine_positions(grid_hw, positions.shape[2])[None])
    x: Value = np.zeros_like(positions)
    for index in range(network.count(f"{_HEAD}transformer.decoder.layers.")):
        name = f"layers.{index}"

        def attended(part: str, *inputs: Value, name: str = name) -> Value:
            weights = thirds(tensors[f"{name}.{part}.in_proj_weight"])
            biases = thirds(tensors[f"{name}.{part}.in_proj_bias"])
            out = read_linear(tensors, f"{name}.{part}.out_proj")
            with ops.at(part):
                linears = list(map(Linear, weights, biases))
                return attend_to(ops, inputs, linears, out, network.num_heads)

        with ops.at(f"decoder.{name}"):
            placed = ops.add(x, positions)
            x = ops.add(x, attended("self_attn", placed, placed, x))
            x = ops.layer_norm(x, read_norm(tensors, f"{name}.norm1"))
            x = ops.add(x, attended("multihead_attn", ops.add(x, positions), keys, memory))
            x = ops.layer_norm(x, read_norm(tensors, f"{name}.norm2"))
            hidden = ops.relu(ops.linear(x, read_linear(tensors, f"{name}.linear1")))
            x = ops.add(x, ops.linear(hidden, read_linear(tensors, f"{name}.linear2")))
            x = ops.layer_norm(x, read_norm(tensors, f"{name}.norm3"))
    with ops.at("decoder.norm"):
        return ops.layer_norm(x, read_norm(tensors, "norm"))


def sine_positions(grid_hw: tuple[int, int], width: int) -> Array:
    """DETR's sine positions of a grid, float32 [gh * gw, width]; rows in the first channels."""
    half, axes = width // 2, []
    wavelengths = 10000.0 ** (2 * (np.arange(half) // 2) / half)
    for size in grid_hw:
        angles = (np.arange(1, size + 1) / (size + 1e-6) * (2 * math.pi))[:, None] / wavelengths
        pairs = np.stack([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], 2)
        axes.append(pairs.reshape(size, half))
    rows, columns = axes
    grid = (*grid_hw, half)
    both = np.broadcast_to(rows[:, None], grid), np.broadcast_to(columns[None], grid)
    return np.concatenate(both, 2).reshape(-1, width).astype(np.float32)


def embed_regions(ops: Operations, network: ZegFormerNetwork, crops: Value) -> Value:
    """CLIP's embeddings [R, D], unit norm, of crops [R, 3, s, s] normalised for CLIP."""
    tower = network.clip
    tokens = run_blocks(ops, tower.blocks[:-1], embed_patches(ops, tower, crops))[-1]
    with ops.at(f"blocks.{len(tower.blocks) - 1}"):
        first = residual_block(ops, tokens, tower.blocks[-1], num_queries=1)
    with ops.at("proj"):
        embeds = project(ops, tower, first)
        return ops.reshape(embeds, (crops.shape[0], embeds.shape[2]))
