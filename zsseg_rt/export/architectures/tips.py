"""Export TIPSv2 from its authors' files, or from a model in torch: family ``dense``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from zsseg_rt.bundles.specs import PreprocessSpec
from zsseg_rt.common.checks import check_size
from zsseg_rt.common.files import sha256_of
from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.export.bundle_writer import ExportedModel, write_model_bundle
from zsseg_rt.export.clip_file import written_model
from zsseg_rt.export.graph_files import weights_of
from zsseg_rt.export.options import COMMON_OPTIONS, ExportOptions, read_options
from zsseg_rt.export.text_side import TextSide
from zsseg_rt.networks.text import WrittenText
from zsseg_rt.networks.tips import TipsImage, TipsText, dense_embeds
from zsseg_rt.text.piece_tokenizer import PIECES_FILE, PieceTokenizer
from zsseg_rt.torch_files.tips_weights import (
    PATCH,
    TEMPLATES,
    TipsTensors,
    heads_of,
    read_tips,
)

_READS = COMMON_OPTIONS | {"class_names", "tokenizer"}


@dataclass(frozen=True, kw_only=True)
class TipsSettings:
    """Settings that the files do not hold."""

    size_hw: tuple[int, int] = (448, 448)  # Input size in pixels, multiples of 14
    num_heads: int | None = None  # Heads of the image tower; None is the published number
    text_heads: int | None = None  # Heads of the text tower; None is the published number
    # Multiplies the cosine similarity; None is one over the stored temperature, or 1 without one
    logit_scale: float | None = None
    unknown_below: float | None = None  # Probability below which a pixel is unknown


def export_tips_files(
    vision: str | Path,
    text: str | Path | None,
    path: str | Path,
    settings: TipsSettings | None = None,
    *,
    check: Callable[[TipsTensors], None] = lambda _: None,
    **options: Any,
) -> Path:
    """Write a bundle of TIPSv2's files; what NumPy computes of the network is its golden sample."""
    towers = [Path(file) for file in (vision, text) if file is not None]
    space = f"TIPSv2 {towers[-1].name} (SHA-256 {sha256_of(towers[-1])[:12]})" if text else ""
    defaults = {"space": space, "source": ", ".join(file.name for file in towers)}
    export_options = read_options(defaults | options, _READS, "TIPS")

    def make() -> ExportedModel:
        weights = read_tips(vision, text)
        check(weights)
        return _cut(weights, settings or TipsSettings(), export_options)

    return write_model_bundle(Path(path), make, export_options)


def export_tips(model: Any, options: ExportOptions) -> ExportedModel:
    """Cut a model in torch into a bundle's parts."""
    config, text = model.config, model.text_encoder
    visual, words = (
        {} if tower is None else weights_of(tower) for tower in (model.image_encoder, text)
    )
    settings = TipsSettings(
        size_hw=options.size_hw or config.size_hw,
        num_heads=config.image_encoder.num_heads,
        text_heads=None if text is None else config.text_encoder.num_heads,
        logit_scale=float(config.logit_scale),
        unknown_below=config.unknown_below,
    )
    weights = TipsTensors(visual=visual, text=words)
    return _cut(weights, settings, options, config.templates or TEMPLATES)


def _cut(
    weights: TipsTensors,
    settings: TipsSettings,
    options: ExportOptions,
    templates: Sequence[str] = TEMPLATES,
) -> ExportedModel:
    check_size(settings.size_hw, PATCH)
    scale = settings.logit_scale
    if scale is None:
        scale = 1.0 if weights.temperature is None else 1 / weights.temperature
    heads = heads_of("num_heads", settings.num_heads, weights.width)
    image = TipsImage(tensors=weights.visual, num_heads=heads, activation="gelu")
    tower = _text_tower(weights, settings, options)
    return written_model(
        partial(dense_embeds, tower=image),
        PreprocessSpec(size_hw=settings.size_hw, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        TextSide(options, embed_dim=weights.width, templates=templates, tower=tower),
        options,
        architecture="tips",
        logit_scale=scale,
        grid_hw=(settings.size_hw[0] // PATCH, settings.size_hw[1] // PATCH),
        unknown_below=settings.unknown_below,
    )


def _text_tower(
    weights: TipsTensors, settings: TipsSettings, options: ExportOptions
) -> WrittenText | None:
    if options.text_encoder not in ("auto", None):
        raise ArgumentError(
            "text_encoder: expected 'auto' or None for TIPS, which has its own, got another one. "
            "Leave it out."
        )
    if not weights.text or options.text_encoder is None:
        return None
    if options.tokenizer is None:
        raise ArgumentError(
            "tokenizer: expected TIPS's SentencePiece model (tokenizer.model) beside its text "
            "tower, got None. Give the file, or no text tower."
        )
    heads = heads_of("text_heads", settings.text_heads, weights.width)
    tower = TipsText(tensors=weights.text, num_heads=heads)
    pieces = options.read_tokenizer()
    num_pieces = PieceTokenizer(pieces).vocab_size
    if num_pieces != tower.vocab_size:
        raise CheckpointError(
            f"tokenizer: expected {tower.vocab_size} pieces, as many as the text tower has rows, "
            f"got {num_pieces}. It is another model's: get TIPS's own tokenizer.model."
        )
    return WrittenText(tower=tower, pieces=(PIECES_FILE, pieces))
