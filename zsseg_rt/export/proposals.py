"""Export ZegFormer to a bundle of family ``proposals``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from zsseg_rt.bundle import HeadSpec, PreprocessSpec
from zsseg_rt.export.bundle_writer import TextBank
from zsseg_rt.export.golden import GOLDEN_TEMPLATES, NUMBERED_NAMES, unit_rows
from zsseg_rt.export.golden_proposals import GoldenClasses, proposals_golden
from zsseg_rt.export.graph_files import (
    GRAPH_PRECISIONS,
    MAX_CLASSES,
    GraphFiles,
    check_precisions,
)
from zsseg_rt.export.model_bundle import write_model_bundle
from zsseg_rt.export.onnx import GraphExport, check_float32_on_cpu, save_graphs
from zsseg_rt.export.text_side import TextEncoderChoice, TextSide, seen_names
from zsseg_rt.models.zegformer import IMAGE_MEAN, IMAGE_STD, REGION_MEAN, REGION_STD, ZegFormer
from zsseg_rt.models.zegformer_folded import ZegFormerParts, fold_zegformer
from zsseg_rt.models.zegformer_prompts import REGION_TEMPLATES, SINGLE_TEMPLATE
from zsseg_rt.region_spec import RegionEncoderSpec, RegionSpec

__all__ = ["export_zegformer", "export_zegformer_graphs"]


def export_zegformer(
    model: ZegFormer,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    text_encoder: TextEncoderChoice = "auto",
    precisions: Sequence[str] = GRAPH_PRECISIONS,
    templates: Sequence[str] = SINGLE_TEMPLATE,
    region_templates: Sequence[str] = REGION_TEMPLATES,
    template_set: str = "custom",
    text_bank: TextBank | None = None,
    size_hw: tuple[int, int] | None = None,
    name: str | None = None,
    space: str = "OpenAI CLIP ViT-B/16",
    source: str = "",
    licence: str = "",
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Write a ZegFormer as a bundle that the engine runs without torch.

    The engine stretches pictures to one size. The official evaluation keeps their shape and pads
    them; that is ``model(...)`` in torch.

    Args:
        model: The model. Its fusion, calibration, region style and region batch go into the
            bundle.
        path: Folder to write, ``NAME.zsseg``.
        class_names: The classes that the model's ``seen_classes`` count in; they name the seen
            classes in the bundle and serve the golden sample.
        text_encoder: ``"auto"`` takes the model's text tower if it has one with CLIP's vocabulary;
            a module is used instead; None writes none (classes then need embeddings).
        precisions: Graph variants, of ``"float32"`` and ``"float16"``.
        templates: Prompts with one ``{}`` each for the segments' embeddings; see
            :mod:`zsseg_rt.models.zegformer_prompts`.
        region_templates: Prompts for CLIP's look at the regions.
        template_set: A short name of the templates.
        text_bank: Names with embeddings float [C, D], or [2, C, D] for segments and regions, that
            ``set_classes`` uses for these names.
        size_hw: Input size in pixels, multiples of 32; None is 512x512.
        name: Name in the manifest; None takes the folder's.
        space: Which joint space the embeddings live in, for people.
        source: Where the weights come from, for people.
        licence: Licence of the weights.
        overwrite: Whether to replace an existing bundle.
        verify: Whether to compare with torch; leave it on.

    Returns:
        The bundle folder.

    Raises:
        BundleError: The folder exists, cannot be written, or the bundle disagrees with torch.
        CheckpointError: The model cannot be exported, or does not fit float16.
        ShapeError: The model cannot take pictures of ``size_hw``.
        VocabularyError: Names, templates or the text bank are unusable.
    """
    check_precisions(precisions)
    check_float32_on_cpu(model)
    job = _Job(model.eval(), size_hw, class_names, region_templates)
    text = TextSide(model, text_encoder, templates)
    return write_model_bundle(
        Path(path),
        _graphs(job.parts, job.batch),
        text,
        partial(job.golden, text),
        family="proposals",
        architecture="zegformer",
        preprocess=job.preprocess,
        head=job.head,
        regions=job.regions,
        embed_dim=job.parts.embed_dim,
        precisions=precisions,
        template_set=template_set,
        text_bank=text_bank,
        name=name,
        space=space,
        source=source,
        licence=licence,
        overwrite=overwrite,
        verify=verify,
    )


