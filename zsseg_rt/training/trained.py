"""The result of a run: load its model again, with the classes it was trained for, and evaluate it.

A checkpoint's ``model_card`` is a *card*: ``architecture``, ``config`` (the model's, as plain
data), ``text_encoder`` (sizes of a text tower that the config does not mention) and ``classes``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from zsseg_rt.common import schema
from zsseg_rt.common.arrays import label_dtype
from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import CheckpointError, DeviceError, VocabularyError
from zsseg_rt.export.exporters import export_bundle
from zsseg_rt.models.base import SegmentationModel, SlideSettings
from zsseg_rt.models.clip.towers import TextEncoder, TextEncoderConfig
from zsseg_rt.models.registry import ARCHITECTURES
from zsseg_rt.text.class_names import ClassList, join_synonyms, split_synonyms
from zsseg_rt.torch_files.checkpoints import hash_weights, load_weights
from zsseg_rt.training.class_embeddings import embed_phrases, region_embeddings
from zsseg_rt.training.loop.checkpointing import CheckpointFolder, read_checkpoint
from zsseg_rt.training.loop.reporting import EvaluationLog

_log = logging.getLogger(__name__)

TOP_CLASS = "top class"
"""Figure of an evaluation: how many percent of the annotated pixels got the commonest label."""
_NEARLY_ALL = 98.0  # percent of the evaluation's pixels


@dataclass(frozen=True, kw_only=True)
class TrainedClasses:
    """The vocabulary a model was trained for."""

    names: tuple[str, ...]  # The data set's classes in order; commas separate synonyms
    seen: tuple[int, ...]  # Indices of the seen ones
    templates: tuple[str, ...]  # Prompts around names
    space: str  # Name of the joint space
    phrases: tuple[str, ...]  # Phrases that have embeddings, in the order of the checkpoint's rows
    dataset: str = ""  # The data set that it was trained on
    protocol: str = ""  # What training knew about unseen classes
    # Prompts around the names that ZegFormer's regions are compared with; if empty, the official
    # ones
    region_templates: tuple[str, ...] = ()

    @property
    def lowered_phrases(self) -> tuple[str, ...]:
        """Synonyms of seen classes, whose scores are lowered if training treated some as unseen."""
        if self.protocol == "supervised" or len(self.seen) == len(self.names):
            return ()
        groups = split_synonyms([self.names[index] for index in self.seen])
        return ClassList.of_groups(groups).phrases


def describe_model(model: Any, classes: TrainedClasses | None = None) -> dict[str, Any]:
    """Make the card of one of our models."""
    text_encoder = getattr(model, "text_encoder", None)
    return {
        "architecture": model.architecture,
        "config": schema.encode(model.config),
        "text_encoder": None if text_encoder is None else schema.encode(text_encoder.config),
        "classes": schema.encode(classes),
    }


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that a path refers to: itself, or a run's best, or else its last."""
    path = Path(path)
    if path.is_file():
        return path
    folder = CheckpointFolder(path / "checkpoints")
    steps = folder.steps()
    if not steps:
        raise CheckpointError(
            f"{path}: expected a training run or one of its checkpoints, got "
            f"{'a folder without one' if path.is_dir() else 'no folder'}. Check the path."
        )
    best = EvaluationLog(path).best_step
    return folder.at(steps[-1] if best not in steps or best is None else best)


def load_trained(path: str | Path) -> SegmentationModel:
    """Load the model of a run, on the CPU, in evaluation mode."""
    file = find_checkpoint(path)
    checkpoint, where = read_checkpoint(file, mmap=True), f"{file}: model_card"
    card = checkpoint.model_card
    architecture = str(card.get("architecture"))
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: expected one of {', '.join(ARCHITECTURES)}, got "
            f"{architecture!r}. Use the version of zsseg_rt that wrote it."
        )
    kind, tower = ARCHITECTURES[architecture], card.get("text_encoder")
    config = schema.decode(kind.config, card.get("config"), where, CheckpointError)
    with torch.device("meta"):
        model = kind.model(config)
        if getattr(model, "text_encoder", None) is None and tower is not None:
            where = f"{where}.text_encoder"
            sizes = schema.decode(TextEncoderConfig, tower, where, CheckpointError)
            model.text_encoder = TextEncoder(sizes)
    load_weights(model, checkpoint.model, architecture=architecture)
    return model.eval()


