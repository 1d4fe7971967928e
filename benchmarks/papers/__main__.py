"""Evaluate dense CLIP as its papers do: their sizes, windows, names, prompts and thresholds.

    python -m benchmarks.papers BUNDLE.zsseg --paper sclip --dataset voc21 --root DIR
        [--split val] [--limit N] [--precision float32] [--json FILE]

docs/datasets.md has the papers, the input that a bundle needs for each, and what is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.papers.protocol import papers, read_protocol
from benchmarks.papers.segmenter import PublishedSegmenter
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.errors import ZssegError
from zsseg_rt.evaluation import create_dataset, evaluate
from zsseg_rt.export.text_side import imagenet_templates


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate, and print what is followed, what differs, and both figures."""
    parser = argparse.ArgumentParser(prog="papers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--paper", required=True, help=", ".join(papers()))
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--root", type=Path, required=True, help="the data set's folder")
    parser.add_argument("--split", default="val")
    parser.add_argument("--partial", action="store_true", help="images may be missing")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", type=Path, dest="report")
    args = parser.parse_args(arguments)
    try:
        run(args)
    except ZssegError as error:
        print(f"papers: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    """Evaluate by the parsed command line."""
    protocol = read_protocol(args.paper, args.dataset)
    options = {"partial": True} if args.partial else {}
    data = create_dataset(args.dataset, args.root, args.split, **options)
    config = PublishedSegmenter.config(EngineConfig(device=args.device, precision=args.precision))
    templates = protocol.templates or imagenet_templates()
    with Engine(args.bundle, config) as engine:
        segmenter = PublishedSegmenter(engine, protocol, data.class_names, templates)
        figure = "no figure was read" if protocol.miou is None else f"mIoU {protocol.miou:g}"
        lines = [protocol.sentence(), *(f"differs: {one}" for one in segmenter.differences())]
        print(*lines, f"published: {figure} ({protocol.figures})", sep="\n")
        result = evaluate(segmenter, data, limit=args.limit)
    figures = result.scores.as_reported().items()
    print(*(f"{name} {percent:.2f}" for name, percent in figures), sep="  ")
    if args.report is not None:
        args.report.write_text(json.dumps(result.to_json(), indent=2), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
