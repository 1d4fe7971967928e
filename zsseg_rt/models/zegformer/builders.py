"""ZegFormer from official checkpoints."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.models.clip.towers import ImageEncoderConfig, TextEncoderConfig
from zsseg_rt.models.clip.weights import (
    image_config,
    image_encoder_config,
    text_config,
    text_encoder_config,
)
from zsseg_rt.models.functional import read_class_indices
from zsseg_rt.models.zegformer.backbone import BackboneNorm, NormedConv, ResNet, ResNetConfig
from zsseg_rt.models.zegformer.decoder import NUM_GROUPS, QueryDecoderConfig, RegionStyle
from zsseg_rt.models.zegformer.model import Fusion, ZegFormer, ZegFormerConfig, fusion_of_flags
from zsseg_rt.torch_files.checkpoints import Sizes, check_float32, load_checkpoint, load_weights
from zsseg_rt.torch_files.clip_weights import Activation, ClipSource, ClipWeights

_CLIP = "sem_seg_head.predictor.clip_model."
_STAGES = ("res2", "res3", "res4", "res5")
# The loss's class weights fit the training vocabulary; the means are constants in this package.
_UNUSED_KEYS = (
    r"criterion\..*",
    r"(clip_)?pixel_(mean|std)",
    r".*\.num_batches_tracked",
)


@dataclass(frozen=True, kw_only=True)
class OfficialZegFormer:
    """Builds ZegFormer from an official checkpoint; sizes are read from shapes.

    Training checkpoints hold no CLIP: its weights are OpenAI's ViT-B/16, given as ``clip``.
    ``criterion.empty_weight`` is ignored. CLIP's tensors may be float16, as the official code
    runs them; they are converted to float32.

    Attributes:
        seen_classes: Rows of the class embeddings whose classes were trained on. Official: 0 to
            14 for VOC, 0 to 155 for COCO-Stuff in ZegFormer's order. Empty: no class was.
        num_heads: Heads of the query decoder.
        calibration: What is subtracted from seen classes' score maps; 0 or less for nothing.
        fusion: Who decides; see :class:`zsseg_rt.models.zegformer.model.ZegFormerConfig`. None is
            what the three official flags below say; with a value, leave the flags out.
        ensemble: Whether the text branch and CLIP decide together.
        ensemble_all_classes: Whether they do so with the same weights for all classes.
        clip_classification: Whether CLIP classifies regions; if not, the text branch decides
            alone. None means yes, except for a checkpoint without CLIP whose branches should not
            decide together.
        region_style: What CLIP is shown of each segment: ``"cropmask"``, ``"mask"`` or ``"crop"``.
        region_batch: Regions that are cut out and encoded at once; limits memory use.
        clip: CLIP's weights; replaces those of the checkpoint.
        clip_heads: Heads of CLIP's image tower; None is as ``clip`` says, or one per 64 channels.
        text_heads: Heads of CLIP's text tower; likewise.
        dropout: Dropout in the query decoder, in training.
    """

    seen_classes: Sequence[int] = ()
    num_heads: int = 8
    calibration: float = 0.1
    fusion: Fusion | None = None
    ensemble: bool = True
    ensemble_all_classes: bool = False
    clip_classification: bool | None = None
    region_style: RegionStyle = "cropmask"
    region_batch: int = 10
    clip: ClipWeights | None = None
    clip_heads: int | None = None
    text_heads: int | None = None
    dropout: float = 0.1

    def build(self, state_dict: Mapping[str, Tensor]) -> ZegFormer:
        """Make the model, in evaluation mode; the weights are copies.

        Shapes:
            state_dict: Official keys, float32; see
                :func:`zsseg_rt.torch_files.checkpoints.load_checkpoint`.
        """
        state_dict = _with_clip(state_dict, self.clip)
        check_float32(state_dict, "zegformer")
        sizes = Sizes(state_dict, "zegformer")
        has_clip = sizes.has(_CLIP)
        fusion = self._fusion(has_clip)
        backbone = _backbone_config(sizes)
        decoder = _decoder_config(sizes, self.num_heads, self.dropout)
        if fusion != "segments" and not has_clip:
            raise _no_clip()
        towers = None
        if has_clip:
            towers = _clip_configs(sizes, decoder, self.clip, self.clip_heads, self.text_heads)
        config = ZegFormerConfig(
            backbone=backbone,
            decoder=decoder,
            clip_image=towers[0] if towers else None,
            clip_text=towers[1] if towers else None,
            seen_classes=read_class_indices("seen_classes", self.seen_classes),
            calibration=self.calibration,
            fusion=fusion,
            region_style=self.region_style,
            region_batch=self.region_batch,
        )
        with torch.device("meta"):
            model = ZegFormer(config)
        load_weights(model, state_dict, architecture="zegformer", ignored=_UNUSED_KEYS)
        return model.eval()

    def _fusion(self, has_clip: bool) -> Fusion:
        """Who decides: as given, or as the official flags say."""
        together = (self.ensemble, self.ensemble_all_classes)
        if self.fusion is None:
            looks = has_clip or any(together)
            return fusion_of_flags(
                ensemble=self.ensemble,
                ensemble_all_classes=self.ensemble_all_classes,
                clip_classification=looks
                if self.clip_classification is None
                else self.clip_classification,
            )
        if (*together, self.clip_classification) != (True, False, None):
            raise ArgumentError(
                f"fusion: expected none besides the official flags ensemble, ensemble_all_classes "
                f"and clip_classification, got {self.fusion!r}. Leave the flags out."
            )
        return self.fusion


def _no_clip() -> CheckpointError:
    return CheckpointError(
        f"state_dict: expected CLIP's weights under '{_CLIP}', got none, as in every checkpoint of "
        "training. Pass clip=load_clip(FILE) with OpenAI's ViT-B-16.pt (--clip FILE), or "
        "fusion='segments' for the text branch alone (--fusion segments)."
    )


def _with_clip(state_dict: Mapping[str, Tensor], clip: ClipWeights | None) -> dict[str, Tensor]:
    """CLIP's tensors as float32, from ``clip`` if given."""
    if clip is None:
        own = {k: v for k, v in state_dict.items() if k.startswith(_CLIP) and hasattr(v, "float")}
        return {**state_dict, **{key: value.float() for key, value in own.items()}}
    rest = {key: value for key, value in state_dict.items() if not key.startswith(_CLIP)}
    visual = {f"{_CLIP}visual.{key}": value for key, value in clip.visual.items()}
    text = {_CLIP + key: value for key, value in clip.text.items()}
    return rest | visual | text | {_CLIP + "logit_scale": torch.tensor(math.log(100.0))}


