"""Export ZegFormer, from its authors' file or a model in torch: family ``proposals``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.specs import (
    FUSIONS,
    STYLES,
    HeadSpec,
    PreprocessSpec,
    RegionEncoderSpec,
    RegionSpec,
)
from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.common.checks import check_choice, check_size
from zsseg_rt.errors import CheckpointError
from zsseg_rt.export.bundle_writer import ExportedModel, write_model_bundle
from zsseg_rt.export.golden import golden_frame, preprocess_frame
from zsseg_rt.export.graph_files import (
    WrittenGraph,
    image_network,
    weights_of,
    written_graph,
)
from zsseg_rt.export.options import MODEL_OPTIONS, ExportOptions, read_options
from zsseg_rt.export.text_side import TextSide, clip_text, seen_names
from zsseg_rt.networks.clip import part_of
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
from zsseg_rt.torch_files.clip_arrays import ClipTensors
from zsseg_rt.torch_files.official import REGION_TEMPLATES, SINGLE_TEMPLATE, read_zegformer
from zsseg_rt.torch_files.shapes import divisor

NATIVE_SIZE_HW = (512, 512)
_FILE_OPTIONS = MODEL_OPTIONS - {"text_encoder"} | {"region_templates"}
_MOST_REGIONS = 64  # the region encoder takes at most this many at once
_KEPT_CROPS = 2  # in the golden sample: enough to compare the region encoder's graph


@dataclass(frozen=True, kw_only=True)
class ZegFormerSettings:
    """Settings that an official checkpoint of ZegFormer does not hold; the torch model has them."""

    seen_classes: Sequence[int] = ()  # Rows of class_names whose score maps are lowered
    calibration: float = 0.1  # By how much; 0 or less for nothing
    fusion: str = "seen_and_unseen"  # Who decides; one of FUSIONS
    region_style: str = "cropmask"  # What CLIP is shown of a segment; one of STYLES
    region_batch: int = 10  # Regions that are encoded at once

    def __post_init__(self) -> None:
        check_choice("fusion", self.fusion, FUSIONS)
        check_choice("region_style", self.region_style, STYLES)


def export_zegformer_file(
    file: str | Path,
    path: str | Path,
    settings: ZegFormerSettings | None = None,
    *,
    clip: ClipTensors | None = None,
    activation: str = "quick_gelu",
    **options: Any,
) -> Path:
    """Write a bundle of an official checkpoint, without torch."""
    file, settings = Path(file), settings or ZegFormerSettings()
    export_options = read_options({"source": file.name} | options, _FILE_OPTIONS, "zegformer")

    def make() -> ExportedModel:
        tensors = read_zegformer(file, clip)
        queries = tensors["sem_seg_head.predictor.query_embed.weight"]
        network = ZegFormerNetwork(
            tensors=tensors,
            num_heads=divisor("num_heads", ZegFormerNetwork.num_heads, queries.shape[1]),
            activation=activation,
        )
        if not network.clip.tensors:
            if settings.fusion != "segments":
                raise CheckpointError(
                    f"{file.name}: expected CLIP's weights under '{CLIP}', got none, as in every "
                    "checkpoint of training. Give OpenAI's ViT-B-16.pt (--clip FILE), or let the "
                    "text branch decide alone (--fusion segments)."
                )
            return _cut(network, None, settings, export_options)
        width = len(network.clip.tensors["class_embedding"])
        network = replace(network, clip_heads=divisor("clip_heads", None, width))
        words = {
            key: value
            for key, value in part_of(tensors, CLIP).items()
            if not key.startswith(("visual.", "logit_scale"))
        }
        return _cut(network, clip_text(words, activation), settings, export_options)

    return write_model_bundle(Path(path), make, export_options)


def export_zegformer(model: Any, options: ExportOptions) -> ExportedModel:
    """Cut a ZegFormer in torch into a bundle's parts, with its fusion and calibration."""
    names = [one.name for one in fields(ZegFormerSettings)]
    settings = ZegFormerSettings(**{name: getattr(model.config, name) for name in names})
    return _cut(network_of(model), model.text_encoder, settings, options)


