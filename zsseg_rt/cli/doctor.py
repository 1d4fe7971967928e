"""``zsseg-rt doctor``: what can run on this machine."""

from __future__ import annotations

import typer

from zsseg_rt.cli.options import JsonOption
from zsseg_rt.cli.output import EXIT_ENVIRONMENT, terminal, write_json


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
    if json_file is not None:
        write_json(json_file, {"findings": findings})
    if any(f.status == "bad" for f in findings):
        raise typer.Exit(EXIT_ENVIRONMENT)
