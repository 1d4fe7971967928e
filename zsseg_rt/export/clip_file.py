"""Export CLIP, PE-Core or SigLIP with a dense head, from a file or from torch: family ``dense``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy.typing as npt

from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.common.checks import check_choice, check_range, check_size
from zsseg_rt.errors import CheckpointError
from zsseg_rt.export.bundle_writer import ExportedModel, write_model_bundle
from zsseg_rt.export.golden import labels_golden, preprocess_frame
from zsseg_rt.export.graph_files import image_network, weights_of
from zsseg_rt.export.options import COMMON_OPTIONS, ExportOptions, read_options
from zsseg_rt.export.text_side import TextSide, imagenet_templates, seen_names
from zsseg_rt.networks import pooled
from zsseg_rt.networks.aggregating import SHIPPED_LAYERS, AggregationConfig, OutlierRule
from zsseg_rt.networks.clip import ImageTower, TextTower
from zsseg_rt.networks.heads import HEADS, LOGIT_SCALES, dense_embeds
from zsseg_rt.networks.text import WrittenText
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.text.piece_tokenizer import GEMMA_FILE, gemma_json
from zsseg_rt.torch_files.clip_arrays import (
    CLIP_MEAN,
    CLIP_STD,
    ClipTensors,
    describe_space,
    read_clip,
)
from zsseg_rt.torch_files.shapes import divisor

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")
_HALF = (0.5, 0.5, 0.5)  # mean and deviation of PE-Core and SigLIP
_READS = COMMON_OPTIONS | {"class_names", "tokenizer"}


@dataclass(frozen=True, kw_only=True)
class DenseHead:
    """The dense head on the weights, and its settings."""

    # One of HEADS for CLIP, of HEADS for PE-Core and SigLIP; None is the first of "naclip" and
    # "value_mlp" that fits
    head: str | None = None
    size_hw: tuple[int, int] = (448, 448)  # Input size in pixels, multiples of the patch size
    # The MLPs', "quick_gelu", "gelu" or "gelu_tanh"; None takes what is known of the weights
    activation: str | None = None
    num_heads: int | None = None  # Heads of the image tower; None is one per 64 channels
    text_heads: int | None = None  # Heads of the text tower; None is one per 64 channels
    # Multiplies the cosine similarity; None is that of the head's authors, for PE-Core and SigLIP
    # that of the weights
    logit_scale: float | None = None
    unknown_below: float | None = None  # Probability below which a pixel is unknown
    position: str = "size"  # How positions are resized, by "size" or "as_published"
    # For SFP and SC-CLIP, like the two that follow: how outliers are found; see AggregationConfig
    pm: OutlierRule | None = None
    r: float = 0.3  # See AggregationConfig
    beta: float = 0.4  # See AggregationConfig

    def __post_init__(self) -> None:
        for name, choices in (
            ("head", (*HEADS, *pooled.HEADS)),
            ("activation", ACTIVATIONS),
            ("position", ("size", "as_published")),
        ):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), choices)
        check_range(self, "unknown_below", least=0, most=1)
        check_range(self, "logit_scale", least=1e-9)
        self.aggregation({})

    def aggregation(self, layers: Mapping[str, int]) -> AggregationConfig:
        """Settings of SFP and SC-CLIP, with these layers instead of the official ones."""
        return AggregationConfig(pm=self.pm, r=self.r, beta=self.beta, **layers)

    def completed(self, weights: ClipTensors) -> DenseHead:
        """With what the weights, and files beside them, say instead of None."""
        settings, is_clip = weights.settings, weights.kind == "clip"
        head = self.head or ("naclip" if is_clip else "value_mlp")
        check_choice("head", head, HEADS if is_clip else pooled.HEADS)
        if is_clip:
            scale = LOGIT_SCALES[head]
        else:
            scale = 100.0 if weights.logit_scale is None else math.exp(weights.logit_scale)
        activation = self.activation or weights.known_activation()
        if activation is None:
            raise CheckpointError(
                "activation: expected 'quick_gelu' or 'gelu', got weights that do not say it, "
                "without a config.json beside them. OpenAI's, MetaCLIP's and DFN's weights use "
                "quick_gelu, most others gelu: give --activation."
            )
        return replace(
            self,
            head=head,
            logit_scale=scale if self.logit_scale is None else self.logit_scale,
            activation=activation,
            num_heads=settings.num_heads if self.num_heads is None else self.num_heads,
            text_heads=settings.text_heads if self.text_heads is None else self.text_heads,
        )


def export_clip_file(
    file: str | Path,
    path: str | Path,
    settings: DenseHead,
    *,
    check: Callable[[ClipTensors], None] = lambda _: None,
    **options: Any,
) -> Path:
    """Write a bundle of a CLIP, PE-Core or SigLIP; memory stays below three times the weights."""
    defaults = {"space": describe_space(file), "source": Path(file).name}
    export_options = read_options(defaults | options, _READS, "CLIP")

    def make() -> ExportedModel:
        weights, own_options = read_clip(file), export_options
        check(weights)
        if weights.kind == "siglip" and own_options.tokenizer is None:
            own_options = replace(own_options, tokenizer=Path(file).with_name("tokenizer.json"))
        return _cut(weights, settings.completed(weights), own_options)

    return write_model_bundle(Path(path), make, export_options)


def _cut(weights: ClipTensors, settings: DenseHead, options: ExportOptions) -> ExportedModel:
    image, text = _towers(weights, settings)
    check_size(settings.size_hw, image.patch_size)
    has_pieces = isinstance(text, pooled.SiglipText)
    tower = WrittenText(
        tower=text,
        words=weights.words,
        prompt_words=weights.prompt_words,
        pieces=_gemma(options, text.vocab_size) if has_pieces else None,
    )
    mean, std = (CLIP_MEAN, CLIP_STD) if weights.kind == "clip" else (_HALF, _HALF)
    preprocess = PreprocessSpec(
        size_hw=settings.size_hw,
        mean=cast(Any, weights.settings.mean) or mean,
        std=cast(Any, weights.settings.std) or std,
    )
    if isinstance(image, pooled.PooledTower):
        encode = partial(pooled.dense_embeds, tower=image, head=cast(str, settings.head))
    else:
        aggregation = settings.aggregation(SHIPPED_LAYERS if weights.words else {})
        own: dict[str, Any] = {"position": settings.position, "aggregation": aggregation}
        encode = partial(dense_embeds, tower=image, head=cast(str, settings.head), **own)
    kind = {"clip": "dense_clip", "pe": "pe_core", "siglip": "siglip"}[weights.kind]
    prompts = imagenet_templates()
    model = written_model(
        encode,
        preprocess,
        TextSide(options, embed_dim=weights.embed_dim, templates=prompts, tower=tower),
        options,
        architecture=f"{kind} {settings.head}",
        logit_scale=settings.logit_scale,
        grid_hw=image.grid_hw(settings.size_hw),
        unknown_below=settings.unknown_below,
    )
    return replace(model, provenance={**model.provenance, "activation": settings.activation})


def _gemma(options: ExportOptions, num_rows: int) -> tuple[str, bytes]:
    """Name and content of the tokenizer's file in the bundle."""
    content = options.read_tokenizer()
    place = "" if isinstance(options.tokenizer, bytes) else f" ({options.tokenizer})"
    try:
        raw = json.loads(content)
        model = raw["model"] if isinstance(raw, dict) and "model" in raw else {}
        if (model.get("type"), model.get("byte_fallback")) != ("BPE", True):
            raise ValueError("another kind of tokenizer than byte pairs with single bytes")
        if (count := len(model["vocab"])) != num_rows:
            raise ValueError(f"{count} pieces where the text tower has {num_rows} rows")
        return GEMMA_FILE, gemma_json(model)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
        raise CheckpointError(
            f"tokenizer: expected Gemma's tokenizer.json, got {str(exc)[:200]}{place}. Put the "
            "model's own tokenizer.json beside the weights."
        ) from exc


