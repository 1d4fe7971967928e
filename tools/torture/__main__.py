"""``tools/torture.sh``: read the arguments, try the targets, print what was found."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tools.torture import kills
from tools.torture.child import Counts
from tools.torture.parent import Run
from tools.torture.target import TARGETS, case_of
from tools.torture.targets import available

_MANY = 1 << 40


def main() -> int:
    """Run, report, return the exit code."""
    arguments = _parse()
    if arguments.list:
        for entry in TARGETS.values():
            print(f"{entry.name:14} {entry.about}")
        return 0
    if arguments.case is not None:
        return _once_more(arguments)
    names, missing = available(arguments.targets)
    for name, reason in missing.items():
        print(f"{name}: not tried: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="zsseg_torture."))
    limits = (arguments.seconds, arguments.cases or _MANY, arguments.hangs_after)
    run = Run(folder, arguments.seed, *limits)
    ended = kills.Ended() if arguments.kills else None
    try:
        run.try_all(names)
        if ended is not None:
            commands = arguments.kill or kills.COMMANDS
            kills.kill_many(folder / "kills", arguments.seed, arguments.kills, ended, commands)
    except KeyboardInterrupt:
        print("interrupted: what follows is what was done until then")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _report(run, names, ended, arguments.json)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/torture.sh", description="Hostile input for every reader of the package."
    )
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="for all targets together, starts included"
    )
    parser.add_argument("--cases", type=int, default=0, help="at most so many of each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--hangs-after",
        type=float,
        default=30.0,
        help="seconds for one case, waits for a CPU aside",
    )
    parser.add_argument("--kills", type=int, default=0, help="commands to end at random moments")
    parser.add_argument(
        "--kill", action="append", choices=kills.COMMANDS, help="only this command; may be repeated"
    )
    parser.add_argument("--case", type=int, help="try one case of one target in this process")
    parser.add_argument("--json", type=Path, help="write counts and failures there")
    parser.add_argument("--list", action="store_true", help="name the targets and end")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all of them if none is named")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.targets if name not in TARGETS]:
        parser.error(f"TARGET: expected names that --list prints, got {', '.join(unknown)}")
    if arguments.case is not None and len(arguments.targets) != 1:
        parser.error("--case: expected one TARGET beside it")
    defaults = [entry.name for entry in TARGETS.values() if entry.by_default]
    arguments.targets = arguments.targets or defaults
    return arguments


def _once_more(arguments: argparse.Namespace) -> int:
    (name,) = arguments.targets
    with tempfile.TemporaryDirectory(prefix="zsseg_torture.") as folder:
        TARGETS[name].prepare(Path(folder))(case_of(arguments.seed, name, arguments.case))
    print(f"{name} {arguments.seed} {arguments.case}: accepted")
    return 0


def _report(run: Run, names: list[str], ended: kills.Ended | None, path: Path | None) -> int:
    total = Counts()
    print(f"{'target':14} {'accepted':>9} {'refused':>9} {'failed':>7}")
    for name in names:
        counts = run.counts.get(name, Counts())
        print(f"{name:14} {counts.accepted:9} {counts.refused:9} {counts.failed:7}")
        for key in asdict(total):
            setattr(total, key, getattr(total, key) + getattr(counts, key))
    print(f"{'all':14} {total.accepted:9} {total.refused:9} {total.failed:7}")
    if ended is not None:
        print(ended.text())
    if path is not None:
        report = {
            "seed": run.seed,
            "targets": {name: asdict(counts) for name, counts in run.counts.items()},
            "untried": run.untried,
            "failures": [asdict(failure) for failure in run.failures],
            "kills": None if ended is None else asdict(ended),
        }
        path.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if run.failures or (ended is not None and ended.troubles) else 0


if __name__ == "__main__":
    sys.exit(main())
