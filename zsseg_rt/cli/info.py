"""``zsseg-rt info`` and ``doctor``: what a bundle holds, and what can run on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from zsseg_rt.cli.options import BundleArgument, JsonOption, opt, takes_groups
from zsseg_rt.cli.output import EXIT_ENVIRONMENT, EXIT_GATE, say, terminal, write_json
from zsseg_rt.config import EngineConfig

if TYPE_CHECKING:
    from zsseg_rt.bundles.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class _Options:
    names: bool = opt("List the names of the text bank.", False)
    check: bool = opt("Check all hashes and run the golden sample.", False)
    precision: str = opt("Precision of the check.", "auto")
    json_file: JsonOption = None


@takes_groups
def info(*, bundle: BundleArgument, shown: _Options) -> None:
    """Show a bundle's contents; with --check, whether it works here (exit code 3 if not)."""
    from zsseg_rt.bundles.bundle import Bundle

    loaded = Bundle.load(bundle)
    write_json(shown.json_file, loaded.to_manifest())
    say(f"{loaded.name}: {loaded.architecture}, family {loaded.family}")
    height, width = loaded.preprocess.size_hw
    shape = ", in windows that keep a frame's shape" * (loaded.preprocess.resize == "windows")
    say(f"input {height}x{width}{shape}, grid {loaded.head.grid_hw}")
    say(f"text space: {loaded.text.space or 'not stated'}")
    for graph, variants in loaded.graphs.items():
        sizes = ", ".join(f"{p} {e.bytes / 1e6:.1f} MB" for p, e in variants.items())
        say(f"{graph}: {sizes}")
    bank = loaded.text_bank.names if loaded.text_bank is not None else ()
    say(f"text bank: {len(bank)} names; licence: {loaded.licence or 'not stated'}")
    if loaded.concepts is not None:
        concepts = loaded.concepts.names
        say(f"trained to see {len(concepts)} things: {', '.join(concepts)}")
    for narrow, quantized in loaded.quantization.items():
        groups = [kind for layers in quantized.layers.values() for kind in layers.values()]
        say(
            f"{narrow}: {groups.count(narrow)} of {len(groups)} groups of layers, agreement with "
            f"float32 {quantized.agreement:.2%} (gate {quantized.min_agreement:.2%}) on "
            f"{quantized.measured_photos} of {len(quantized.photos)} images"
        )
        if quantized.masks is not None:
            say(f"  {quantized.masks.describe()}")
    if loaded.text.words:
        say(f"words: {', '.join(loaded.text.words)}")
    if shown.names:
        say(*(f"  {name}" for name in bank))
    if shown.check:
        _run_self_check(loaded, shown.precision)


def _run_self_check(loaded: Bundle, precision: str) -> None:
    from zsseg_rt.engine import Engine

    loaded.verify()
    with Engine(loaded, EngineConfig(precision=precision)) as engine:
        report = engine.self_check()
        say(f"self-check of {engine!r}:")
    for stage in report.stages:
        verdict = "ok" if stage.passed else "FAILED"
        say(f"  {stage.stage:14} error {stage.error:.2e} of {stage.tolerance:.0e}  {verdict}")
    if not report.passed:
        raise typer.Exit(EXIT_GATE)


def doctor(json_file: JsonOption = None) -> None:
    """Show what can run on this machine, and how to fix what cannot."""
    from rich.table import Table
    from rich.text import Text

    from zsseg_rt.doctor import examine

    findings = examine()
    table = Table("topic", "", "found", "what to do", box=None, pad_edge=False)
    colours = {"ok": "green", "absent": "yellow", "bad": "red"}
    for f in findings:
        table.add_row(f.topic, Text(f.status, style=colours[f.status]), f.detail, f.remedy)
    terminal().print(table)
    write_json(json_file, {"findings": findings})
    if any(f.status == "bad" for f in findings):
        raise typer.Exit(EXIT_ENVIRONMENT)
