"""Export a descriptor model (ZegCLIP, CLIP-RC) to a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from zsseg_rt.bundle import HeadSpec, PreprocessSpec
from zsseg_rt.errors import CheckpointError
from zsseg_rt.export.bundle_writer import TextBank
from zsseg_rt.export.golden import NUMBERED_NAMES
from zsseg_rt.export.golden_descriptor import descriptor_golden
from zsseg_rt.export.graph_files import GRAPH_PRECISIONS, MAX_CLASSES, check_precisions
from zsseg_rt.export.model_bundle import write_model_bundle
from zsseg_rt.export.onnx import check_float32_on_cpu, descriptor_graphs
from zsseg_rt.export.text_side import TextEncoderChoice, TextSide, seen_names
from zsseg_rt.export.word_subset import WordSubset
from zsseg_rt.models.descriptor_model import DescriptorModel
from zsseg_rt.models.input_checks import check_size

__all__ = ["CLIP_TEMPLATES", "export_bundle"]

CLIP_TEMPLATES = ("a photo of a {}.",)


def export_bundle(
    model: Any,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    text_encoder: TextEncoderChoice = "auto",
    word_subset: WordSubset | None = None,
    precisions: Sequence[str] = GRAPH_PRECISIONS,
    templates: Sequence[str] = CLIP_TEMPLATES,
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
    """Write a ZegCLIP or CLIP-RC model as a bundle that the engine runs without torch.

    The graphs, then the whole engine, are compared with torch before the bundle appears under its
    name; a bundle that disagrees is not written.

    Args:
        model: A :class:`zsseg_rt.models.zegclip.ZegCLIP` or
            :class:`zsseg_rt.models.clip_rc.ClipRC`.
        path: Folder to write, ``NAME.zsseg``.
        class_names: The classes the model's ``seen_classes`` count in; they name the seen classes
            in the bundle and serve the golden sample.
        text_encoder: ``"auto"`` takes the model's text tower if it has one with CLIP's vocabulary;
            a module is used instead; None writes none (classes then need embeddings).
        word_subset: A text tower that knows some words only, written instead; see
            :func:`zsseg_rt.export.word_subset.keep_words`.
        precisions: Graph variants, of ``"float32"`` and ``"float16"``.
        templates: Prompts with one ``{}`` each.
        template_set: A short name of the templates.
        text_bank: Names with embeddings float [C, D] that ``set_classes`` uses for these names.
        size_hw: Input size in pixels; None is the model's own.
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
        VocabularyError: Names, templates or the text bank are unusable.
    """
    check_precisions(precisions)
    _check_model(model)
    text = TextSide(model, text_encoder, templates, word_subset)
    job = _Job(model.eval(), size_hw, class_names, text)
    return write_model_bundle(
        Path(path),
        descriptor_graphs(job.parts),
        text,
        job.golden,
        family="descriptor",
        architecture=model.architecture,
        weights=job.weights(),
        preprocess=job.preprocess,
        head=job.head,
        embed_dim=job.embed_dim,
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


class _Job:
    """What one export derives from the model."""

    def __init__(
        self,
        model: Any,
        size_hw: tuple[int, int] | None,
        class_names: Sequence[str] | None,
        text: TextSide,
    ) -> None:
        self.model, self.text = model, text
        if size_hw is not None:
            check_size(size_hw, model.config.image_encoder.patch_size)
        self.parts = model.fold_for_inference(size_hw)
        self.embed_dim = int(model.config.image_encoder.embed_dim)
        self.class_names = None if class_names is None else list(class_names)
        self.head = self._head_spec()
        self.preprocess = PreprocessSpec(
            size_hw=self.parts.size_hw,
            mean=tuple(float(v) for v in model.image_mean),  # type: ignore[arg-type]
            std=tuple(float(v) for v in model.image_std),  # type: ignore[arg-type]
        )

    def weights(self) -> dict[str, npt.NDArray[Any]]:
        return {
            "descriptor.weight": self.parts.descriptor_weight.numpy(),
            "descriptor.bias": self.parts.descriptor_bias.numpy(),
        }

    def golden(self) -> dict[str, npt.NDArray[Any]]:
        """The golden sample; with a text tower also ``prompt_embeds`` of ``token_ids``."""
        names = (self.class_names or list(NUMBERED_NAMES))[:MAX_CLASSES]
        embeds, extra = self.text.embed_golden(names, self.embed_dim)
        arrays = descriptor_golden(
            self.model, self.parts, self.preprocess, self.head, (names, embeds)
        )
        return arrays | extra

    def _head_spec(self) -> HeadSpec:
        config = self.model.config
        shifted = () if config.self_trained else tuple(config.seen_classes)
        seen = seen_names(shifted, self.class_names)
        return HeadSpec(
            logit_scale=float(self.parts.logit_scale),
            normalize=False,
            activation=config.score_activation,
            grid_hw=self.parts.grid_hw,
            seen=seen,
            seen_bias=float(config.seen_bias) if seen else 0.0,
            max_classes=MAX_CLASSES,
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, DescriptorModel):
        raise CheckpointError(
            f"model: expected a zsseg_rt ZegCLIP or CLIP-RC model, got {type(model).__name__}. "
            "Build it with zsseg_rt.models.from_official('zegclip', state_dict)."
        )
    check_float32_on_cpu(model)
