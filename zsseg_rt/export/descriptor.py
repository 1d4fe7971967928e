"""Export a descriptor model (ZegCLIP) to a bundle."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import zsseg_rt
from zsseg_rt.bundle import FileEntry, HeadSpec, PreprocessSpec, TextSpec
from zsseg_rt.errors import CheckpointError, VocabularyError
from zsseg_rt.export.bundle_writer import (
    TextBank,
    bundle_name,
    new_bundle_folder,
    write_arrays,
    write_golden,
    write_manifest,
    write_text_bank,
)
from zsseg_rt.export.golden import unit_rows
from zsseg_rt.export.golden_descriptor import descriptor_golden
from zsseg_rt.export.graph_files import (
    GRAPH_PRECISIONS,
    MAX_CLASSES,
    GraphFiles,
    check_precisions,
)
from zsseg_rt.export.onnx import OPSET, export_graphs
from zsseg_rt.export.tokenizer_json import tokenizer_json
from zsseg_rt.models.text_encoder import average_templates
from zsseg_rt.text.prompts import check_templates, fill
from zsseg_rt.text.tokenizer import Tokenizer

__all__ = ["CLIP_TEMPLATES", "export_bundle"]

_log = logging.getLogger(__name__)

CLIP_TEMPLATES = ("a photo of a {}.",)
_CLIP_VOCAB = 49408
_NUM_GOLDEN_CLASSES = 5

TextEncoderChoice = nn.Module | Literal["auto"] | None


def export_bundle(
    model: Any,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    text_encoder: TextEncoderChoice = "auto",
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
    """Write a ZegCLIP model as a bundle that the engine runs without torch.

    The graphs, then the whole engine, are compared with torch before the bundle appears under its
    name; a bundle that disagrees is not written.

    Args:
        model: A :class:`zsseg_rt.models.zegclip.ZegCLIP`.
        path: Folder to write, ``NAME.zsseg``.
        class_names: The classes the model's ``seen_classes`` count in; they name the seen classes
            in the bundle and serve the golden sample.
        text_encoder: ``"auto"`` takes the model's text tower if it has one with CLIP's vocabulary;
            a module is used instead; None writes none (classes then need embeddings).
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
    target = Path(path)
    check_precisions(precisions)
    _check_model(model)
    job = _Job(model.eval(), size_hw, class_names, check_templates(templates), text_encoder)
    with new_bundle_folder(target, overwrite=overwrite, verify=verify) as folder:
        graphs = export_graphs(
            model,
            folder,
            size_hw=size_hw,
            precisions=precisions,
            text_encoder=job.text_encoder,
        )
        tokenizer = job.write_tokenizer(folder)
        write_manifest(
            folder,
            name=name or bundle_name(target),
            family="descriptor",
            architecture="zegclip",
            graphs=graphs,
            weights=job.write_weights(folder),
            preprocess=job.preprocess,
            text=job.text_spec(graphs, tokenizer, template_set, space),
            head=job.head,
            text_bank=write_text_bank(folder, text_bank, job.embed_dim),
            golden=write_golden(folder, job.golden()),
            provenance=_provenance(source),
            licence=licence,
        )
    return target


