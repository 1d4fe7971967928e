"""Train and evaluate several systems on the same data, and print their figures as a table.

python -m tools.studies.compare_systems scenes --out runs/scenes
python -m tools.studies.compare_systems scenes --small --out runs/small
python -m tools.studies.compare_systems FILE.toml --out DIR --only zegclip cosine_head --seeds 0 1

An interrupted call continues where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from tools.studies import comparison
from zsseg_rt.errors import ZssegError


def main() -> int:
    """Parse arguments, run what is not done yet, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", help=f"TOML file, or {comparison.list_comparisons()}")
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
        chosen = comparison.Comparison.load(args.comparison)
        if args.small:
            chosen = chosen.in_small()
        clip = args.clip or comparison.make_clip(chosen, args.out / "clip")
        runs = comparison.run(
            chosen,
            args.out,
            changes=changes_of(clip, args.iterations),
            seeds=args.seeds,
            only=args.only,
            on_run=tell,
        )
    except ZssegError as error:
        print(f"compare_systems: {error}", file=sys.stderr)
        return 1
    table = comparison.markdown_table(chosen, runs)
    (args.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


def changes_of(clip: str | Path | None, iterations: int | None) -> dict[str, Any]:
    """What the arguments change in the shared settings."""
    changes: dict[str, Any] = {}
    if clip:
        changes["model"] = {"options": {"pretrained": str(clip)}}
    if iterations:
        changes["loop"] = {"iterations": iterations}
    return changes


def tell(figures: comparison.RunFigures) -> None:
    """Print one run as soon as it is done."""
    values = ", ".join(f"{name} {value:.1f}" for name, value in figures.metrics.items())
    seed = "" if figures.seed is None else f" seed {figures.seed}"
    print(f"{figures.variant}{seed}: {values}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
