"""The golden sample of a proposals bundle: every intermediate array, computed by torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zsseg_rt.bundle import PreprocessSpec
from zsseg_rt.export.golden import golden_frame
from zsseg_rt.models import functional
from zsseg_rt.models.image_encoder import unit
from zsseg_rt.models.zegformer import ZegFormer
from zsseg_rt.models.zegformer_decoder import Segments
from zsseg_rt.models.zegformer_regions import crop_regions, mask_boxes, upsample_masks
from zsseg_rt.region_spec import RegionSpec

__all__ = ["GoldenClasses", "proposals_golden"]

GoldenClasses = tuple[Sequence[str], npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Names, their embeddings for segments [C, D] and for regions [C, D]."""

_KEPT_CROPS = 2  # enough to compare the region encoder's graph


@torch.no_grad()
def proposals_golden(
    model: ZegFormer,
    preprocess: PreprocessSpec,
    regions: RegionSpec,
    classes: GoldenClasses,
) -> dict[str, npt.NDArray[Any]]:
    """Every intermediate of a ZegFormer, from the model as trained, not from its folded parts.

    ``mask_logits`` are the final score maps of the frame, which the engine never makes; they tell
    by how much each label won.

    Args:
        model: The model; its ``seen_classes`` count in the names.
        preprocess: Preprocessing for the segments.
        regions: Preprocessing for CLIP.
        classes: Classes.
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
    golden = {name: np.ascontiguousarray(array.numpy()) for name, array in arrays.items()}
    if regions.encoder is not None:
        golden["region_text_embeds"] = region_embeds
    return golden | {
        "labels": maps.argmax(dim=0).numpy().astype(np.uint8 if len(names) < 255 else np.uint16),
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
    """A few regions as CLIP is shown them, and what it makes of them."""
    clip = model.clip_model
    assert clip is not None
    size_hw = (planes.shape[1], planes.shape[2])
    masks = upsample_masks(segments.masks[0, :_KEPT_CROPS], size_hw)
    crops = crop_regions(
        planes, masks, mask_boxes(masks > 0), style=model.config.region_style, side=clip.image_side
    )
    return {"crops": crops, "region_embeds": unit(clip.embed_images(crops))}
