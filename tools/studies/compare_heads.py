"""Train decode heads on cached features of a frozen CLIP, and write their figures as JSON.

python -m tools.studies.compare_heads --out runs/heads.json
python -m tools.studies.compare_heads --clip runs/scenes2/clip/clip.safetensors --out FILE
python -m tools.studies.compare_heads --rows cosine aligned --seeds 0 --worlds one_thing --out FILE

An interrupted call continues where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tools.studies.cached_heads import ROWS, WORLDS, HeadSettings, open_world, train_head
from zsseg_rt.common.files import sha256_of, write_whole
from zsseg_rt.errors import ArgumentError, ZssegError
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Read the command line, run what is not done yet, write the file after every run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument(
        "--clip", default="demo", help="CLIP weights; default: the shipped small one"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument(
        "--worlds", nargs="+", choices=WORLDS, default=list(WORLDS), metavar="WORLD"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for setting in dataclasses.fields(HeadSettings):
        name = f"--{setting.name.replace('_', '-')}"
        parser.add_argument(name, type=type(setting.default), default=setting.default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        compare(arguments)
    except ZssegError as error:
        print(f"compare_heads: {error}", file=sys.stderr)
        return 1
    return 0


def compare(arguments: argparse.Namespace) -> None:
    """Do all runs that the file does not hold."""
    names = [setting.name for setting in dataclasses.fields(HeadSettings)]
    settings = HeadSettings(**{name: getattr(arguments, name) for name in names})
    content = started(arguments.out, describe(arguments.clip, settings))
    done = {(run["row"], run["world"], run["seed"]) for run in content["runs"]}
    for world in arguments.worlds:
        wanted = [(row, world, seed) for seed in arguments.seeds for row in arguments.rows]
        wanted = [run for run in wanted if run not in done]
        if not wanted:
            continue
        features = open_world(arguments.clip, WORLDS[world], settings)
        for row, _, seed in wanted:
            start = time.perf_counter()
            figures = train_head(ROWS[row], features, settings, seed)
            seconds = round(time.perf_counter() - start, 1)
            run = {"row": row, "world": world, "seed": seed, "seconds": seconds}
            content["runs"].append(run | {"title": ROWS[row].title, "metrics_percent": figures})
            write_whole(arguments.out, (json.dumps(content, indent=1) + "\n").encode())
            shown = ", ".join(f"{name} {value:.1f}" for name, value in figures.items())
            print(f"{world} {row} seed {seed}: {shown} ({seconds} s)", flush=True)


def describe(clip: str, settings: HeadSettings) -> dict[str, Any]:
    """What all runs of a file share."""
    weights = sha256_of(Path(clip)) if Path(clip).is_file() else clip
    return {"clip": weights, "settings": dataclasses.asdict(settings)}


def started(path: Path, shared: dict[str, Any]) -> dict[str, Any]:
    """The file's content so far.

    Raises:
        ArgumentError: The file holds runs of other settings, or cannot be read.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"commit": describe_commit(ROOT), "machine": describe_machine()}
        return shared | about | {"runs": []}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = all(content[name] == value for name, value in shared.items())
        content["runs"] = list(content["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"out: expected a file of this tool, got {error!r}.") from error
    if not same:
        raise ArgumentError(
            f"out: expected runs of these settings and this CLIP, got others in {path}. Choose "
            "another file."
        )
    return content


if __name__ == "__main__":
    raise SystemExit(main())
