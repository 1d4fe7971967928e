"""Train and evaluate several systems on the same data, and print their figures as a table.

python -m tools.studies.compare_systems scenes --out runs/scenes
python -m tools.studies.compare_systems scenes --small --out runs/small
python -m tools.studies.compare_systems FILE.toml --out DIR --only zegclip cosine_head --seeds 0 1

A comparison is a TOML file: what all runs share, and what each variant changes. Every run is an
ordinary training run in a folder of its own, so an interrupted comparison continues where it
stopped, and any run of it can be inspected, exported or continued.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from tools.scenes.folder import as_folder
from tools.studies.starts import HeadStart
from zsseg_rt.common import schema
from zsseg_rt.common.files import write_whole
from zsseg_rt.errors import ArgumentError, TrainingError, ZssegError
from zsseg_rt.models.descriptor.model import DecodeHead, DescriptorModel
from zsseg_rt.training.config import TrainConfig, list_kept, merge, read_toml

_log = logging.getLogger(__name__)

_KEPT = Path(__file__).parent / "comparisons"

FIGURES = ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the comparison.

    Attributes:
        name: Short name; folders are named after it.
        title: What the table calls it.
        changes: Tables of a :class:`zsseg_rt.training.config.TrainConfig` laid over the shared
            ones.
        start_from: Name of an earlier variant whose trained model this one continues; the run of
            the same seed.
        trained: Whether anything is trained; if not, the model is evaluated once, as built.
        start: Initial weights of the head.
        without: Shared tables or keys that this variant does not use ("model.options.view").
    """

    name: str
    title: str
    changes: dict[str, Any] = field(default_factory=dict)
    start_from: str = ""
    trained: bool = True
    start: HeadStart = field(default_factory=HeadStart)
    without: tuple[str, ...] = ()

    def over(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """The variant's tables laid over the shared ones."""
        kept: dict[str, Any] = copy.deepcopy(dict(shared))
        for name in self.without:
            *outer, last = name.split(".")
            table = kept
            for part in outer:
                table = table.get(part, {})
            table.pop(last, None)
        return merge(kept, self.changes)


@dataclass(frozen=True, kw_only=True)
class SmallForm:
    """A quick form of a comparison: fewer steps and seeds, the same rows.

    Attributes:
        seeds: Replaces the comparison's.
        clip: Laid over the comparison's table of this name.
        changes: Tables laid over the shared ones.
    """

    seeds: tuple[int, ...]
    clip: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison of systems.

    Attributes:
        shared: Tables of a training configuration that all runs share; ``data.name = "scenes"``
            takes the options of :class:`tools.scenes.SceneDataset`, which are written as folders.
        variants: The rows, in order.
        seeds: Seeds of the runs; each seed is one run of each trained variant.
        clip: Settings of the small CLIP that all start from unless weights are given, a
            :class:`tools.studies.small_clip.PretrainingConfig`; None trains no CLIP.
        small: The quick form; None if there is none.
    """

    shared: dict[str, Any]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    clip: dict[str, Any] | None = None
    small: SmallForm | None = None

    def __post_init__(self) -> None:
        names: set[str] = set()
        for variant in self.variants:
            if variant.name in names:
                raise ArgumentError(f"variants: {variant.name!r} appears twice. Rename one.")
            if variant.start_from and variant.start_from not in names:
                raise ArgumentError(
                    f"variants: {variant.name!r} starts from {variant.start_from!r}, not an "
                    "earlier variant. Name one, or put it first."
                )
            names.add(variant.name)

    @classmethod
    def load(cls, source: str | Path) -> Comparison:
        """Read a TOML file or one of the package's comparisons.

        Raises:
            ArgumentError: There is no such file, it is not valid TOML, or a key is unknown.
        """
        raw, where = read_toml(source, _KEPT)
        return schema.decode(cls, raw, where, ArgumentError)

    def in_small(self) -> Comparison:
        """Return the quick form.

        Raises:
            ArgumentError: There is none.
        """
        if self.small is None:
            raise ArgumentError(
                "small: expected a comparison with a table of this name, got one without. Leave "
                "--small out, or add the table."
            )
        return replace(
            self,
            shared=merge(self.shared, self.small.changes),
            seeds=self.small.seeds,
            clip=None if self.clip is None else merge(self.clip, self.small.clip),
            small=None,
        )


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """The figures of one run.

    Attributes:
        variant: Name of the variant.
        seed: The run's seed; None if nothing is trained.
        metrics: Figures in percent, by name.
    """

    variant: str
    seed: int | None
    metrics: dict[str, float]


def list_comparisons() -> list[str]:
    """Names of the comparisons that come with the package."""
    return list_kept(_KEPT)


def make_clip(comparison: Comparison, folder: Path) -> Path | None:
    """Train the small CLIP that a comparison asks for, or go on; its weights, None without one."""
    if comparison.clip is None:
        return None
    from tools.studies.clip_pretraining import pretrain
    from tools.studies.small_clip import PretrainingConfig

    settings = schema.decode(PretrainingConfig, comparison.clip, "clip", ArgumentError)
    return pretrain(settings, folder)


def run(
    comparison: Comparison,
    folder: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] = (),
    on_run: Callable[[RunFigures], None] | None = None,
) -> list[RunFigures]:
    """Do every run that is not done yet.

    Args:
        comparison: What to compare.
        folder: Gets one folder per run.
        changes: Tables laid over the shared ones, such as the CLIP weights to start from.
        seeds: Instead of the comparison's own.
        only: Names of variants to run; empty runs all. A variant that another starts from must be
            done or among them.
        on_run: Called with the figures of each run.

    Returns:
        The figures of all runs, seed by seed.

    Raises:
        ArgumentError: A variant or a setting is unknown, or a run in the folder had other settings.
        TrainingError: A run failed or was interrupted; earlier runs are kept.
    """
    unknown = set(only) - {variant.name for variant in comparison.variants}
    if unknown:
        raise ArgumentError(f"only: expected names of variants, got {', '.join(sorted(unknown))}.")
    shared = merge(comparison.shared, changes or {})
    rows = []
    for variant, seed in _plan(comparison, only, seeds or comparison.seeds):
        figures = _run_one(variant, shared, folder, seed)
        rows.append(figures)
        if on_run is not None:
            on_run(figures)
    return rows


def markdown_table(comparison: Comparison, runs: Iterable[RunFigures]) -> str:
    """The figures as a Markdown table: mean and standard deviation over the seeds, in percent."""
    by_variant: dict[str, list[RunFigures]] = {}
    for figures in runs:
        by_variant.setdefault(figures.variant, []).append(figures)
    lines = [f"| system | runs | {' | '.join(FIGURES)} |", "|---|---|" + "---|" * len(FIGURES)]
    for variant in comparison.variants:
        done = by_variant.get(variant.name, [])
        if done:
            cells = [_mean_and_deviation([r.metrics[name] for r in done]) for name in FIGURES]
            lines.append(f"| {variant.title} | {len(done)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean_and_deviation(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def _plan(
    comparison: Comparison, only: Sequence[str], seeds: Sequence[int]
) -> Iterable[tuple[Variant, int | None]]:
    """All variants of one seed before the next seed; untrained ones come first, once."""
    variants = [v for v in comparison.variants if not only or v.name in only]
    yield from ((variant, None) for variant in variants if not variant.trained)
    for seed in seeds:
        yield from ((variant, seed) for variant in variants if variant.trained)


def _run_one(
    variant: Variant, shared: Mapping[str, Any], folder: Path, seed: int | None
) -> RunFigures:
    place = folder / (variant.name if seed is None else f"{variant.name}-{seed}")
    record, settings = place / "figures.json", place / "settings.toml"
    config = _configure(variant, shared, folder, place, seed)
    if record.is_file() and settings.is_file():
        _check_settings(config, settings)
        metrics = json.loads(record.read_text(encoding="utf-8"))
        return RunFigures(variant=variant.name, seed=seed, metrics=metrics)
    _log.info("%s", place)
    metrics = _evaluate_untrained(config) if seed is None else _train(config, variant.start)
    place.mkdir(parents=True, exist_ok=True)
    write_whole(settings, config.to_toml().encode())
    write_whole(record, json.dumps(metrics, indent=2).encode())
    return RunFigures(variant=variant.name, seed=seed, metrics=metrics)


def _configure(
    variant: Variant, shared: Mapping[str, Any], folder: Path, place: Path, seed: int | None
) -> TrainConfig:
    raw = variant.over(shared)
    raw = merge(raw, {"loop": {"seed": seed or 0}, "output": {"folder": str(place)}})
    if variant.start_from:
        start = {"start_from": str(folder / f"{variant.start_from}-{seed}"), "options": {}}
        raw["model"] = start
    return TrainConfig.from_dict(as_folder(raw, folder / "worlds"), f"variant {variant.name}")


def _check_settings(config: TrainConfig, settings: Path) -> None:
    """Check that figures were made with these settings."""
    before = TrainConfig.load(settings)
    changed = config.differences(before)
    if Path(config.data.root).name != Path(before.data.root).name:  # the world's options
        changed.append("data.options or evaluation.options")
    if changed:
        raise ArgumentError(
            f"{settings.parent}: expected figures of these settings, got those of another "
            f"{', '.join(changed)}. Remove that folder, or choose another for all runs."
        )


def _train(config: TrainConfig, start: HeadStart) -> dict[str, float]:
    from zsseg_rt.training.assembly import assemble, train_assembled

    parts = assemble(config)
    if start != HeadStart():
        assert parts.embeddings is not None
        head = cast(DescriptorModel, parts.task.model).decode_head
        start.apply(cast(DecodeHead, head), parts.embeddings.class_embeds)
    result = train_assembled(parts, resume=True)
    if not result.finished:
        raise TrainingError(
            f"{result.run_folder}: expected {config.loop.iterations} steps, got {result.step}: the "
            "run was stopped. Run the comparison again to continue it."
        )
    return dict(result.metrics)


def _evaluate_untrained(config: TrainConfig) -> dict[str, float]:
    """Figures in percent of a model as built, on the split that its run would be evaluated on."""
    from zsseg_rt.evaluation.evaluate import evaluate
    from zsseg_rt.training.assembly import build_model
    from zsseg_rt.training.class_embeddings import class_embeddings, region_embeddings
    from zsseg_rt.training.trained import TorchSegmenter

    settings = config.evaluation
    dataset = config.open_data("evaluation")
    names = dataset.class_names
    model = build_model(config.model, seen=dataset.seen, protocol=config.task.protocol).eval()
    segmenter = TorchSegmenter(
        model,
        names,
        class_embeddings(names, config.text, model).phrase_embeds,
        region_embeds=region_embeddings(model, names, config.text.region_templates),
        protocol=settings.protocol,
    )
    return evaluate(segmenter, dataset, limit=settings.limit or None).scores.as_reported()


def main() -> int:
    """Parse arguments, run what is not done yet, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", help=f"TOML file, or {list_comparisons()}")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument(
        "--clip",
        help="weights that every system starts from; by default the comparison trains its own",
    )
    parser.add_argument("--small", action="store_true", help="the comparison's quick form")
    parser.add_argument("--seeds", type=int, nargs="+", help="replaces the comparison's own")
    parser.add_argument("--only", nargs="+", default=(), metavar="VARIANT")
    parser.add_argument("--iterations", type=int, help="replaces the comparison's own")
    args = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("zsseg_rt").setLevel(logging.INFO)  # not the exporter's notes
    try:
        comparison = Comparison.load(args.comparison)
        if args.small:
            comparison = comparison.in_small()
        clip = args.clip or make_clip(comparison, args.out / "clip")
        runs = run(
            comparison,
            args.out,
            changes=changes_of(clip, args.iterations),
            seeds=args.seeds,
            only=args.only,
            on_run=tell,
        )
    except ZssegError as error:
        print(f"compare_systems: {error}", file=sys.stderr)
        return 1
    table = markdown_table(comparison, runs)
    (args.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


def changes_of(clip: str | Path | None, iterations: int | None) -> dict[str, Any]:
    """The shared settings, as the arguments change them."""
    changes: dict[str, Any] = {}
    if clip:
        changes["model"] = {"options": {"pretrained": str(clip)}}
    if iterations:
        changes["loop"] = {"iterations": iterations}
    return changes


def tell(figures: RunFigures) -> None:
    """Print one run as soon as it is done."""
    values = ", ".join(f"{name} {value:.1f}" for name, value in figures.metrics.items())
    seed = "" if figures.seed is None else f" seed {figures.seed}"
    print(f"{figures.variant}{seed}: {values}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
