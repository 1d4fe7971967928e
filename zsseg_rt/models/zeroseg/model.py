"""ZeroSeg: an MAE student that learns segments from CLIP's image encoder alone.

Nothing official can be loaded: neither code nor weights were published. What the paper leaves open
is an option of :class:`zsseg_rt.models.zeroseg.config.ZeroSegConfig`, whose defaults
``docs/zeroseg.md`` explains.

Source:
    Chen et al., "Exploring Open-Vocabulary Semantic Segmentation from CLIP Vision Encoder
    Distillation Only", ICCV 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from zsseg_rt import ops
from zsseg_rt.models.base import SegmentationModel, input_image
from zsseg_rt.models.clip.text_encoder import TextEncoder
from zsseg_rt.models.sliding import Prepared, SlideSettings, check_picture, score_windows
from zsseg_rt.models.zeroseg.config import ZeroSegConfig
from zsseg_rt.models.zeroseg.encoder import ReconstructionHead, StudentEncoder
from zsseg_rt.models.zeroseg.grouping import (
    GroupingBlock,
    SegmentationHead,
    SegmentOutput,
)
from zsseg_rt.models.zeroseg.labels import (
    check_threshold,
    class_scores,
    pixel_segments,
    spread_scores,
)

LONGEST_SIDE = 2048  # GroupViT's limit for images of extreme proportions


class _Predictor(Prepared, Protocol):
    def predict(
        self, image: Tensor, text_embeds: Tensor, *, background_threshold: float | None
    ) -> Tensor: ...


@torch.no_grad()
def segment_predict(
    model: _Predictor,
    rgb: NDArray[np.uint8],
    text_embeds: Tensor,
    *,
    short_side: int = 448,
    crop_size: int | None = 448,
    stride: int = 224,
    background_threshold: float | None = None,
) -> Tensor:
    """Score every class at every pixel of a whole image, as GroupViT's evaluation does.

    Resize so that the short side is ``short_side`` (and the long one at most 2048), normalise,
    average the class scores of overlapping windows, upsample them to the image.

    Shapes:
        rgb: uint8 ``[H, W, 3]``, RGB.
        text_embeds: Class embeddings of the teacher's text encoder, ``[C, D]``.

    Returns:
        ``[C, H, W]`` at the image's size; with a threshold ``[1 + C, H, W]``, background first.
        ``.argmax(0)`` gives labels.
    """
    check_threshold(background_threshold)
    check_picture(rgb)
    height, width = rgb.shape[:2]
    limit = max(1, LONGEST_SIDE * min(height, width) // max(height, width))
    crop = LONGEST_SIDE if crop_size is None else crop_size
    windows = SlideSettings(short_side=min(short_side, limit), crop_size=crop, stride=stride)

    def predict(window: Tensor) -> Tensor:
        return model.predict(window, text_embeds, background_threshold=background_threshold)

    return score_windows(model, predict, rgb, windows)


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SegmentTokens(NamedTuple):
    """What a forward pass returns: the segments of an image.

    Attributes:
        segment_embeds: ``[B, G, D]``, not normalised.
        image_embed: ``[B, D]``, not normalised.
        group_map: Share of every segment in every patch, ``[B, G, gh, gw]``; sums to 1 over G.
    """

    segment_embeds: Tensor
    image_embed: Tensor
    group_map: Tensor


class ZeroSeg(SegmentationModel):
    """Student encoder, segmentation head, and a reconstruction head for training.

    Images are RGB, divided by 255 and normalised with :attr:`image_mean` and :attr:`image_std`.

    Attributes:
        image_mean: Mean of R, G, B, in ``[0, 1]``.
        image_std: Standard deviation of R, G, B, in ``[0, 1]``.
        decoder: The reconstruction head, or None.
        text_encoder: The teacher's text tower if one was added; not trained.
    """

    architecture = "zeroseg"
    config: ZeroSegConfig

    def __init__(self, config: ZeroSegConfig) -> None:
        super().__init__()
        self.config = config
        self.image_mean, self.image_std = IMAGENET_MEAN, IMAGENET_STD
        self.encoder = StudentEncoder(
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            patch_size=config.patch_size,
            grid_side=config.grid_side,
        )
        self.decoder = _reconstruction_head(config) if config.decoder_layers else None
        self.seg = SegmentationHead(config)
        self.text_encoder: TextEncoder | None = None
        _initialise(self)

    @property
    def size_hw(self) -> tuple[int, int]:
        """The configured input size in pixels."""
        return self.config.size_hw

    @property
    def windows(self) -> SlideSettings:
        """GroupViT's: windows as large as the short side, in steps of half a window."""
        side = min(self.config.size_hw)
        return SlideSettings(short_side=side, crop_size=side, stride=side // 2)

    def label(
        self, rgb: NDArray[np.uint8], text_embeds: Tensor, region_embeds: Tensor | None = None
    ) -> Tensor:
        """Label every pixel by :meth:`segment`; see :meth:`SegmentationModel.label`."""
        image = input_image(self, rgb, text_embeds.device)
        return self.segment(image, text_embeds, (rgb.shape[0], rgb.shape[1]))[0][0]

    def slide(self, rgb: NDArray[np.uint8], text_embeds: Tensor, windows: SlideSettings) -> Tensor:
        """Label every pixel by :func:`segment_predict`; see :meth:`SegmentationModel.slide`."""
        threshold = self.config.background_threshold
        scores = segment_predict(
            self, rgb, text_embeds, **vars(windows), background_threshold=threshold
        )
        return scores.argmax(dim=0) - int(threshold is not None)  # the background comes first

    def forward(self, image: Tensor) -> SegmentTokens:
        """Find the segments of images; in evaluation mode the result is deterministic.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``; any size of at least one patch.
                A remainder below one patch at the right and the bottom is ignored.
        """
        output = self.seg(self.encoder(image).patch_tokens)
        grid_hw = self.encoder.grid_hw((image.shape[2], image.shape[3]))
        return segment_tokens(output, grid_hw)

    def predict(
        self, image: Tensor, text_embeds: Tensor, *, background_threshold: float | None = None
    ) -> Tensor:
        """Scores of every class at every pixel: those of the pixel's segment.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.
            text_embeds: Class embeddings of the teacher's text encoder, ``[C, D]``.

        Returns:
            ``[B, C, H, W]`` in [0, 1], or ``[B, 1 + C, H, W]`` with the background first.
        """
        tokens = self(image)
        scores = self.class_scores(tokens, text_embeds)
        segments = pixel_segments(tokens.group_map, (image.shape[2], image.shape[3]))
        return spread_scores(scores, segments, background_threshold)

    @torch.no_grad()
    def segment(
        self, image: Tensor, text_embeds: Tensor, out_hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Label every pixel as the engine does: one pass over the whole image, any output size.

        The shares are upsampled to ``out_hw`` directly. A segment that is background by the
        configured ``background_threshold`` is unknown.

        Shapes:
            image: Normalised RGB planes, float ``[B, 3, H, W]``.
            text_embeds: Class embeddings of the teacher's text encoder, ``[C, D]``.

        Returns:
            Labels int64 ``[B, *out_hw]``, -1 for unknown, and each pixel's score.
        """
        tokens = self(image)
        best, classes = self.class_scores(tokens, text_embeds).max(dim=2)
        threshold = self.config.background_threshold
        if threshold is not None:
            limit = best.amax(dim=1, keepdim=True).clamp(max=threshold)
            classes = classes.masked_fill(best < limit, -1)
        maps = tokens.group_map.detach().float().cpu().numpy()
        winners = np.asarray(ops.upsample_argmax(maps, out_hw)[0], np.int64)
        segments = torch.from_numpy(winners).flatten(1).to(classes.device)
        labels, scores = classes.gather(1, segments), best.gather(1, segments)
        return torch.unflatten(labels, 1, out_hw), torch.unflatten(scores, 1, out_hw)

    def class_scores(self, tokens: SegmentTokens, text_embeds: Tensor) -> Tensor:
        """Scores of every class for every segment ``[B, G, C]`` by the configured rule."""
        return class_scores(
            tokens.segment_embeds, tokens.image_embed, text_embeds, self.config.rule
        )


def segment_tokens(output: SegmentOutput, grid_hw: tuple[int, int]) -> SegmentTokens:
    """What the segmentation head gives, with groups as maps."""
    group_map = torch.unflatten(output.group_map(), 2, grid_hw)
    return SegmentTokens(output.segment_embeds, output.image_embed, group_map)


def _reconstruction_head(config: ZeroSegConfig) -> ReconstructionHead:
    return ReconstructionHead(
        encoder_width=config.width,
        width=config.decoder_width,
        num_layers=config.decoder_layers,
        num_heads=config.decoder_heads,
        patch_size=config.patch_size,
        grid_side=config.grid_side,
    )


def _initialise(model: ZeroSeg) -> None:
    """MAE's rules for encoder and heads; GroupViT's for group tokens."""
    parts: Sequence[nn.Module | None] = (model.encoder, model.decoder, model.seg)
    for part in parts:
        for module in part.modules() if part is not None else ():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
    patches = model.encoder.patch_embed.proj.weight
    nn.init.xavier_uniform_(patches.view(patches.shape[0], -1))
    nn.init.normal_(model.encoder.cls_token, std=0.02)
    if model.decoder is not None:
        nn.init.normal_(model.decoder.mask_token, std=0.02)
    first = model.seg.stages[0]
    assert not isinstance(first, GroupingBlock)
    nn.init.trunc_normal_(first.group_token, std=0.02)  # type: ignore[arg-type]
