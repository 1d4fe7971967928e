"""ZegCLIP and CLIP-RC from CLIP weights, to be trained, and from official checkpoints.

Source:
    Zhou et al., "ZegCLIP: Towards Adapting CLIP for Zero-shot Semantic Segmentation", CVPR 2023.
    Zhang et al., "Exploring Regional Clues in CLIP for Zero-Shot Semantic Segmentation", CVPR 2024.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from zsseg_rt.common.checks import check_choice, check_size
from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.models.base import ScoreActivation
from zsseg_rt.models.clip.towers import ImageEncoderConfig
from zsseg_rt.models.clip.weights import (
    image_config,
    image_encoder_config,
    load_into,
    start_from_clip,
    text_config,
    text_encoder_config,
)
from zsseg_rt.models.descriptor.model import (
    ClipRC,
    ClipRCConfig,
    DecoderConfig,
    DecoderStack,
    Descriptor,
    DescriptorModel,
    ZegCLIP,
    ZegCLIPConfig,
)
from zsseg_rt.models.functional import shared_fields
from zsseg_rt.torch_files.checkpoints import Sizes, check_float32
from zsseg_rt.torch_files.clip_weights import ClipSource, ClipWeights

_TEXT, _RECOVERY = "text_encoder.", "decode_head.recovery_decoder."


@dataclass(frozen=True, kw_only=True)
class DescriptorStart(ClipSource):
    """Starts a model from CLIP weights, prompts and decode head initialised for training.

    The positional embedding is resized to ``image_size`` (bilinear).
    """

    made: ClassVar[Any]
    made_config: ClassVar[Any]

    # Visual prompts per layer; officially 10 for VOC, 100 for COCO-Stuff. 0 is for a backbone that
    # is fine-tuned instead
    num_prompts: int = 10
    image_size: int = 512  # Side of training crops, in pixels; a multiple of the patch size
    # Pixels from one patch to the next, such as half the patch size for four times as many patches;
    # None is the patch size, as officially
    patch_stride: int | None = None
    # Sizes of the decoders; None is the official ones at CLIP's embedding width
    decoder: DecoderConfig | None = None
    seen_classes: Sequence[int] = ()  # Rows of the text embeddings that are trained on
    # Whether training is self-training; see DescriptorConfig
    self_trained: bool = False
    # What turns mask logits into probabilities; see DescriptorConfig
    score_activation: ScoreActivation = "sigmoid"
    # Whether initial weights are scaled for the unit vectors that they read, for short trainings;
    # see scale_for_unit_inputs. Not official
    unit_inputs: bool = False
    # Initial weights of the decoder's layers: "random", or "copies" of the first layer, as
    # officially
    start: Literal["random", "copies"] = "random"

    def build(self) -> DescriptorModel:
        """Make the model, in evaluation mode, with its text tower."""
        self._check()
        weights = self.load()
        encoder = self._encoder(weights)
        check_size((self.image_size, self.image_size), encoder.patch_size)
        sizes = DecoderConfig(query_dim=encoder.embed_dim, ffn_dim=4 * encoder.embed_dim)
        fields = {"decoder": sizes, **shared_fields(self, self.made_config), **self._more()}
        grid, deep = self.image_size // encoder.stride, encoder.num_layers - 1
        encoder = replace(
            encoder, grid_side=grid, num_prompts=self.num_prompts, num_deep_prompts=deep
        )
        text = text_config(weights)
        config = self.made_config(image_encoder=encoder, text_encoder=text, **fields)
        model: DescriptorModel = start_from_clip(self.made(config), weights, "backbone")
        head: Any = model.decode_head
        if self.unit_inputs:
            head.scale_for_unit_inputs()
        stacks = [part for part in head.children() if isinstance(part, DecoderStack)]
        for stack in stacks if self.start == "copies" else ():
            stack.copy_first_layer()
        self._finish(model, weights)
        return model

    def _check(self) -> None:
        """Refuse bad settings before weights are read."""
        check_choice("start", self.start, ("random", "copies"))

    def _encoder(self, weights: ClipWeights) -> ImageEncoderConfig:
        return replace(image_config(weights), patch_stride=self.patch_stride)

    def _more(self) -> dict[str, Any]:
        """Fields of the configuration that have other names here."""
        return {}

    def _finish(self, model: DescriptorModel, weights: ClipWeights) -> None:
        """Steps after the head's start."""


