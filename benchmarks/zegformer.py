"""Measure ZegFormer's engine against its eager torch form and against ZegCLIP, side by side.

    python benchmarks/zegformer.py [--size real|tiny] [--rounds 3] [--threads 2] [--json FILE]

A frame of 512x512 and 20 classes. "engine" is exact: CLIP sees every region. "eager" is the torch
model with the same weights, all 100 crops in one batch, as the official code runs them. "zegclip"
is our ZegCLIP's engine at the same size. The thresholds show what ``min_region_score`` saves and
how many pixels keep their label. Weights are random unless ``--checkpoint`` names real ones: speed
and agreement are measured, not accuracy. Candidates take turns, so a busy moment affects all;
each one's peak memory (VmHWM) is that of a process of its own that labels one frame.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from engine import machine_and_commit

from zsseg_rt.profiling.turns import take_turns_locally

ROOT = Path(__file__).resolve().parents[1]
CHILD_FLAG = "--child"
SEEN = tuple(range(15))
NAMES = [f"class {index}" for index in range(20)]
THRESHOLDS = (0.01, 0.1, 0.5)
# The design's speed claims hold beyond these ratios.
GOALS = {"eager / engine": 5.0, "engine / zegclip": 5.0}

Labeller = Callable[[np.ndarray], np.ndarray]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--precision", default="auto", help="the engines' precision")
    parser.add_argument("--checkpoint", type=Path, help="official weights instead of random ones")
    parser.add_argument("--clip", help="CLIP's weights for the checkpoint; see import-checkpoint")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="keep or reuse the bundles here")
    parser.add_argument(CHILD_FLAG, choices=("engine", "eager", "zegclip"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        args.folder = args.folder or Path(scratch)
        os.environ.setdefault("ZSSEG_HOME", str(args.folder / "cache"))
        if args.child:
            return run_child(args)
        report = run_all(args)
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


# ---- what is measured ----------------------------------------------------------------------------


def build_zegformer(args: argparse.Namespace) -> Any:
    """ZegFormer R50 with CLIP ViT-B/16, all crops in one batch, or a tiny one."""
    sys.path.insert(0, str(ROOT / "python_tests"))
    from support import tiny_zegformer

    if args.checkpoint:
        from zsseg_rt.models import from_official, load_checkpoint, load_clip, normalize_state_dict

        weights = normalize_state_dict(load_checkpoint(args.checkpoint))
        clip = load_clip(args.clip) if args.clip else None
        return from_official("zegformer", weights, clip=clip, seen_classes=SEEN, region_batch=100)
    if args.size == "tiny":
        return tiny_zegformer.model(region_batch=100)
    import torch

    from zsseg_rt.models.clip.towers import ImageEncoderConfig, TextEncoderConfig
    from zsseg_rt.models.zegformer.model import ZegFormer, ZegFormerConfig

    config = ZegFormerConfig(
        clip_image=ImageEncoderConfig(grid_side=14),
        clip_text=TextEncoderConfig(vocab_size=64, num_layers=1),
        seen_classes=SEEN,
        region_batch=100,
    )
    with torch.device("meta"):
        model = ZegFormer(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(tiny_zegformer.rule_state_dict(shapes), assign=True)
    return model.eval()


def build_zegclip(args: argparse.Namespace) -> Any:
    """ZegCLIP ViT-B/16 at 512x512, or a tiny one."""
    sys.path.insert(0, str(ROOT / "python_tests"))
    from support import tiny

    if args.size == "tiny":
        return tiny.zegclip_model(seen_classes=(0, 1, 3))
    sizes = tiny.TinySizes(
        width=768, num_heads=12, num_layers=12, grid_side=32, embed_dim=512, num_prompts=10,
        decoder_heads=8, num_classes=20, seen=SEEN,
    )  # fmt: skip
    return tiny.zegclip_model(sizes)


def bundle_of(kind: str, args: argparse.Namespace) -> Path:
    """The bundle of ``"zegformer"`` or ``"zegclip"``, exported if it does not exist yet."""
    path: Path = args.folder / f"{kind}.zsseg"
    if path.exists():
        return path
    from zsseg_rt.export import export_bundle  # imports torch, which is not part of the measurement

    options: dict[str, Any] = {"class_names": NAMES, "precisions": ("float32",)}
    if kind == "zegclip":
        return export_bundle(build_zegclip(args), path, **options)
    model = build_zegformer(args)
    model.config = replace(model.config, region_batch=10)
    size_hw = (64, 96) if args.size == "tiny" else None
    return export_bundle(model, path, size_hw=size_hw, verify=False, **options)


def frame_and_texts(embed_dim: int, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """A smooth frame uint8 [H, W, 3] and unit embeddings [2, 20, embed_dim]."""
    import cv2

    size = (96, 64) if args.size == "tiny" else (512, 512)
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)
    frame = cv2.resize(small, size, interpolation=cv2.INTER_CUBIC)
    text = rng.standard_normal((2, len(NAMES), embed_dim))
    return frame, (text / np.linalg.norm(text, axis=2, keepdims=True)).astype(np.float32)


def open_engine(kind: str, args: argparse.Namespace, **settings: Any) -> Any:
    """An engine with its classes."""
    from zsseg_rt import Engine, EngineConfig

    config = EngineConfig(
        device="cpu", precision=args.precision, num_threads=args.threads, **settings
    )
    engine = Engine(bundle_of(kind, args), config)
    _, texts = frame_and_texts(engine.bundle.text.embed_dim, args)
    engine.set_classes(NAMES, embeddings=texts if kind == "zegformer" else texts[0])
    return engine


def eager_labeller(args: argparse.Namespace) -> Labeller:
    """The torch model from frame to labels."""
    import torch

    torch.set_num_threads(args.threads)
    model = build_zegformer(args)
    _, texts = frame_and_texts(model.config.decoder.embed_dim, args)
    given = [torch.from_numpy(text) for text in texts]

    def label(frame: np.ndarray) -> np.ndarray:
        picture = torch.from_numpy(frame).permute(2, 0, 1).contiguous()
        with torch.inference_mode():
            maps = model([picture], *given, [frame.shape[:2]]).sem_seg[0]
            labels: np.ndarray = maps.argmax(dim=0).numpy()
        return labels

    return label


# ---- measuring -----------------------------------------------------------------------------------


def run_child(args: argparse.Namespace) -> int:
    """Label one frame in this process and print its peak memory."""
    if args.child == "eager":
        label = eager_labeller(args)
        frame, _ = frame_and_texts(8, args)
    else:
        engine = open_engine("zegformer" if args.child == "engine" else "zegclip", args)
        frame, _ = frame_and_texts(8, args)

        def label(frame: np.ndarray) -> np.ndarray:
            found: np.ndarray = engine.segment(frame).labels
            return found

    before = peak_megabytes()
    label(frame)
    print(json.dumps({"loaded_mb": before, "peak_mb": peak_megabytes()}))
    return 0


def peak_megabytes() -> float:
    """VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def measure_memory(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Peak memory of each candidate in a process of its own."""
    found = {}
    for child in ("engine", "eager", "zegclip"):
        command = [sys.executable, __file__, CHILD_FLAG, child, "--size", args.size]
        command += ["--threads", str(args.threads), "--precision", args.precision]
        command += ["--folder", str(args.folder)]
        if args.checkpoint:
            command += ["--checkpoint", str(args.checkpoint)]
        if args.clip:
            command += ["--clip", args.clip]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found[child] = json.loads(run.stdout.splitlines()[-1])
    return found


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """Export, then measure every candidate in turns."""
    engine, zegclip = open_engine("zegformer", args), open_engine("zegclip", args)
    spec = engine.bundle.regions.encoder
    frame, _ = frame_and_texts(8, args)
    lazy = {
        threshold: open_engine("zegformer", args, min_region_score=threshold)
        for threshold in THRESHOLDS
    }
    candidates: dict[str, Labeller] = {
        "engine": lambda frame: np.array(engine.segment(frame).labels),
        "zegclip": lambda frame: np.array(zegclip.segment(frame).labels),
        "eager": eager_labeller(args),
    }
    for threshold, other in lazy.items():
        candidates[f"min_region_score {threshold:g}"] = lambda frame, other=other: np.array(
            other.segment(frame).labels
        )
    labels = {name: label(frame) for name, label in candidates.items()}  # warms all up
    calls = {name: functools.partial(label, frame) for name, label in candidates.items()}
    taken = take_turns_locally(calls, rounds=args.rounds)
    medians = {name: taken.median_ms(name) for name in candidates}
    report: dict[str, Any] = {
        "machine": machine_and_commit(),
        "size": args.size,
        "threads": args.threads,
        "rounds": args.rounds,
        "precision": engine.precision,
        "median_ms": medians,
        "stages_ms": dict(engine.segment(frame).times),
        "ratios": {
            "eager / engine": medians["eager"] / medians["engine"],
            "engine / zegclip": medians["engine"] / medians["zegclip"],
        },
        "goals": GOALS,
        "same_labels_as_eager": float((labels["engine"] == labels["eager"]).mean()),
        "same_labels_as_exact": {
            name: float((labels[name] == labels["engine"]).mean())
            for name in candidates
            if name.startswith("min")
        },
        "crops_alive_mb": spec.batch * 3 * spec.side**2 * 4 / 1e6,
    }
    for other in (engine, zegclip, *lazy.values()):
        other.close()
    return report | {"memory": measure_memory(args)}


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['size']}, {report['threads']} threads, precision {report['precision']}")
    for name, ms in report["median_ms"].items():
        print(f"  {name:24} {ms:10.1f} ms")
    for name, ratio in report["ratios"].items():
        print(f"  {name:24} {ratio:10.2f}   (goal {report['goals'][name]:g})")
    print(f"  labels as the eager model: {report['same_labels_as_eager']:.4%}")
    for name, share in report["same_labels_as_exact"].items():
        print(f"  {name}: labels as exact: {share:.4%}")
    for name, memory in report["memory"].items():
        print(f"  {name:24} peak {memory['peak_mb']:.0f} MB (loaded {memory['loaded_mb']:.0f} MB)")
    print(f"  crops alive at once: {report['crops_alive_mb']:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
