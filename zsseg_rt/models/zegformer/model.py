"""ZegFormer: class-agnostic segments, classified by text and again by CLIP.

Source:
    Ding et al., "Decoupling Zero-Shot Semantic Segmentation", CVPR 2022.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from zsseg_rt.common.checks import check_choice, check_range
from zsseg_rt.errors import ArgumentError, CheckpointError, ShapeError
from zsseg_rt.models.base import (
    LONGEST_SIDE,
    SegmentationModel,
    check_images,
    check_seen,
    resize_rgb,
)
from zsseg_rt.models.clip.towers import ImageEncoderConfig, TextEncoder, TextEncoderConfig, unit
from zsseg_rt.models.clip.weights import (
    ClipSource,
    image_config,
    image_encoder_config,
    load_into,
    text_config,
    text_encoder_config,
)
from zsseg_rt.models.functional import check_text_embeds, shared_fields
from zsseg_rt.models.zegformer.decoder import (
    NUM_GROUPS,
    REGION_STYLES,
    BackboneNorm,
    Clip,
    NormedConv,
    PixelDecoder,
    QueryDecoderConfig,
    RegionStyle,
    ResNet,
    ResNetConfig,
    SegmentPredictor,
    Segments,
    crop_regions,
)
from zsseg_rt.networks.zegformer import CLIP, IMAGE_MEAN, IMAGE_STD, REGION_MEAN, REGION_STD
from zsseg_rt.torch_files.checkpoints import check_float32, load_checkpoint, load_weights
from zsseg_rt.torch_files.clip_arrays import ClipTensors
from zsseg_rt.torch_files.clip_layouts import Settings
from zsseg_rt.torch_files.official import (
    REGION_TEMPLATES,
    check_zegformer,
    scaled_clip,
    with_clip,
)
from zsseg_rt.torch_files.shapes import Checked, divisor

Fusion = Literal["seen_and_unseen", "all_classes", "regions", "segments"]
FUSIONS: tuple[str, ...] = get_args(Fusion)

_DIVISOR = 32  # of the sides that images are padded to
_TRUSTED = 2 / 3  # exponent of the branch that is trusted more; the other gets the rest


@dataclass(frozen=True, kw_only=True)
class ZegFormerConfig:
    """Everything that defines a ZegFormer model besides its weights."""

    backbone: ResNetConfig = field(default_factory=ResNetConfig)  # Backbone
    # Pixel decoder and query decoder
    decoder: QueryDecoderConfig = field(default_factory=QueryDecoderConfig)
    # CLIP's image tower, or None for a model without CLIP
    clip_image: ImageEncoderConfig | None = None
    # CLIP's text tower; set if and only if clip_image is
    clip_text: TextEncoderConfig | None = None
    # Rows of the class embeddings whose classes were trained on. Empty: no class
    seen_classes: tuple[int, ...] = ()
    # What is subtracted from the score maps of seen classes (official GZERO_CALIBRATE); nothing if
    # zero or less
    calibration: float = 0.1
    # Who decides. "seen_and_unseen": the text branch and CLIP together, weighted differently for
    # seen and unseen classes. "all_classes": together, with the weights of unseen classes for every
    # class. "regions": CLIP alone, at regions. "segments": the text branch alone; CLIP classifies
    # no regions
    fusion: Fusion = "seen_and_unseen"
    # What CLIP is shown of each segment (official CLIP_CLS_STYLE); see crop_regions
    region_style: RegionStyle = "cropmask"
    region_batch: int = 10  # Regions that are cut out and encoded at once; limits memory use
    # Short side that images are resized to, in pixels (official MIN_SIZE_TEST: 512, for COCO-Stuff
    # 640)
    image_size: int = 512

    def __post_init__(self) -> None:
        check_choice("fusion", self.fusion, FUSIONS)
        check_choice("region_style", self.region_style, REGION_STYLES)
        check_range(self, "region_batch", "image_size", least=1)


@dataclass(frozen=True)
class ZegFormerOutput:
    """The result of a forward pass."""

    pred_logits: Tensor  # The text branch's class logits, [B, Q, C + 1]; the last is "no object"
    pred_masks: Tensor  # Mask logits at a quarter of the padded size, [B, Q, h / 4, w / 4]
    # CLIP's class logits followed by the text branch's "no object", [B, Q, C + 1]; None without
    # CLIP
    clip_logits: Tensor | None
    class_scores: Tensor  # Each segment's class weights after fusion, [B, Q, C]
    sem_seg: list[Tensor]  # Score maps of each image, [C, H, W]


class SegmentationHead(nn.Module):
    """Both decoders."""

    def __init__(
        self, config: QueryDecoderConfig, channels: tuple[int, ...], clip: Clip | None
    ) -> None:
        super().__init__()
        self.pixel_decoder = PixelDecoder(channels, config.conv_dim, config.mask_dim)
        self.predictor = SegmentPredictor(config, channels[-1], clip)

    def forward(self, maps: list[Tensor], text_features: Tensor) -> Segments:
        """Propose the last layer's segments; see :class:`SegmentPredictor`."""
        queries = self.predictor.decode(maps[-1])[-1]
        segments = self.predictor(queries, self.pixel_decoder(maps), text_features)
        return cast(Segments, segments)