def _cut(
    network: ZegFormerNetwork, tower: Any, settings: ZegFormerSettings, options: ExportOptions
) -> ExportedModel:
    size_hw = options.size_hw or NATIVE_SIZE_HW
    check_size(size_hw, 32)
    preprocess = PreprocessSpec(
        size_hw=size_hw, mean=_unit_range(IMAGE_MEAN), std=_unit_range(IMAGE_STD)
    )
    regions = _region_spec(network, settings, options)
    seen = seen_names(settings.seen_classes, options.class_names)
    head = HeadSpec(
        logit_scale=float(math.exp(network.predictor["logit_scale"].item())),
        normalize=False,
        activation="none",
        grid_hw=(size_hw[0] // STRIDE, size_hw[1] // STRIDE),
        seen=seen,
        seen_bias=max(settings.calibration, 0.0) if seen else 0.0,
    )
    text = TextSide(
        options,
        embed_dim=network.embed_dim,
        templates=SINGLE_TEMPLATE,
        space="OpenAI CLIP ViT-B/16",
        tower=tower,
    )
    graphs = graphs_of(network, size_hw)
    if regions.encoder is None:
        graphs.pop("region_encoder", None)
    return ExportedModel(
        family="proposals",
        architecture="zegformer",
        graphs=graphs,
        preprocess=preprocess,
        head=head,
        sections={"regions": regions},
        text=text,
        golden=partial(_golden, network),
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


def _region_spec(
    network: ZegFormerNetwork, settings: ZegFormerSettings, options: ExportOptions
) -> RegionSpec:
    if settings.fusion == "segments" or not network.clip.tensors:
        return RegionSpec(num_regions=network.num_queries, fusion=settings.fusion)
    templates = options.region_templates
    return RegionSpec(
        num_regions=network.num_queries,
        fusion=settings.fusion,
        encoder=RegionEncoderSpec(
            side=network.region_side,
            batch=min(settings.region_batch, _MOST_REGIONS),
            style=settings.region_style,
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
    network: ZegFormerNetwork, model: ExportedModel, names: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    """The golden sample of one image; ``mask_logits`` show by how much each label won."""
    text, head, regions = model.text, model.head, model.sections["regions"]
    embeds, arrays = text.embed(names)
    frame, size_hw = golden_frame(), model.preprocess.size_hw
    image = preprocess_frame(model.preprocess)
    arrays |= {"image": image, **propose(Arrays(), network, image)}
    masks, nothing = arrays["region_masks"][0], arrays["no_object"][0]
    scaled = np.asarray(head.logit_scale * embeds, np.float32)
    by_text = class_probabilities(scaled @ arrays["segment_embeds"][0].T, nothing)[0]
    by_region = None
    if regions.encoder is not None:
        encoder = regions.encoder
        planes = PreprocessSpec(size_hw=size_hw, mean=encoder.mean, std=encoder.std)
        crops = reference.crop_regions(  # float32 [Q, 3, s, s], each region as CLIP sees it
            preprocess_frame(planes)[0],
            masks,
            np.arange(len(masks), dtype=np.int32),
            reference.mask_boxes(masks, size_hw),
            side=encoder.side,
            style=encoder.style,
        )
        parts = range(0, len(crops), encoder.batch)
        crop_embeds = np.concatenate(
            [embed_regions(Arrays(), network, crops[at : at + encoder.batch]) for at in parts]
        )
        region_embeds = text.embed(names, encoder.templates)[0]
        if text.encoder is None:  # the same random rows: their order tells them apart
            region_embeds = region_embeds[::-1].copy()
        scaled = np.asarray(encoder.logit_scale * region_embeds, np.float32)
        by_region = class_probabilities(scaled @ crop_embeds.T, nothing)[0]
        arrays |= {"crops": crops[:_KEPT_CROPS], "region_embeds": crop_embeds[:_KEPT_CROPS]}
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
