"""Export ZegFormer: family ``proposals``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec, RegionEncoderSpec, RegionSpec
from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.export.bundle_writer import ExportedModel
from zsseg_rt.export.folded.zegformer import ZegFormerParts, fold_zegformer
from zsseg_rt.export.golden import (
    GOLDEN_TEMPLATES,
    NUMBERED_NAMES,
    as_numpy,
    golden_frame,
    unit_rows,
)
from zsseg_rt.export.graph_files import MAX_CLASSES, provenance
from zsseg_rt.export.onnx import GraphExport, image_graph
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.export.text_side import TextSide, seen_names
from zsseg_rt.models import functional
from zsseg_rt.models.clip.image_encoder import unit
from zsseg_rt.models.zegformer.decoder import Segments
from zsseg_rt.models.zegformer.model import (
    IMAGE_MEAN,
    IMAGE_STD,
    REGION_MEAN,
    REGION_STD,
    ZegFormer,
)
from zsseg_rt.models.zegformer.regions import crop_regions, mask_boxes, upsample_masks
from zsseg_rt.torch_files.zegformer_prompts import REGION_TEMPLATES, SINGLE_TEMPLATE

_MOST_REGIONS = 64  # the region encoder takes at most this many at once
_KEPT_CROPS = 2  # in the golden sample: enough to compare the region encoder's graph

# Names, their embeddings for segments [C, D] and for regions [C, D].
_Classes = tuple[Sequence[str], npt.NDArray[np.float32], npt.NDArray[np.float32]]


def export_zegformer(model: ZegFormer, options: ExportOptions) -> ExportedModel:
    """Split a ZegFormer into a bundle's parts; keep its fusion, calibration and region style.

    Graphs and tensors: ``image_encoder``: ``image`` [1, 3, H, W] to ``region_masks``
    [1, Q, H / 4, W / 4], ``segment_embeds`` [1, Q, D] and ``no_object`` [1, Q];
    ``region_encoder``: ``crops`` [regions, 3, s, s] to ``region_embeds`` [regions, D].
    """
    parts = fold_zegformer(model, options.size_hw)
    preprocess = PreprocessSpec(
        size_hw=parts.size_hw, mean=_unit_range(IMAGE_MEAN), std=_unit_range(IMAGE_STD)
    )
    regions = _region_spec(model, parts, options)
    head = _head_spec(model, parts, options)
    text = TextSide(
        options,
        embed_dim=parts.embed_dim,
        templates=SINGLE_TEMPLATE,
        space="OpenAI CLIP ViT-B/16",
        tower=model.text_encoder,
    )
    if not head.seen:  # then the golden sample has none either
        model = copy.copy(model)
        model.config = replace(model.config, seen_classes=())
    names = list(options.class_names or NUMBERED_NAMES)[:MAX_CLASSES]
    return ExportedModel(
        family="proposals",
        architecture=model.architecture,
        graphs=_graphs(parts, regions),
        preprocess=preprocess,
        head=head,
        sections={"regions": regions},
        text=text,
        golden=partial(_golden, model, preprocess, regions, text, names),
        provenance=provenance(),
    )


def _graphs(parts: ZegFormerParts, regions: RegionSpec) -> dict[str, GraphExport]:
    outputs = ("region_masks", "segment_embeds", "no_object")
    graphs = {"image_encoder": image_graph(parts.image_encoder, parts.size_hw, outputs)}
    if parts.region_encoder is not None and regions.encoder is not None:
        graphs["region_encoder"] = GraphExport(
            module=parts.region_encoder,
            inputs={"crops": torch.zeros(3, 3, parts.region_side, parts.region_side)},
            outputs=("region_embeds",),
            dynamic={"crops": {0: ("regions", max(regions.encoder.batch, 4))}},
        )
    return graphs


def _head_spec(model: ZegFormer, parts: ZegFormerParts, options: ExportOptions) -> HeadSpec:
    seen = seen_names(model.config.seen_classes, options.class_names)
    return HeadSpec(
        logit_scale=parts.segment_scale,
        normalize=False,
        activation="none",
        grid_hw=parts.grid_hw,
        seen=seen,
        seen_bias=max(model.config.calibration, 0.0) if seen else 0.0,
        max_classes=MAX_CLASSES,
    )


def _region_spec(model: ZegFormer, parts: ZegFormerParts, options: ExportOptions) -> RegionSpec:
    config = model.config
    if parts.region_encoder is None:
        return RegionSpec(num_regions=parts.num_regions, fusion=config.fusion)
    templates = options.region_templates
    return RegionSpec(
        num_regions=parts.num_regions,
        fusion=config.fusion,
        encoder=RegionEncoderSpec(
            side=parts.region_side,
            batch=min(config.region_batch, _MOST_REGIONS),
            style=config.region_style,
            mean=_unit_range(REGION_MEAN),
            std=_unit_range(REGION_STD),
            logit_scale=parts.region_scale,
            templates=REGION_TEMPLATES if templates is None else tuple(templates),
        ),
    )


def _unit_range(values: Sequence[float]) -> tuple[float, float, float]:
    """From 0..255 to 0..1."""
    red, green, blue = (value / 255 for value in values)
    return red, green, blue


def _golden(
    model: ZegFormer,
    preprocess: PreprocessSpec,
    regions: RegionSpec,
    text: TextSide,
    names: Sequence[str],
) -> dict[str, npt.NDArray[Any]]:
    classes, extra = _golden_classes(text, regions, names)
    return _golden_arrays(model, preprocess, regions, classes) | extra


def _golden_classes(
    text: TextSide, regions: RegionSpec, names: Sequence[str]
) -> tuple[_Classes, dict[str, npt.NDArray[Any]]]:
    segments = text.embed(names, text.templates[:GOLDEN_TEMPLATES])
    if segments is None:
        rows = unit_rows(2 * len(names), text.embed_dim)
        return (names, rows[: len(names)], rows[len(names) :].copy()), {}
    embeds, extra = segments
    templates = text.templates if regions.encoder is None else regions.encoder.templates
    region_embeds, _ = text.embed_golden(names, templates[:GOLDEN_TEMPLATES])
    return (names, embeds, region_embeds), extra


@torch.no_grad()
def _golden_arrays(
    model: ZegFormer, preprocess: PreprocessSpec, regions: RegionSpec, classes: _Classes
) -> dict[str, npt.NDArray[Any]]:
    """Every intermediate of the model as trained, not of its folded parts.

    ``mask_logits`` are the final score maps of the frame, which the engine never makes; they show
    by how much each label won.
    """
    frame = golden_frame()
    names, embeds, region_embeds = classes
    image = _planes(frame, preprocess.size_hw, preprocess.mean, preprocess.std)
    segments = model.propose(image, torch.from_numpy(embeds))
    clip_logits, extra = None, {}
    if regions.encoder is not None:
        spec = regions.encoder
        planes = _planes(frame, preprocess.size_hw, spec.mean, spec.std)
        clip_logits = model.classify_regions(planes, segments, torch.from_numpy(region_embeds))
        extra = _kept_crops(model, planes[0], segments)
    scores = model.fuse(segments.logits, clip_logits)[0]
    size_hw = preprocess.size_hw
    maps = model.score_maps(scores, segments.masks[0], size_hw, size_hw, frame.shape[:2])
    arrays = {
        "image": image,
        "region_masks": segments.masks,
        "segment_embeds": _segment_embeds(model, image),
        "no_object": segments.logits[..., -1],
        "class_scores": scores.T,
        "mask_logits": maps.unsqueeze(0),
        **extra,
    }
    golden = as_numpy(arrays)
    if regions.encoder is not None:
        golden["region_text_embeds"] = region_embeds
    return golden | {
        "labels": maps.argmax(dim=0).numpy().astype(label_dtype(len(names))),
        "frame": frame,
        "class_names": np.array(list(names)),
        "text_embeds": embeds,
    }


def _planes(
    frame: npt.NDArray[np.uint8],
    size_hw: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """The frame as float32 [1, 3, h, w]."""
    planes = functional.preprocess(torch.from_numpy(frame), size_hw=size_hw, mean=mean, std=std)
    return planes[None]


def _segment_embeds(model: ZegFormer, image: Tensor) -> Tensor:
    predictor = model.sem_seg_head.predictor
    queries = predictor.decode(model.backbone(image)[-1])[-1]
    return unit(predictor.projection_layer(queries))


def _kept_crops(model: ZegFormer, planes: Tensor, segments: Segments) -> dict[str, Tensor]:
    """A few regions as CLIP sees them, and their embeddings."""
    clip = model.clip_model
    assert clip is not None
    size_hw = (planes.shape[1], planes.shape[2])
    masks = upsample_masks(segments.masks[0, :_KEPT_CROPS], size_hw)
    crops = crop_regions(
        planes, masks, mask_boxes(masks > 0), style=model.config.region_style, side=clip.image_side
    )
    return {"crops": crops, "region_embeds": unit(clip.embed_images(crops))}