class ZegFormer(SegmentationModel):
    """The complete model, with the official checkpoints' names. Its CLIP is frozen.

    A class's embedding is the mean of its synonyms'. (Officially the mean over all prompts of all
    synonyms at once, which differs by 3e-4 with eight prompts. At run time the best synonym
    counts instead.)
    """

    architecture = "zegformer"
    averages_synonyms: ClassVar[bool] = True
    config: ZegFormerConfig

    def __init__(self, config: ZegFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNet(config.backbone)
        clip = None
        if config.clip_image is not None and config.clip_text is not None:
            clip = Clip(config.clip_image, config.clip_text)
        self.sem_seg_head = SegmentationHead(config.decoder, config.backbone.channels, clip)
        if self.clip_model is not None:
            self.clip_model.requires_grad_(False)

    @property
    def clip_model(self) -> Clip | None:
        return self.sem_seg_head.predictor.clip_model

    @property
    def text_encoder(self) -> TextEncoder | None:
        return self.clip_model

    @property
    def size_hw(self) -> tuple[int, int]:
        """A square of ``image_size``; the official evaluation keeps an image's shape."""
        return self.config.image_size, self.config.image_size

    @property
    def region_templates(self) -> tuple[str, ...]:
        """The official prompts of the CLIP branch; empty if CLIP classifies no regions."""
        return () if self.config.fusion == "segments" else REGION_TEMPLATES

    def label(
        self, rgb: NDArray[np.uint8], text_embeds: Tensor, region_embeds: Tensor | None = None
    ) -> Tensor:
        """Label in the image's own shape, as the official evaluation; no pixel is unknown."""
        resized = torch.from_numpy(resize_rgb(rgb, self.config.image_size))
        planes = resized.permute(2, 0, 1).to(text_embeds.device)
        out_hw = (rgb.shape[0], rgb.shape[1])
        return self([planes], text_embeds, region_embeds, [out_hw]).sem_seg[0].argmax(dim=0)  # type: ignore[no-any-return]

    def describe_input(self) -> dict[str, Any]:
        """Side lengths that images are resized to; see :meth:`SegmentationModel.describe_input`."""
        return {"short_side": self.config.image_size, "long_side": LONGEST_SIDE}

    def forward(
        self,
        images: Sequence[Tensor],
        text_features: Tensor,
        text_features_clip: Tensor | None,
        out_hw: Sequence[tuple[int, int]],
    ) -> ZegFormerOutput:
        """Segment images as the official evaluation does.

        Shapes:
            images: RGB images, uint8 ``[3, h, w]``, already resized. They are padded together.
            text_features: Class embeddings of the text branch, ``[C, D]``, unit norm.
            text_features_clip: Class embeddings of the CLIP branch, ``[C, D]``, unit norm;
                officially made with other prompts. May be None if CLIP classifies no regions.
        """
        self._check_inputs(images, text_features, text_features_clip, out_hw)
        out_hw = [(int(height), int(width)) for height, width in out_hw]
        planes = self.prepare(images, IMAGE_MEAN, IMAGE_STD)
        segments = self.propose(planes, text_features)
        clip_logits = None
        if self.config.fusion != "segments" and text_features_clip is not None:
            planes = self.prepare(images, REGION_MEAN, REGION_STD)
            clip_logits = self.classify_regions(planes, segments, text_features_clip)
        class_scores = self.fuse(segments.logits, clip_logits)
        padded_hw = (planes.shape[2], planes.shape[3])
        sem_seg = [
            self.score_maps(scores, masks, padded_hw, (image.shape[1], image.shape[2]), size)
            for scores, masks, image, size in zip(
                class_scores, segments.masks, images, out_hw, strict=True
            )
        ]
        return ZegFormerOutput(segments.logits, segments.masks, clip_logits, class_scores, sem_seg)

    def prepare(
        self, images: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]
    ) -> Tensor:
        """Normalise images and pad them with zeros at the right and bottom, ``[B, 3, H, W]``."""
        like = self.sem_seg_head.predictor.bg_feature
        sides = (max(image.shape[axis] for image in images) for axis in (1, 2))
        height, width = (-(-side // _DIVISOR) * _DIVISOR for side in sides)
        offset, scale = (
            torch.tensor(values, dtype=like.dtype, device=like.device).view(3, 1, 1)
            for values in (mean, std)
        )
        planes = like.new_zeros(len(images), 3, height, width)
        for plane, image in zip(planes, images, strict=True):
            plane[:, : image.shape[1], : image.shape[2]] = (image.to(like) - offset) / scale
        return planes

    def propose(self, planes: Tensor, text_features: Tensor) -> Segments:
        """Propose segments in planes ``[B, 3, H, W]`` for class embeddings ``[C, D]``."""
        return self.sem_seg_head(self.backbone(planes), text_features)  # type: ignore[no-any-return]

    def classify_regions(self, planes: Tensor, segments: Segments, text_features: Tensor) -> Tensor:
        """CLIP's class logits ``[B, Q, C + 1]`` of every segment's region in CLIP's planes."""
        clip = self.clip_model
        if clip is None:
            raise ArgumentError(
                "clip: expected a model with CLIP's weights to classify regions, got one without. "
                "Build it with clip=..., or with fusion='segments'."
            )
        style, side = self.config.region_style, clip.image_side
        rows = [
            clip.visual.encode_image(crop_regions(plane, batch, style=style, side=side))
            for plane, masks in zip(planes, segments.masks, strict=True)
            for batch in torch.split(masks, self.config.region_batch)
        ]
        embeds = torch.unflatten(torch.cat(rows), 0, segments.masks.shape[:2])
        logits = clip.logit_scale.exp() * unit(embeds) @ text_features.to(embeds).T
        return torch.cat([logits, segments.logits[..., -1:]], dim=-1)

    def fuse(self, pred_logits: Tensor, clip_logits: Tensor | None) -> Tensor:
        """Combine the two branches' logits ``[..., C + 1]``: class weights ``[..., C]`` in [0, 1].

        With p from the text branch and p' from CLIP, both softmaxes over classes and "no object":
        unseen classes get ``p^(1/3) p'^(2/3)``; seen ones ``p^(2/3) m^(1/3)``, m being the mean of
        p' over seen classes.
        """
        by_text = pred_logits.softmax(dim=-1)[..., :-1]
        fusion = self.config.fusion
        if clip_logits is None or fusion == "segments":
            return by_text
        by_clip = clip_logits.softmax(dim=-1)[..., :-1]
        if fusion == "regions":
            return by_clip
        fused = by_text ** (1 - _TRUSTED) * by_clip**_TRUSTED
        seen = self._seen(fused.shape[-1], fused.device)
        if fusion == "all_classes" or not seen.any():
            return fused
        mean = by_clip[..., seen].mean(dim=-1, keepdim=True)
        return torch.where(seen, by_text**_TRUSTED * mean ** (1 - _TRUSTED), fused)

    def score_maps(
        self,
        class_scores: Tensor,
        mask_logits: Tensor,
        padded_hw: tuple[int, int],
        image_hw: tuple[int, int],
        out_hw: tuple[int, int],
    ) -> Tensor:
        """Sum soft masks ``[Q, h, w]`` by class weights ``[Q, C]``, ``[C, *out_hw]``."""
        maps = class_scores.new_zeros(class_scores.shape[1], padded_hw[0] * padded_hw[1])
        batches = (torch.split(x, self.config.region_batch) for x in (class_scores, mask_logits))
        for scores, logits in zip(*batches, strict=True):
            soft = F.interpolate(logits[None], size=padded_hw, mode="bilinear")[0].sigmoid()
            maps = maps.addmm(scores.T, soft.flatten(1))
        cut = torch.unflatten(maps, 1, padded_hw)[:, : image_hw[0], : image_hw[1]]
        resized = F.interpolate(cut.unsqueeze(0), size=out_hw, mode="bilinear").squeeze(0)
        if self.config.calibration <= 0:
            return resized
        seen = self._seen(len(resized), resized.device).to(resized.dtype)
        return resized - self.config.calibration * seen.view(-1, 1, 1)

    def _seen(self, num_classes: int, device: torch.device) -> Tensor:
        seen = torch.zeros(num_classes, dtype=torch.bool, device=device)
        seen[list(self.config.seen_classes)] = True
        return seen

    def _check_inputs(
        self,
        images: Sequence[Tensor],
        text_features: Tensor,
        text_features_clip: Tensor | None,
        out_hw: Sequence[tuple[int, int]],
    ) -> None:
        check_images(images, out_hw)
        self._check_text("text_features", text_features)
        if self.config.fusion == "segments":
            return
        if text_features_clip is None:
            raise ShapeError(
                f"text_features_clip: expected {list(text_features.shape)}, got None. "
                "Embed the classes for the CLIP branch, or set fusion='segments'."
            )
        self._check_text("text_features_clip", text_features_clip)
        if len(text_features_clip) != len(text_features):
            raise ShapeError(
                f"text_features_clip: expected {len(text_features)} classes like text_features, "
                f"got {len(text_features_clip)}. Embed the same classes for both branches."
            )

    def _check_text(self, name: str, text_features: Tensor) -> None:
        check_text_embeds(text_features, self.config.decoder.embed_dim, name)
        check_seen(self.config.seen_classes, len(text_features), name)


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """How segments become labels, whatever the weights come from; see :class:`ZegFormerConfig`."""

    # Rows of the class embeddings whose classes were trained on. Official: 0 to 14 for VOC, 0 to
    # 155 for COCO-Stuff in ZegFormer's order. Empty: no class was
    seen_classes: Sequence[int] = ()
    # What is subtracted from seen classes' score maps; 0 or less for nothing
    calibration: float = 0.1
    # What CLIP is shown of each segment: "cropmask", "mask" or "crop"
    region_style: RegionStyle = "cropmask"
    region_batch: int = 10  # Regions that are cut out and encoded at once; limits memory use


@dataclass(frozen=True, kw_only=True)
class OfficialZegFormer(LabelSettings):
    """Builds ZegFormer from an official checkpoint; sizes are read from shapes.

    Training checkpoints hold no CLIP: its weights are OpenAI's ViT-B/16, given as ``clip``. CLIP's
    tensors may be float16, as the official code runs them.
    """

    num_heads: int = 8  # Heads of the query decoder
    # Who decides; see ZegFormerConfig. None is what ensemble says
    fusion: Fusion | None = None
    # Whether the text branch and CLIP decide together; if not, CLIP alone, or for a checkpoint
    # without CLIP the text branch
    ensemble: bool = True
    clip: ClipTensors | None = None  # CLIP's weights; replaces those of the checkpoint
    # Heads of CLIP's image tower; None is as clip says, or one per 64 channels
    clip_heads: int | None = None
    text_heads: int | None = None  # Heads of CLIP's text tower; likewise
    dropout: float = 0.1  # Dropout in the query decoder, in training

    def build(self, state_dict: Mapping[str, Tensor]) -> ZegFormer:
        """Make the model of official keys, float32; the weights are copies."""
        own = {k: v for k, v in state_dict.items() if k.startswith(CLIP) and hasattr(v, "float")}
        state_dict = {**state_dict, **{key: value.float() for key, value in own.items()}}
        check_float32(state_dict, "zegformer")
        tensors, sizes = check_zegformer(with_clip(state_dict, self.clip))
        file = Checked(tensors=tensors, what="zegformer")
        has_clip = file.has(CLIP)
        alone: Fusion = "regions" if has_clip else "segments"
        fusion = self.fusion or ("seen_and_unseen" if self.ensemble else alone)
        backbone = ResNetConfig(
            stem_width=sizes["S"],
            widths=tuple(sizes[letter] for letter in "ABEG"),
            depths=tuple(file.depth(f"backbone.res{stage}.") for stage in range(2, 6)),
        )
        predictor = "sem_seg_head.predictor."
        decoder = QueryDecoderConfig(
            conv_dim=sizes["C"],
            mask_dim=sizes["K"],
            hidden_dim=sizes["N"],
            num_queries=sizes["Z"],
            num_layers=file.depth(f"{predictor}transformer.decoder.layers."),
            num_heads=divisor("num_heads", self.num_heads, sizes["N"]),
            ffn_dim=sizes["J"],
            mask_layers=file.depth(f"{predictor}mask_embed.layers."),
            embed_dim=sizes["D"],
            dropout=self.dropout,
        )
        fields = shared_fields(self, ZegFormerConfig)
        fields |= {"backbone": backbone, "decoder": decoder, "fusion": fusion}
        if fusion != "segments" and not has_clip:
            raise CheckpointError(
                f"state_dict: expected CLIP's weights under '{CLIP}', got none, as in every "
                "checkpoint of training. Pass clip=load_clip(FILE) with OpenAI's ViT-B-16.pt "
                "(--clip FILE), or fusion='segments' for the text branch alone (--fusion segments)."
            )
        if has_clip:
            settings = self.clip.settings if self.clip else Settings()
            heads = settings.num_heads if self.clip_heads is None else self.clip_heads
            image = image_encoder_config(file, CLIP + "visual.", heads, settings.activation)
            heads = settings.text_heads if self.text_heads is None else self.text_heads
            text = text_encoder_config(file, CLIP, heads, settings.activation)
            fields |= {"clip_image": image, "clip_text": text}
        config = ZegFormerConfig(**fields)
        return load_into(ZegFormer, config, tensors, architecture="zegformer")


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
class ZegFormerStart(LabelSettings, ClipSource):
    """Starts ZegFormer: CLIP frozen, decoders initialised officially, the backbone as given.

    Regions are shown to CLIP at its native size, and its embedding width is also the segments'.
    """

    # "resnet50", "resnet101", or the sizes of another ResNet
    backbone: str | ResNetConfig = "resnet50"
    # A state_dict file of torchvision's ResNet of these sizes, such as resnet50-0676ba61.pth; its
    # classifier is not used, and its batch norms are frozen. None starts untrained
    backbone_weights: str | Path | None = None
    queries: int = 100  # Number Q of proposed segments
    # Sizes of the decoders; None is the official ones. Its num_queries is queries, its embed_dim
    # CLIP's
    decoder: QueryDecoderConfig | None = None
    image_size: int = 512  # Short side of images in evaluation, in pixels
    # Who decides; see ZegFormerConfig
    fusion: Fusion = "seen_and_unseen"

    def build(self) -> ZegFormer:
        weights = self.load()
        image = image_config(weights)
        norm: BackboneNorm = "learned" if self.backbone_weights is None else "frozen"
        fields = {
            **shared_fields(self, ZegFormerConfig),
            "backbone": replace(_backbone(self.backbone), norm=norm),
            "decoder": _decoder(self.decoder, self.queries, image.embed_dim),
        }
        config = ZegFormerConfig(clip_image=image, clip_text=text_config(weights), **fields)
        model = ZegFormer(config)
        _initialise(model)
        _load_clip_model(model, weights)
        if self.backbone_weights is not None:
            resnet = load_checkpoint(self.backbone_weights)
            load_torchvision_backbone(model.backbone, resnet)
        return model.eval()


def load_torchvision_backbone(backbone: ResNet, state_dict: Mapping[str, Tensor]) -> None:
    """Copy a torchvision ResNet's ``state_dict``, float32, without its classifier."""
    renamed = {_official_key(key): value for key, value in state_dict.items()}
    check_float32(renamed, "torchvision's ResNet")
    load_weights(backbone, renamed, architecture="torchvision's ResNet", ignored=_NOT_USED)


def _official_key(key: str) -> str:
    key = re.sub(r"^layer(\d+)\.", lambda match: f"res{int(match[1]) + 1}.", key)
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
    """Initialise as the official code where torch differs; norms start as identity."""
    for module in model.backbone.modules():  # as detectron2
        if isinstance(module, NormedConv):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    head = model.sem_seg_head
    for module in (*head.pixel_decoder.modules(), head.predictor.input_proj):  # as Caffe2
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _load_clip_model(model: ZegFormer, weights: ClipTensors) -> None:
    assert model.clip_model is not None
    tensors: dict[str, Any] = scaled_clip(weights)
    if weights.logit_scale is not None:
        tensors["logit_scale"] = torch.tensor(weights.logit_scale)
    load_weights(model.clip_model, tensors, architecture="CLIP")
