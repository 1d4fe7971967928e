"""Measure CAT-Seg's engine against the official arithmetic in eager torch, side by side.

    python benchmarks/cat_seg.py [--size real|tiny] [--classes 20 150] [--rounds 3] [--json FILE]

A frame of 640x480 goes in, labels of 640x480 come out, of one view of the whole frame. "eager" is
the torch model with the same weights and the authors' arithmetic: padding tokens are computed one
by one below 256 classes, and what the image or a name adds again for every class; its attention is
torch's fused one, which theirs is not. "one graph"
is the engine without the head's parts. Weights are random: speed, memory and agreement are
measured, not accuracy. Candidates take turns, so that a busy moment affects all; the load of the
machine beside them is reported. Each one's peak memory (VmHWM) is that of a process of its own that
labels one frame with given embeddings.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from engine import FRAME_HW, machine_and_commit, random_inputs

from zsseg_rt.profiling.turns import take_turns_locally

ROOT = Path(__file__).resolve().parents[1]
CHILD_FLAG = "--child"
CANDIDATES = ("engine", "one graph", "eager")
GOALS = {20: 2.0, 150: 1.4}  # eager / engine, in float32

Labeller = Callable[[np.ndarray], np.ndarray]


def main() -> int:
    """Parse arguments, measure, print a report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    parser.add_argument("--classes", type=int, nargs="+", default=[20, 150])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--precision", default="float32", help="the engine's precision")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="keep or reuse the bundle here")
    parser.add_argument(CHILD_FLAG, choices=CANDIDATES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        args.folder = args.folder or Path(scratch)
        os.environ.setdefault("ZSSEG_HOME", str(args.folder / "cache"))
        if args.child:
            return run_child(args)
        report = measure(args)
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def random_model() -> Any:
    """CAT-Seg B without its text tower, with random weights that keep values lively."""
    import torch

    from zsseg_rt.models.cat_seg.model import CatSeg, CatSegConfig
    from zsseg_rt.models.clip.towers import ImageEncoderConfig

    encoder = ImageEncoderConfig(grid_side=14, num_prompts=0, num_deep_prompts=0)
    model = CatSeg(CatSegConfig(image_encoder=encoder)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0.0, weight[0].numel() ** -0.5, generator=generator)
        elif name.endswith("weight"):
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, 0.1, generator=generator)
    return model


def build_model(size: str) -> Any:
    """The model, or a tiny one."""
    if size == "real":
        return random_model()
    sys.path.insert(0, str(ROOT / "python_tests"))
    from support.golden_cat_seg import tiny_model

    return tiny_model(padding=256)


def as_published(attention: Any, x: Any, text: Any) -> Any:
    """The attention between classes with copies of the padding token in the sequence."""
    import torch

    classes, missing = x.shape[1], max(0, attention.padding - x.shape[1])
    tokens = attention.padding_tokens[:, None].expand(len(x), missing, x.shape[2], -1)
    guides = attention.padding_guidance[0].expand(missing, -1)
    padded, named = torch.cat([x, tokens], dim=1), torch.cat([text, guides])
    q, k, v = attention.keys_values(padded, named[:, None])
    products = torch.einsum("bcnhd,bcnhe->bnhde", k, v)
    weights = torch.einsum("bcnhd,bnhd->bcnh", q, k.sum(1)) + 1e-6
    mixed = torch.einsum("bcnhd,bnhde->bcnhe", q, products) / weights[..., None]
    refined = padded + mixed.flatten(-2)
    refined = refined + attention.MLP(attention.norm2(refined))
    return x + refined[:, :classes]


