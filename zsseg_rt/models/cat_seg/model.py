"""CAT-Seg: CLIP's patches compared with every class, and the correlations aggregated.

Source:
    Cho et al., "CAT-Seg: Cost Aggregation for Open-Vocabulary Semantic Segmentation", CVPR 2024.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from zsseg_rt import ops
from zsseg_rt.common.checks import check_range, check_size
from zsseg_rt.errors import ArgumentError, ShapeError
from zsseg_rt.models.base import (
    LabelRule,
    PixelModel,
    SegmentationOutput,
    SlideSettings,
    check_rgb,
    resize_rgb,
    slide_scores,
)
from zsseg_rt.models.clip.towers import (
    Attention,
    ImageEncoder,
    ImageEncoderConfig,
    ResidualBlock,
    TextEncoder,
    TextEncoderConfig,
    Transformer,
    attend,
)
from zsseg_rt.models.clip.weights import (
    ClipSource,
    image_config,
    image_encoder_config,
    load_into,
    start_from_clip,
    text_config,
    text_encoder_config,
)
from zsseg_rt.models.functional import check_text_embeds
from zsseg_rt.networks.cat_seg import NUM_LAYERS, TEXT_SPACE, shift_mask, window_order
from zsseg_rt.torch_files.checkpoints import check_float32
from zsseg_rt.torch_files.clip_arrays import CLIP_MEAN, CLIP_STD, Tower
from zsseg_rt.torch_files.official import check_cat_seg, check_masks, split_weights
from zsseg_rt.torch_files.shapes import Checked, divisor

DROPPED_LOGIT = -100.0
"""The logit of classes that the head did not look at."""


@dataclass(frozen=True, kw_only=True)
class AggregatorConfig:
    """Sizes of the head; the defaults are CAT-Seg B's."""

    embed_dim: int = 512  # Width D of the joint space
    width: int = 768  # Trunk width W
    hidden: int = 128  # Channels of a class's map
    num_heads: int = 4  # Heads, in space and between classes
    window: int = 12  # Side of an attention window, in patches
    text_guidance: int = 128  # Width of the classes' guidance
    guidance: int = 128  # Width of the image's guidance
    decoder: tuple[int, int] = (64, 32)  # Channels of the two decoder stages
    up: tuple[int, int] = (256, 128)  # Channels of the two upsampled taps
    decoder_guidance: tuple[int, int] = (32, 16)  # Channels of these beside the decoder's
    padding: int = 256  # Classes that shorter vocabularies are padded to

    def __post_init__(self) -> None:
        check_range(self, *(vars(self).keys() - {"padding"}), least=1)
        check_range(self, "padding")
        if self.hidden % self.num_heads:
            raise ArgumentError(
                f"hidden: expected a multiple of num_heads = {self.num_heads}, got {self.hidden}. "
                "Officially they are 128 and 4."
            )
        if any(size % 16 for size in self.decoder):
            raise ArgumentError(
                f"decoder: expected multiples of 16, the channels that are normalised together, "
                f"got {self.decoder}. Officially they are 64 and 32."
            )
        inputs = (self.hidden, self.decoder[0])
        if any(map(operator.ge, self.decoder_guidance, inputs)):
            raise ArgumentError(
                f"decoder_guidance: expected less than what the stages take, {inputs}, got "
                f"{self.decoder_guidance}. Officially they are 32 and 16."
            )


class Guidance(NamedTuple):
    """Inputs of the head besides correlations: ``[B, ., g, g]`` and its multiples."""

    near: Tensor  # Of the patches' embeddings
    fine: tuple[Tensor, Tensor]  # Of the taps, at two and at four times the grid


def sum_linear(linear: nn.Module, own: Tensor, shared: Tensor) -> Tensor:
    """A layer of ``[own, shared]``, where ``shared`` is broadcast: its part is computed once."""
    layer, width = cast(nn.Linear, linear), own.shape[-1]
    rest = F.linear(shared, layer.weight[:, width:], layer.bias)
    return F.linear(own, layer.weight[:, :width]) + rest