def _clip_configs(
    sizes: Sizes,
    decoder: QueryDecoderConfig,
    clip: ClipWeights | None,
    clip_heads: int | None,
    text_heads: int | None,
) -> tuple[ImageEncoderConfig, TextEncoderConfig]:
    activation: Activation = "quick_gelu"
    if clip is not None:
        activation = clip.activation
        clip_heads = clip.num_heads if clip_heads is None else clip_heads
        text_heads = clip.text_heads if text_heads is None else text_heads
    image = image_encoder_config(sizes, _CLIP + "visual.", clip_heads, activation)
    if image.embed_dim != decoder.embed_dim:
        raise CheckpointError(
            f"{_CLIP}visual.proj: expected the width {decoder.embed_dim} of the text branch, got "
            f"{image.embed_dim}. Use the CLIP that the checkpoint was trained with, ViT-B/16."
        )
    return image, text_encoder_config(sizes, _CLIP, text_heads, activation)


def _backbone_config(sizes: Sizes) -> ResNetConfig:
    return ResNetConfig(
        stem_width=sizes.of("backbone.stem.conv1.weight", 4)[0],
        widths=tuple(sizes.of(f"backbone.{name}.0.conv1.weight", 4)[0] for name in _STAGES),
        depths=tuple(sizes.count(f"backbone.{name}.") for name in _STAGES),
    )


