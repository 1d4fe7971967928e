"""Export CLIP, PE-Core or SigLIP with a dense head: family ``dense``.

From a weights file, without torch and onnx, or from a model in torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy.typing as npt

from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.common.checks import check_choice, check_size
from zsseg_rt.common.files import read_limited
from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.export.bundle_writer import ExportedModel, write_model_bundle
from zsseg_rt.export.golden import (
    GOLDEN_NAMES,
    GOLDEN_TEMPLATES,
    dense_golden,
    golden_names,
    preprocess_frame,
)
from zsseg_rt.export.graph_files import MAX_CLASSES, image_network, provenance, weights_of
from zsseg_rt.export.options import COMMON_OPTIONS, ExportOptions, read_options
from zsseg_rt.export.text_side import TextSide, clip_text_side, seen_names
from zsseg_rt.networks import pooled
from zsseg_rt.networks.aggregating import (
    RULES_OF_OUTLIERS,
    SHIPPED_LAYERS,
    AggregationConfig,
    OutlierRule,
    check_grid,
)
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
    tower_sizes,
)
from zsseg_rt.torch_files.shapes import divisor

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")
_HALF = (0.5, 0.5, 0.5)  # mean and deviation of PE-Core and SigLIP
_MAX_TOKENIZER_BYTES = 64 << 20
_READS = COMMON_OPTIONS | {"class_names", "tokenizer", "window_batch"}


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
        if self.head is not None:
            check_choice("head", self.head, (*HEADS, *pooled.HEADS))
        if self.activation is not None:
            check_choice("activation", self.activation, ACTIVATIONS)
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ArgumentError(
                f"logit_scale: expected a number above 0, got {self.scale}. Change it."
            )
        if self.unknown_below is not None and not 0 <= self.unknown_below <= 1:
            raise ArgumentError(
                f"unknown_below: expected a probability in [0, 1], got {self.unknown_below}. "
                "Use None to keep every pixel."
            )
        check_choice("position", self.position, ("size", "as_published"))
        self.aggregation({})

    def aggregation(self, layers: Mapping[str, int]) -> AggregationConfig:
        """Settings of SFP and SC-CLIP, with these layers instead of the official ones."""
        return AggregationConfig(pm=self.pm, r=self.r, beta=self.beta, **layers)

    @property
    def scale(self) -> float:
        """The factor on cosines, of CLIP's heads if it is not given."""
        return (
            LOGIT_SCALES.get(self.head or "", 40.0)
            if self.logit_scale is None
            else self.logit_scale
        )

    def completed(self, weights: ClipTensors) -> DenseHead:
        """With what the weights, and files beside them, say instead of None."""
        settings, heads = weights.settings, HEADS if weights.kind == "clip" else pooled.HEADS
        head = self.head or ("naclip" if weights.kind == "clip" else "value_mlp")
        check_choice("head", head, heads)
        scale = self.logit_scale
        if scale is None and weights.kind != "clip":
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
            logit_scale=scale,
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
    """Write a bundle of a CLIP, PE-Core or SigLIP; memory stays below three times the weights.

    Its golden sample is what NumPy computes of the network on one image; the graphs, then the
    whole engine, are compared with it before the bundle appears under its name.
    """
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
    aggregation = settings.aggregation(SHIPPED_LAYERS if weights.words else {})
    depth = tower_sizes(weights.visual)[1]
    if settings.head in RULES_OF_OUTLIERS:
        aggregation.check_depth(depth)
        rule = aggregation.pm or RULES_OF_OUTLIERS[settings.head]
        check_grid(rule, image.grid_hw(settings.size_hw))
    has_pieces = isinstance(text, pooled.SiglipText)
    tower = WrittenText(
        tower=text,
        words=weights.words,
        prompt_words=weights.prompt_words,
        pieces=_gemma(options.tokenizer, text.vocab_size) if has_pieces else None,
    )
    side = clip_text_side(options, embed_dim=weights.embed_dim, tower=tower)
    head = HeadSpec(
        logit_scale=settings.scale,
        normalize=True,
        activation="softmax",
        grid_hw=image.grid_hw(settings.size_hw),
        unknown_below=settings.unknown_below,
        max_classes=MAX_CLASSES,
        window_batch=options.window_batch,
    )
    names = golden_names(options.class_names, GOLDEN_NAMES)
    encode = _encoder(image, settings, aggregation)
    kind = {"clip": "dense_clip", "pe": "pe_core", "siglip": "siglip"}[weights.kind]
    name, preprocess = f"{kind} {settings.head}", _preprocess(weights, settings)
    model = written_model(encode, head, preprocess, side, names, architecture=name)
    return replace(model, provenance={**model.provenance, "activation": settings.activation})