def export_zegformer_graphs(
    parts: ZegFormerParts,
    folder: Path,
    precisions: Sequence[str] = GRAPH_PRECISIONS,
    batch: int = 10,
    text_encoder: nn.Module | None = None,
) -> GraphFiles:
    """Write ``NAME.PRECISION.onnx`` for every graph.

    ``image_encoder``: ``image`` [1, 3, H, W] to ``region_masks`` [1, Q, H / 4, W / 4],
    ``segment_embeds`` [1, Q, D] and ``no_object`` [1, Q]; ``region_encoder``: ``crops``
    [regions, 3, s, s] to ``region_embeds`` [regions, D]; ``text_encoder`` in float32 only.

    Args:
        parts: What :func:`zsseg_rt.models.zegformer_folded.fold_zegformer` gave.
        folder: Existing folder to write into.
        precisions: Which variants to write.
        batch: The most crops that the region encoder takes at once.
        text_encoder: The text tower to write, or None for none.

    Returns:
        ``{graph name: {precision: entry}}``, paths relative to ``folder``.
    """
    return save_graphs(_graphs(parts, batch), folder, precisions, text_encoder=text_encoder)


def _graphs(parts: ZegFormerParts, batch: int) -> dict[str, GraphExport]:
    graphs = {
        "image_encoder": GraphExport(
            module=parts.image_encoder,
            inputs={"image": torch.zeros(1, 3, *parts.size_hw)},
            outputs=("region_masks", "segment_embeds", "no_object"),
        )
    }
    if parts.region_encoder is not None:
        side = parts.region_side
        graphs["region_encoder"] = GraphExport(
            module=parts.region_encoder,
            inputs={"crops": torch.zeros(3, 3, side, side)},
            outputs=("region_embeds",),
            dynamic={"crops": {0: ("regions", max(batch, 4))}},
        )
    return graphs


class _Job:
    """What one export derives from the model."""

    def __init__(
        self,
        model: ZegFormer,
        size_hw: tuple[int, int] | None,
        class_names: Sequence[str] | None,
        region_templates: Sequence[str],
    ) -> None:
        self.model = model
        self.parts = fold_zegformer(model, size_hw)
        self.batch = min(model.config.region_batch, 64)
        self.class_names = None if class_names is None else list(class_names)
        self.preprocess = PreprocessSpec(
            size_hw=self.parts.size_hw, mean=_unit_range(IMAGE_MEAN), std=_unit_range(IMAGE_STD)
        )
        self.regions = self._region_spec(tuple(region_templates))
        self.seen = seen_names(model.config.seen_classes, self.class_names)
        self.head = HeadSpec(
            logit_scale=self.parts.segment_scale,
            normalize=False,
            activation="none",
            grid_hw=self.parts.grid_hw,
            seen=self.seen,
            seen_bias=max(model.config.calibration, 0.0) if self.seen else 0.0,
            max_classes=MAX_CLASSES,
        )

    def golden(self, text: TextSide) -> dict[str, npt.NDArray[Any]]:
        """The golden sample; with a text tower also ``prompt_embeds`` of ``token_ids``."""
        names = self.class_names or list(NUMBERED_NAMES)
        classes, extra = self._golden_classes(text, names[:MAX_CLASSES])
        model = self.model
        if not self.seen:  # the bundle then knows none either
            model = copy.copy(model)
            model.config = replace(model.config, seen_classes=())
        arrays = proposals_golden(model, self.preprocess, self.regions, classes)
        return arrays | extra

    def _golden_classes(
        self, text: TextSide, names: list[str]
    ) -> tuple[GoldenClasses, dict[str, npt.NDArray[Any]]]:
        segments = text.embed(names, text.templates[:GOLDEN_TEMPLATES])
        encoder = self.regions.encoder
        if segments is None:
            rows = unit_rows(2 * len(names), self.parts.embed_dim)
            return (names, rows[: len(names)], rows[len(names) :].copy()), {}
        embeds, extra = segments
        used = text.templates if encoder is None else encoder.templates
        regions = text.embed(names, used[:GOLDEN_TEMPLATES])
        assert regions is not None
        return (names, embeds, regions[0]), extra

    def _region_spec(self, templates: tuple[str, ...]) -> RegionSpec:
        config, parts = self.model.config, self.parts
        if parts.region_encoder is None:
            return RegionSpec(num_regions=parts.num_regions, fusion="segments")
        fusion = "seen_and_unseen" if config.ensemble else "regions"
        return RegionSpec(
            num_regions=parts.num_regions,
            fusion="all_classes" if config.ensemble_all_classes else fusion,
            encoder=RegionEncoderSpec(
                side=parts.region_side,
                batch=self.batch,
                style=config.region_style,
                mean=_unit_range(REGION_MEAN),
                std=_unit_range(REGION_STD),
                logit_scale=parts.region_scale,
                templates=templates,
            ),
        )


def _unit_range(values: Sequence[float]) -> tuple[float, float, float]:
    """From 0..255 to 0..1."""
    red, green, blue = (value / 255 for value in values)
    return red, green, blue