class SwinBlock(nn.Module):
    """Attention within windows, steered by the image, then an MLP; ``[B, C, N, h]`` to the same."""

    def __init__(self, config: AggregatorConfig, shift: int) -> None:
        super().__init__()
        hidden, guided = config.hidden, config.hidden + config.guidance
        self.window, self.shift, self.num_heads = config.window, shift, config.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attn = nn.ModuleDict(
            {name: nn.Linear(guided if name in "qk" else hidden, hidden) for name in "qkv"}
            | {"proj": nn.Linear(hidden, hidden)}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(hidden, 4 * hidden), "fc2": nn.Linear(4 * hidden, hidden)}
        )

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """``guidance`` is ``[B, 1, N, G]``."""
        grid = int(x.shape[2] ** 0.5)
        order = torch.from_numpy(window_order(grid, self.window, self.shift)).to(x.device)
        y, guidance = self.norm1(x)[:, :, order], guidance[:, :, order]
        guided = (sum_linear(self.attn[name], y, guidance) for name in "qk")
        q, k, v = (part.unflatten(2, (-1, self.window**2)) for part in (*guided, self.attn["v"](y)))
        mask = None
        if self.shift:
            mask = torch.from_numpy(shift_mask(grid, self.window, self.shift)).to(x)[:, None]
        mixed = attend(q, k, v, self.num_heads, mask=mask)
        mixed = mixed.flatten(2, 3)[:, :, order.argsort()]
        x = x + self.attn["proj"](mixed)
        return cast(Tensor, x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class ClassAttention(nn.Module):
    """Linear attention between the classes of a pixel; ``[B, C, N, h]`` to the same."""

    def __init__(self, config: AggregatorConfig) -> None:
        super().__init__()
        hidden, guided = config.hidden, config.hidden + config.text_guidance
        self.num_heads, self.padding = config.num_heads, config.padding
        self.pooling = 1  # in training, officially 2: looks at means of so many cells a side
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, hidden))
        self.padding_guidance = nn.Parameter(torch.zeros(1, 1, config.text_guidance))
        self.attention = nn.ModuleDict(
            {name: nn.Linear(guided if name in "qk" else hidden, hidden) for name in "qkv"}
        )
        self.MLP = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.ReLU(), nn.Linear(4 * hidden, hidden)
        )
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def keys_values(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[..., heads, h / heads]`` of tokens with their guidance."""
        y = self.norm1(x)
        q, k = (F.elu(sum_linear(self.attention[name], y, text)) + 1.0 for name in "qk")
        q, k, v = (p.unflatten(-1, (self.num_heads, -1)) for p in (q, k, self.attention["v"](y)))
        return q, k, v

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """``text`` is ``[C, T]``."""
        if self.pooling == 1 or not self.training:
            return x + self.refined(x, text)  # its input counts twice, as officially
        side = int(x.shape[2] ** 0.5)
        small = F.avg_pool2d(_as_maps(x, side), self.pooling).flatten(2).transpose(1, 2)
        small = self.refined(small.reshape(*x.shape[:2], *small.shape[1:]), text)
        maps = _as_maps(small, side // self.pooling)
        raised = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=True)
        return x + raised.flatten(2).transpose(1, 2).reshape(x.shape)

    def refined(self, x: Tensor, text: Tensor) -> Tensor:
        """Tokens after attention and MLP."""
        q, k, v = self.keys_values(x, text[:, None])
        # One learned token fills up to `padding` classes; its part is added as often as needed.
        missing = max(0, self.padding - x.shape[1])
        _, pad_k, pad_v = self.keys_values(self.padding_tokens[0, 0], self.padding_guidance[0, 0])
        products = torch.einsum("bcnhd,bcnhe->bnhde", k, v)
        products = products + missing * pad_k[:, :, None] * pad_v[:, None]
        totals = k.sum(1) + missing * pad_k
        weights = torch.einsum("bcnhd,bnhd->bcnh", q, totals) + 1e-6
        mixed = torch.einsum("bcnhd,bnhde->bcnhe", q, products) / weights[..., None]
        refined = x + mixed.flatten(-2)
        return cast(Tensor, refined + self.MLP(self.norm2(refined)))


class AggregatorLayer(nn.Module):
    """Two window blocks, the second shifted, then attention between classes."""

    def __init__(self, config: AggregatorConfig) -> None:
        super().__init__()
        shifts = {"block_1": 0, "block_2": config.window // 2}
        blocks: dict[str, nn.Module] = {n: SwinBlock(config, s) for n, s in shifts.items()}
        self.swin_block = nn.ModuleDict(blocks | {"guidance_norm": nn.LayerNorm(config.guidance)})
        self.attention = ClassAttention(config)

    def forward(self, x: Tensor, near: Tensor, text: Tensor) -> Tensor:
        """``x`` ``[B, C, N, h]``, ``near`` ``[B, N, G]``, ``text`` ``[C, T]``."""
        guidance = self.swin_block["guidance_norm"](near)[:, None]
        for name in ("block_1", "block_2"):
            x = self.swin_block[name](x, guidance)
        return cast(Tensor, self.attention(x, text))


class UpBlock(nn.Module):
    """Doubles a class's map, beside the image's guidance."""

    def __init__(self, inputs: int, outputs: int, guidance: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, inputs - guidance, 2, stride=2)
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [
                nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
                nn.GroupNorm(outputs // 16, outputs),
                nn.ReLU(),
            ]
        self.conv = nn.ModuleDict({"double_conv": nn.Sequential(*layers)})

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """``x`` ``[B * C, inputs, g, g]``, ``guidance`` ``[B, guidance, 2g, 2g]``."""
        # The first convolution of [up(x), guidance] is a sum: what x adds is one transposed
        # convolution, and the rest, of up's bias and the guidance, is the same for all classes.
        first, *rest = cast(nn.Sequential, self.conv["double_conv"])
        bias = cast(Tensor, self.up.bias)[:, None, None].expand(-1, *guidance.shape[2:])
        shared = first(torch.cat([bias.expand(len(guidance), -1, -1, -1), guidance], dim=1))
        own: Tensor = F.conv_transpose2d(x, self.raising_kernel(), stride=2, padding=1)
        maps = own.reshape(len(guidance), -1, *own.shape[1:]) + shared[:, None]
        return cast(Tensor, nn.Sequential(*rest)(maps.flatten(0, 1)))

    def raising_kernel(self) -> Tensor:
        """Of the upsampling and the convolution behind it, ``[inputs, outputs, 4, 4]``."""
        first: Any = cast(nn.Sequential, self.conv["double_conv"])[0]
        return F.conv2d(self.up.weight, first.weight[:, : self.up.out_channels], padding=2)


class Aggregator(nn.Module):
    """From correlations ``[B, C, g, g]`` to logits ``[B, C, 4g, 4g]``."""

    def __init__(self, config: AggregatorConfig) -> None:
        super().__init__()
        hidden, first, second = config.hidden, *config.decoder
        self.conv1 = nn.Conv2d(1, hidden, 7, padding=3)
        self.guidance_projection = _conv3(config.embed_dim, config.guidance)
        self.text_guidance_projection = nn.Sequential(
            nn.Linear(config.embed_dim, config.text_guidance), nn.ReLU()
        )
        self.decoder_guidance_projection = nn.ModuleList(
            map(_conv3, config.up, config.decoder_guidance)
        )
        self.layers = nn.ModuleList(AggregatorLayer(config) for _ in range(NUM_LAYERS))
        self.decoder1 = UpBlock(hidden, first, config.decoder_guidance[0])
        self.decoder2 = UpBlock(first, second, config.decoder_guidance[1])
        self.head = nn.Conv2d(second, 1, 3, padding=1)

    def guide(self, features: Tensor, taps: tuple[Tensor, Tensor]) -> Guidance:
        """Guidance, the same for all classes, from features ``[B, D, g, g]`` and upsampled taps."""
        two, four = (p(t) for p, t in zip(self.decoder_guidance_projection, taps, strict=True))
        return Guidance(self.guidance_projection(features), (two, four))

    def forward(self, correlation: Tensor, guidance: Guidance, text: Tensor) -> Tensor:
        """``text`` is unit rows ``[C, D]``."""
        batch, classes, grid, _ = correlation.shape
        named = self.text_guidance_projection(text)
        x = self.conv1(correlation.flatten(0, 1)[:, None]).flatten(2).transpose(1, 2)
        x = x.unflatten(0, (batch, classes))
        near = guidance.near.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, near, named)
        maps = _as_maps(x, grid)
        for decoder, fine in zip((self.decoder1, self.decoder2), guidance.fine, strict=True):
            maps = decoder(maps, fine)
        logits: Any = self.head(maps)
        return cast(Tensor, logits[:, 0].unflatten(0, (batch, classes)))


def _as_maps(x: Tensor, side: int) -> Tensor:
    """``[B, C, N, h]`` to ``[B * C, h, g, g]``."""
    return x.flatten(0, 1).transpose(1, 2).reshape(-1, x.shape[3], side, side)


def _conv3(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())


class SplitAttention(Attention):
    """Attention whose weights of q, k and v are tensors of their own: only q and v are tuned."""

    def __init__(self, width: int, num_heads: int) -> None:
        nn.Module.__init__(self)
        self.num_heads = num_heads
        for name in "qkv":
            weight = nn.Parameter(torch.empty(width, width))
            self.register_parameter(f"{name}_proj_weight", weight)
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        return torch.cat([getattr(self, f"{name}_proj_weight") for name in "qkv"])


def split_attention(transformer: Transformer) -> None:
    """Give every block of a transformer a :class:`SplitAttention` without values."""
    for block in cast("list[ResidualBlock]", transformer.resblocks):
        width = block.attn.out_proj.in_features
        block.attn = SplitAttention(width, block.attn.num_heads)


class DenseFeatures(NamedTuple):
    """The result of :class:`DenseFeatureEncoder`, class token first."""

    embeds: Tensor  # In the joint space, [B, 1 + N, D], not normalised
    taps: tuple[Tensor, Tensor]  # Outputs of two earlier blocks, patches only, [B, W, g, g] each


class DenseFeatureEncoder(ImageEncoder):
    """CLIP's image tower; in its last block every token attends to itself alone."""

    position_mode = "bicubic"

    def __init__(self, config: ImageEncoderConfig, taps: tuple[int, int]) -> None:
        super().__init__(config)
        self.taps = taps
        split_attention(self.transformer)

    def forward(self, image: Tensor) -> DenseFeatures:  # type: ignore[override]
        x, grid_hw = self.embed_patches(image), self.grid_hw((image.shape[2], image.shape[3]))
        *blocks, last = cast("list[ResidualBlock]", self.transformer.resblocks)
        features = []
        for index, block in enumerate(blocks):
            x = block(x)
            if index in self.taps:
                features.append(x[:, 1:].transpose(1, 2).unflatten(2, grid_hw))
        return DenseFeatures(self.project(dense_block(last, x)), (features[0], features[1]))


def dense_block(block: ResidualBlock, x: Tensor) -> Tensor:
    """The last block, ``[B, 1 + N, W]``: ``M(O(v(ln_1(X))) + X[0])``, M(Z) = Z + mlp(ln_2(Z))."""
    bias = block.attn.in_proj_bias.chunk(3)[2]
    value = F.linear(block.ln_1(x), block.attn.in_proj_weight.chunk(3)[2], bias)
    x = block.attn.out_proj(value) + x[:, :1]
    return cast(Tensor, x + block.mlp(block.ln_2(x)))


@dataclass(frozen=True, kw_only=True)
class CatSegConfig:
    """Everything that defines a model besides its weights."""

    # Image tower; it has no prompts
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    aggregator: AggregatorConfig = field(default_factory=AggregatorConfig)  # The head
    # Text tower, which was tuned with the rest; None for a model that is given text embeddings only
    text_encoder: TextEncoderConfig | None = None
    # Blocks of the image tower whose outputs guide the decoder at two and at four times the grid
    taps: tuple[int, int] = (3, 7)
    view: int = 384  # Side of the image in pixels
    # Classes that the head looks at: those with the largest correlation anywhere in the image, 256
    # officially; all others get the logit -100. None: all, which is not what the model was trained
    # with
    most_classes: int | None = 256

    def __post_init__(self) -> None:
        check_size((self.view, self.view), self.image_encoder.patch_size)
        grid, window = self.view // self.image_encoder.patch_size, self.aggregator.window
        if window < 2 or grid % window or grid <= window:
            raise ArgumentError(
                f"window: expected a side that fills the grid of {grid}x{grid} patches at least "
                f"twice, got {window}. Set aggregator.window or another view; officially they are "
                "12 and 384."
            )
        first, second = self.taps
        if not 0 <= first < second < self.image_encoder.num_layers - 1:
            raise ArgumentError(
                f"taps: expected two blocks before the last of {self.image_encoder.num_layers}, "
                f"the earlier first, got {self.taps}. Officially they are 3 and 7 of 12."
            )
        check_range(self, "most_classes", least=1)


class CatSeg(PixelModel):
    """CAT-Seg, for square images of one size, with the official checkpoints' names.

    Images are RGB, divided by 255 and normalised with CLIP's constants. Gradients reach the head
    and, in both towers, the attention weights of q and v.
    """

    architecture = "cat_seg"
    image_mean, image_std = CLIP_MEAN, CLIP_STD
    text_space = TEXT_SPACE
    config: CatSegConfig

    def __init__(self, config: CatSegConfig) -> None:
        super().__init__()
        self.config = config
        width, (two, four) = config.image_encoder.width, config.aggregator.up
        self.image_encoder = DenseFeatureEncoder(config.image_encoder, config.taps)
        self.text_encoder = TextEncoder(config.text_encoder) if config.text_encoder else None
        if self.text_encoder is not None:
            split_attention(self.text_encoder.transformer)
        self.upsample1 = nn.ConvTranspose2d(width, two, 2, stride=2)
        self.upsample2 = nn.ConvTranspose2d(width, four, 4, stride=4)
        self.aggregator = Aggregator(config.aggregator)
        for name, parameter in self.named_parameters():
            tuned = name.endswith(("q_proj_weight", "v_proj_weight"))
            parameter.requires_grad_(tuned or "_encoder." not in name)

    @property
    def size_hw(self) -> tuple[int, int]:
        return self.config.view, self.config.view

    @property
    def crop_hw(self) -> tuple[int, int]:
        return self.size_hw

    @property
    def windows(self) -> SlideSettings:
        """The authors' four windows; see :meth:`slide_views` for their fifth view."""
        view = self.config.view
        return SlideSettings(
            short_side=view * 5 // 3, crop_size=view, stride=int(view * (1 - 0.333))
        )

    @property
    def label_rule(self) -> LabelRule:
        return LabelRule(activation="sigmoid")

    def forward(self, image: Tensor, text_embeds: Tensor) -> SegmentationOutput:
        """Compute every class's logits.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, view, view]``.
            text_embeds: Class embeddings, ``[C, D]``; brought to the image's dtype and unit norm.

        Returns:
            Logits ``[B, C, 4g, 4g]``; the patches' embeddings ``[B, D, g, g]`` and the image's
            ``[B, D]``, neither of unit norm.
        """
        check_text_embeds(text_embeds, self.config.image_encoder.embed_dim)
        if image.ndim == 4 and tuple(image.shape[2:]) != self.size_hw:
            raise ShapeError(
                f"image: expected {self.size_hw[0]}x{self.size_hw[1]} pixels, got "
                f"{image.shape[2]}x{image.shape[3]}. Resize the image."
            )
        embeds, taps = self.image_encoder(image)
        side = taps[0].shape[2]
        features = embeds[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        text = F.normalize(text_embeds.to(features), dim=-1)
        correlation = torch.einsum("bdhw,cd->bchw", F.normalize(features, dim=1), text)
        raised = (self.upsample1(taps[0]), self.upsample2(taps[1]))
        guidance = self.aggregator.guide(features, raised)
        most = self.config.most_classes
        if most is None or len(text) <= most:
            logits = self.aggregator(correlation, guidance, text)
        else:
            size = (len(image), len(text), 4 * side, 4 * side)
            logits = correlation.new_full(size, DROPPED_LOGIT)
            for row, best in enumerate(correlation.flatten(2).amax(2).topk(most).indices):
                top, one = best.sort().values, slice(row, row + 1)
                near, (two, four) = guidance
                own = guidance._replace(near=near[one], fine=(two[one], four[one]))
                logits[row, top] = self.aggregator(correlation[one, top], own, text[top])[0]
        return SegmentationOutput(mask_logits=logits, patch_embeds=features, cls_embed=embeds[:, 0])

    def predict(self, image: Tensor, text_embeds: Tensor) -> Tensor:
        """Logits upsampled to the image, then the sigmoid; see :meth:`PixelModel.predict`."""
        return _resized(self(image, text_embeds).mask_logits, self.size_hw).sigmoid()

    @torch.no_grad()
    def slide_views(
        self, rgb: NDArray[np.uint8], text_embeds: Tensor, windows: SlideSettings
    ) -> Tensor:
        """Score every class at every pixel from five views, ``[C, H, W]``, as officially.

        The image is resized to a short side, then stretched to a square of that side for four
        overlapping windows, and to one view's size for the fifth; the mean of the windows and the
        fifth view count alike.
        """
        check_rgb(rgb)
        if windows != self.windows:
            raise ArgumentError(
                f"windows: expected {self.windows} for {self.architecture}, got {windows}. Leave "
                "them out."
            )
        side, view = windows.short_side, windows.crop_size
        image = resize_rgb(rgb, side, 4 * side)
        square, whole = (
            self._stretched(image, size).to(text_embeds.device) for size in (side, view)
        )
        four = slide_scores(
            lambda window: self.predict(window, text_embeds),
            square,
            crop_size=view,
            stride=side - view,
        )
        overview = _resized(self.predict(whole, text_embeds), (side, side))
        return _resized((four + overview) / 2, (rgb.shape[0], rgb.shape[1]))[0]

    def _stretched(self, rgb: NDArray[np.uint8], side: int) -> Tensor:
        planes = ops.preprocess(rgb, size_hw=(side, side), mean=self.image_mean, std=self.image_std)
        return torch.from_numpy(np.asarray(planes))[None]


def _resized(x: Tensor, size_hw: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size_hw, mode="bilinear", align_corners=False)


@dataclass(frozen=True, kw_only=True)
class OfficialCatSeg:
    """Builds CAT-Seg B from an official checkpoint; sizes are read from shapes."""

    num_heads: int = 4  # Heads of the head
    window: int = 12  # Side of its attention windows, in patches
    taps: tuple[int, int] = (3, 7)  # Blocks of the image tower that guide the decoder
    view: int = 384  # Side of the image in pixels
    padding: int = 256  # Classes that shorter vocabularies are padded to
    # Classes that the head looks at; None is all. See CatSegConfig
    most_classes: int | None = 256
    clip_heads: int | None = None  # Heads of the image tower; None is one per 64 channels
    text_heads: int | None = None  # Heads of the text tower; None is one per 64 channels

    def build(self, state_dict: Mapping[str, Tensor]) -> CatSeg:
        """Make the model of official keys, float32; the weights are copies."""
        check_float32(state_dict, "cat_seg")
        tensors, sizes = check_cat_seg(state_dict)
        file = Checked(tensors=tensors, what="cat_seg")
        encoder = image_encoder_config(file, "image_encoder.", self.clip_heads)
        text = None
        if file.has("text_encoder."):
            text = text_encoder_config(file, "text_encoder.", self.text_heads)
        aggregator = AggregatorConfig(
            embed_dim=encoder.embed_dim,
            width=encoder.width,
            hidden=sizes["H"],
            num_heads=divisor("num_heads", self.num_heads, sizes["H"]),
            window=self.window,
            text_guidance=sizes["Y"],
            guidance=sizes["G"],
            decoder=(sizes["A"], sizes["B"]),
            up=(sizes["U"], sizes["X"]),
            decoder_guidance=(sizes["J"], sizes["K"]),
            padding=self.padding,
        )
        config = CatSegConfig(
            image_encoder=encoder,
            text_encoder=text,
            aggregator=aggregator,
            taps=self.taps,
            view=self.view,
            most_classes=self.most_classes,
        )
        check_masks(state_dict, self.view // encoder.patch_size, self.window)
        return load_into(CatSeg, config, tensors, architecture="cat_seg")


@dataclass(frozen=True, kw_only=True)
class CatSegStart(ClipSource):
    """Starts CAT-Seg from CLIP weights, with a head that is not trained yet."""

    view: int = 384  # Side of the image in pixels
    # Sizes of the head, whose embed_dim and width become CLIP's; None is the official ones, with
    # windows of half the grid
    aggregator: AggregatorConfig | None = None
    # Blocks of the image tower that guide the decoder; None is as early as officially
    taps: tuple[int, int] | None = None

    def build(self) -> CatSeg:
        weights = self.load()
        encoder = image_config(weights)
        window = self.view // encoder.patch_size // 2
        head = replace(
            self.aggregator or AggregatorConfig(window=window),
            embed_dim=encoder.embed_dim,
            width=encoder.width,
        )
        third = encoder.num_layers // 3
        config = CatSegConfig(
            image_encoder=encoder,
            text_encoder=text_config(weights),
            aggregator=head,
            taps=self.taps or (third - 1, 2 * third - 1),
            view=self.view,
        )
        visual, text = (Tower(split_weights(tower)) for tower in (weights.visual, weights.text))
        return start_from_clip(CatSeg(config), replace(weights, visual=visual, text=text))