def _decoder_config(sizes: Sizes, num_heads: int, dropout: float) -> QueryDecoderConfig:
    predictor = "sem_seg_head.predictor."
    layers = predictor + "transformer.decoder.layers."
    mask_dim, conv_dim, _, _ = sizes.of("sem_seg_head.pixel_decoder.mask_features.weight", 4)
    num_queries, hidden_dim = sizes.of(predictor + "query_embed.weight", 2)
    if conv_dim % NUM_GROUPS:
        raise CheckpointError(
            f"sem_seg_head.pixel_decoder.mask_features.weight: expected a multiple of {NUM_GROUPS} "
            f"input channels, got {conv_dim}. Check that the checkpoint is from this architecture."
        )
    return QueryDecoderConfig(
        conv_dim=conv_dim,
        mask_dim=mask_dim,
        hidden_dim=hidden_dim,
        num_queries=num_queries,
        num_layers=sizes.count(layers),
        num_heads=sizes.heads("num_heads", num_heads, hidden_dim),
        ffn_dim=sizes.of(layers + "0.linear1.weight", 2)[0],
        mask_layers=sizes.count(predictor + "mask_embed.layers."),
        embed_dim=sizes.of(predictor + "bg_feature", 2)[1],
        dropout=dropout,
    )


BACKBONES: Mapping[str, ResNetConfig] = {
    "resnet50": ResNetConfig(),
    "resnet101": ResNetConfig(depths=(3, 4, 23, 3)),
}

_NOT_USED = (r"fc\..*", r".*\.num_batches_tracked")
_RENAMED = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


@dataclass(frozen=True, kw_only=True)
class ZegFormerStart(ClipSource):
    """Starts ZegFormer: CLIP frozen, decoders initialised officially, the backbone as given.

    Convolutions of the pixel decoder and the projection of its coarsest map are Xavier-uniform as
    in Caffe2 (``sqrt(3 / fan_in)``), an untrained backbone is Kaiming-normal by fan-out as in
    detectron2, "no object" is uniform within ``1 / sqrt(D)``.

    Regions are shown to CLIP at its native size, and its embedding width is also the segments'.

    Attributes:
        backbone: ``"resnet50"``, ``"resnet101"``, or the sizes of another ResNet.
        backbone_weights: A ``state_dict`` file of torchvision's ResNet of these sizes, such as
            ``resnet50-0676ba61.pth``; its classifier is not used. None starts untrained.
        backbone_norm: Whether batch norms are ``"frozen"`` or ``"learned"``. None freezes
            pretrained ones, as the official code does, and lets untrained ones learn.
        queries: Number Q of proposed segments.
        decoder: Sizes of the decoders; None is the official ones. Its ``num_queries`` is
            ``queries``, its ``embed_dim`` CLIP's.
        image_size: Short side of images in evaluation, in pixels.
        seen_classes: Rows of the class embeddings that are trained on.
        calibration: What is subtracted from seen classes' score maps; 0 or less for nothing.
        fusion: Who decides; see :class:`zsseg_rt.models.zegformer.model.ZegFormerConfig`.
        region_style: What CLIP is shown of each segment: ``"cropmask"``, ``"mask"`` or ``"crop"``.
        region_batch: Regions that are cut out and encoded at once; limits memory use.
    """

    backbone: str | ResNetConfig = "resnet50"
    backbone_weights: str | Path | None = None
    backbone_norm: BackboneNorm | None = None
    queries: int = 100
    decoder: QueryDecoderConfig | None = None
    image_size: int = 512
    seen_classes: Sequence[int] = ()
    calibration: float = 0.1
    fusion: Fusion = "seen_and_unseen"
    region_style: RegionStyle = "cropmask"
    region_batch: int = 10

    def build(self) -> ZegFormer:
        """Make the model, in evaluation mode, with both towers of CLIP."""
        weights = self.load()
        image = image_config(weights)
        norm = self.backbone_norm or ("learned" if self.backbone_weights is None else "frozen")
        config = ZegFormerConfig(
            backbone=replace(_backbone(self.backbone), norm=norm),
            decoder=_decoder(self.decoder, self.queries, image.embed_dim),
            clip_image=image,
            clip_text=text_config(weights),
            seen_classes=read_class_indices("seen_classes", self.seen_classes),
            calibration=self.calibration,
            fusion=self.fusion,
            region_style=self.region_style,
            region_batch=self.region_batch,
            image_size=self.image_size,
        )
        model = ZegFormer(config)
        _initialise(model)
        _load_clip_model(model, weights)
        if self.backbone_weights is not None:
            found = load_checkpoint(self.backbone_weights)
            load_torchvision_backbone(model.backbone, found)
        return model.eval()