def written_model(
    encode: Callable[..., Any],
    preprocess: PreprocessSpec,
    text: TextSide,
    options: ExportOptions,
    *,
    architecture: str,
    **rule: Any,
) -> ExportedModel:
    """A dense bundle's parts from ``encode(ops, image=)``; ``rule`` is the rest of its head."""
    head = HeadSpec(**{"normalize": True, "activation": "softmax", **rule})

    def golden(model: ExportedModel, names: list[str]) -> dict[str, npt.NDArray[Any]]:
        image = preprocess_frame(preprocess)
        embeds, extra = text.embed(names)
        patches = encode(Arrays(), image=image)
        stages = {"text_embeds": embeds, "image": image, "patch_embeds": patches}
        return stages | labels_golden(patches, embeds, head, names) | extra

    return ExportedModel(
        family="dense",
        architecture=architecture,
        graphs={"image_encoder": image_network(encode, preprocess.size_hw)},
        preprocess=preprocess,
        head=head,
        text=text,
        golden=golden,
    )


def _towers(
    weights: ClipTensors, settings: DenseHead
) -> tuple[ImageTower, TextTower | pooled.SiglipText]:
    def parts(name: str, num_heads: int | None, tensors: Mapping[str, Any]) -> dict[str, Any]:
        heads = divisor(name, num_heads, int(tensors["positional_embedding"].shape[1]))
        return {"tensors": tensors, "num_heads": heads, "activation": settings.activation}

    is_clip = weights.kind == "clip"
    words = pooled.SiglipText if weights.kind == "siglip" else TextTower
    image = parts("num_heads", settings.num_heads, weights.visual)
    return (
        ImageTower(**image) if is_clip else pooled.PooledTower(**image),
        words(**parts("text_heads", settings.text_heads, weights.text)),
    )


