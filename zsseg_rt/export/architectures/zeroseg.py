"""Export ZeroSeg: family ``segment_tokens``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec, SegmentSpec
from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.common.checks import check_size
from zsseg_rt.export.bundle_writer import ExportedModel
from zsseg_rt.export.golden import golden_frame, preprocess_frame
from zsseg_rt.export.graph_files import image_network, weights_of
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.export.text_side import TextSide
from zsseg_rt.networks.zeroseg import Student, segments
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.ops import reference
from zsseg_rt.runtime.families.segment_tokens import segment_scores

_OUTPUTS = ("segment_embeds", "image_embed", "group_map")


def export_zeroseg(model: Any, options: ExportOptions) -> ExportedModel:
    """Split a ZeroSeg into a bundle's parts; the text tower is its teacher's."""
    config, size_hw = model.config, options.size_hw or model.config.size_hw
    check_size(size_hw, config.patch_size)
    student = student_of(model)
    text = TextSide(
        options,
        embed_dim=config.embed_dim,
        templates=config.templates,
        space="OpenAI CLIP ViT-L/14",
        tower=model.text_encoder,
    )
    preprocess = PreprocessSpec(size_hw=size_hw, mean=model.image_mean, std=model.image_std)
    head = HeadSpec(
        logit_scale=config.logit_scale,
        normalize=True,
        activation="none",
        grid_hw=(size_hw[0] // config.patch_size, size_hw[1] // config.patch_size),
        unknown_below=config.background_threshold,
    )
    spec = SegmentSpec(num_segments=config.group_tokens[1], top_k=config.top_k)
    encode = partial(segments, student=student)
    return ExportedModel(
        family="segment_tokens",
        architecture=model.architecture,
        graphs={"image_encoder": image_network(encode, size_hw, outputs=_OUTPUTS)},
        preprocess=preprocess,
        head=head,
        sections={"segments": spec},
        text=text,
        golden=partial(_golden, student),
    )


def student_of(model: Any) -> Student:
    """A torch model's network, which shares its weights."""
    heads = {"num_heads": model.config.num_heads, "head_heads": model.config.head_heads}
    return Student(tensors=weights_of(model), **heads)


def _golden(
    student: Student, model: ExportedModel, names: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    """Every intermediate, as NumPy computes it."""
    embeds, extra = model.text.embed(names)
    frame, image = golden_frame(), preprocess_frame(model.preprocess)
    stages = dict(zip(_OUTPUTS, segments(Arrays(), student, image), strict=True))
    specs = model.head, model.sections["segments"]
    scores = segment_scores(stages["segment_embeds"][0], stages["image_embed"][0], embeds, *specs)
    best, classes = scores.max(axis=1), scores.argmax(axis=1)
    unknown_as = label_dtype(len(names))
    limit = model.head.unknown_below
    if limit is not None:
        classes = np.where(best < min(limit, best.max()), np.iinfo(unknown_as).max, classes)
    segment, _ = reference.upsample_argmax(stages["group_map"], frame.shape[:2], activation="none")
    return {
        "frame": frame,
        "class_names": np.array(names),
        "text_embeds": embeds,
        "image": image,
        **stages,
        "mask_logits": stages["group_map"],
        "labels": classes[segment[0]].astype(unknown_as),
        "scores": best[segment[0]],
    } | extra
