"""Training-free dense CLIP: plain CLIP whose last block attends so that patches stay local.

Every head changes the last block only. With X the tokens after the blocks before it (row 0 is the
class token), q, k, v its projections of ``ln_1(X)``, s = 1 / sqrt(head width), O its output
projection and M(Z) = Z + mlp(ln_2(Z)):

========== ===================================== ==================
head       attention A                           last block's Z
========== ===================================== ==================
vanilla    softmax(q k^T s)                      M(X + O(A v))
maskclip   identity                              M(X + O(v))
sclip      softmax(q q^T s) + softmax(k k^T s)   M(X + O(A v))
clearclip  softmax(q q^T s)                      O(A v)
naclip     softmax(k k^T s + prior)              O(A v)
========== ===================================== ==================

Patch embeddings are ``ln_post(Z) @ proj`` without row 0, divided by their norms.

Source:
    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML
    2021; Zhou et al., "Extract Free Dense Labels from CLIP" (MaskCLIP), ECCV 2022; Wang et al.,
    "SCLIP", ECCV 2024; Lan et al., "ClearCLIP", ECCV 2024; Hajimiri et al., "Pay Attention to Your
    Neighbours" (NACLIP), WACV 2025.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.errors import ArgumentError, ShapeError
from zsseg_rt.models.checkpoints import Sizes, load_weights
from zsseg_rt.models.clip import (
    CLIP_MEAN,
    CLIP_STD,
    ClipWeights,
    image_encoder_config,
    load_clip,
    normalisation_of,
    random_clip,
    text_encoder_config,
)
from zsseg_rt.models.functional import patch_text_similarity
from zsseg_rt.models.image_encoder import (
    ImageEmbeds,
    ImageEncoder,
    ImageEncoderConfig,
    Interpolation,
    unit,
)
from zsseg_rt.models.text_encoder import TextEncoder, TextEncoderConfig
from zsseg_rt.models.transformer import Activation, ResidualBlock, merge_heads, split_heads
from zsseg_rt.models.zegclip import SegmentationOutput

__all__ = [
    "HEADS",
    "DenseCLIP",
    "DenseCLIPConfig",
    "DenseImageEncoder",
    "FoldedDenseEncoder",
    "Head",
    "dense_clip_from_clip",
    "neighbour_prior",
]

Head = Literal["vanilla", "maskclip", "sclip", "clearclip", "naclip"]
HEADS: tuple[Head, ...] = get_args(Head)


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """What a head makes of the last block.

    Attributes:
        reads: Projections it needs, in the order they are packed.
        products: Pairs (query, key) of projections; a softmax each, summed. None is identity.
        residual: Whether the block keeps its residual sum and its MLP.
        prior: Whether scores get the neighbour prior.
        logit_scale: What the authors multiply cosines with.
    """

    reads: str
    products: tuple[tuple[str, str], ...]
    residual: bool
    prior: bool = False
    logit_scale: float


_RULES: Mapping[Head, _Rule] = {
    "vanilla": _Rule(reads="qkv", products=(("q", "k"),), residual=True, logit_scale=100.0),
    "maskclip": _Rule(reads="v", products=(), residual=True, logit_scale=100.0),
    "sclip": _Rule(reads="qkv", products=(("q", "q"), ("k", "k")), residual=True, logit_scale=40.0),
    "clearclip": _Rule(reads="qv", products=(("q", "q"),), residual=False, logit_scale=50.0),
    "naclip": _Rule(
        reads="kv", products=(("k", "k"),), residual=False, prior=True, logit_scale=40.0
    ),
}


def neighbour_prior(grid_hw: tuple[int, int], std: float = 5.0) -> Tensor:
    """What NACLIP adds to the attention scores: a Gaussian of the distance between patches.

    ``prior[i, j] = exp(-|p_i - p_j|^2 / (2 std^2))`` in patches; 0 for the class token.

    Args:
        grid_hw: Rows and columns of the patch grid.
        std: Standard deviation, in patches.

    Returns:
        float32 ``[1 + N, 1 + N]``, row-major over the grid, the class token first.
    """
    rows, columns = (
        torch.exp(-((torch.arange(size)[:, None] - torch.arange(size)) ** 2) / (2 * std**2))
        for size in grid_hw
    )
    return F.pad(torch.kron(rows, columns), (1, 0, 1, 0))


def _attend(rule: _Rule, parts: Mapping[str, Tensor], prior: Tensor | None) -> Tensor:
    """``A @ v`` of one head's rule, ``[B, heads, 1 + N, W / heads]``."""
    value = parts["v"]
    attended = [
        F.scaled_dot_product_attention(parts[query], parts[key], value, attn_mask=prior)
        for query, key in rule.products
    ]
    return sum(attended[1:], attended[0]) if attended else value