@dataclass(frozen=True, kw_only=True)
class ZegCLIPStart(DescriptorStart):
    """Starts ZegCLIP."""

    made, made_config = ZegCLIP, ZegCLIPConfig

    # What class queries are made of; see ZegCLIPConfig
    descriptor: Descriptor = "relationship"


@dataclass(frozen=True, kw_only=True)
class ClipRCStart(DescriptorStart):
    """Starts CLIP-RC. Every cell token starts, and stays, as class embedding with its position."""

    made, made_config = ClipRC, ClipRCConfig

    num_cells: int = 16  # Cell tokens, a square number
    exact: bool = False  # Whether to refuse other input sizes; see :class:`ClipRCConfig`
    # Whether to build the recovery decoder, which runs in training only
    with_recovery_decoder: bool = True

    def _check(self) -> None:
        super()._check()
        if self.num_cells < 1 or math.isqrt(self.num_cells) ** 2 != self.num_cells:
            raise ArgumentError(
                f"num_cells: expected a square number of at least 1, got {self.num_cells}. "
                "Officially it is 16."
            )

    def _encoder(self, weights: ClipWeights) -> ImageEncoderConfig:
        return replace(super()._encoder(weights), num_cells=self.num_cells)

    def _more(self) -> dict[str, Any]:
        return {"with_recovery": self.with_recovery_decoder}

    @torch.no_grad()
    def _finish(self, model: DescriptorModel, weights: ClipWeights) -> None:
        assert isinstance(model, ClipRC)
        token = weights.visual["class_embedding"] + weights.visual["positional_embedding"][0]
        model.backbone.region_level_bridge.copy_(token.expand(self.num_cells, -1))


@dataclass(frozen=True, kw_only=True)
class OfficialDescriptor(ABC):
    """Builds a model from an official checkpoint; sizes are read from shapes.

    The decoder's ``self_attn.*`` and ``norm1.*``, which never run, are ignored; checkpoints of
    CLIP-RC's Jittor port lack them.
    """

    made: ClassVar[Any]
    made_config: ClassVar[Any]
    layers: ClassVar[str]

    num_heads: int | None = None  # Heads of the image tower; None is one per 64 channels
    decoder_heads: int = 8  # Heads of the decoder
    text_heads: int | None = None  # Heads of the text tower; None is one per 64 channels
    # Side in pixels that masks are upsampled to before the sigmoid; None is the size the positional
    # embedding is stored for (512 officially)
    image_size: int | None = None
    # Rows of the text embeddings whose classes were trained on. Official: 0 to 14 for VOC, the 156
    # seen classes for COCO-Stuff. Empty: predict lowers no score
    seen_classes: Sequence[int] = ()
    # Whether the weights come from self-training; then no score is lowered
    self_trained: bool = False
    with_text_encoder: bool = True  # Whether to build the text tower when the checkpoint holds one
    prompt_dropout: float = 0.1  # Dropout on the projected prompts, in training
    decoder_dropout: float = 0.1  # Dropout in the decoder's layers, in training

    def build(self, state_dict: Mapping[str, Tensor]) -> DescriptorModel:
        """Make the model, in evaluation mode; the weights are copies.

        Args:
            state_dict: Official keys, float32; see
                :func:`zsseg_rt.torch_files.checkpoints.load_checkpoint`.
        """
        name: str = self.made.architecture
        check_float32(state_dict, name)
        sizes = Sizes(state_dict, name)
        encoder = self._encoder(sizes)
        has_text = self.with_text_encoder and sizes.has(_TEXT)
        text = text_encoder_config(sizes, _TEXT, self.text_heads) if has_text else None
        fields = {"image_size": encoder.side, **shared_fields(self, self.made_config)}
        config = self.made_config(
            image_encoder=encoder,
            decoder=self._decoder(sizes),
            text_encoder=text,
            **fields,
            **self._more(sizes, encoder),
        )
        ignored = (*self.unused(config), *(() if has_text else (r"text_encoder\..*",)))
        make: Callable[[Any], DescriptorModel] = self.made
        return load_into(make, config, state_dict, architecture=name, ignored=ignored)

    def _encoder(self, sizes: Sizes) -> ImageEncoderConfig:
        num_deep_prompts, num_prompts, _ = sizes.of("backbone.deep_prompt_embeddings", 3)
        return replace(
            image_encoder_config(sizes, "backbone.", self.num_heads),
            num_prompts=num_prompts,
            num_deep_prompts=num_deep_prompts,
            prompt_dropout=self.prompt_dropout,
        )

    def _decoder(self, sizes: Sizes) -> DecoderConfig:
        query_dim = sizes.of("decode_head.q_proj.weight", 2)[0]
        return DecoderConfig(
            query_dim=query_dim,
            num_layers=sizes.count(self.layers),
            num_heads=sizes.heads("decoder_heads", self.decoder_heads, query_dim),
            ffn_dim=sizes.of(f"{self.layers}0.linear1.weight", 2)[0],
            dropout=self.decoder_dropout,
        )

    @abstractmethod
    def _more(self, sizes: Sizes, encoder: ImageEncoderConfig) -> dict[str, Any]:
        """Fields of the configuration that only one system has."""

    @abstractmethod
    def unused(self, config: Any) -> tuple[str, ...]:
        """Keys that the model has no use for."""


