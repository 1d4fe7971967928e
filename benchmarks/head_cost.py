"""What SFP's image encoder costs against NACLIP's: ViT-B/16 at 448 with random weights.

    python benchmarks/head_cost.py [--heads sfp sc_clip] [--precision float32 auto] [--json FILE]

Goal: SFP with outliers by length (`l2`) takes at most 1.08 times as long as NACLIP. The encoders
of two bundles take turns on two threads in random order (the sampler of `zsseg-rt profile`), until
the interval of their ratio is 1 % wide on both sides, or for --seconds. Needs torch for the export.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt import Engine, EngineConfig
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine
from zsseg_rt.profiling.conditions import compare_snapshots, take_snapshot
from zsseg_rt.profiling.turns import StopRule, take_turns
from zsseg_rt.profiling.worker import LocalCandidate, TurnPlan, settle_threads

ROOT = Path(__file__).resolve().parents[1]
GOAL, FIRST, THREADS = 1.08, "naclip", 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse arguments, export, measure, print; the exit status is 1 where SFP misses the goal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", nargs="+", default=["sfp"], help="beside naclip")
    parser.add_argument("--precision", nargs="+", default=["float32", "auto"])
    parser.add_argument("--size", type=int, default=448, help="side of the input in pixels")
    parser.add_argument("--width", type=int, default=768, help="of tokens; less: a quick trial")
    parser.add_argument("--seconds", type=float, default=100.0, help="for each precision, at most")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    before, rows = take_snapshot(), {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ZSSEG_HOME"] = str(Path(folder) / "cache")
        heads = (FIRST, *args.heads)
        bundles = {h: export(h, args.size, args.width, Path(folder) / f"{h}.zsseg") for h in heads}
        for precision in args.precision:
            rows[precision] = measure(bundles, precision, args.seconds)
    report = {
        "machine": describe_machine(),
        "commit": describe_commit(ROOT),
        "conditions": vars(compare_snapshots(before, take_snapshot())),
        "size": args.size,
        "goal": GOAL,
        "precisions": rows,
    }
    text = json.dumps(report, indent=2, default=vars)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    found = [row["ratios"]["sfp"]["ratio"] for row in rows.values() if "sfp" in row["ratios"]]
    return int(any(ratio > GOAL for ratio in found))


def export(head: Any, size: int, width: int, bundle: Path) -> Path:
    """A bundle without a text tower; ``width`` is ViT-B/16's or less."""
    import torch

    from zsseg_rt.export import export_bundle
    from zsseg_rt.models.clip.towers import ImageEncoderConfig
    from zsseg_rt.models.dense.dense_clip import DenseCLIP, DenseCLIPConfig

    torch.manual_seed(0)
    encoder = ImageEncoderConfig(
        width=width,
        num_heads=width // 64,
        mlp_width=4 * width,
        grid_side=14,
        num_prompts=0,
        num_deep_prompts=0,
    )
    config = DenseCLIPConfig(image_encoder=encoder, head=head, size_hw=(size, size))
    export_bundle(DenseCLIP(config).eval(), bundle, text_encoder=None, verify=False)
    return bundle


def measure(bundles: dict[str, Path], precision: str, seconds: float) -> dict[str, Any]:
    """Medians of the encoders in milliseconds, and each one's ratio to the first."""
    with ExitStack() as stack:
        calls = {}
        for head, bundle in bundles.items():
            config = EngineConfig(
                device="cpu", num_threads=THREADS, num_lanes=2, precision=precision
            )
            engine = stack.enter_context(Engine(bundle, config))
            calls[head] = encoder_call(engine)
            taken = engine.precision
        candidates = [LocalCandidate(head, call) for head, call in calls.items()]
        settle_threads()
        stop = StopRule(max_seconds=seconds, min_rounds=12, half_width=0.01)
        rounds = take_turns(candidates, TurnPlan(measuring_ms=0.0), stop)
        ratios = {}
        for head in list(bundles)[1:]:
            found = rounds.difference(FIRST, head, 0.01)
            assert found is not None
            ends = [None if end is None else 1 + end for end in (found.low, found.high)]
            ratios[head] = {"ratio": 1 + found.change, "interval_95": ends, "basis": found.basis}
        medians = {head: rounds.median_ms(head) for head in bundles}
    return {"precision": taken, "rounds": rounds.count, "median_ms": medians, "ratios": ratios}


def encoder_call(engine: Engine) -> Callable[[], Any]:
    """One run of the image encoder alone on noise, which must give finite numbers."""
    lane = engine.lane()
    session = lane.sessions["image_encoder"]
    dtype = session.inputs[0].dtype
    size = engine.bundle.preprocess.size_hw
    noise = np.random.default_rng(0).standard_normal((1, 3, *size))
    image = lane.workspace.place(noise.astype(dtype))

    def call() -> Any:
        return session.run({"image": image}, stream=lane.workspace.stream)

    assert np.isfinite(np.asarray(call()["patch_embeds"], np.float32)).all()
    return call


if __name__ == "__main__":
    raise SystemExit(main())
