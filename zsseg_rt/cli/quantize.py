"""``zsseg-rt quantize`` and ``build``: bundles in 8 bits, TensorRT plans."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zsseg_rt.cli.evaluate import DataOptions
from zsseg_rt.cli.options import (
    BundleArgument,
    JsonOption,
    NamedClasses,
    OutOption,
    Takes,
    opt,
    takes_groups,
)
from zsseg_rt.cli.output import (
    EXIT_GATE,
    ProgressBar,
    UsageError,
    UserInterrupt,
    check_file_place,
    say,
    stopped_by_signals,
    write_json,
)
from zsseg_rt.config import PRECISIONS
from zsseg_rt.text.class_names import split_synonyms

if TYPE_CHECKING:
    from zsseg_rt.bundles.bundle import Bundle
    from zsseg_rt.evaluation.datasets.base import SegmentationDataset
    from zsseg_rt.export.quantized.bundle import QuantizeReport
    from zsseg_rt.runtime.plan_builds import BuiltPlan

_MOST_CLASSES = 256


@dataclass(frozen=True, kw_only=True)
class _Gate:
    """The precision to make, and the accuracy to keep."""

    precision: str = opt("int8 or fp8.", "int8")
    min_agreement: float = opt("Share of clear cells that must keep float32's label.", 0.98)
    max_miou_loss: float = opt(
        "With --dataset: points that mIoU may lose, and unseen classes beyond seen ones.", 0.5
    )
    overwrite: bool = opt("Replace an existing bundle.", False)


@takes_groups
def quantize(
    *,
    bundle: BundleArgument,
    photos: Annotated[
        Path | None, typer.Option(help="Folder of 8 to 512 images; default: the data set's.")
    ] = None,
    masks: Annotated[DataOptions, Takes(dataset="")],
    out: OutOption,
    named: NamedClasses,
    gate: _Gate,
    json_file: JsonOption = None,
) -> None:
    """Write a bundle in INT8 or FP8; below the gate only the report is written (exit code 3)."""
    from zsseg_rt.bundles.bundle import Bundle
    from zsseg_rt.export.quantized.bundle import QuantizeSettings, quantize_bundle

    check_file_place("--json", json_file)
    loaded, data = Bundle.load(bundle), None if masks == DataOptions(dataset="") else masks.open()
    classes = named.read_if_given() or _own_classes(loaded, data)
    settings = QuantizeSettings(**vars(gate))
    with _interruptible(), ProgressBar() as bar:
        tell = lambda _, done, total: bar.show(done, total)  # noqa: E731
        report = quantize_bundle(loaded, out, photos, classes, settings, tell, dataset=data)
    _print(report)
    write_json(json_file, report)
    if report.path is None:
        raise typer.Exit(EXIT_GATE)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM end work as Ctrl-C does, with whatever it holds tidied up."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    try:
        with stopped_by_signals(interrupt):
            yield
    except KeyboardInterrupt:
        raise UserInterrupt("interrupted; nothing half-written was left") from None


def _own_classes(bundle: Bundle, data: SegmentationDataset | None) -> list[str | list[str]]:
    """The classes of a data set, or those that a bundle itself names."""
    if data is not None:
        return [*split_synonyms(data.class_names)]
    bank = bundle.text_bank.names if bundle.text_bank is not None else ()
    seen = bundle.concepts.names if bundle.concepts is not None else bundle.head.seen
    names = list(seen or bank)[:_MOST_CLASSES]
    if not names:
        raise UsageError("--classes: expected names, got none, and the bundle names none itself")
    return [*names]


def _print(report: QuantizeReport) -> None:
    spec = report.spec
    for graph, layers in spec.layers.items():
        say(*(f"{graph} {name}: {precision}" for name, precision in layers.items()))
    say(
        f"agreement with float32 on {spec.measured_photos} images that gave no ranges: "
        f"{spec.agreement:.2%} of clear cells (gate {spec.min_agreement:.2%}), "
        f"{spec.agreement_of_all:.2%} of all"
    )
    if spec.masks is not None:
        say(spec.masks.describe())
    end = "the gate does not hold; nothing was written" if report.path is None else None
    say(end or f"wrote {report.path}")


@dataclass(frozen=True, kw_only=True)
class _Target:
    compute_capability: str | None = opt("Target GPU, such as 8.9; default: this machine's.")
    precision: str = opt(", ".join(PRECISIONS), "auto")
    workspace: int | None = opt("Most MB that the layers of a plan take to work in.", metavar="MB")


@takes_groups
def build(*, bundle: BundleArgument, target: _Target, json_file: JsonOption = None) -> None:
    """Build a bundle's TensorRT plans now, so that no first frame waits for them."""
    from zsseg_rt.bundles.bundle import Bundle
    from zsseg_rt.runtime.plan_builds import BuildSettings, build_plans, plan_builds

    check_file_place("--json", json_file)
    loaded, settings = Bundle.load(bundle), BuildSettings(**vars(target))
    planned = plan_builds(loaded, settings)
    for one in planned:
        say(
            f"{one.graph} in {one.precision}: weights {one.weights / 1e6:.0f} MB, activations of a "
            f"lane at most {one.activations / 1e6:.1f} MB; building takes up to about "
            f"{one.peak / 1e6:.0f} MB of memory"
        )
    finished: list[BuiltPlan] = []
    with _interruptible(), ProgressBar() as bar:

        def tell(_: str, fraction: float) -> None:
            bar.show(round(100 * (len(finished) + fraction)), 100 * len(planned))

        for plan in build_plans(loaded, settings, tell):
            finished.append(plan)
            took = f"built in {plan.seconds:.0f} s with {plan.peak / 1e6:.0f} MB of memory"
            say(
                f"{plan.graph}: {plan.size / 1e6:.0f} MB in {plan.precision}, "
                f"{'was there' if plan.was_there else took}: {plan.path}"
            )
    write_json(json_file, {"planned": planned, "plans": finished})
