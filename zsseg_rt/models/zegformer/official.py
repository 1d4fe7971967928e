"""ZegFormer from official checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.models.clip.image_encoder import ImageEncoderConfig
from zsseg_rt.models.clip.text_encoder import TextEncoderConfig
from zsseg_rt.models.clip.weights import image_encoder_config, text_encoder_config
from zsseg_rt.models.input_checks import read_class_indices
from zsseg_rt.models.zegformer.backbone import ResNetConfig
from zsseg_rt.models.zegformer.config import ZegFormerConfig
from zsseg_rt.models.zegformer.decoder import NUM_GROUPS, QueryDecoderConfig
from zsseg_rt.models.zegformer.fusion import Fusion, fusion_of_flags
from zsseg_rt.models.zegformer.model import ZegFormer
from zsseg_rt.models.zegformer.regions import RegionStyle
from zsseg_rt.torch_files.checkpoints import Sizes, check_float32, load_weights
from zsseg_rt.torch_files.clip_weights import Activation, ClipWeights

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
        fusion: Who decides; see :class:`zsseg_rt.models.zegformer.config.ZegFormerConfig`. None is
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
        return {k: v.float() if k.startswith(_CLIP) else v for k, v in state_dict.items()}
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
