"""CAT-Seg from official checkpoints, and from CLIP weights to be trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.models.cat_seg.aggregator import AggregatorConfig
from zsseg_rt.models.cat_seg.model import CatSeg, CatSegConfig
from zsseg_rt.models.clip.image_encoder import ImageEncoderConfig
from zsseg_rt.models.clip.weights import (
    image_config,
    image_encoder_config,
    text_config,
    text_encoder_config,
)
from zsseg_rt.torch_files.checkpoints import Sizes, check_float32, load_weights
from zsseg_rt.torch_files.clip_difference import CLIP_PREFIX as _CLIP
from zsseg_rt.torch_files.clip_difference import split_weights
from zsseg_rt.torch_files.clip_weights import ClipSource

_HEAD = "sem_seg_head.predictor.transformer."
_TEXT = r"sem_seg_head\.predictor\.clip_model\.(?!visual\.|logit_scale)"
_UNUSED = r"text_encoder\.logit_scale|aggregator\.layers\.\d\.swin_block\.block_2\.attn_mask"


@dataclass(frozen=True, kw_only=True)
class OfficialCatSeg:
    """Builds CAT-Seg B from an official checkpoint; sizes are read from shapes.

    Attributes:
        num_heads: Heads of the head.
        window: Side of its attention windows, in patches.
        taps: Blocks of the image tower that guide the decoder.
        view: Side of the image in pixels.
        pooling: Pooling before the attention between classes; at test it is 1x1.
        padding: Classes that shorter vocabularies are padded to.
        most_classes: Classes that the head looks at; None is all. See :class:`CatSegConfig`.
        clip_heads: Heads of the image tower; None is one per 64 channels.
        text_heads: Heads of the text tower; None is one per 64 channels.
        with_text_encoder: Whether to build the text tower when the checkpoint holds one.
    """

    num_heads: int = 4
    window: int = 12
    taps: tuple[int, int] = (3, 7)
    view: int = 384
    pooling: tuple[int, int] = (1, 1)
    padding: int = 256
    most_classes: int | None = 256
    clip_heads: int | None = None
    text_heads: int | None = None
    with_text_encoder: bool = True

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
        _refuse_others(state_dict)
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
        _check_masks(state_dict, self.view // encoder.patch_size, self.window)
        with torch.device("meta"):
            model = CatSeg(config)
        ignored = (_UNUSED, *(() if text else (r"text_encoder\..*",)))
        load_weights(model, _renamed(state_dict), architecture="cat_seg", ignored=ignored)
        return model.eval()

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
    """Starts CAT-Seg from CLIP weights, with a head that is not trained yet.

    Attributes:
        view: Side of the image in pixels.
        aggregator: Sizes of the head, whose ``embed_dim`` and ``width`` become CLIP's; None is the
            official ones, with windows of half the grid.
        taps: Blocks of the image tower that guide the decoder; None is as early as officially.
    """

    view: int = 384
    aggregator: AggregatorConfig | None = None
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
        model = CatSeg(config)
        towers = {"image_encoder": weights.visual, "text_encoder": weights.text}
        given = {f"{t}.{k}": v for t, w in towers.items() for k, v in split_weights(w).items()}
        load_weights(model, model.state_dict() | given, architecture="CLIP")
        return model.eval()


def _renamed(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {_CLIP + "visual.": "image_encoder.", _CLIP: "text_encoder.", _HEAD: "aggregator."}
    found = {}
    for key, value in state_dict.items():
        prefix = next((prefix for prefix in names if key.startswith(prefix)), "")
        found[names.get(prefix, "") + key.removeprefix(prefix)] = value
    return found


def _refuse_others(state_dict: Mapping[str, Tensor]) -> None:
    """Refuse the first generation, which had two backbones, and the large variant."""
    needed = ("upsample1.weight", _HEAD + "layers.0.attention.padding_tokens")
    earlier = any(key.startswith("backbone.") for key in state_dict)
    if earlier or (
        any(key.startswith(_HEAD) for key in state_dict)
        and any(key not in state_dict for key in needed)
    ):
        raise CheckpointError(
            "state_dict: expected CAT-Seg as published with its paper in 2024, got an earlier "
            f"generation, without '{needed[0]}' or with a second backbone. Get the authors' newer "
            "weights (zsseg-rt fetch cat-seg-b16)."
        )
    patches = state_dict.get(_CLIP + "visual.conv1.weight")
    if patches is not None and patches.ndim == 4 and patches.shape[3] == 14:
        raise CheckpointError(
            f"{_CLIP}visual.conv1.weight: expected CAT-Seg B, whose patches are 16 pixels wide, "
            "got 14, as in CAT-Seg L. Use the B weights."
        )


def _check_masks(state_dict: Mapping[str, Tensor], grid: int, window: int) -> None:
    """Stored masks follow from the windows; refuse those of others."""
    expected = ((grid // window) ** 2, window**2, window**2)
    for key, value in state_dict.items():
        if key.endswith("attn_mask") and tuple(value.shape) != expected:
            raise CheckpointError(
                f"{key}: expected {list(expected)} for windows of {window} in a grid of {grid}, "
                f"got {list(value.shape)}. Pass the checkpoint's window and view."
            )