def load_classes(path: str | Path) -> tuple[TrainedClasses, Tensor] | None:
    """The classes that a run's model was trained for, with embeddings [P, D] of their phrases."""
    file = find_checkpoint(path)
    checkpoint = read_checkpoint(file, mmap=True)
    raw = checkpoint.model_card.get("classes")
    if raw is None:
        return None
    classes = schema.decode(TrainedClasses, raw, f"{file}: model_card", CheckpointError)
    embeds = checkpoint.constants.get("text_embeds")
    if embeds is None or len(embeds) != len(classes.phrases):
        raise CheckpointError(
            f"{file}: expected text_embeds of {len(classes.phrases)} phrases in constants, got "
            f"{'none' if embeds is None else len(embeds)}. "
            "Copy the checkpoint again, or take an earlier one."
        )
    return classes, embeds


def export_trained(run: str | Path, path: str | Path, **options: Any) -> Path:
    """Write the model of a training run as a bundle.

    The bundle knows the classes of the training data by their embeddings (its text bank), so that
    it needs no text encoder for them, and lowers the scores of the seen ones as training specified.
    A warning tells if the checkpoint gave nearly all pixels of its evaluation to one class.
    """
    model, trained = load_trained(run), load_classes(run)
    file = find_checkpoint(run)
    settings: dict[str, Any] = {
        "source": f"trained by zsseg_rt, {file.name}",
        "space": "",
        "size_hw": model.size_hw,
    }
    if trained is not None:
        classes, embeds = trained
        lowered = set(classes.lowered_phrases)
        rows = [index for index, phrase in enumerate(classes.phrases) if phrase in lowered]
        model = model.with_seen(rows, self_trained=classes.protocol == "transductive")
        if model.text_space:
            model.text_space = classes.space
        bank = embeds.numpy()
        regions = region_embeddings(model, classes.names, classes.region_templates)
        if regions is not None:
            bank = np.stack([bank, regions.numpy()])
            settings["region_templates"] = classes.region_templates or model.region_templates
        settings |= {
            "class_names": classes.phrases,
            "templates": classes.templates,
            "space": classes.space,
            "text_bank": (classes.phrases, bank),
        }
    written = export_bundle(model, path, **settings | options)
    share = _share_of_top_class(file.resolve())
    if share is not None and share >= _NEARLY_ALL:
        _log.warning(
            "%s: gives one class %.1f %% of the pixels of its evaluation. It has learned nothing "
            "useful unless the images show little else: train longer, from a better start, or "
            "look at the run's pictures.",
            file,
            share,
        )
    return written


def _share_of_top_class(file: Path) -> float | None:
    """How many percent of an evaluation's pixels a checkpoint gave to one class, if known."""
    step = file.stem.removeprefix("step-")
    if file.parent.name != "checkpoints" or not step.isdecimal():
        return None  # a copy outside its run
    return EvaluationLog(file.parents[1]).of(int(step)).get(TOP_CLASS)


_DEFAULT_TEMPLATES = ("a photo of a {}.",)


