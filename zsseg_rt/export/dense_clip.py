"""Export dense CLIP, as it is or fine-tuned, to a bundle of family ``dense``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from zsseg_rt.bundle import HeadSpec, PreprocessSpec
from zsseg_rt.errors import BackendUnavailableError
from zsseg_rt.export.bundle_writer import TextBank
from zsseg_rt.export.golden import (
    GOLDEN_NAMES,
    GOLDEN_TEMPLATES,
    dense_golden,
    preprocess_frame,
)
from zsseg_rt.export.graph_files import GRAPH_PRECISIONS, MAX_CLASSES, check_precisions
from zsseg_rt.export.model_bundle import write_model_bundle
from zsseg_rt.export.onnx import GraphExport, check_float32_on_cpu
from zsseg_rt.export.text_side import TextEncoderChoice, TextSide, seen_names
from zsseg_rt.extras import install_command
from zsseg_rt.models.dense_clip import DenseCLIP, FoldedDenseEncoder

__all__ = ["export_dense_clip", "imagenet_templates"]


def imagenet_templates() -> tuple[str, ...]:
    """CLIP's 80 ImageNet prompts, as open_clip lists them.

    Raises:
        BackendUnavailableError: open_clip is not installed.
    """
    try:
        from open_clip import OPENAI_IMAGENET_TEMPLATES
    except ModuleNotFoundError as exc:
        raise BackendUnavailableError(
            "templates: expected open_clip for CLIP's ImageNet prompts, got nothing. "
            f"Run {install_command('train')}, or give templates."
        ) from exc
    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def export_dense_clip(
    model: DenseCLIP,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    text_encoder: TextEncoderChoice = "auto",
    precisions: Sequence[str] = GRAPH_PRECISIONS,
    templates: Sequence[str] | None = None,
    template_set: str | None = None,
    text_bank: TextBank | None = None,
    size_hw: tuple[int, int] | None = None,
    name: str | None = None,
    space: str = "",
    source: str = "",
    licence: str = "",
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Write dense CLIP as a bundle that the engine runs without torch.

    The engine runs the whole picture at one size; windows are for evaluation in torch
    (:func:`zsseg_rt.models.slide_predict`). Logit scale and threshold are the model's.

    Args:
        model: What ``create_model("dense_clip", ...)`` made.
        path: Folder to write, ``NAME.zsseg``.
        class_names: Classes of the golden sample; the bundle takes any at run time.
        text_encoder: ``"auto"`` takes the model's text tower if it has one with CLIP's vocabulary;
            a module is used instead; None writes none (classes then need embeddings).
        precisions: Graph variants, of ``"float32"`` and ``"float16"``.
        templates: Prompts with one ``{}`` each; None is the model's, by default CLIP's 80.
        template_set: A short name of the templates.
        text_bank: Names with embeddings float [C, D] that ``set_classes`` uses for these names.
        size_hw: Input size in pixels, multiples of the patch size; None is the model's.
        name: Name in the manifest; None takes the folder's.
        space: Which joint space the embeddings live in, for people.
        source: Where the weights come from, for people.
        licence: Licence of the weights.
        overwrite: Whether to replace an existing bundle.
        verify: Whether to compare with torch; leave it on.

    Returns:
        The bundle folder.

    Raises:
        BackendUnavailableError: CLIP's prompts or tokenizer are needed and open_clip is missing.
        BundleError: The folder exists, cannot be written, or the bundle disagrees with torch.
        CheckpointError: The model is not float32 on the CPU, or does not fit float16.
        ShapeError: Patches do not fill ``size_hw``.
        VocabularyError: Templates or the text bank are unusable.
    """
    check_precisions(precisions)
    check_float32_on_cpu(model)
    encoder = model.eval().fold_image_encoder(size_hw)
    given = model.config.templates if templates is None else templates
    text = TextSide(model, text_encoder, imagenet_templates() if given is None else given)
    preprocess = _preprocess_spec(model, encoder)
    head = _head_spec(model, encoder, class_names)
    return write_model_bundle(
        Path(path),
        {"image_encoder": _image_encoder(encoder)},
        text,
        partial(_golden, model, head, preprocess, text, class_names or GOLDEN_NAMES),
        family="dense",
        architecture=model.description,
        preprocess=preprocess,
        head=head,
        embed_dim=model.config.image_encoder.embed_dim,
        precisions=precisions,
        template_set=template_set or ("imagenet-80" if given is None else "custom"),
        text_bank=text_bank,
        name=name,
        space=space,
        source=source,
        licence=licence,
        overwrite=overwrite,
        verify=verify,
    )


@torch.no_grad()
def _head_spec(
    model: DenseCLIP, encoder: FoldedDenseEncoder, class_names: Sequence[str] | None
) -> HeadSpec:
    seen = seen_names(model.seen_classes, class_names)
    return HeadSpec(
        logit_scale=float(model.logit_scale),
        normalize=True,
        activation=model.score_activation,
        grid_hw=encoder.grid_hw,
        seen=seen,
        seen_bias=model.seen_bias if seen else 0.0,
        unknown_below=model.config.unknown_below,
        max_classes=MAX_CLASSES,
    )


def _preprocess_spec(model: DenseCLIP, encoder: FoldedDenseEncoder) -> PreprocessSpec:
    return PreprocessSpec(size_hw=encoder.size_hw, mean=model.image_mean, std=model.image_std)


def _image_encoder(encoder: FoldedDenseEncoder) -> GraphExport:
    return GraphExport(
        module=encoder,
        inputs={"image": torch.zeros(1, 3, *encoder.size_hw)},
        outputs=("patch_embeds",),
    )


@torch.no_grad()
def _golden(
    model: DenseCLIP,
    head: HeadSpec,
    preprocess: PreprocessSpec,
    text: TextSide,
    class_names: Sequence[str],
) -> dict[str, npt.NDArray[Any]]:
    """Every intermediate of the model as built, not as folded, so that folding is checked too."""
    names = list(class_names)[:MAX_CLASSES]
    embed_dim = model.config.image_encoder.embed_dim
    embeds, extra = text.embed_golden(names, embed_dim, text.templates[:GOLDEN_TEMPLATES])
    image = preprocess_frame(preprocess)
    patch_embeds = model.image_encoder(torch.from_numpy(image)).patch_embeds.numpy()
    return dense_golden(image, patch_embeds, head, (names, embeds)) | extra