def _encoder(
    image: ImageTower, settings: DenseHead, aggregation: AggregationConfig
) -> Callable[..., Any]:
    assert settings.head is not None
    if isinstance(image, pooled.PooledTower):
        return partial(pooled.dense_embeds, tower=image, head=settings.head)
    own: dict[str, Any] = {"position": settings.position, "aggregation": aggregation}
    return partial(dense_embeds, tower=image, head=settings.head, **own)


def _preprocess(weights: ClipTensors, settings: DenseHead) -> PreprocessSpec:
    mean, std = (CLIP_MEAN, CLIP_STD) if weights.kind == "clip" else (_HALF, _HALF)
    return PreprocessSpec(
        size_hw=settings.size_hw,
        mean=cast(Any, weights.settings.mean) or mean,
        std=cast(Any, weights.settings.std) or std,
    )


def _gemma(source: str | Path | bytes | None, num_rows: int) -> tuple[str, bytes]:
    """Name and content of the tokenizer's file in the bundle."""
    content = source if isinstance(source, bytes) else b""
    where = "tokenizer.json" if content else str(source)
    try:
        raw = json.loads(content or read_limited(Path(where), max_bytes=_MAX_TOKENIZER_BYTES))
        model = raw["model"] if isinstance(raw, dict) and "model" in raw else {}
        if (model.get("type"), model.get("byte_fallback")) != ("BPE", True):
            raise ValueError("another kind of tokenizer than byte pairs with single bytes")
        if (count := len(model["vocab"])) != num_rows:
            raise ValueError(f"{count} pieces where the text tower has {num_rows} rows")
        return GEMMA_FILE, gemma_json(model)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
        raise CheckpointError(
            f"tokenizer: expected Gemma's tokenizer.json, got {where}: {str(exc)[:200]}. Put the "
            "model's own tokenizer.json beside the weights."
        ) from exc


def written_model(
    encode: Callable[..., Any],
    head: HeadSpec,
    preprocess: PreprocessSpec,
    side: TextSide,
    names: Sequence[str],
    *,
    architecture: str,
) -> ExportedModel:
    """A dense bundle's parts from ``encode(ops, image=)``, which NumPy computes once.

    ``names`` serve the golden sample.
    """

    def golden() -> dict[str, npt.NDArray[Any]]:
        embeds, extra = side.embed_golden(names, side.templates[:GOLDEN_TEMPLATES])
        frame = preprocess_frame(preprocess)
        return dense_golden(frame, encode(Arrays(), image=frame), head, (names, embeds)) | extra

    return ExportedModel(
        family="dense",
        architecture=architecture,
        graphs={"image_encoder": image_network(encode, preprocess.size_hw, head.window_batch)},
        preprocess=preprocess,
        head=head,
        text=side,
        golden=golden,
        provenance=provenance(),
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
    text = clip_text_side(
        options,
        embed_dim=model.config.image_encoder.embed_dim,
        tower=model.text_encoder,
        templates=model.config.templates,
    )
    tower, head_name = tower_of(model), model.config.head
    settings: dict[str, Any] = getattr(model.image_encoder, "options", {})
    if aggregation := settings.get("aggregation"):
        check_grid(aggregation.pm or RULES_OF_OUTLIERS[head_name], tower.grid_hw(size_hw))
    rule = model.label_rule
    seen = seen_names(rule.seen_classes, options.class_names)
    head = HeadSpec(
        logit_scale=float(model.logit_scale),
        normalize=True,
        activation=rule.activation,
        grid_hw=tower.grid_hw(size_hw),
        seen=seen,
        seen_bias=rule.seen_bias if seen else 0.0,
        unknown_below=rule.unknown_below,
        max_classes=MAX_CLASSES,
        window_batch=options.window_batch,
    )
    preprocess = PreprocessSpec(size_hw=size_hw, mean=model.image_mean, std=model.image_std)
    encode = partial(dense_embeds, tower=tower, head=head_name, **settings)
    names = golden_names(options.class_names, GOLDEN_NAMES)
    architecture = str(model.architecture)
    if architecture == "dense_clip":
        architecture += f" {head_name}"
    return written_model(encode, head, preprocess, text, names, architecture=architecture)


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