class _Job:
    """What one export derives from the model."""

    def __init__(
        self,
        model: Any,
        size_hw: tuple[int, int] | None,
        class_names: Sequence[str] | None,
        templates: tuple[str, ...],
        text_encoder: TextEncoderChoice,
    ) -> None:
        self.model, self.templates = model, templates
        self.parts = model.fold_for_inference(size_hw)
        self.embed_dim = int(model.config.image_encoder.embed_dim)
        self.text_encoder = _choose_text_encoder(model, text_encoder)
        self.class_names = None if class_names is None else list(class_names)
        self.head = self._head_spec()
        self.preprocess = PreprocessSpec(
            size_hw=self.parts.size_hw,
            mean=tuple(float(v) for v in model.image_mean),  # type: ignore[arg-type]
            std=tuple(float(v) for v in model.image_std),  # type: ignore[arg-type]
        )
        self._tokenizer: Tokenizer | None = None

    def write_tokenizer(self, folder: Path) -> FileEntry | None:
        if self.text_encoder is None:
            return None
        content = tokenizer_json()
        path = folder / "tokenizer.json"
        path.write_text(content, encoding="utf-8")
        self._tokenizer = Tokenizer(content, context_length=_context_length(self.text_encoder))
        return FileEntry.describe(path, folder)

    def write_weights(self, folder: Path) -> FileEntry:
        arrays = {
            "descriptor.weight": self.parts.descriptor_weight.numpy(),
            "descriptor.bias": self.parts.descriptor_bias.numpy(),
        }
        return write_arrays(folder, "weights.safetensors", arrays)

    def text_spec(
        self, graphs: GraphFiles, tokenizer: FileEntry | None, template_set: str, space: str
    ) -> TextSpec:
        encoder = graphs.get("text_encoder")
        return TextSpec(
            embed_dim=self.embed_dim,
            templates=self.templates,
            template_set=template_set,
            context_length=_context_length(self.text_encoder) if self.text_encoder else 77,
            tokenizer=tokenizer,
            encoder_sha256=encoder["float32"].sha256 if encoder else None,
            space=space,
        )

    def golden(self) -> dict[str, npt.NDArray[Any]]:
        """The golden sample; with a text tower also ``prompt_embeds`` of ``token_ids``."""
        names = self.class_names or [f"class {i}" for i in range(_NUM_GOLDEN_CLASSES)]
        names = names[:MAX_CLASSES]
        extra: dict[str, npt.NDArray[Any]] = {}
        if self._tokenizer is None:
            embeds = unit_rows(len(names), self.embed_dim)
        else:
            embeds, extra = self._embed(names)
        arrays = descriptor_golden(
            self.model, self.parts, self.preprocess, self.head, (names, embeds)
        )
        return arrays | extra

    @torch.no_grad()
    def _embed(
        self, names: Sequence[str]
    ) -> tuple[npt.NDArray[np.float32], dict[str, npt.NDArray[Any]]]:
        assert self._tokenizer is not None
        assert self.text_encoder is not None
        prompts = [prompt for name in names for prompt in fill(self.templates, name)]
        tokens = self._tokenizer.encode(prompts)
        batches = torch.split(torch.from_numpy(tokens), 64)
        features = torch.cat([self.text_encoder(batch) for batch in batches])
        grouped = features.reshape(len(names), len(self.templates), -1)
        merged = average_templates(grouped).numpy()
        kept = min(len(tokens), 16)  # enough to compare the exported graph
        return merged, {"token_ids": tokens[:kept], "prompt_embeds": features[:kept].numpy()}

    def _head_spec(self) -> HeadSpec:
        config = self.model.config
        shifted = () if config.self_trained else tuple(config.seen_classes)
        seen: tuple[str, ...] = ()
        if shifted and self.class_names is None:
            _log.warning(
                "class_names: the model lowers the scores of %d seen classes, but they have no "
                "names; the bundle lowers none. Pass class_names to keep the calibration.",
                len(shifted),
            )
        elif shifted:
            seen = _names_at(shifted, self.class_names or [])
        return HeadSpec(
            logit_scale=float(self.parts.logit_scale),
            normalize=False,
            activation="sigmoid",
            grid_hw=self.parts.grid_hw,
            seen=seen,
            seen_bias=float(config.seen_bias) if seen else 0.0,
            max_classes=MAX_CLASSES,
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "fold_for_inference"):
        raise CheckpointError(
            f"model: expected a zsseg_rt ZegCLIP model, got {type(model).__name__}. "
            "Build it with zsseg_rt.models.from_official('zegclip', state_dict)."
        )
    devices = {parameter.device.type for parameter in model.parameters()}
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if devices != {"cpu"} or dtypes != {torch.float32}:
        raise CheckpointError(
            "model: expected float32 weights on the CPU, got "
            f"{', '.join(sorted(map(str, dtypes)))} on {', '.join(sorted(devices))}. "
            "Call model.float().cpu() first."
        )


def _choose_text_encoder(model: Any, choice: TextEncoderChoice) -> nn.Module | None:
    encoder: Any = model.text_encoder if choice == "auto" else choice
    if encoder is None:
        return None
    vocab_size = encoder.config.vocab_size
    if vocab_size == _CLIP_VOCAB:
        return encoder  # type: ignore[no-any-return]
    message = f"text_encoder: expected CLIP's {_CLIP_VOCAB} tokens, got {vocab_size}"
    if choice != "auto":
        raise CheckpointError(f"{message}. There is no tokenizer for another vocabulary.")
    _log.warning("%s; the bundle has no text encoder", message)
    return None


def _context_length(text_encoder: nn.Module) -> int:
    config: Any = text_encoder.config
    return int(config.context_length)


def _names_at(indices: Sequence[int], names: Sequence[str]) -> tuple[str, ...]:
    if max(indices) >= len(names):
        raise VocabularyError(
            f"class_names: expected at least {max(indices) + 1} names, because the model's "
            f"seen_classes reach {max(indices)}, got {len(names)}. Give the whole vocabulary."
        )
    return tuple(names[index] for index in indices)


def _provenance(source: str) -> dict[str, Any]:
    return {
        "package": f"zsseg_rt {zsseg_rt.__version__}",
        "torch": str(torch.__version__),
        "opset": OPSET,
        "source": source,
    }