def up_as_published(block: Any, x: Any, guidance: Any) -> Any:
    """A decoder stage whose first convolution sees the image's guidance beside every class."""
    import torch

    beside = guidance.repeat_interleave(len(x) // len(guidance), dim=0)
    return block.conv["double_conv"](torch.cat([block.up(x), beside], dim=1))


def linear_as_published(linear: Any, own: Any, shared: Any) -> Any:
    """A layer of both, side by side."""
    import torch

    return linear(torch.cat([own, shared.expand(*own.shape[:-1], -1)], dim=-1))


def use_published_arithmetic(model: Any) -> None:
    """Let a model, and with it all others of this process, compute as the authors' code does."""
    from zsseg_rt.models.cat_seg import aggregator

    aggregator.sum_linear = linear_as_published
    forms = {aggregator.ClassAttention: as_published, aggregator.UpBlock: up_as_published}
    for module in model.modules():
        if type(module) in forms:
            module.forward = functools.partial(forms[type(module)], module)


def bundle_of(args: argparse.Namespace) -> Path:
    """The bundle, exported if it does not exist yet."""
    path: Path = args.folder / f"cat_seg-{args.size}.zsseg"
    if not path.exists():
        from zsseg_rt.export import export_bundle  # torch is no part of the measurement

        options = {"precisions": ("float32",), "text_encoder": None, "verify": False}
        export_bundle(build_model(args.size), path, **options)
    return path


def engine_labeller(args: argparse.Namespace, classes: int, *, whole: bool = False) -> Labeller:
    """An engine with so many classes; ``whole`` leaves the head's parts out."""
    from zsseg_rt import Engine, EngineConfig
    from zsseg_rt.runtime.families import aggregation

    config = EngineConfig(device="cpu", precision=args.precision, num_threads=args.threads)
    usual = aggregation.in_parts
    if whole:
        aggregation.in_parts = lambda graphs: False
    try:
        engine = Engine(bundle_of(args), config)
    finally:
        aggregation.in_parts = usual
    _, text = random_inputs(engine.bundle.text.embed_dim, classes)
    engine.set_classes([f"class {index}" for index in range(classes)], embeddings=text)

    def label(frame: np.ndarray) -> np.ndarray:
        return np.array(engine.segment(frame).labels)

    return label


def eager_labeller(args: argparse.Namespace, classes: int) -> Labeller:
    """The torch model from frame to labels, as published but for the number of views."""
    import torch

    from zsseg_rt import ops

    torch.set_num_threads(args.threads)
    model = build_model(args.size)
    use_published_arithmetic(model)
    _, text = random_inputs(model.config.image_encoder.embed_dim, classes)
    embeds = torch.from_numpy(text)
    scaling = {"size_hw": model.size_hw, "mean": model.image_mean, "std": model.image_std}

    def label(frame: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            image = torch.from_numpy(np.asarray(ops.preprocess(frame, **scaling)))[None]
            logits = model(image, embeds).mask_logits
            up = torch.nn.functional.interpolate(logits, frame.shape[:2], mode="bilinear")
            return up[0].sigmoid().argmax(0).numpy()

    return label


def open_candidate(name: str, args: argparse.Namespace, classes: int) -> Labeller:
    """What labels a frame."""
    if name == "eager":
        return eager_labeller(args, classes)
    return engine_labeller(args, classes, whole=name == "one graph")


def a_frame() -> np.ndarray:
    """A smooth frame, uint8 [480, 640, 3]."""
    import cv2

    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    return np.asarray(cv2.resize(small, FRAME_HW[::-1], interpolation=cv2.INTER_CUBIC))


def run_child(args: argparse.Namespace) -> int:
    """Label one frame in this process and print its peak memory."""
    label = open_candidate(args.child, args, args.classes[0])
    before = peak_megabytes()
    label(a_frame())
    print(json.dumps({"loaded_mb": before, "peak_mb": peak_megabytes()}))
    return 0


def peak_megabytes() -> float:
    """VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def peak_of(name: str, args: argparse.Namespace, classes: int) -> dict[str, float]:
    """Peak memory of a candidate in a process of its own."""
    command = [sys.executable, __file__, CHILD_FLAG, name, "--size", args.size]
    command += ["--classes", str(classes), "--folder", str(args.folder)]
    command += ["--threads", str(args.threads), "--precision", args.precision]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All candidates in turns, for each number of classes."""
    frame, rows = a_frame(), {}
    bundle_of(args)
    load = os.getloadavg()[0]
    for classes in args.classes:
        labellers = {name: open_candidate(name, args, classes) for name in CANDIDATES}
        labels = {name: label(frame) for name, label in labellers.items()}  # warms all up
        calls = {name: functools.partial(label, frame) for name, label in labellers.items()}
        taken = take_turns_locally(calls, rounds=args.rounds)
        medians = {name: taken.median_ms(name) for name in CANDIDATES}
        del labellers, calls
        rows[classes] = {
            "median_ms": medians,
            "eager / engine": medians["eager"] / medians["engine"],
            "goal": GOALS.get(classes),
            "same_labels_as_eager": float((labels["engine"] == labels["eager"]).mean()),
            "memory": {name: peak_of(name, args, classes) for name in CANDIDATES},
        }
    return {
        "machine": machine_and_commit(),
        "load_before": load,
        "size": args.size,
        "threads": args.threads,
        "rounds": args.rounds,
        "precision": args.precision,
        "classes": rows,
    }


def print_report(report: dict[str, Any]) -> None:
    """Print a few lines per number of classes."""
    machine = report["machine"]
    print(f"{machine['cpu']}, {report['threads']} threads, {report['precision']}")
    print(f"commit {machine['commit']}, load before the start {report['load_before']:.1f}")
    for classes, row in report["classes"].items():
        goal = f" (goal {row['goal']:g})" if row["goal"] else ""
        print(f"{classes} classes: eager / engine {row['eager / engine']:.2f}{goal}, labels as")
        print(f"  eager {row['same_labels_as_eager']:.4%}")
        for name, ms in row["median_ms"].items():
            print(f"  {name:10} {ms:9.1f} ms, peak {row['memory'][name]['peak_mb']:.0f} MB")


if __name__ == "__main__":
    sys.exit(main())