# --- models in torch ---


def export_dense_clip(model: Any, options: ExportOptions) -> ExportedModel:
    """Cut dense CLIP or the trained cosine head into a bundle's parts."""
    size_hw = options.size_hw or model.config.size_hw
    check_size(size_hw, model.config.image_encoder.patch_size)
    tower, head_name = tower_of(model), model.config.head
    prompts = model.config.templates
    text = TextSide(
        options,
        embed_dim=model.config.image_encoder.embed_dim,
        templates=imagenet_templates() if prompts is None else prompts,
        tower=model.text_encoder,
    )
    settings: dict[str, Any] = getattr(model.image_encoder, "options", {})
    rule = model.label_rule
    seen = seen_names(rule.seen_classes, options.class_names)
    architecture = str(model.architecture)
    return written_model(
        partial(dense_embeds, tower=tower, head=head_name, **settings),
        PreprocessSpec(size_hw=size_hw, mean=model.image_mean, std=model.image_std),
        text,
        options,
        architecture=architecture + f" {head_name}" * (architecture == "dense_clip"),
        logit_scale=float(model.logit_scale),
        activation=rule.activation,
        grid_hw=tower.grid_hw(size_hw),
        seen=seen,
        seen_bias=rule.seen_bias if seen else 0.0,
        unknown_below=rule.unknown_below,
    )


def tower_of(model: Any) -> ImageTower:
    """The weights of a model's image tower, what it trained after it included."""
    encoder, config = model.image_encoder, model.config.image_encoder
    tensors = weights_of(encoder)
    if trained := getattr(encoder, "patch_proj", None):
        tensors |= {"proj": trained().detach().cpu().numpy()}
    return ImageTower(
        tensors=tensors,
        num_heads=config.num_heads,
        activation=config.activation,
    )
