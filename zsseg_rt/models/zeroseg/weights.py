"""Build ZeroSeg: from our own checkpoints, from MAE's encoder, or untrained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.models.clip.towers import TextEncoder
from zsseg_rt.models.clip.weights import build_text_encoder, load_into
from zsseg_rt.models.functional import shared_fields
from zsseg_rt.models.zeroseg.model import ClassRule, Projection, SegmentTap, ZeroSeg, ZeroSegConfig
from zsseg_rt.torch_files.checkpoints import Sizes, check_float32, load_checkpoint, load_weights
from zsseg_rt.torch_files.clip_weights import ClipSource

_NOT_OURS = (r"text_encoder\..*",)  # CLIP's, loaded from CLIP's own weights
_MAE_DECODER = (r"mask_token", r"decoder_.*")


@dataclass(frozen=True, kw_only=True)
class ZeroSegStart(ClipSource):
    """Starts ZeroSeg: from a checkpoint of our own, from MAE's encoder, or untrained.

    The settings from ``width`` on are those of :class:`ZeroSegConfig`. None leaves its default, or
    with ``weights`` what shapes say; then only what they do not say may be given.

    Attributes:
        num_heads: Attention heads of the student's encoder.
    """

    # The teacher's CLIP weights, whose text tower embeds class names. Without weights, embed_dim is
    # theirs unless it is given. None builds no text tower
    pretrained: str | Path | None = None
    clip: str = "ViT-L-14"
    # A checkpoint of our own training, with the names encoder.*, seg.* and optionally decoder.*.
    # Its sizes are read from shapes
    weights: str | Path | None = None
    # A public MAE checkpoint whose encoder the student starts from, such as
    # mae_pretrain_vit_base.pth; the reconstruction head and the segmentation head start untrained.
    # The paper does not say whether it did so
    mae_weights: str | Path | None = None
    # Input size in pixels that a bundle is built for, a side or (height, width)
    image_size: int | tuple[int, int] = 448
    logit_scale: float = 100.0  # Multiplies cosines before the softmax
    # Number of classes kept, those nearest to the whole image; None keeps all
    top_k: int | None = 5
    plain_cosine: bool = False  # Whether scores are the bare softmax
    with_decoder: bool = True  # Whether to keep the reconstruction head, which only training needs
    width: int | None = None
    num_layers: int | None = None
    patch_size: int | None = None
    grid_side: int | None = None
    decoder_width: int | None = None
    decoder_layers: int | None = None
    decoder_heads: int | None = None
    head_width: int | None = None
    head_heads: int | None = None
    head_layers: tuple[int, int, int] | None = None
    group_tokens: tuple[int, int] | None = None
    embed_dim: int | None = None
    projection: Projection | None = None
    projection_width: int | None = None
    segment_tap: SegmentTap | None = None
    drop_path: float | None = None
    gumbel_tau: float | None = None
    assign_eps: float | None = None
    background_threshold: float | None = None
    templates: tuple[str, ...] | None = None

    def build(self) -> ZeroSeg:
        """Make the model, in evaluation mode."""
        if self.weights is not None and self.mae_weights is not None:
            raise ArgumentError(
                "mae_weights: expected no more than one of weights and mae_weights, got both. "
                "weights hold the encoder too."
            )
        fields, text_encoder = self._fields(), None
        if self.pretrained is not None:  # num_heads are the student's, not the teacher's
            text_encoder = build_text_encoder(replace(self, num_heads=None).load())
        if self.weights is not None:
            model = _trained(load_checkpoint(self.weights), fields)
        else:
            if text_encoder is not None:
                fields.setdefault("embed_dim", text_encoder.config.embed_dim)
            model = ZeroSeg(ZeroSegConfig(**fields))
        if self.mae_weights is not None:
            load_mae_encoder(model, load_checkpoint(self.mae_weights))
        if text_encoder is not None:
            model.text_encoder = _matching(text_encoder, model.config.embed_dim)
        return model.eval()

    def _fields(self) -> dict[str, Any]:
        """Fields of the configuration that are given."""
        side = self.image_size
        rule = ClassRule(
            logit_scale=self.logit_scale, top_k=self.top_k, plain_cosine=self.plain_cosine
        )
        size_hw = side if isinstance(side, tuple) else (side, side)
        fields = shared_fields(self, ZeroSegConfig) | {"rule": rule, "size_hw": size_hw}
        return fields if self.with_decoder else fields | {"decoder_layers": 0}


def load_mae_encoder(model: ZeroSeg, state_dict: Mapping[str, Tensor]) -> None:
    """Copy MAE's encoder into the student; MAE's decoder, if present, is not used.

    Shapes:
        state_dict: MAE's keys, float32: ``patch_embed.proj.weight``, ``blocks.0...``.
    """
    check_float32(state_dict, "MAE")
    load_weights(model.encoder, state_dict, architecture="MAE's encoder", ignored=_MAE_DECODER)


def _trained(state_dict: Mapping[str, Tensor], fields: dict[str, Any]) -> ZeroSeg:
    check_float32(state_dict, "zeroseg")
    read = _read_sizes(state_dict, fields)
    conflicts = [name for name in read if name in fields and fields[name] != read[name]]
    if conflicts and conflicts != ["decoder_layers"]:
        name = next(name for name in conflicts if name != "decoder_layers")
        raise ArgumentError(
            f"{name}: expected {read[name]}, as in the checkpoint, got {fields[name]}. "
            "Leave it out."
        )
    config = ZeroSegConfig(**(read | fields))
    unused = _NOT_OURS if config.decoder_layers else (*_NOT_OURS, r"decoder\..*")
    return load_into(ZeroSeg, config, state_dict, architecture="zeroseg", ignored=unused)


def _read_sizes(state_dict: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes from shapes; one head per 64 channels (32 in the decoder) by default."""
    sizes = Sizes(state_dict, "zeroseg")
    width, _, patch_size, _ = sizes.of("encoder.patch_embed.proj.weight", 4)
    head_width = sizes.of("seg.norm.weight", 1)[0]
    projection = "batch_norm" if "seg.proj.3.weight" in state_dict else "gelu"
    last = "seg.proj.3.weight" if projection == "batch_norm" else "seg.proj.2.weight"
    read: dict[str, Any] = {
        "width": width,
        "patch_size": patch_size,
        "grid_side": sizes.grid_side("encoder.pos_embed", 3),
        "num_layers": sizes.count("encoder.blocks."),
        "num_heads": sizes.heads("num_heads", fields.get("num_heads"), width),
        "head_width": head_width,
        "head_heads": sizes.heads("head_heads", fields.get("head_heads"), head_width),
        "head_layers": tuple(sizes.count(f"seg.stages.{i}.blocks.") for i in range(3)),
        "group_tokens": tuple(sizes.of(f"seg.stages.{i}.group_token", 3)[1] for i in range(2)),
        "embed_dim": sizes.of(last, 2)[0],
        "projection": projection,
        "projection_width": sizes.of("seg.proj.0.weight", 2)[0],
        "segment_tap": "second_grouping" if "seg.tap.weight" in state_dict else "last_block",
    }
    return read | _read_decoder_sizes(sizes, fields)


def _read_decoder_sizes(sizes: Sizes, fields: Mapping[str, Any]) -> dict[str, Any]:
    if not sizes.has("decoder."):
        return {"decoder_layers": 0}
    width = sizes.of("decoder.decoder_embed.weight", 2)[0]
    num_heads = fields.get("decoder_heads")
    return {
        "decoder_layers": sizes.count("decoder.decoder_blocks."),
        "decoder_width": width,
        "decoder_heads": sizes.heads("decoder_heads", num_heads or max(1, width // 32), width),
    }


def _matching(text_encoder: TextEncoder, embed_dim: int) -> TextEncoder:
    width = text_encoder.config.embed_dim
    if width != embed_dim:
        raise CheckpointError(
            f"pretrained: expected the teacher's text tower with embeddings of {embed_dim}, got "
            f"{width}. Use the CLIP model that the student was distilled from."
        )
    return text_encoder