@dataclass(frozen=True, kw_only=True)
class OfficialZegCLIP(OfficialDescriptor):
    """Builds ZegCLIP. ``decode_head.loss_decode.*`` is ignored, too."""

    made, made_config = ZegCLIP, ZegCLIPConfig
    layers = "decode_head.decoder_1.layers."

    # What turns mask logits into probabilities; see ZegCLIPConfig
    score_activation: ScoreActivation = "sigmoid"

    def _more(self, sizes: Sizes, encoder: ImageEncoderConfig) -> dict[str, Any]:
        inputs = sizes.of("decode_head.q_proj.weight", 2)[1]
        return {"descriptor": "text" if inputs == encoder.embed_dim else "relationship"}

    def unused(self, config: ZegCLIPConfig) -> tuple[str, ...]:
        """Keys that the model has no use for."""
        return (
            r"decode_head\.decoder_1\.layers\.\d+\.(self_attn|norm1)\..*",
            r"decode_head\.loss_decode\..*",
        )


@dataclass(frozen=True, kw_only=True)
class OfficialClipRC(OfficialDescriptor):
    """Builds CLIP-RC."""

    made, made_config = ClipRC, ClipRCConfig
    layers = "decode_head.decoder_q.layers."

    exact: bool = False  # Whether to refuse input sizes other than the official one
    # Whether to build the recovery decoder, which runs in training only, when the checkpoint holds
    # one
    with_recovery_decoder: bool = True

    def _encoder(self, sizes: Sizes) -> ImageEncoderConfig:
        num_cells = sizes.of("backbone.region_level_bridge", 2)[0]
        if not num_cells or math.isqrt(num_cells) ** 2 != num_cells:
            raise CheckpointError(
                "backbone.region_level_bridge: expected one row per cell of a square grid, got "
                f"{num_cells} rows. Check that the checkpoint is complete and from this "
                "architecture."
            )
        return replace(super()._encoder(sizes), num_cells=num_cells)

    def _more(self, sizes: Sizes, encoder: ImageEncoderConfig) -> dict[str, Any]:
        return {"with_recovery": self.with_recovery_decoder and sizes.has(_RECOVERY)}

    def unused(self, config: ClipRCConfig) -> tuple[str, ...]:
        """Keys that the model has no use for."""
        layers = r"(decoder_[qv]\.layers|recovery_decoder\.decouple_[qv])\.\d+\.(self_attn|norm1)"
        recovery = () if config.with_recovery else (r"decode_head\.recovery_decoder\..*",)
        return rf"decode_head\.{layers}\..*", *recovery
