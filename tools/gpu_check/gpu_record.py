"""The record of a run: kept after every step, and compared with what was expected."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu_processes import ROOT, run_quietly

RECORD_FORMAT = 2  # 2: parts by step in "results", "expected"
EXPECTED = Path(__file__).resolve().parent / "expected.json"
COPY = "record.json"  # in the working folder, for a call that continues


class Record:
    """The record of a run so far, on disk at every moment.

    Args:
        gpu: The GPU's name.
        before: Clocks and power at the begin, with the driver.
        out: Folder of the record.
        work: Folder in which steps keep their results; a copy of the record lies there.
        earlier: The record that this run continues.
    """

    def __init__(
        self,
        gpu: str,
        before: Mapping[str, Any],
        out: Path,
        work: Path,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        changes = run_quietly(
            "git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"
        )
        self.content: dict[str, Any] = {
            "format": RECORD_FORMAT,
            "gpu": gpu,
            "driver": before["driver"],
            "before": {key: value for key, value in before.items() if key != "driver"},
            "commit": run_quietly("git", "-C", str(ROOT), "rev-parse", "HEAD"),
            "changed": None if changes is None else bool(changes),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        self._earlier = dict(earlier or {})
        self._steps: dict[str, dict[str, Any]] = {
            step["name"]: step for step in self._earlier.get("steps", ())
        }
        self._work = work
        self.file = _free_name(out, gpu, self.content["date"][:10])

    def earlier_outcome(self, name: str) -> dict[str, Any] | None:
        """The outcome of a step before; None where it did not run, or not to its end."""
        step = self._steps.get(name)
        is_over = step is not None and step["state"] != "missing"
        return step if is_over and not step.get("timed_out") else None

    def add(self, outcome: dict[str, Any]) -> None:
        """Note a step's outcome and keep the record."""
        self._steps[outcome["name"]] = outcome
        self.save()

    def save(self) -> None:
        """Write the record with what steps have kept so far, whole or not at all."""
        steps = list(self._steps.values())
        named = {state: [step["name"] for step in steps if step["state"] == state]
                 for state in ("failed", "missing")}  # fmt: skip
        results = {**self._earlier.get("results", {}), **read_results(self._work)}
        self.content |= {
            "passed": bool(steps) and not named["failed"] and not named["missing"],
            **named,
            "steps": steps,
            "expected": compare(results, str(self.content["gpu"])),
            "results": results,
        }
        text = json.dumps(self.content, indent=2) + "\n"
        for file in (self.file, self._work / COPY):
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".part")
            partial.write_text(text, encoding="utf-8")
            partial.replace(file)


def _free_name(folder: Path, gpu: str, day: str) -> Path:
    """``<gpu>-<date>.json``; a second one of a day gets a number."""
    stem = f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{day}"
    target, count = folder / f"{stem}.json", 1
    while target.exists():
        count += 1
        target = folder / f"{stem}-{count}.json"
    return target


def read_results(work: Path) -> dict[str, Any]:
    """The files that steps have kept, by step; a file that is just being replaced is left out."""
    results = {}
    for file in sorted((work / "results").glob("*.json")):
        try:
            results[file.stem] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return results


def read_figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Every measured figure by a name of plain words, as expected.json has them."""
    return {
        name: value
        for step, result in results.items()
        for name, value in _figures_of(step, result)
        if isinstance(value, (int, float))
    }


def _figures_of(step: str, result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    backend = step.split()[-1]
    for case in result.get("cases", ()):  # frame times
        size = f"{case['frame_hw'][1]}x{case['frame_hw'][0]}, {case['classes']} classes"
        for name, row in case["candidates"].items():
            named = name.replace("engine", f"engine on {backend}", 1)
            for key in ("p50_ms", "p99_ms", "cpu_ms", "launches"):
                yield f"{size}, {named}: {key}", row.get(key)
    for row in result.get("results", ()) if step == "kernel times" else ():
        taken = (row.get("captured") or {}).get("median_ms", {}).get("zsseg_rt")
        yield f"{row['op']} {row['sizes']}: us", None if taken is None else 1e3 * taken
    for row in result.get("rows", ()):
        named = row.get("name") or f"{row.get('bundle')} {row.get('precision')}"
        for key, value in row.items():
            yield f"{step}, {named}: {key}", value
        for graph, count in (row.get("fused_attention") or {}).items():
            yield f"{step}, {named}: fused attention of {graph}", count
    kernels = [int(row["Instances"]) for row in result.get("cuda_gpu_kern_sum", ())]
    kernels += [
        row["count"]
        for row in result.get("kernels", ())
        if "count" in row and not row["name"].startswith(("Memcpy", "Memset"))
    ]
    if kernels:
        yield f"{step}: kernels", sum(kernels)


def compare(results: Mapping[str, Any], gpu: str) -> list[dict[str, Any]]:
    """Each expected figure of this GPU beside the measured one, and whether it is off."""
    figures, rows = read_figures(results), []
    for row in json.loads(EXPECTED.read_text(encoding="utf-8"))["figures"]:
        if not re.search(row["gpu"], gpu, re.IGNORECASE):
            continue
        measured = figures.get(row["name"])
        low, high = row.get("at_least", float("-inf")), row.get("at_most", float("inf"))
        state = "not measured" if measured is None else "as expected"
        if measured is not None and not low <= measured <= high:
            state = "off"
        kept = {key: row[key] for key in ("name", "at_least", "at_most", "source") if key in row}
        rows.append({**kept, "measured": measured, "state": state})
    return rows
