"""CAT-Seg: CLIP's patches compared with every class, and the correlations aggregated.

It is built from official checkpoints, or from CLIP weights to be trained.

Source:
    Cho et al., "CAT-Seg: Cost Aggregation for Open-Vocabulary Semantic Segmentation", CVPR 2024.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from zsseg_rt import ops
from zsseg_rt.common.checks import check_size
from zsseg_rt.errors import ArgumentError, ShapeError
from zsseg_rt.models.base import (
    LabelRule,
    PixelModel,
    SegmentationOutput,
    SlideSettings,
    check_picture,
    resize_picture,
)
from zsseg_rt.models.cat_seg.aggregator import DROPPED_LOGIT, Aggregator, AggregatorConfig
from zsseg_rt.models.clip.towers import (
    Attention,
    ImageEncoder,
    ImageEncoderConfig,
    ResidualBlock,
    TextEncoder,
    TextEncoderConfig,
    Transformer,
)
from zsseg_rt.models.clip.weights import (
    image_config,
    image_encoder_config,
    load_into,
    start_from_clip,
    text_config,
    text_encoder_config,
)
from zsseg_rt.models.functional import check_text_embeds
from zsseg_rt.networks.cat_seg import TEXT_SPACE
from zsseg_rt.torch_files.cat_seg_arrays import CLIP_PREFIX as _CLIP
from zsseg_rt.torch_files.cat_seg_arrays import (
    check_masks,
    own_names,
    refuse_others,
    split_weights,
)
from zsseg_rt.torch_files.checkpoints import Sizes, check_float32
from zsseg_rt.torch_files.clip_arrays import CLIP_MEAN, CLIP_STD
from zsseg_rt.torch_files.clip_weights import ClipSource


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
        """The packed weight, rows q, k, v."""
        return torch.cat([getattr(self, f"{name}_proj_weight") for name in "qkv"])


def split_attention(transformer: Transformer) -> None:
    """Give every block of a transformer a :class:`SplitAttention` without values."""
    for block in cast("list[ResidualBlock]", transformer.resblocks):
        width = block.attn.out_proj.in_features
        block.attn = SplitAttention(width, block.attn.num_heads)


class DenseFeatures(NamedTuple):
    """What :class:`DenseFeatureEncoder` returns, class token first."""

    embeds: Tensor  # In the joint space, [B, 1 + N, D], not normalised
    taps: tuple[Tensor, Tensor]  # Outputs of two earlier blocks, patches only, [B, W, g, g] each


class DenseFeatureEncoder(ImageEncoder):
    """CLIP's image tower; in its last block every token attends to itself alone.

    With v and O its projections and M(Z) = Z + mlp(ln_2(Z)), the last block gives
    ``M(O(v(ln_1(X))) + X[0])``: the class token is the residual of all tokens.
    """

    position_mode = "bicubic"

    def __init__(self, config: ImageEncoderConfig, taps: tuple[int, int]) -> None:
        super().__init__(config)
        self.taps = taps
        split_attention(self.transformer)

    def forward(self, image: Tensor) -> DenseFeatures:  # type: ignore[override]
        """Encode images, ``[B, 3, H, W]``."""
        x, grid_hw = self.embed_patches(image), self.grid_hw((image.shape[2], image.shape[3]))
        *blocks, last = cast("list[ResidualBlock]", self.transformer.resblocks)
        kept = []
        for index, block in enumerate(blocks):
            x = block(x)
            if index in self.taps:
                kept.append(x[:, 1:].transpose(1, 2).unflatten(2, grid_hw))
        return DenseFeatures(self.project(dense_block(last, x)), (kept[0], kept[1]))


def dense_block(block: ResidualBlock, x: Tensor) -> Tensor:
    """The last block, ``[B, 1 + N, W]`` to the same."""
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
        """Check the settings."""
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
        if self.most_classes is not None and self.most_classes < 1:
            raise ArgumentError(
                f"most_classes: expected at least 1 or None, got {self.most_classes}. None is all."
            )


class CatSeg(PixelModel):
    """CAT-Seg, for square images of one size.

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
        """See :attr:`SegmentationModel.size_hw`."""
        return self.config.view, self.config.view

    @property
    def crop_hw(self) -> tuple[int, int]:
        """See :attr:`SegmentationModel.crop_hw`."""
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
        """See :attr:`PixelModel.label_rule`."""
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
                kept, one = best.sort().values, slice(row, row + 1)
                near, (two, four) = guidance
                own = guidance._replace(near=near[one], fine=(two[one], four[one]))
                logits[row, kept] = self.aggregator(correlation[one, kept], own, text[kept])[0]
        return SegmentationOutput(mask_logits=logits, patch_embeds=features, cls_embed=embeds[:, 0])

    def predict(self, image: Tensor, text_embeds: Tensor) -> Tensor:
        """Logits upsampled to the image, then the sigmoid; see :meth:`PixelModel.predict`."""
        return _resized(self(image, text_embeds).mask_logits, self.size_hw).sigmoid()

    @torch.no_grad()
    def slide_views(
        self, rgb: NDArray[np.uint8], text_embeds: Tensor, windows: SlideSettings
    ) -> Tensor:
        """Score every class at every pixel from five views, as the official evaluation does.

        The picture is resized to a short side, then stretched to a square of that side for four
        overlapping windows, and to one view's size for the fifth; the mean of the windows and the
        fifth view count alike: ``[C, H, W]``, in ``[0, 1]``.
        """
        check_picture(rgb)
        if windows != self.windows:
            raise ArgumentError(
                f"windows: expected {self.windows} for {self.architecture}, got {windows}. Leave "
                "them out."
            )
        side, view = windows.short_side, windows.crop_size
        picture = resize_picture(rgb, side, 4 * side)
        places = [(top, left) for top in (0, side - view) for left in (0, side - view)]
        square, whole = (
            self._stretched(picture, size).to(text_embeds.device) for size in (side, view)
        )
        total, count = None, square.new_zeros(1, side, side)
        for top, left in places:
            part = (..., slice(top, top + view), slice(left, left + view))
            scores = self.predict(square[part], text_embeds)[0]
            total = scores.new_zeros(len(scores), side, side) if total is None else total
            total[part] += scores
            count[part] += 1
        assert total is not None
        overview = _resized(self.predict(whole, text_embeds), (side, side))[0]
        merged = (total / count + overview) / 2
        return _resized(merged[None], (rgb.shape[0], rgb.shape[1]))[0]

    def _stretched(self, rgb: NDArray[np.uint8], side: int) -> Tensor:
        planes = ops.preprocess(rgb, size_hw=(side, side), mean=self.image_mean, std=self.image_std)
        return torch.from_numpy(np.asarray(planes))[None]


