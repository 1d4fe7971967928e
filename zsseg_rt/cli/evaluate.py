"""``zsseg-rt evaluate``: how well a model or a bundle labels an annotated data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsseg_rt.cli.options import (
    JsonOption,
    Takes,
    TemplateOption,
    flat_names,
    opt,
    read_classes,
    takes_groups,
)
from zsseg_rt.cli.output import ProgressBar, UsageError, check_file_place, say, terminal, write_json
from zsseg_rt.common.checks import arguments_called
from zsseg_rt.common.extras import needs_extra
from zsseg_rt.config import MAX_WINDOWS, EngineConfig

if TYPE_CHECKING:
    from zsseg_rt.evaluation.datasets.base import SegmentationDataset
    from zsseg_rt.evaluation.evaluate import Evaluation, Segmenter

PROTOCOLS = ("whole", "slide")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The data set to evaluate on."""

    dataset: str = opt("Data set to evaluate on; an unknown name lists all.", ...)
    root: Path | None = opt("Folder of the data set.")
    split: str = opt("Split to evaluate.", "val")
    unseen: str | None = opt("Classes that are unseen: 'a,b' or @FILE; default: the data set's.")
    option: list[str] | None = opt("Data set option NAME=VALUE; may repeat.")

    def open(self) -> SegmentationDataset:
        """Open it."""
        options = _read_options(self.option or [])
        if self.unseen is not None:
            options["unseen"] = flat_names(self.unseen)
        with (
            arguments_called({"name": "--dataset"}),
            needs_extra("data", f"to read {self.dataset}"),
        ):
            from zsseg_rt.evaluation.datasets import create_dataset

            return create_dataset(self.dataset, self.root, self.split, **options)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """The request that every model gets, and files of results."""

    protocol: str = opt("whole: as the engine runs; slide: the papers' windows, in torch.", "whole")
    classes: str | None = opt("Other names of all classes, in order: 'a,b', or @FILE; synonyms.")
    rename: list[str] | None = opt("New names: 'car=automobile, vehicle'; may repeat.")
    template: TemplateOption = None
    limit: int | None = opt("Evaluate at most this many images, spread over the split.", min=1)
    confusion: Path | None = opt("Write the confusion matrix as CSV.")
    json_file: JsonOption = None


@takes_groups
def evaluate(
    *,
    model: Annotated[Path, typer.Argument(help="Bundle NAME.zsseg, or a training run's folder.")],
    source: DataOptions,
    task: _Task,
    run: Annotated[EngineConfig, Takes(but=("unknown_below",), max_windows=MAX_WINDOWS)],
) -> None:
    """Measure pAcc, mIoU of seen and unseen classes, and hIoU."""
    if task.protocol not in PROTOCOLS:
        raise UsageError(f"--protocol: expected one of {', '.join(PROTOCOLS)}, got {task.protocol}")
    check_file_place("--json", task.json_file)
    check_file_place("--confusion", task.confusion)
    data = source.open()
    names = _read_names(data.class_names, task.classes, task.rename or [])
    from zsseg_rt.evaluation import evaluate as run_one
    from zsseg_rt.evaluation.metrics import confusion_csv
    from zsseg_rt.results.visualize import save_file

    with ExitStack() as stack:
        segmenter = _open_segmenter(model, names, task, run, stack)
        bar = stack.enter_context(ProgressBar())
        result = run_one(segmenter, data, limit=task.limit, on_picture=bar.show)
    _print_evaluation(result)
    write_json(task.json_file, result.to_json())
    if task.confusion is not None:
        save_file(task.confusion, confusion_csv(result.counts, result.class_names).encode())


def _read_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE; a value is JSON where it can be, text otherwise."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--option: expected NAME=VALUE, got {pair!r}")
        try:
            options[name.strip()] = json.loads(value)
        except ValueError:
            options[name.strip()] = value
    return options


def _read_names(
    names: Sequence[str], classes: str | None, renames: Sequence[str]
) -> tuple[str, ...]:
    """The data set's names after ``--classes`` and ``--rename``."""
    from zsseg_rt.text.class_names import rename_classes

    asked = tuple(names)
    if classes is not None:
        groups = read_classes(classes, [])
        if len(groups) != len(names):
            raise UsageError(
                f"--classes: expected {len(names)} names, one for each of {', '.join(names)}, "
                f"got {len(groups)}"
            )
        asked = tuple(name if isinstance(name, str) else ", ".join(name) for name in groups)
    pairs = [rename.partition("=") for rename in renames]
    for old, equals, new in pairs:
        if not equals or not old.strip() or not new.strip():
            raise UsageError(f"--rename: expected 'OLD=NEW', got {old + equals + new!r}")
    with arguments_called({"new_names": "--rename"}):
        return rename_classes(asked, {old.strip(): new.strip() for old, _, new in pairs})


def _open_segmenter(
    path: Path, names: Sequence[str], task: _Task, config: EngineConfig, stack: ExitStack
) -> Segmenter:
    """A bundle's engine, or the model of a training run."""
    from zsseg_rt.training.loop import is_run

    if is_run(path) and not (path / "bundle.json").exists():
        return _open_trained(path, names, task, config)
    from zsseg_rt.engine import Engine
    from zsseg_rt.evaluation.evaluate import EngineSegmenter

    engine = stack.enter_context(Engine(path, config))
    return EngineSegmenter(engine, names, templates=task.template, protocol=task.protocol)


def _open_trained(path: Path, names: Sequence[str], task: _Task, config: EngineConfig) -> Segmenter:
    usual = {"precision": ("auto", "float32"), "backend": ("auto", "torch")}
    for name, values in {**usual, "min_region_score": (None,)}.items():
        if getattr(config, name) not in values:
            raise UsageError(
                f"--{name.replace('_', '-')}: expected {values[-1]} for the model of a training "
                f"run, {path}, got {getattr(config, name)}; others need a bundle"
            )
    with needs_extra("train", f"to evaluate {path}"):
        from zsseg_rt.training.trained import trained_segmenter
    return trained_segmenter(
        path, names, templates=task.template, protocol=task.protocol, device=config.device
    )


def _print_evaluation(result: Evaluation) -> None:
    from rich.table import Table

    table = Table("class", "", "IoU %", "accuracy %", "pixels %", box=None, pad_edge=False)
    total = max(int(result.scores.true_pixels.sum()), 1)
    for row in result.class_table():
        cells = [_name(row["name"], row["asked_as"]), "seen" if row["seen"] else "unseen"]
        cells += [_figure(row["iou_percent"]), _figure(row["accuracy_percent"])]
        table.add_row(*cells, f"{100 * row['true_pixels'] / total:.2f}")
    reported = result.scores.as_reported().items()
    figures = "  ".join(f"{name} {_figure(None if x != x else x)}" for name, x in reported)
    times = result.times
    terminal().print(table)
    say(
        figures,
        f"{result.pictures} of {result.dataset_size} images of {result.dataset}, "
        f"{times['median_segment_ms']:.1f} ms each, "
        f"{result.pictures / times['total_seconds']:.1f} images/s, "
        f"{times['share_outside_segmenter']:.1%} of the time outside the model",
    )


def _name(name: str, asked: str) -> str:
    return name if name == asked else f"{name} ({asked})"


def _figure(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.2f}"
