"""CAT-Seg over any :class:`Operations`: a class-free image encoder, and the head for the classes.

All folds are exact: queries and keys are sums of a part of the class and a part of the image or the
name; the first convolution of a decoder stage is a sum, too; an upsampling and the convolution
behind it are one transposed convolution and a map that its bias leaves; padding tokens are
constants, counted by ``padding``. Tokens stay in the order of the windows between attentions.

Source:
    Cho et al., "CAT-Seg: Cost Aggregation for Open-Vocabulary Semantic Segmentation", CVPR 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from zsseg_rt.networks.clip import (
    ImageTower,
    Tensors,
    embed_patches,
    part_of,
    patches_of,
    projection,
    run_blocks,
)
from zsseg_rt.networks.heads import own_values
from zsseg_rt.networks.layers import activate, attend, group_norm, read_linear, read_norm, unit
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.onnx.operations import Array, Linear, Norm, Operations, Shape, Value

TEXT_SPACE = "CAT-Seg ViT-B/16 (its own text tower)"
TEMPLATES = ("A photo of a {} in the scene",)
NUM_LAYERS = 2
GROUP = 16  # channels that the decoder normalises together
_VALUE_SCALE = 1 / 256  # keeps sums over classes within float16; a power of two

Values = Mapping[str, Value]


def window_order(grid: int, window: int, shift: int) -> Array:
    """Tokens of a square grid, window by window, after a cyclic shift towards the origin."""
    places = np.roll(np.arange(grid * grid).reshape(grid, grid), (-shift, -shift), (0, 1))
    cut = places.reshape(grid // window, window, grid // window, window)
    return cut.transpose(0, 2, 1, 3).reshape(-1)


def shift_mask(grid: int, window: int, shift: int) -> Array:
    """The mask added to attention in shifted windows, float32 [windows, window^2, window^2]."""
    sides = np.arange(grid)
    region = (sides >= grid - window).astype(int) + (sides >= grid - shift)
    labels = (3 * region[:, None] + region).reshape(-1)[window_order(grid, window, 0)]
    labels = labels.reshape(-1, window * window)
    return np.where(labels[:, :, None] != labels[:, None], np.float32(-100), np.float32(0))


@dataclass(frozen=True, kw_only=True)
class CatSegNetwork:
    """CAT-Seg's weights, and what shapes do not tell."""

    # With the keys of CatSeg, float32
    tensors: Tensors
    image_heads: int = 12  # Heads of the image tower
    num_heads: int = 4  # Heads of the head
    window: int = 12  # Side of an attention window, in patches
    taps: tuple[int, int] = (3, 7)  # Blocks of the image tower whose outputs guide the decoder
    view: int = 384  # Side of the image in pixels
    activation: str = "quick_gelu"  # Of the image tower's MLPs

    @cached_property
    def tower(self) -> ImageTower:
        return ImageTower(
            tensors=part_of(self.tensors, "image_encoder."),
            num_heads=self.image_heads,
            activation=self.activation,
        )

    @cached_property
    def head(self) -> Tensors:
        return part_of(self.tensors, "aggregator.")

    @property
    def grid(self) -> int:
        return self.view // self.tower.patch_size

    @property
    def hidden(self) -> int:
        """Channels of a class's map."""
        return len(self.head["conv1.weight"])

    @property
    def shifts(self) -> tuple[int, int]:
        """How far a layer's two blocks shift their windows."""
        return 0, self.window // 2

    def shapes(self) -> dict[str, Shape]:
        """Inputs of all graphs by name."""
        grid, hidden, heads = self.grid, self.hidden, self.num_heads
        cells, width = grid * grid, hidden // heads
        embed_dim = self.tower.tensors["proj"].shape[1]
        near, far = (len(self.head[f"decoder{n}.conv.double_conv.0.weight"]) for n in (1, 2))
        sums = {"products": (cells, heads, width, width), "totals": (cells, heads, width, 1)}
        return {
            "image": (1, 3, self.view, self.view),
            "patch_embeds": (1, cells, embed_dim),
            "spatial": (4 * NUM_LAYERS, cells, hidden),
            "near_map": (1, near, 2 * grid, 2 * grid),
            "far_map": (1, far, 4 * grid, 4 * grid),
            "text_embeds": ("classes", embed_dim),
            "class_halves": ("classes", 2 * NUM_LAYERS * hidden),
            "tokens": ("classes", cells, hidden),
            "padding": (1,),
            **sums,
            **{f"first_{name}": shape for name, shape in sums.items()},
        }

    def vocabulary_weights(self) -> dict[str, Array]:
        """The weights of the vocabulary's own terms, by name."""
        names = [
            f"layers.{index}.attention.attention.{x}" for index in range(NUM_LAYERS) for x in "qk"
        ]
        parts = [read_linear(self.head, name) for name in names]
        guidance = read_linear(self.head, "text_guidance_projection.0")
        return {
            "text_guidance.weight": guidance.weight,
            "text_guidance.bias": _bias(guidance),
            "class_halves.weight": np.concatenate([p.weight[:, self.hidden :] for p in parts]),
            "class_halves.bias": np.concatenate([_bias(part) for part in parts]),
        }


