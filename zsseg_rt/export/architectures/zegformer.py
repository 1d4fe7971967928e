"""Export ZegFormer: family ``proposals``. Neither torch nor onnx is imported here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec, RegionEncoderSpec, RegionSpec
from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.errors import ShapeError
from zsseg_rt.export.bundle_writer import ExportedModel
from zsseg_rt.export.golden import (
    GOLDEN_TEMPLATES,
    NUMBERED_NAMES,
    golden_frame,
    preprocess_frame,
    unit_rows,
)
from zsseg_rt.export.graph_files import (
    MAX_CLASSES,
    WrittenGraph,
    image_network,
    provenance,
    weights_of,
    written_graph,
)
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.export.text_side import TextSide, seen_names
from zsseg_rt.networks.zegformer import (
    CLIP,
    IMAGE_MEAN,
    IMAGE_STD,
    REGION_MEAN,
    REGION_STD,
    STRIDE,
    ZegFormerNetwork,
    embed_regions,
    propose,
)
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.ops import reference
from zsseg_rt.runtime.families.proposals import class_probabilities, fuse
from zsseg_rt.torch_files.zegformer_prompts import REGION_TEMPLATES, SINGLE_TEMPLATE

if TYPE_CHECKING:
    from zsseg_rt.models.zegformer.model import ZegFormerConfig

NATIVE_SIZE_HW = (512, 512)
_MOST_REGIONS = 64  # the region encoder takes at most this many at once
_KEPT_CROPS = 2  # in the golden sample: enough to compare the region encoder's graph

# Names, their embeddings for segments [C, D] and for regions [C, D].
_Classes = tuple[Sequence[str], npt.NDArray[np.float32], npt.NDArray[np.float32]]


def export_zegformer(model: Any, options: ExportOptions) -> ExportedModel:
    """Cut a ZegFormer into a bundle's parts; keep its fusion, calibration and region style.

    Graphs and tensors: ``image_encoder``: ``image`` [1, 3, H, W] to ``region_masks``
    [1, Q, H / 4, W / 4], ``segment_embeds`` [1, Q, D] and ``no_object`` [1, Q];
    ``region_encoder``: ``crops`` [regions, 3, s, s] to ``region_embeds`` [regions, D].
    """
    config, network = model.config, network_of(model)
    size_hw = _checked_size(options.size_hw or NATIVE_SIZE_HW, config.size_divisor)
    preprocess = PreprocessSpec(
        size_hw=size_hw, mean=_unit_range(IMAGE_MEAN), std=_unit_range(IMAGE_STD)
    )
    regions = _region_spec(network, config, options)
    seen = seen_names(config.seen_classes, options.class_names)
    head = HeadSpec(
        logit_scale=float(math.exp(network.predictor["logit_scale"].item())),
        normalize=False,
        activation="none",
        grid_hw=(size_hw[0] // STRIDE, size_hw[1] // STRIDE),
        seen=seen,
        seen_bias=max(config.calibration, 0.0) if seen else 0.0,
        max_classes=MAX_CLASSES,
    )
    text = TextSide(
        options,
        embed_dim=network.embed_dim,
        templates=SINGLE_TEMPLATE,
        space="OpenAI CLIP ViT-B/16",
        tower=model.text_encoder,
    )
    graphs = graphs_of(network, size_hw)
    if regions.encoder is None:
        graphs.pop("region_encoder", None)
    names = list(options.class_names or NUMBERED_NAMES)[:MAX_CLASSES]
    return ExportedModel(
        family="proposals",
        architecture=model.architecture,
        graphs=graphs,
        preprocess=preprocess,
        head=head,
        sections={"regions": regions},
        text=text,
        golden=partial(_golden, network, preprocess, head, regions, text, names),
        provenance=provenance(),
    )


def graphs_of(network: ZegFormerNetwork, size_hw: tuple[int, int]) -> dict[str, WrittenGraph]:
    """Segments of images of one size; with a CLIP, its embeddings of any number of regions."""
    graphs = {"image_encoder": image_network(partial(propose, network=network), size_hw)}
    if network.clip.tensors:
        encode, side = partial(embed_regions, network=network), network.region_side
        shape = ("regions", 3, side, side)
        graphs["region_encoder"] = written_graph(encode, {"crops": shape}, ("region_embeds",))
    return graphs


def network_of(model: Any) -> ZegFormerNetwork:
    """The weights of a model in torch, and its settings."""
    config = model.config
    clip = {}
    if config.clip_image is not None:
        clip = {
            "clip_heads": config.clip_image.num_heads,
            "activation": config.clip_image.activation,
        }
    return ZegFormerNetwork(tensors=weights_of(model), num_heads=config.decoder.num_heads, **clip)


def _checked_size(size_hw: tuple[int, int], size_divisor: int) -> tuple[int, int]:
    divisor = max(size_divisor, 32)
    if min(size_hw) < divisor or max(size_hw) > 4096 or any(side % divisor for side in size_hw):
        raise ShapeError(
            f"size_hw: expected multiples of {divisor} up to 4096, got {size_hw[0]}x{size_hw[1]}. "
            "Images are stretched to this size, so nothing is padded."
        )
    return size_hw


def _region_spec(
    network: ZegFormerNetwork, config: ZegFormerConfig, options: ExportOptions
) -> RegionSpec:
    if config.fusion == "segments" or config.clip_image is None:
        return RegionSpec(num_regions=network.num_queries, fusion=config.fusion)
    templates = options.region_templates
    return RegionSpec(
        num_regions=network.num_queries,
        fusion=config.fusion,
        encoder=RegionEncoderSpec(
            side=network.region_side,
            batch=min(config.region_batch, _MOST_REGIONS),
            style=config.region_style,
            mean=_unit_range(REGION_MEAN),
            std=_unit_range(REGION_STD),
            logit_scale=float(math.exp(network.tensors[f"{CLIP}logit_scale"].item())),
            templates=REGION_TEMPLATES if templates is None else tuple(templates),
        ),
    )


def _unit_range(values: Sequence[float]) -> tuple[float, float, float]:
    """From 0..255 to 0..1."""
    red, green, blue = (value / 255 for value in values)
    return red, green, blue


def _golden(
    network: ZegFormerNetwork,
    preprocess: PreprocessSpec,
    head: HeadSpec,
    regions: RegionSpec,
    text: TextSide,
    names: Sequence[str],
) -> dict[str, npt.NDArray[Any]]:
    """What NumPy computes of the network on one image.

    ``mask_logits`` are the final score maps of the frame, which the engine never makes; they show
    by how much each label won.
    """
    (names, embeds, region_embeds), arrays = _golden_classes(text, regions, names)
    frame, size_hw = golden_frame(), preprocess.size_hw
    image = preprocess_frame(preprocess)
    arrays |= {"image": image, **propose(Arrays(), network, image)}
    masks, nothing = arrays["region_masks"][0], arrays["no_object"][0]
    scaled = np.asarray(head.logit_scale * embeds, np.float32)
    by_text = class_probabilities(scaled @ arrays["segment_embeds"][0].T, nothing)[0]
    by_region = None
    if regions.encoder is not None:
        crops = _crops(regions.encoder, size_hw, masks)
        found = _embed_all(network, crops, regions.encoder.batch)
        scaled = np.asarray(regions.encoder.logit_scale * region_embeds, np.float32)
        by_region = class_probabilities(scaled @ found.T, nothing)[0]
        arrays |= {"crops": crops[:_KEPT_CROPS], "region_embeds": found[:_KEPT_CROPS]}
        arrays["region_text_embeds"] = region_embeds
    seen = np.isin(list(names), head.seen)
    scores = np.asarray(fuse(by_text, by_region, regions.fusion, seen), np.float32)
    maps = reference.score_maps(masks, scores, size_hw, (frame.shape[0], frame.shape[1]))
    maps = maps - np.float32(head.seen_bias) * seen[:, None, None].astype(np.float32)
    return arrays | {
        "frame": frame,
        "class_names": np.array(list(names)),
        "text_embeds": embeds,
        "class_scores": scores,
        "mask_logits": maps[None],
        "labels": maps.argmax(axis=0).astype(label_dtype(len(names))),
    }


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


def _crops(
    spec: RegionEncoderSpec, size_hw: tuple[int, int], masks: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Every region as CLIP sees it, float32 [Q, 3, s, s]."""
    planes = preprocess_frame(PreprocessSpec(size_hw=size_hw, mean=spec.mean, std=spec.std))[0]
    boxes = reference.mask_boxes(masks, size_hw)
    regions = np.arange(len(masks), dtype=np.int32)
    return reference.crop_regions(planes, masks, regions, boxes, side=spec.side, style=spec.style)


def _embed_all(
    network: ZegFormerNetwork, crops: npt.NDArray[np.float32], batch: int
) -> npt.NDArray[np.float32]:
    starts = range(0, len(crops), batch)
    parts = [embed_regions(Arrays(), network, crops[start : start + batch]) for start in starts]
    return np.concatenate(parts)