@dataclass(frozen=True, kw_only=True)
class DenseCLIPConfig:
    """What defines a dense CLIP model besides its weights.

    Attributes:
        image_encoder: Image tower.
        text_encoder: Text tower, or None for a model that is given text embeddings only.
        head: What the last block becomes.
        size_hw: Input size in pixels that a bundle is made for; the model itself takes any.
        logit_scale: Multiplies the cosine similarity.
        unknown_below: Probability under which a pixel is unknown in a bundle; None keeps all.
        prior_std: Standard deviation of NACLIP's prior, in patches.
        templates: Prompts with one ``{}`` each; None is the 80 ImageNet prompts of CLIP.
        image_mean: Of R, G, B, in ``[0, 1]``.
        image_std: Of R, G, B, in ``[0, 1]``.
    """

    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    text_encoder: TextEncoderConfig | None = None
    head: Head = "naclip"
    size_hw: tuple[int, int] = (448, 448)
    logit_scale: float = 40.0
    unknown_below: float | None = None
    prior_std: float = 5.0
    templates: tuple[str, ...] | None = None
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ArgumentError(
                f"head: expected one of {', '.join(HEADS)}, got {self.head!r}. Check the spelling."
            )
        for name in ("logit_scale", "prior_std"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ArgumentError(f"{name}: expected a number above 0, got {value}. Change it.")
        if self.unknown_below is not None and not 0 <= self.unknown_below <= 1:
            raise ArgumentError(
                f"unknown_below: expected a probability in [0, 1], got {self.unknown_below}. "
                "Use None to keep every pixel."
            )
        _check_size(self.size_hw, self.image_encoder.patch_size)


def _check_size(size_hw: tuple[int, int], patch_size: int) -> None:
    """Refuse sizes that patches do not fill.

    Raises:
        ShapeError: A side is not a positive multiple of the patch size.
    """
    if min(size_hw) < 1 or any(side % patch_size for side in size_hw):
        raise ShapeError(
            f"image_size: expected multiples of the patch size {patch_size}, got "
            f"{size_hw[0]}x{size_hw[1]}. Choose the next multiple."
        )


class DenseImageEncoder(ImageEncoder):
    """CLIP's image tower with a dense head; the positional embedding is resized bicubically.

    Args:
        config: Sizes; what concerns prompts is not used.
        head: What the last block becomes.
        prior_std: Standard deviation of NACLIP's prior, in patches.
    """

    position_mode: ClassVar[Interpolation] = "bicubic"

    def __init__(
        self, config: ImageEncoderConfig, head: Head = "naclip", prior_std: float = 5.0
    ) -> None:
        super().__init__(config)
        self.rule = _RULES[head]
        self.prior_std = prior_std

    def forward(self, image: Tensor) -> ImageEmbeds:
        """Encode pictures.

        Args:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.

        Returns:
            The head's patch embeddings, and CLIP's own class embedding, which no head changes;
            unit norm.

        Raises:
            ShapeError: The image has another layout or is smaller than one patch.
            DTypeError: The image is not of the weights' dtype.
        """
        tokens = self.tokens_before_last(image)
        grid_hw = self.grid_hw((image.shape[2], image.shape[3]))
        cls_token = self.last_block(tokens)[:, 0]
        return ImageEmbeds(self.dense_embeds(tokens, grid_hw), unit(self.project(cls_token)))

    @property
    def last_block(self) -> ResidualBlock:
        """The block whose attention the head replaces."""
        block = self.transformer.resblocks[-1]
        assert isinstance(block, ResidualBlock)
        return block

    def tokens_before_last(self, image: Tensor) -> Tensor:
        """What the last block is given, ``[B, 1 + N, W]``."""
        tokens = self.embed_patches(image)
        for block in self.transformer.resblocks[:-1]:
            tokens = block(tokens)
        return tokens

    def prior(self, grid_hw: tuple[int, int]) -> Tensor | None:
        """What the head adds to attention scores, ``[1 + N, 1 + N]``, or None."""
        return neighbour_prior(grid_hw, self.prior_std) if self.rule.prior else None

    def dense_embeds(self, tokens: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """The head's patch embeddings ``[B, N, D]`` of tokens before the last block, unit norm."""
        block, attention = self.last_block, self.last_block.attn
        projections = zip(
            "qkv", attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
        )
        x = block.ln_1(tokens)
        parts = {
            name: split_heads(F.linear(x, weight, bias), attention.num_heads)
            for name, weight, bias in projections
            if name in self.rule.reads
        }
        prior = self.prior(grid_hw)
        attended = _attend(self.rule, parts, None if prior is None else prior.to(tokens))
        dense = attention.out_proj(merge_heads(attended))
        if self.rule.residual:
            dense = tokens + dense
            dense = dense + block.mlp(block.ln_2(dense))
        return unit(self.project(dense[:, 1:]))


class _FoldedDenseBlock(nn.Module):
    """The last block for one grid: only the projections a head reads, only patches out.

    MaskCLIP's attention is the identity: its two projections are one.
    """

    in_weight: Tensor
    in_bias: Tensor
    prior: Tensor | None

    def __init__(self, encoder: DenseImageEncoder, grid_hw: tuple[int, int]) -> None:
        super().__init__()
        block, attention = encoder.last_block, encoder.last_block.attn
        self.rule, self.num_heads = encoder.rule, attention.num_heads
        kept = ["qkv".index(name) for name in self.rule.reads]
        weight = torch.cat([attention.in_proj_weight.chunk(3)[index] for index in kept])
        bias = torch.cat([attention.in_proj_bias.chunk(3)[index] for index in kept])
        self.out_proj: nn.Module = attention.out_proj
        if not self.rule.products:
            bias = attention.out_proj.bias + attention.out_proj.weight @ bias
            weight = attention.out_proj.weight @ weight
            self.out_proj = nn.Identity()
        self.register_buffer("in_weight", weight)
        self.register_buffer("in_bias", bias)
        self.register_buffer("prior", encoder.prior(grid_hw))
        self.ln_1 = block.ln_1
        if self.rule.residual:
            self.ln_2, self.mlp = block.ln_2, block.mlp

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[B, 1 + N, W]`` to patches ``[B, N, W]``."""
        dense = self.out_proj(self._mix(self.ln_1(tokens))[:, 1:])
        if not self.rule.residual:
            return dense  # type: ignore[no-any-return]
        dense = tokens[:, 1:] + dense
        return dense + self.mlp(self.ln_2(dense))  # type: ignore[no-any-return]

    def _mix(self, x: Tensor) -> Tensor:
        projected = F.linear(x, self.in_weight, self.in_bias)
        if not self.rule.products:
            return projected
        chunks = projected.chunk(len(self.rule.reads), dim=-1)
        parts = {
            name: split_heads(chunk, self.num_heads)
            for name, chunk in zip(self.rule.reads, chunks, strict=True)
        }
        return merge_heads(_attend(self.rule, parts, self.prior))


class FoldedDenseEncoder(nn.Module):
    """A :class:`DenseImageEncoder` for one input size, with everything constant precomputed.

    Equal to the encoder's patch embeddings up to rounding; there is no class embedding. No control
    flow depends on data.

    Args:
        encoder: The encoder to fold; unchanged weights are shared with it, not copied.
        size_hw: Picture size in pixels, multiples of the patch size.

    Raises:
        ShapeError: Patches do not fill the picture.
    """

    cls_token: Tensor
    positions: Tensor

    def __init__(self, encoder: DenseImageEncoder, size_hw: tuple[int, int]) -> None:
        super().__init__()
        _check_size(size_hw, encoder.config.patch_size)
        self.size_hw, self.grid_hw = size_hw, encoder.grid_hw(size_hw)
        self.conv1, self.ln_pre, self.ln_post = encoder.conv1, encoder.ln_pre, encoder.ln_post
        self.blocks = encoder.transformer.resblocks[:-1]
        with torch.no_grad():
            self.register_buffer("positions", encoder.patch_positions(self.grid_hw).clone())
            self.register_buffer("cls_token", encoder.ln_pre(encoder.class_token())[None, None])
            self.register_buffer("proj", encoder.proj.detach())
            self.last_block = _FoldedDenseBlock(encoder, self.grid_hw)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor:
        """Encode pictures of the one size.

        Args:
            image: Normalised RGB planes, float ``[B, 3, *size_hw]``.

        Returns:
            Patch embeddings ``[B, N, D]``, unit norm.
        """
        patches = self.ln_pre(self.conv1(image).flatten(2).transpose(1, 2) + self.positions)
        tokens = torch.cat([self.cls_token.expand(image.shape[0], -1, -1), patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return unit(self.ln_post(self.last_block(tokens)) @ self.proj)


class DenseCLIP(nn.Module):
    """CLIP that labels patches: their embeddings against text embeddings, without any training.

    Pictures are RGB, divided by 255 and normalised with :attr:`image_mean` and :attr:`image_std`.

    Args:
        config: Sizes, head and labelling rule.

    Attributes:
        image_mean: Of R, G, B, in ``[0, 1]``.
        image_std: Of R, G, B, in ``[0, 1]``.
    """

    def __init__(self, config: DenseCLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.image_mean, self.image_std = config.image_mean, config.image_std
        self.image_encoder = DenseImageEncoder(config.image_encoder, config.head, config.prior_std)
        self.text_encoder = TextEncoder(config.text_encoder) if config.text_encoder else None

    def forward(self, image: Tensor, text_embeds: Tensor) -> SegmentationOutput:
        """Compare every patch with every class.

        Args:
            image: Normalised RGB planes, float ``[B, 3, H, W]``; any size of at least one patch.
                A rest below one patch at the right and the bottom is not seen.
            text_embeds: Class embeddings, ``[C, D]``; brought to the image's dtype and unit norm.

        Returns:
            Cosine similarities times ``logit_scale``, the head's patch embeddings, and CLIP's own
            image embedding.

        Raises:
            ShapeError: An argument has another shape.
            DTypeError: The image is not of the weights' dtype.
        """
        self._check_text(text_embeds)
        patch_embeds, cls_embed = self.image_encoder(image)
        mask_logits = patch_text_similarity(
            patch_embeds, text_embeds.to(patch_embeds), logit_scale=self.config.logit_scale
        )
        grid_hw = self.image_encoder.grid_hw((image.shape[2], image.shape[3]))
        return SegmentationOutput(
            mask_logits=torch.unflatten(mask_logits, 2, grid_hw),
            patch_embeds=torch.unflatten(patch_embeds.transpose(1, 2), 2, grid_hw),
            cls_embed=cls_embed,
        )

    def predict(self, image: Tensor, text_embeds: Tensor) -> Tensor:
        """Logits of every class at every pixel: those of the patches, upsampled bilinearly.

        :func:`zsseg_rt.models.slide_predict` averages them over windows and ends with the softmax:
        ``slide_predict(model, rgb, text_embeds, short_side=336, crop_size=224, stride=112)`` is
        SCLIP's and NACLIP's protocol; a ``crop_size`` above both sides takes the whole picture.

        Args:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.
            text_embeds: Class embeddings, ``[C, D]``.

        Returns:
            ``[B, C, H, W]``, before the softmax.

        Raises:
            ShapeError: An argument has another shape.
            DTypeError: The image is not of the weights' dtype.
        """
        logits = self(image, text_embeds).mask_logits
        size_hw = (image.shape[2], image.shape[3])
        return F.interpolate(logits, size=size_hw, mode="bilinear", align_corners=False)

    def fold_image_encoder(self, size_hw: tuple[int, int] | None = None) -> FoldedDenseEncoder:
        """Make the image encoder that is exported.

        Args:
            size_hw: Input size in pixels; None is the configured one.

        Raises:
            ShapeError: Patches do not fill the picture.
        """
        return FoldedDenseEncoder(self.image_encoder, size_hw or self.config.size_hw)

    def _check_text(self, text_embeds: Tensor) -> None:
        embed_dim = self.config.image_encoder.embed_dim
        if text_embeds.ndim != 2 or text_embeds.shape[1] != embed_dim or not len(text_embeds):
            raise ShapeError(
                f"text_embeds: expected [C, {embed_dim}] with at least one class, "
                f"got {list(text_embeds.shape)}. Use embeddings of this model's text encoder."
            )


def dense_clip_from_clip(
    *,
    pretrained: str | Path | None = None,
    clip: str = "ViT-B-16",
    head: Head = "naclip",
    image_size: int | tuple[int, int] | None = None,
    logit_scale: float | None = None,
    unknown_below: float | None = None,
    templates: Sequence[str] | None = None,
    prior_std: float = 5.0,
    image_mean: tuple[float, float, float] | None = None,
    image_std: tuple[float, float, float] | None = None,
    activation: Activation | None = None,
    num_heads: int | None = None,
    text_heads: int | None = None,
    with_text_encoder: bool = True,
    trust: bool = False,
) -> DenseCLIP:
    """Build dense CLIP from CLIP weights; nothing is trained.

    Args:
        pretrained: A file or an open_clip tag, see :func:`zsseg_rt.models.clip.load_clip`; None is
            open_clip's random initialisation.
        clip: open_clip's name of the ViT, for a tag and for None.
        head: ``"naclip"``, ``"clearclip"``, ``"sclip"``, ``"maskclip"`` or ``"vanilla"``.
        image_size: Input size in pixels that a bundle is made for, a side or (height, width);
            None is the size the weights were trained at.
        logit_scale: Multiplies the cosine similarity; None is the authors': 40 for NACLIP and
            SCLIP, 50 for ClearCLIP, 100 for the others.
        unknown_below: Probability under which a pixel is unknown in a bundle.
        templates: Prompts with one ``{}`` each; None is the 80 ImageNet prompts of CLIP.
        prior_std: Standard deviation of NACLIP's prior, in patches.
        image_mean: Of R, G, B, in ``[0, 1]``; None is the weights'.
        image_std: Of R, G, B, in ``[0, 1]``; None is the weights'.
        activation: For a ``state_dict`` file, which does not say.
        num_heads: Heads of the image tower, for a file; None is one per 64 channels.
        text_heads: Heads of the text tower, for a file; None is one per 64 channels.
        with_text_encoder: Whether to build the text tower.
        trust: See :func:`zsseg_rt.models.checkpoints.load_checkpoint`.

    Returns:
        The model, in evaluation mode, nothing of it trainable.

    Raises:
        ArgumentError: The head is unknown or a setting is out of its range.
        CheckpointError: The weights cannot be read or are not a CLIP ViT's.
        ShapeError: Patches do not fill ``image_size``.
    """
    settings: dict[str, Any] = {"head": head, "prior_std": prior_std}
    if head in _RULES:
        settings["logit_scale"] = _RULES[head].logit_scale
    if logit_scale is not None:
        settings["logit_scale"] = logit_scale
    settings["unknown_below"] = unknown_below
    settings["templates"] = None if templates is None else tuple(templates)
    DenseCLIPConfig(**settings)  # refuse bad settings before weights are read
    if pretrained is None:
        weights, normalisation = random_clip(clip), (CLIP_MEAN, CLIP_STD)
    else:
        weights = load_clip(
            pretrained,
            architecture=clip,
            activation=activation,
            num_heads=num_heads,
            text_heads=text_heads,
            trust=trust,
        )
        normalisation = normalisation_of(pretrained, clip)
    settings["image_mean"] = image_mean or normalisation[0]
    settings["image_std"] = image_std or normalisation[1]
    return _build(weights, settings, image_size, with_text_encoder)


def _build(
    weights: ClipWeights,
    settings: Mapping[str, Any],
    image_size: int | tuple[int, int] | None,
    with_text_encoder: bool,
) -> DenseCLIP:
    activation = weights.activation
    visual = Sizes(weights.visual, "CLIP")
    encoder = image_encoder_config(visual, "", weights.num_heads, activation)
    text, state_dict = None, {f"image_encoder.{key}": v for key, v in weights.visual.items()}
    if with_text_encoder:
        sizes = Sizes(weights.text, "CLIP")
        text = text_encoder_config(sizes, "", weights.text_heads, activation)
        state_dict |= {f"text_encoder.{key}": value for key, value in weights.text.items()}
    native = encoder.grid_side * encoder.patch_size
    side = native if image_size is None else image_size
    size_hw = side if isinstance(side, tuple) else (side, side)
    config = DenseCLIPConfig(image_encoder=encoder, text_encoder=text, size_hw=size_hw, **settings)
    with torch.device("meta"):
        model = DenseCLIP(config)
    load_weights(model, state_dict, architecture="CLIP")
    return model.eval().requires_grad_(False)