def load_torchvision_backbone(backbone: ResNet, state_dict: Mapping[str, Tensor]) -> None:
    """Copy a torchvision ResNet into a backbone of the same sizes; its classifier is left out.

    Shapes:
        state_dict: torchvision's keys, float32: ``conv1.weight``, ``layer1.0.bn1.weight`` ...
    """
    renamed = {_official_key(key): value for key, value in state_dict.items()}
    check_float32(renamed, "torchvision's ResNet")
    load_weights(backbone, renamed, architecture="torchvision's ResNet", ignored=_NOT_USED)


def _official_key(key: str) -> str:
    key = re.sub(r"^layer(\d+)\.", lambda found: f"res{int(found[1]) + 1}.", key)
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


def _backbone(backbone: str | ResNetConfig) -> ResNetConfig:
    if isinstance(backbone, ResNetConfig):
        return backbone
    check_choice("backbone", backbone, BACKBONES)
    return BACKBONES[backbone]


def _decoder(
    decoder: QueryDecoderConfig | None, queries: int, embed_dim: int
) -> QueryDecoderConfig:
    sizes = replace(decoder or QueryDecoderConfig(), num_queries=queries, embed_dim=embed_dim)
    if sizes.conv_dim % NUM_GROUPS:
        raise ArgumentError(
            f"decoder.conv_dim: expected a multiple of {NUM_GROUPS}, the groups of its norms, got "
            f"{sizes.conv_dim}. Use {NUM_GROUPS * (sizes.conv_dim // NUM_GROUPS + 1)}."
        )
    if sizes.num_heads < 1 or sizes.hidden_dim % sizes.num_heads or sizes.hidden_dim % 4:
        raise ArgumentError(
            f"decoder.hidden_dim: expected a multiple of 4 and of num_heads {sizes.num_heads}, got "
            f"{sizes.hidden_dim}. Change one of them."
        )
    counts = sizes.num_queries, sizes.num_layers, sizes.mask_layers, sizes.mask_dim, sizes.ffn_dim
    if min(counts) < 1:
        raise ArgumentError(
            f"queries: expected positive numbers of queries, layers and channels, got {counts}."
        )
    return sizes


@torch.no_grad()
def _initialise(model: ZegFormer) -> None:
    """What the official code initialises differently from torch; norms start as identity."""
    for module in model.backbone.modules():
        if isinstance(module, NormedConv):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    head = model.sem_seg_head
    for module in (*head.pixel_decoder.modules(), head.predictor.input_proj):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _load_clip_model(model: ZegFormer, weights: ClipWeights) -> None:
    assert model.clip_model is not None
    tensors = {f"visual.{key}": value for key, value in weights.visual.items()} | weights.text
    scale = math.log(100.0) if weights.logit_scale is None else weights.logit_scale
    tensors["logit_scale"] = torch.tensor(scale)
    load_weights(model.clip_model, tensors, architecture="CLIP")
