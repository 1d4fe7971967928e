"""ZegFormer from CLIP weights and a pretrained or untrained backbone, to be trained.

Source:
    Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError
from zsseg_rt.models.clip.weights import image_config, text_config
from zsseg_rt.models.input_checks import read_class_indices
from zsseg_rt.models.zegformer.backbone import BackboneNorm, NormedConv, ResNet, ResNetConfig
from zsseg_rt.models.zegformer.config import ZegFormerConfig
from zsseg_rt.models.zegformer.decoder import NUM_GROUPS, QueryDecoderConfig
from zsseg_rt.models.zegformer.fusion import Fusion
from zsseg_rt.models.zegformer.model import ZegFormer
from zsseg_rt.models.zegformer.regions import RegionStyle
from zsseg_rt.torch_files.checkpoints import check_float32, load_checkpoint, load_weights
from zsseg_rt.torch_files.clip_weights import ClipSource, ClipWeights

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
        fusion: Who decides; see :class:`zsseg_rt.models.zegformer.config.ZegFormerConfig`.
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
