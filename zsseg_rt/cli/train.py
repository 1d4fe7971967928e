"""``zsseg-rt train``: a model as a TOML file says."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from zsseg_rt.cli.options import JsonOption, opt, takes_groups
from zsseg_rt.cli.output import EXIT_FAILURE, ProgressBar, UsageError, say, write_json
from zsseg_rt.common.extras import needs_extra
from zsseg_rt.errors import DatasetError

if TYPE_CHECKING:
    from zsseg_rt.training.config import TrainConfig
    from zsseg_rt.training.data_checks import SplitCheck
    from zsseg_rt.training.loop.loop import TrainingResult

_SHOWN_PROBLEMS = 50


@dataclass(frozen=True, kw_only=True)
class _Options:
    config: str = opt("TOML file, or the name of a recipe.", "", "--config", "-c")
    demo: bool = opt("First run: recipe demo, export, draw a picture.", False, "--demo")
    resume: bool = opt("Continue the run from its last checkpoint.", False, "--resume")
    changes: list[str] | None = opt("table.key=value instead; may repeat.", None, "--set")
    dry_run: bool = opt("Build and check everything, train nothing.", False, "--dry-run")
    check_data: bool = opt("Read all images and masks, train nothing.", False, "--check-data")
    recipes: bool = opt("List the recipes.", False, "--recipes")
    json_file: JsonOption = None


@takes_groups
def train(*, run: _Options) -> None:
    """Train a model; Ctrl-C saves a checkpoint that --resume continues from."""
    with needs_extra("train", "to train"):
        from zsseg_rt.training.config import TrainConfig, list_recipes

        if run.recipes:
            say(*list_recipes())
            return
        if bool(run.config) == run.demo:
            raise UsageError(
                "--config: expected a TOML file or a recipe's name (see --recipes), or --demo; got "
                f"{'both' if run.demo else 'neither'}"
            )
        settings = TrainConfig.load(run.config or "demo", run.changes or [])
        if run.check_data:
            _check_data(settings, run.json_file)
        if run.dry_run:
            _describe(settings)
        if run.check_data or run.dry_run:
            return
        result, lines = (_train_demo if run.demo else _train)(settings, run.resume)
    if int(os.environ.get("RANK", "0")) == 0:
        _print_result(result, lines)
        write_json(run.json_file, vars(result) | {"timing": result.timing.to_dict()})
    if not result.finished:
        raise typer.Exit(EXIT_FAILURE)


def _train(settings: TrainConfig, resume: bool) -> tuple[TrainingResult, list[str]]:
    from zsseg_rt.training.assembly import train as run
    from zsseg_rt.training.loop.run_state import leave_processes

    result = run(settings, resume=resume)
    leave_processes()
    return result, [f"next: zsseg-rt export trained {result.run_folder} --out NAME.zsseg"]


def _train_demo(settings: TrainConfig, resume: bool) -> tuple[TrainingResult, list[str]]:
    """The result, where bundle and image are, and what to do with them."""
    from zsseg_rt.training.assembly import train_and_show

    root = Path(settings.data.root)
    if not root.exists():
        raise DatasetError(
            f"{root}: expected the drawn scenes to train on, got no such folder. Write them by "
            f"python -m tools.scenes {root} in a checkout."
        )
    result, bundle, image = train_and_show(settings, resume=resume)
    return result, [
        f"bundle: {bundle}",
        f"picture: {image} (scene | truth | labels)",
        f"next: zsseg-rt evaluate {bundle} --dataset folder --root {root} --split val",
    ]


def _check_data(settings: TrainConfig, json_file: Path | None) -> None:
    """Print what is in the data; an error if training or evaluating on it makes no sense."""
    from zsseg_rt.training.data_checks import check_data

    with ProgressBar() as bar:
        checks = check_data(settings, bar.show)
    for check in checks:
        _print_check(check)
    write_json(json_file, [check.to_json() for check in checks])
    faults = [fault for check in checks for fault in check.faults]
    if faults:
        raise DatasetError(
            f"data: expected images that can all be used and pixels of every class to be "
            f"trained, got {'; '.join(faults)}. Fix the files listed above, or leave "
            "them and those classes out."
        )


def _print_check(check: SplitCheck) -> None:
    from rich.table import Table

    scan, data = check.scan, check.dataset
    table = Table("class", "", "pixels %", box=None, pad_edge=False)
    total = max(int(scan.pixels.sum()) + scan.ignored_pixels, 1)
    for row, (name, pixels) in enumerate(zip(data.class_names, scan.pixels, strict=True)):
        table.add_row(name, "seen" if row in data.seen else "unseen", _share(int(pixels), total))
    table.add_row("(not annotated)", "", _share(scan.ignored_pixels, total))
    head = f"{check.use}: {data.name}, usable images: {scan.num_pictures}"
    lines: list[str | Table] = [head, table]
    if scan.absent:
        lines.append(f"classes in no mask: {', '.join(scan.absent)}")
    lines += scan.problems[:_SHOWN_PROBLEMS]
    if len(scan.problems) > _SHOWN_PROBLEMS:
        lines.append(f"and {len(scan.problems) - _SHOWN_PROBLEMS} more; --json writes them all")
    say(*lines)


def _share(pixels: int, total: int) -> str:
    return f"{100 * pixels / total:.2f}" if pixels else "none"


def _describe(settings: TrainConfig) -> None:
    from zsseg_rt.training.assembly import assemble

    parts = assemble(settings)
    say(parts.config.to_toml())
    trainable = sum(p.numel() for p in parts.task.parameters() if p.requires_grad)
    total = sum(p.numel() for p in parts.task.parameters())
    unseen = len(parts.dataset.class_names) - len(parts.dataset.seen)
    judged = parts.evaluation_dataset
    lines = [
        f"data: {parts.dataset.name}, {len(parts.dataset)} images, "
        f"{len(parts.dataset.seen)} seen and {unseen} unseen classes",
        f"evaluation: {'none' if judged is None else f'{judged.name}, {len(judged)} images'}",
        f"model: {total / 1e6:.2f} M parameters, {trainable / 1e6:.2f} M trained",
    ]
    say(*lines)


def _print_result(result: TrainingResult, next_lines: list[str]) -> None:
    if result.finished:
        head = f"finished {result.step} steps"
    else:
        head = f"stopped after step {result.step}; continue with --resume"
    timing = result.timing
    lines = [
        head,
        f"{timing.pictures_per_second:.1f} images/s, "
        f"{timing.overhead_share:.1%} of the time outside the model's step",
    ]
    if result.metrics:
        figures = ", ".join(f"{name} {value:.2f}" for name, value in result.metrics.items())
        lines.append(f"best at step {result.best_step}: {figures}")
    lines.append(f"checkpoint: {result.best_checkpoint}")
    if result.finished:
        lines += next_lines
    say(*lines)