def _resized(x: Tensor, size_hw: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size_hw, mode="bilinear", align_corners=False)


_HEAD = "sem_seg_head.predictor.transformer."
_TEXT = r"sem_seg_head\.predictor\.clip_model\.(?!visual\.|logit_scale)"
_UNUSED = r"text_encoder\.logit_scale|aggregator\.layers\.\d\.swin_block\.block_2\.attn_mask"


@dataclass(frozen=True, kw_only=True)
class OfficialCatSeg:
    """Builds CAT-Seg B from an official checkpoint; sizes are read from shapes."""

    num_heads: int = 4  # Heads of the head
    window: int = 12  # Side of its attention windows, in patches
    taps: tuple[int, int] = (3, 7)  # Blocks of the image tower that guide the decoder
    view: int = 384  # Side of the image in pixels
    # Pooling before the attention between classes; at test it is 1x1
    pooling: tuple[int, int] = (1, 1)
    padding: int = 256  # Classes that shorter vocabularies are padded to
    # Classes that the head looks at; None is all. See CatSegConfig
    most_classes: int | None = 256
    clip_heads: int | None = None  # Heads of the image tower; None is one per 64 channels
    text_heads: int | None = None  # Heads of the text tower; None is one per 64 channels
    with_text_encoder: bool = True  # Whether to build the text tower when the checkpoint holds one

    def build(self, state_dict: Mapping[str, Tensor]) -> CatSeg:
        """Make the model, in evaluation mode; the weights are copies.

        Shapes:
            state_dict: Official keys, float32; see
                :func:`zsseg_rt.torch_files.checkpoints.load_checkpoint`.
        """
        if tuple(self.pooling) != (1, 1):
            raise ArgumentError(
                f"pooling: expected (1, 1), which the authors evaluate with, got {self.pooling}. "
                "Leave it out: their configuration file states the value for training."
            )
        check_float32(state_dict, "cat_seg")
        refuse_others(state_dict)
        sizes = Sizes(state_dict, "cat_seg")
        encoder = image_encoder_config(sizes, _CLIP + "visual.", self.clip_heads)
        text = None
        tower = any(re.match(_TEXT, key) for key in state_dict)  # if of it, all of it
        if self.with_text_encoder and tower:
            text = text_encoder_config(sizes, _CLIP, self.text_heads)
        config = CatSegConfig(
            image_encoder=encoder,
            text_encoder=text,
            aggregator=self._aggregator(sizes, encoder),
            taps=self.taps,
            view=self.view,
            most_classes=self.most_classes,
        )
        check_masks(state_dict, self.view // encoder.patch_size, self.window)
        ignored = (_UNUSED, *(() if text else (r"text_encoder\..*",)))
        renamed = own_names(state_dict)
        return load_into(CatSeg, config, renamed, architecture="cat_seg", ignored=ignored)

    def _aggregator(self, sizes: Sizes, encoder: ImageEncoderConfig) -> AggregatorConfig:
        hidden = sizes.of(_HEAD + "conv1.weight", 4)[0]
        first, second = (
            sizes.of(f"{_HEAD}decoder{n}.conv.double_conv.0.weight", 4)[0] for n in (1, 2)
        )
        near, far = (
            sizes.of(f"{_HEAD}decoder_guidance_projection.{n}.0.weight", 4)[:2] for n in (0, 1)
        )
        return AggregatorConfig(
            embed_dim=encoder.embed_dim,
            width=encoder.width,
            hidden=hidden,
            num_heads=sizes.heads("num_heads", self.num_heads, hidden),
            window=self.window,
            text_guidance=sizes.of(_HEAD + "text_guidance_projection.0.weight", 2)[0],
            guidance=sizes.of(_HEAD + "guidance_projection.0.weight", 4)[0],
            decoder=(first, second),
            up=(near[1], far[1]),
            decoder_guidance=(near[0], far[0]),
            padding=self.padding,
        )


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
        """Make the model, in evaluation mode, with its text tower."""
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
        visual, text = split_weights(weights.visual), split_weights(weights.text)
        return start_from_clip(CatSeg(config), replace(weights, visual=visual, text=text))