def class_halves(network: CatSegNetwork, text_embeds: Array) -> Array:
    """The share of names in queries and keys of both layers, [C, 4 h], of unit rows [C, D]."""
    w = network.vocabulary_weights()
    named = text_embeds @ w["text_guidance.weight"].T + w["text_guidance.bias"]
    named = np.maximum(named, np.float32(0))
    return np.asarray(named @ w["class_halves.weight"].T + w["class_halves.bias"])


def encode_view(ops: Operations, network: CatSegNetwork, image: Value) -> dict[str, Value]:
    """All that the head takes of an image [1, 3, v, v], whatever the classes.

    Returns:
        ``patch_embeds`` [1, N, D], unit norm; ``spatial`` [8, N, h], for both layers and both
        blocks what the image adds to queries and keys, in the order of the block's windows;
        ``near_map`` [1, ., 2g, 2g] and ``far_map`` [1, ., 4g, 4g], what the image and biases add
        in the decoder.
    """
    tower = network.tower
    outputs = run_blocks(ops, tower.blocks[:-1], embed_patches(ops, tower, image))
    with ops.at("last_block"):
        first = ops.slice(outputs[-1], 1, 0, 1)
        patches = own_values(ops, patches_of(ops, outputs[-1]), tower.blocks[-1], first)
    features = ops.mark("features", projection(ops, tower)(patches))
    return {
        "patch_embeds": unit(ops, features),
        "spatial": _spatial(ops, network, features),
        "near_map": _fine(ops, network, outputs[network.taps[0]], 1),
        "far_map": _fine(ops, network, outputs[network.taps[1]], 2),
    }


