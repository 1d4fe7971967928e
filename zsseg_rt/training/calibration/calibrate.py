"""Choose weights of cosines, their scale and the seen bias by names that training did not see.

A quarter of the run's seen names is held out, a model is trained briefly from the run's start
without their labels, and the settings that label other training images best are taken. The run's
unseen classes play no part: their labels are replaced before anything reads them, their names are
not offered, and the split that the run is evaluated on is never opened.

Held-out names may still be in the pictures that the brief training sees, as pixels without a label.
That is what unseen classes of most data sets are, but not names that the pictures do not show at
all. For these, pictures can be held out with the names. A run all of whose classes are seen has no
unseen ones in its pictures, so that held-out names alone choose no weight for unseen classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.checks import check_choice
from zsseg_rt.errors import ArgumentError, CheckpointError, DatasetError
from zsseg_rt.evaluation.datasets import SegmentationDataset
from zsseg_rt.training.assembly import assemble, train_assembled
from zsseg_rt.training.calibration.candidates import CandidateCounts
from zsseg_rt.training.calibration.held_out import (
    AnnotatedPart,
    draw_names,
    judged_images,
    shown_classes,
)
from zsseg_rt.training.calibration.judging import judge
from zsseg_rt.training.config import CONFIG_FILE, OutputConfig, TrainConfig
from zsseg_rt.training.tasks import TASKS
from zsseg_rt.training.tasks.descriptor import DescriptorTask
from zsseg_rt.training.trained.calibration import (
    Calibration,
    FoldFigures,
    HoldOut,
    HoldOutKind,
)

_log = logging.getLogger(__name__)

WORK_FOLDER = "calibration"


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """How long and by what settings are chosen.

    Attributes:
        iterations: Optimizer steps of each brief training; 0 takes a quarter of the run's.
        folds: How often other names are held out, 1 to 4; the settings are the best on average.
        images: Training images to choose by, at most half of them; they are not trained on.
        seed: Of the names that are held out.
        hold_out: ``"names"``: the labels of held-out names. ``"pictures"``: also all pictures that
            show one; every training picture is read once to find them.
    """

    iterations: int = 0
    folds: int = 2
    images: int = 200
    seed: int = 0
    hold_out: HoldOutKind = "names"

    def __post_init__(self) -> None:
        check_choice("hold_out", self.hold_out, get_args(HoldOutKind))
        for name in ("iterations", "seed"):
            if getattr(self, name) < 0:
                raise ArgumentError(
                    f"{name}: expected at least 0, got {getattr(self, name)}. Choose another."
                )


def calibrate(
    run: str | Path,
    settings: CalibrationSettings | None = None,
    *,
    tell: Callable[[str], None] = _log.info,
) -> Calibration | None:
    """Choose settings for a run and write them into its folder, ``calibration.json``.

    Exporting and evaluating the run takes them from there. The brief trainings are runs in
    ``RUN/calibration/``; after an interruption the same call continues them, and they are removed
    when the choice is written. Equal calls give equal choices.

    Returns:
        The choice; None if training was stopped.
    """
    folder = Path(run)
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder}: expected the folder of a training run, got one without {CONFIG_FILE}. "
            "Check the path."
        )
    config = TrainConfig.load(folder / CONFIG_FILE)
    found = choose_settings(config, folder / WORK_FOLDER, settings, tell=tell)
    if found is not None:
        found.write(folder)
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    return found


def choose_settings(
    config: TrainConfig,
    work: Path,
    settings: CalibrationSettings | None = None,
    *,
    tell: Callable[[str], None] = _log.info,
) -> Calibration | None:
    """Choose settings for a configuration; see :func:`calibrate`.

    Returns:
        The choice; None if training was stopped.
    """
    settings = settings or CalibrationSettings()
    _check(config)
    dataset = config.open_data("training")
    drawn = draw_names(dataset.seen, settings.folds, settings.seed)
    trained, judged = judged_images(len(dataset), settings.images)
    by_pictures = settings.hold_out == "pictures"
    shown = shown_classes(dataset, trained) if by_pictures else None
    with_weights = by_pictures or len(dataset.seen) < len(dataset.class_names)
    brief = _brief(config, settings.iterations or max(config.loop.iterations // 4, 1))
    folds: list[CandidateCounts] = []
    for place, names in enumerate(drawn, start=1):
        kept = [row for row in dataset.seen if row not in names]
        held = ", ".join(_named(dataset, names))
        tell(f"hold-out {place} of {len(drawn)}, trained without: {held}")
        images = trained if shown is None else _without(trained, shown[:, list(names)], held)
        part = AnnotatedPart(dataset, images, annotated=kept, seen=kept)
        parts = assemble(_in_folder(brief, work, part), dataset=part)
        if not train_assembled(parts, resume=True).finished:
            return None
        test = AnnotatedPart(dataset, judged, annotated=dataset.seen, seen=kept)
        folds.append(judge(parts, test, dataset.seen, unseen_weights=with_weights))
    chosen = _best(folds)
    return Calibration(
        cosine=folds[0].settings[chosen].cosine,
        seen_bias=folds[0].settings[chosen].seen_bias,
        seen=_named(dataset, dataset.seen),
        iterations=brief.loop.iterations,
        images=len(judged),
        seed=settings.seed,
        hold_out=settings.hold_out,
        hold_outs=tuple(
            HoldOut(
                names=_named(dataset, names),
                before=_figures(found, found.own),
                after=_figures(found, chosen),
            )
            for names, found in zip(drawn, folds, strict=True)
        ),
    )


def _check(config: TrainConfig) -> None:
    """Refuse runs that have nothing to choose, or whose start knows the names to hold out."""
    model, protocol = config.model, config.task.protocol
    if model.start_from:
        raise ArgumentError(
            f"model.start_from: expected none, got {model.start_from!r}, which knows the names "
            "that would be held out. Calibrate a run that starts from CLIP."
        )
    if TASKS.get(model.architecture) is not DescriptorTask:
        raise ArgumentError(
            "model.architecture: expected zegclip or clip_rc, whose masks can be blended with "
            f"cosines, got {model.architecture!r}. Others have no such settings."
        )
    if protocol != "inductive":
        raise ArgumentError(
            f"task.protocol: expected 'inductive', got {protocol!r}. Calibrate an inductive run "
            "and pass its choice with --cosine."
        )


def _brief(config: TrainConfig, iterations: int) -> TrainConfig:
    """The same run with other steps, without evaluations; its warm-up shrinks with it."""
    share = min(iterations / config.loop.iterations, 1.0)
    warmup = min(int(config.schedule.warmup_steps * share), max(iterations - 1, 0))
    loop = replace(
        config.loop,
        iterations=iterations,
        keep_checkpoints=1,
        kept_steps=(),
        evaluation_interval=0,
        num_pictures=0,
    )
    return replace(
        config,
        loop=loop,
        schedule=replace(config.schedule, warmup_steps=warmup),
        evaluation=replace(config.evaluation, split=""),
    )


def _in_folder(config: TrainConfig, work: Path, part: AnnotatedPart) -> TrainConfig:
    """The configuration with a folder of its own, named after all that decides the result."""
    plain = replace(config, output=OutputConfig(folder=""))
    content = json.dumps([plain.to_toml(), part.images, part.seen])
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    return replace(config, output=OutputConfig(folder=str(work / name)))


def _without(images: Sequence[int], shows: npt.NDArray[np.bool_], held: str) -> list[int]:
    """The images that show none of the held-out names; ``shows`` is bool ``[images, names]``."""
    left = [image for image, found in zip(images, shows, strict=True) if not found.any()]
    if not left:
        raise DatasetError(
            f"data: expected training images without {held}, got none among {len(images)}. "
            "Hold out names alone, or other names with another seed."
        )
    return left


def _named(dataset: SegmentationDataset, rows: Sequence[int]) -> tuple[str, ...]:
    return tuple(dataset.class_names[row] for row in rows)


def _best(folds: Sequence[CandidateCounts]) -> int:
    """The setting with the highest mean hIoU, the first of equals."""
    means = np.mean([found.harmonic_means() for found in folds], axis=0)
    return int(np.argmax(np.nan_to_num(means, nan=-1.0)))


def _figures(found: CandidateCounts, setting: int) -> FoldFigures:
    seen, unseen = (found.group_means(seen=seen)[setting] for seen in (True, False))
    return FoldFigures(
        seen=round(float(seen), 2),
        unseen=round(float(unseen), 2),
        harmonic_mean=round(float(found.harmonic_means()[setting]), 2),
    )
