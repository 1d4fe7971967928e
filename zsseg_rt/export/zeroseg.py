"""Export ZeroSeg to a bundle of family ``segment_tokens``: student, text tower, tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zsseg_rt.bundle import HeadSpec, PreprocessSpec, SegmentSpec
from zsseg_rt.export.bundle_writer import TextBank
from zsseg_rt.export.golden import GOLDEN_NAMES, golden_frame, preprocess_frame
from zsseg_rt.export.graph_files import GRAPH_PRECISIONS, MAX_CLASSES, check_precisions
from zsseg_rt.export.model_bundle import write_model_bundle
from zsseg_rt.export.onnx import GraphExport, check_float32_on_cpu
from zsseg_rt.export.text_side import TextEncoderChoice, TextSide
from zsseg_rt.models.zeroseg import FoldedZeroSeg, ZeroSeg

__all__ = ["export_zeroseg"]


def export_zeroseg(
    model: ZeroSeg,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    text_encoder: TextEncoderChoice = "auto",
    precisions: Sequence[str] = GRAPH_PRECISIONS,
    templates: Sequence[str] | None = None,
    template_set: str = "custom",
    text_bank: TextBank | None = None,
    size_hw: tuple[int, int] | None = None,
    name: str | None = None,
    space: str = "OpenAI CLIP ViT-L/14",
    source: str = "",
    licence: str = "",
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Write ZeroSeg as a bundle that the engine runs without torch.

    The engine runs the whole frame at one size; windows are for evaluation in torch
    (:func:`zsseg_rt.models.zeroseg_labels.segment_predict`). The class rule and the background
    threshold are the model's.

    Args:
        model: What ``create_model("zeroseg", ...)`` made.
        path: Folder to write, ``NAME.zsseg``.
        class_names: Classes of the golden sample; the bundle takes any at run time.
        text_encoder: ``"auto"`` takes the model's text tower if it has one with CLIP's vocabulary;
            a module is used instead, which must be the teacher's; None writes none (classes then
            need embeddings or a text bank).
        precisions: Graph variants, of ``"float32"`` and ``"float16"``.
        templates: Prompts with one ``{}`` each; None is the model's.
        template_set: A short name of the templates.
        text_bank: Names with embeddings float [C, D] that ``set_classes`` uses for these names.
        size_hw: Input size in pixels, multiples of the patch size; None is the model's.
        name: Name in the manifest; None takes the folder's.
        space: Which joint space the embeddings live in, for people: the teacher's.
        source: Where the weights come from, for people.
        licence: Licence of the weights.
        overwrite: Whether to replace an existing bundle.
        verify: Whether to compare with torch; leave it on.

    Returns:
        The bundle folder.

    Raises:
        BundleError: The folder exists, cannot be written, or the bundle disagrees with torch.
        CheckpointError: The model is not float32 on the CPU, or does not fit float16.
        ShapeError: Patches do not fill ``size_hw``.
        VocabularyError: Templates or the text bank are unusable.
    """
    check_precisions(precisions)
    check_float32_on_cpu(model)
    folded = model.eval().fold_for_inference(size_hw)
    text = TextSide(model, text_encoder, templates or model.config.templates)
    preprocess = PreprocessSpec(size_hw=folded.size_hw, mean=model.image_mean, std=model.image_std)
    return write_model_bundle(
        Path(path),
        {"image_encoder": _image_encoder(folded)},
        text,
        partial(_golden, model, preprocess, text, class_names or GOLDEN_NAMES),
        family="segment_tokens",
        architecture="zeroseg",
        preprocess=preprocess,
        head=_head_spec(model, folded),
        segments=_segment_spec(model),
        embed_dim=model.config.embed_dim,
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


def _head_spec(model: ZeroSeg, folded: FoldedZeroSeg) -> HeadSpec:
    return HeadSpec(
        logit_scale=model.config.rule.logit_scale,
        normalize=True,
        activation="none",
        grid_hw=folded.grid_hw,
        unknown_below=model.config.background_threshold,
        max_classes=MAX_CLASSES,
    )


def _segment_spec(model: ZeroSeg) -> SegmentSpec:
    return SegmentSpec(
        num_segments=model.config.group_tokens[1],
        top_k=model.config.rule.top_k,
        plain_cosine=model.config.rule.plain_cosine,
    )


def _image_encoder(folded: FoldedZeroSeg) -> GraphExport:
    return GraphExport(
        module=folded,
        inputs={"image": torch.zeros(1, 3, *folded.size_hw)},
        outputs=("segment_embeds", "image_embed", "group_map"),
    )


@torch.no_grad()
def _golden(
    model: ZeroSeg, preprocess: PreprocessSpec, text: TextSide, class_names: Sequence[str]
) -> dict[str, npt.NDArray[Any]]:
    """Every intermediate of the model as built, not as folded, so that folding is checked too."""
    names = list(class_names)[:MAX_CLASSES]
    embeds, extra = text.embed_golden(names, model.config.embed_dim)
    frame, image = golden_frame(), preprocess_frame(preprocess)
    tokens = model(torch.from_numpy(image))
    labels, scores = model.segment(
        torch.from_numpy(image), torch.from_numpy(embeds), (frame.shape[0], frame.shape[1])
    )
    unknown_as = np.uint8 if len(names) <= 254 else np.uint16  # -1 becomes the largest value
    return {
        "frame": frame,
        "class_names": np.array(names),
        "text_embeds": embeds,
        "image": image,
        "segment_embeds": tokens.segment_embeds.numpy(),
        "image_embed": tokens.image_embed.numpy(),
        "group_map": tokens.group_map.numpy(),
        "mask_logits": tokens.group_map.numpy(),
        "labels": labels[0].numpy().astype(unknown_as),
        "scores": scores[0].numpy(),
    } | extra