class TorchSegmenter:
    """Labels images with any of our models; a segmenter of :mod:`zsseg_rt.evaluation`.

    Protocol ``"whole"`` is the model's ``label``: for most models the runtime's method, from which
    a bundle's engine differs only by export and precision; for ZegFormer the official evaluation.
    Protocol ``"slide"`` is the official evaluation of the others. ``text_embeds`` has the unit rows
    [P, D] of all phrases, class by class.
    """

    def __init__(
        self,
        model: SegmentationModel,
        class_names: Sequence[str],
        text_embeds: Tensor,
        *,
        region_embeds: Tensor | None = None,
        seen_names: Collection[str] = (),
        protocol: str = "whole",
        windows: SlideSettings | None = None,
    ) -> None:
        check_choice("protocol", protocol, ("whole", "slide") if model.windows else ("whole",))
        groups = split_synonyms(class_names)
        self.class_names = join_synonyms(groups)
        self._classes = ClassList.of_groups(groups)
        self._merged = model.averages_synonyms
        seen = self._classes.seen(seen_names)
        rows = np.flatnonzero([] if seen is None else seen)
        rows = np.unique(self._classes.phrase_classes[rows]) if self._merged else rows
        self._model = model.with_seen(tuple(rows.tolist()))
        self._device = next(model.parameters()).device
        self.text_embeds = self._rows(text_embeds)
        self._region_embeds = None if region_embeds is None else self._rows(region_embeds)
        self._windows = None if protocol == "whole" else windows or model.windows

    @torch.inference_mode()
    def segment(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Label every pixel; see :class:`zsseg_rt.evaluation.evaluate.Segmenter`."""
        if self._windows is None:
            labels = self._model.label(image, self.text_embeds, self._region_embeds)
        else:
            labels = self._model.slide(image, self.text_embeds, self._windows)
        rows = labels.cpu().numpy()
        if self._merged:
            return rows.astype(label_dtype(len(self._classes.names)))
        classes: npt.NDArray[Any] = self._classes.label_table[rows]  # those beyond are unknown
        return classes

    def describe(self) -> dict[str, Any]:
        """Architecture, hash of the weights, protocol and device, as plain data."""
        dtype = next(self._model.parameters()).dtype
        description: dict[str, Any] = {
            "kind": "torch",
            "architecture": self._model.architecture,
            "sha256": hash_weights(self._model),
            "device": str(self._device),
            "precision": str(dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "protocol": "whole" if self._windows is None else "slide",
        }
        if self._windows is not None:
            description["windows"] = vars(self._windows)
        return description | self._model.describe_input()

    def _rows(self, embeds: Tensor) -> Tensor:
        """The rows that the model compares: those of all phrases, or the means of each class's."""
        embeds = embeds.to(self._device, torch.float32)
        if not self._merged:
            return embeds
        counts = np.bincount(self._classes.phrase_classes).tolist()
        means = torch.stack([rows.mean(dim=0) for rows in torch.split(embeds, counts)])
        return torch.nn.functional.normalize(means, dim=-1)


def trained_segmenter(
    path: str | Path,
    class_names: Sequence[str],
    *,
    templates: Sequence[str] | None = None,
    protocol: str = "whole",
    device: str = "auto",
) -> TorchSegmenter:
    """Load a run's model and the embeddings of any classes.

    Phrases that the run was trained with keep the run's embeddings, unless templates are given;
    others are embedded by the model's text tower.
    """
    model, trained = load_trained(path), load_classes(path)
    phrases = [phrase for synonyms in split_synonyms(class_names) for phrase in synonyms]
    embeds = _embed(model, phrases, trained, templates)
    classes = None if trained is None else trained[0]
    return TorchSegmenter(
        model.to(_find_device(device)),
        class_names,
        embeds,
        region_embeds=region_embeddings(
            model, class_names, () if classes is None else classes.region_templates
        ),
        seen_names=() if classes is None else classes.lowered_phrases,
        protocol=protocol,
    )


def _find_device(name: str) -> torch.device:
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DeviceError(
            f"device: expected one of {count} GPUs that torch can use, got {name}. Use cpu."
        )
    return device


def _embed(
    model: nn.Module,
    phrases: Sequence[str],
    trained: tuple[TrainedClasses, Tensor] | None,
    templates: Sequence[str] | None,
) -> Tensor:
    rows: dict[str, Tensor] = {}
    if trained is not None and templates is None:
        rows = dict(zip(trained[0].phrases, trained[1], strict=True))
    missing = [phrase for phrase in phrases if phrase not in rows]
    if missing:
        tower = getattr(model, "text_encoder", None)
        if tower is None:
            raise VocabularyError(
                f"class_names: expected names that the run was trained with, got {missing[0]!r}; "
                "its model has no text tower. Rename the class, or train with one."
            )
        used = templates or (_DEFAULT_TEMPLATES if trained is None else trained[0].templates)
        rows |= dict(zip(missing, embed_phrases(tower, missing, used), strict=True))
    return torch.stack([rows[phrase] for phrase in phrases])