def _spatial(ops: Operations, network: CatSegNetwork, features: Value) -> Value:
    """The image's share in queries and keys of the window blocks, [8, N, h]."""
    head, hidden, cells = network.head, network.hidden, network.grid**2
    with ops.at("guidance_projection"):
        maps = _as_maps(ops, features, network.grid)
        near = ops.relu(ops.conv(maps, read_linear(head, "guidance_projection.0"), pad=1))
        near = ops.transpose(ops.reshape(near, (near.shape[1], cells)), (1, 0))
    orders = [window_order(network.grid, network.window, shift) for shift in network.shifts]
    ordered = [ops.gather(near, order) for order in orders]
    scale = (hidden // network.num_heads) ** -0.5
    parts = []
    for index in range(NUM_LAYERS):
        swin = f"layers.{index}.swin_block."
        norm = read_norm(head, f"{swin}guidance_norm")
        for block, rows in enumerate(ordered, 1):
            with ops.at(f"{swin}block_{block}"):
                guidance = ops.layer_norm(rows, norm)
                for name, factor in (("q", scale), ("k", 1.0)):
                    weight, bias = read_linear(head, f"{swin}block_{block}.attn.{name}")
                    with ops.at(name):
                        half = ops.linear(guidance, Linear(weight[:, hidden:], bias), factor)
                    parts.append(ops.reshape(half, (1, cells, hidden)))
    return ops.concat(parts, 0)


def _fine(ops: Operations, network: CatSegNetwork, tokens: Value, stage: int) -> Value:
    """The share of biases and of a tap [1, 1 + N, W] of the image tower in a decoder stage."""
    head, sides = network.head, stage * 2 * network.grid
    lift = read_linear(network.tensors, f"upsample{stage}")
    with ops.at(f"decoder{stage}.guidance"):
        maps = _as_maps(ops, patches_of(ops, tokens), network.grid)
        maps = ops.conv_transpose(maps, lift, stride=2 * stage)
        project = read_linear(head, f"decoder_guidance_projection.{stage - 1}.0")
        maps = ops.relu(ops.conv(maps, project, pad=1))
        kernel, bias = (
            head[f"decoder{stage}.conv.double_conv.0.weight"],
            head[f"decoder{stage}.up.bias"],
        )
        flat = np.broadcast_to(bias[:, None, None], (1, len(bias), sides, sides))
        constant = Arrays().conv(flat, Linear(kernel[:, : len(bias)]), pad=1)
        own = ops.conv(maps, Linear(np.ascontiguousarray(kernel[:, len(bias) :])), pad=1)
        return ops.add(own, constant)


def head(ops: Operations, network: CatSegNetwork, values: Values) -> dict[str, Value]:
    """Logits [1, C, 4g, 4g] from an image's parts and the vocabulary's.

    ``class_halves`` [C, 4 h]: what a name adds to queries and keys of both layers; -1e4 for keys
    makes a class that counts for no other. ``padding`` [1]: missing classes.
    """
    part = _Head(ops, network, values)
    x = part.begin()
    for layer in range(NUM_LAYERS):
        x = part.refine(x, layer)
        x = part.meet(x, layer, *part.sums(x, layer))
    return {"mask_logits": part.decode(x)}


def head_begin(ops: Operations, network: CatSegNetwork, values: Values) -> dict[str, Value]:
    """Up to where classes meet for the first time; sums go on from those of earlier parts."""
    part = _Head(ops, network, values)
    x = part.refine(part.begin(), 0)
    return {"tokens": x, **part.add_sums(x, 0)}


def head_middle(ops: Operations, network: CatSegNetwork, values: Values) -> dict[str, Value]:
    """From the first meeting, whose sums over all classes are ``first_*``, to the second."""
    part = _Head(ops, network, values)
    x = part.meet(values["tokens"], 0, values["first_products"], values["first_totals"])
    x = part.refine(x, 1)
    return {"tokens_out": x, **part.add_sums(x, 1)}


def head_end(ops: Operations, network: CatSegNetwork, values: Values) -> dict[str, Value]:
    """From the second meeting, of sums over all classes, to logits."""
    part = _Head(ops, network, values)
    x = part.meet(values["tokens"], 1, values["products"], values["totals"])
    return {"mask_logits": part.decode(x)}


def _encoder(ops: Operations, network: CatSegNetwork, values: Values) -> dict[str, Value]:
    return encode_view(ops, network, values["image"])


_Part = Callable[[Operations, CatSegNetwork, Values], dict[str, Value]]

GRAPHS: Mapping[str, tuple[_Part, str]] = {
    "image_encoder": (_encoder, "image"),
    "head": (head, "patch_embeds spatial near_map far_map text_embeds class_halves padding"),
    "head_1": (head_begin, "patch_embeds spatial text_embeds class_halves products totals"),
    "head_2": (
        head_middle,
        "tokens first_products first_totals spatial class_halves padding products totals",
    ),
    "head_3": (head_end, "tokens products totals near_map far_map class_halves padding"),
}
"""The function of each graph, and its inputs; the head whole, and cut into three where classes meet
for vocabularies in several parts."""


class _Head:
    """The head's steps; tokens [C, N, h] are those of some classes."""

    def __init__(self, ops: Operations, network: CatSegNetwork, values: Values) -> None:
        self._ops, self._network, self._values = ops, network, values
        self._tensors, self._hidden, self._grid = network.head, network.hidden, network.grid
        plain = np.arange(self._grid**2)
        orders = [window_order(self._grid, network.window, shift) for shift in network.shifts]
        orders = [plain, *orders * NUM_LAYERS, plain]
        self._moves = [now.argsort()[then] for now, then in pairwise(orders)]

    def begin(self) -> Value:
        """Correlations as tokens, row by row."""
        ops, grid = self._ops, self._grid
        patches, text = self._values["patch_embeds"], self._values["text_embeds"]
        with ops.at("correlation"):
            cells, width = patches.shape[1:]
            columns = ops.transpose(ops.reshape(patches, (cells, width)), (1, 0))
            maps = ops.reshape(ops.matmul(text, columns), (text.shape[0], 1, grid, grid))
        with ops.at("conv1"):
            maps = ops.conv(maps, read_linear(self._tensors, "conv1"), pad=3)
            maps = ops.reshape(maps, (text.shape[0], self._hidden, cells))
            return ops.transpose(maps, (0, 2, 1))

    def refine(self, x: Value, layer: int) -> Value:
        """Each class's tokens by themselves; they stay in the order of the layer's last windows."""
        for block, shift in enumerate(self._network.shifts):
            index = 2 * layer + block
            with self._ops.at(f"layers.{layer}.block_{block + 1}"):
                x = self._ops.gather(x, self._moves[index], 1)
                x = self._window_block(x, index, shift)
        return x

    def _window_block(self, x: Value, index: int, shift: int) -> Value:
        ops, name = self._ops, f"layers.{index // 2}.swin_block.block_{index % 2 + 1}."
        num_heads, window, hidden = self._network.num_heads, self._network.window, self._hidden
        y = ops.layer_norm(x, self._norm(f"{name}norm1"))
        parts: list[Value] = []
        for place, letter in enumerate("qkv"):
            weight, bias = read_linear(self._tensors, f"{name}attn.{letter}")
            scale = (hidden // num_heads) ** -0.5 if letter == "q" else 1.0
            with ops.at(letter):
                own = Linear(weight[:, :hidden], bias if letter == "v" else None)
                part = ops.linear(y, own, scale)
                if letter != "v":
                    row = 2 * index + place
                    part = ops.add(part, ops.slice(self._values["spatial"], 0, row, row + 1))
                parts.append(self._split(part))
        mask = None
        if shift:
            mask = shift_mask(self._grid, window, shift).repeat(num_heads, 0)[None]
        mixed = self._merge(attend(ops, parts[0], parts[1], parts[2], mask), x.shape)
        with ops.at("proj"):
            x = ops.add(x, ops.linear(mixed, read_linear(self._tensors, f"{name}attn.proj")))
        return ops.add(
            x, self._mlp(x, f"{name}norm2", (f"{name}mlp.fc1", f"{name}mlp.fc2"), "gelu")
        )

    def _split(self, x: Value) -> Value:
        """[C, N, h] to [C, windows * heads, window^2, h / heads]."""
        ops, heads, inside = self._ops, self._network.num_heads, self._network.window**2
        windows, width = x.shape[1] // inside, self._hidden // heads
        x = ops.reshape(x, (x.shape[0], windows, inside, heads, width))
        x = ops.transpose(x, (0, 1, 3, 2, 4))
        return ops.reshape(x, (x.shape[0], windows * heads, inside, width))

    def _merge(self, x: Value, shape: Shape) -> Value:
        ops, heads = self._ops, self._network.num_heads
        _, both, inside, width = x.shape
        x = ops.reshape(x, (shape[0], both // heads, heads, inside, width))
        return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4)), shape)

    def sums(self, x: Value, layer: int) -> tuple[Value, Value]:
        """Sums over classes: keys times values [N, heads, d, d], and keys [N, heads, d, 1]."""
        ops, name = self._ops, f"layers.{layer}.attention."
        with ops.at(f"layers.{layer}.sums"):
            y = ops.layer_norm(x, self._norm(f"{name}norm1"))
            keys = self._positive(y, layer, "k")
            values = ops.linear(y, read_linear(self._tensors, f"{name}attention.v"), _VALUE_SCALE)
            values = ops.transpose(self._heads(values), (1, 2, 0, 3))
            products = ops.matmul(ops.transpose(keys, (1, 2, 3, 0)), values)
            return products, ops.reshape(ops.sum(keys, 0), (*products.shape[:3], 1))

    def add_sums(self, x: Value, layer: int) -> dict[str, Value]:
        """The sums with those of earlier parts."""
        sums = zip(("products", "totals"), self.sums(x, layer), strict=True)
        return {f"{name}_out": self._ops.add(self._values[name], own) for name, own in sums}

    def meet(self, x: Value, layer: int, products: Value, totals: Value) -> Value:
        """``products`` and ``totals`` are sums over all classes; padding tokens are added."""
        ops, name = self._ops, f"layers.{layer}.attention."
        with ops.at(f"layers.{layer}.attention_of_classes"):
            y = ops.layer_norm(x, self._norm(f"{name}norm1"))
            queries = ops.transpose(self._positive(y, layer, "q"), (1, 2, 0, 3))
            padding = self._values["padding"]
            of_products, of_totals = self._padding_sums(layer)
            products = ops.add(products, ops.mul(padding, of_products))
            totals = ops.add(totals, ops.mul(padding, of_totals))
            mixed = ops.div(ops.matmul(queries, products), np.float32(_VALUE_SCALE))
            mixed = ops.div(mixed, ops.add(ops.matmul(queries, totals), np.float32(1e-6)))
            mixed = ops.reshape(ops.transpose(mixed, (2, 0, 1, 3)), x.shape)
            refined = ops.add(x, mixed)
            hidden = self._mlp(refined, f"{name}norm2", (f"{name}MLP.0", f"{name}MLP.2"), "relu")
            return ops.add(ops.add(x, refined), hidden)  # the input counts twice, as officially

    def _positive(self, y: Value, layer: int, letter: str) -> Value:
        """Queries or keys of the attention between classes, [C, N, heads, d]."""
        ops, hidden = self._ops, self._hidden
        weight = self._tensors[f"layers.{layer}.attention.attention.{letter}.weight"]
        begin = (2 * layer + "qk".index(letter)) * hidden
        halves = ops.slice(self._values["class_halves"], 1, begin, begin + hidden)
        halves = ops.reshape(halves, (y.shape[0], 1, hidden))
        x = ops.add(ops.linear(y, Linear(weight[:, :hidden])), halves)
        return self._heads(ops.add(ops.elu(x), np.float32(1)))

    def _heads(self, x: Value) -> Value:
        heads = self._network.num_heads
        return self._ops.reshape(x, (*x.shape[:2], heads, self._hidden // heads))

    def _padding_sums(self, layer: int) -> tuple[Array, Array]:
        """Those of one padding token, [heads, d, d] and [heads, d, 1]."""
        ops, name, heads = Arrays(), f"layers.{layer}.attention.", self._network.num_heads
        y = ops.layer_norm(self._tensors[f"{name}padding_tokens"][0], self._norm(f"{name}norm1"))
        guided = ops.concat((y, self._tensors[f"{name}padding_guidance"][0]), 1)
        keys = ops.linear(guided, read_linear(self._tensors, f"{name}attention.k"))
        keys = (ops.elu(keys) + np.float32(1)).reshape(heads, -1, 1)
        values = ops.linear(y, read_linear(self._tensors, f"{name}attention.v"))
        return keys * values.reshape(heads, 1, -1) * np.float32(_VALUE_SCALE), keys

    def _mlp(self, x: Value, norm: str, linears: tuple[str, str], activation: str) -> Value:
        ops, (first, second) = self._ops, (read_linear(self._tensors, n) for n in linears)
        with ops.at("mlp"):
            hidden = ops.linear(ops.layer_norm(x, self._norm(norm)), first)
            return ops.linear(activate(ops, hidden, activation), second)

    def _norm(self, name: str) -> Norm:
        return read_norm(self._tensors, name)

    def decode(self, x: Value) -> Value:
        """From tokens to logits."""
        ops, grid = self._ops, self._grid
        x = ops.gather(x, self._moves[-1], 1)
        maps = _as_maps(ops, x, grid)
        for stage, name in ((1, "near_map"), (2, "far_map")):
            with ops.at(f"decoder{stage}"):
                maps = self._up(maps, f"decoder{stage}.", self._values[name])
        with ops.at("head"):
            logits = ops.conv(maps, read_linear(self._tensors, "head"), pad=1)
            return ops.reshape(logits, (1, x.shape[0], 4 * grid, 4 * grid))

    def _up(self, maps: Value, name: str, added: Value) -> Value:
        """A stage; the upsampling and the class's part of the convolution behind it are one."""
        ops, tensors, conv = self._ops, self._tensors, f"{name}conv.double_conv."
        lift, first = tensors[f"{name}up.weight"], tensors[f"{conv}0.weight"]
        own = np.ascontiguousarray(first[:, : lift.shape[1]])
        kernel = Arrays().conv(lift, Linear(own), pad=2)
        maps = ops.add(ops.conv_transpose(maps, Linear(kernel), stride=2, pad=1), added)
        for place in (1, 4):
            norm = self._norm(f"{conv}{place}")
            groups = len(first) // GROUP
            maps = ops.relu(group_norm(ops, maps, norm, groups))
            if place == 1:
                maps = ops.conv(maps, Linear(tensors[f"{conv}3.weight"]), pad=1)
        return maps


def _as_maps(ops: Operations, tokens: Value, grid: int) -> Value:
    """[C, N, h] to [C, h, g, g]."""
    batch, _, width = tokens.shape
    return ops.reshape(ops.transpose(tokens, (0, 2, 1)), (batch, width, grid, grid))


def _bias(linear: Linear) -> Array:
    assert linear.bias is not None
    return linear.bias
