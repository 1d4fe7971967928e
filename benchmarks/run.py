"""Compare the engine with its rivals: torch, torch.compile, ONNX Runtime, OpenVINO, OpenCV.

    python benchmarks/run.py --json FILE        # everything: 13 minutes on 2 quiet cores
    python benchmarks/run.py classes --json FILE
    python benchmarks/run.py --tables FILE      # a report into docs/benchmarks.md

Each rival is a process of its own. Its labels are compared with the engine's before it is timed; a
rival with wrong labels is reported, and the exit status is 1. Then all rivals of a case take turns
(docs/profiling.md). Rivals that are not installed are reported with the command that installs them.
Models have random weights: this measures speed and agreement, not accuracy. All runs on the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from functools import cache, partial
from importlib import metadata
from pathlib import Path

from rivals.cases import GROUPS, INSTALL, RIVALS, Case, cases_of, is_installed, missing_needs
from rivals.measure import Settings, measure_cases
from rivals.models import store_model
from rivals.report import FORMAT, Absent, Report, read_report, write_report
from rivals.tables import PAGE, TABLES, filled

from zsseg_rt.errors import ZssegError
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine
from zsseg_rt.profiling.conditions import compare_snapshots, take_snapshot
from zsseg_rt.profiling.worker import Stopwatch

ROOT = Path(__file__).resolve().parents[1]
SECONDS, QUICK_SECONDS = 12.0, 1.0
WRONG, FAILED, LACKING = 1, 1, 4


def main(arguments: list[str] | None = None) -> int:
    """Parse arguments and measure, list or write tables; return the exit status."""
    args = parse_arguments(arguments)
    try:
        if args.tables:
            page, report = PAGE.read_text(encoding="utf-8"), read_report(args.tables)
            PAGE.write_text(filled(page, report, args.tables), encoding="utf-8")
            return 0
        if not is_installed("torch") and any(case.model for case in cases_asked(args)):
            print(f"torch: expected it, got nothing. Run: {INSTALL['torch']}", file=sys.stderr)
            return LACKING
        report = run(args)
    except ZssegError as exc:
        print(exc, file=sys.stderr)
        return FAILED
    for name in ("conditions", *args.groups, "absent"):
        print(f"\n{TABLES[name](report)}")
    if args.json:
        write_report(report, args.json)
    for line in report.wrong:
        print(line, file=sys.stderr)
    return WRONG if report.wrong or len(report.cases) < len(cases_asked(args)) else 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    description, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--quick", action="store_true", help="a few small cases, under 20 s")
    parser.add_argument("--seconds", type=float, help="of turns for each case of the large model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="write a report into the page")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the models here")
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.groups) - set(GROUPS))
    if unknown:
        parser.error(f"GROUP: expected some of {', '.join(GROUPS)}, got {', '.join(unknown)}")
    args.groups = args.groups or list(GROUPS)
    return args


def cases_asked(args: argparse.Namespace) -> list[Case]:
    """Distinct cases of the groups."""
    cases = (case for group in args.groups for case in cases_of(group, quick=args.quick))
    return list(dict.fromkeys(cases))


def run(args: argparse.Namespace) -> Report:
    """Measure everything that was asked for."""
    watch, before, commit = Stopwatch(), take_snapshot(), describe_commit(ROOT)
    with tempfile.TemporaryDirectory(prefix="zsseg_benchmark_") as folder:
        scratch = Path(folder)
        os.environ["ZSSEG_HOME"] = str(scratch / "cache")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
        models = args.work or scratch
        models.mkdir(parents=True, exist_ok=True)
        seconds = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)
        settings = Settings(
            seconds=seconds, short=args.quick, scratch=scratch, installed=is_installed
        )
        stored = cache(partial(store_model, folder=models))
        cases = cases_asked(args)
        results = []
        try:
            for result in measure_cases(cases, stored, settings):
                results.append(result)  # noqa: PERF402 - what there is at Ctrl-C counts
        except KeyboardInterrupt:
            print(f"stopped after {len(results)} of {len(cases)} cases", file=sys.stderr)
    shares = [result.rivals[0].waiting for result in results]
    worst = max((share for share in shares if share is not None), default=None)
    options = " ".join([*args.groups, *(["--quick"] if args.quick else [])])
    return Report(
        format=FORMAT,
        commit=commit,
        command=f"python benchmarks/run.py {options} --seconds {seconds:g}",
        groups=tuple(args.groups),
        machine=describe_machine() | installed_versions(),
        conditions=compare_snapshots(before, take_snapshot(), waiting=worst),
        seconds=watch.seconds,
        absent=tuple(absent_rivals(cases)),
        cases=tuple(results),
    )


def absent_rivals(cases: list[Case]) -> list[Absent]:
    """Packages that are not installed, who needs them, and how to get them."""
    rivals = {rival.name: rival for case in cases for rival in RIVALS[case.task]}
    lacking: dict[str, list[str]] = {}
    for name, rival in rivals.items():
        for need in missing_needs(rival, is_installed):
            lacking.setdefault(need, []).append(name)
    return [
        Absent(rivals=tuple(names), need=need, command=INSTALL[need])
        for need, names in lacking.items()
    ]


def installed_versions() -> dict[str, str]:
    """Versions of the libraries that rivals are made of."""
    distributions = metadata.packages_distributions()
    return {
        name: metadata.version(distributions[name][0]) for name in INSTALL if name in distributions
    }


if __name__ == "__main__":
    sys.exit(main())
