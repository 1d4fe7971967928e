"""Count and time every system at its official size, with random weights: the model zoo's figures.

    python benchmarks/model_zoo.py [--only NAME ...] [--rounds 5] [--threads 2]
        [--precision float32] [--json FILE]

A frame of 640x480 goes in, labels of 640x480 come out of ``Engine.segment``; all engines are
loaded and take turns, so that a busy moment affects all. Multiply-accumulates are those of
matrix products, convolutions and attention in one eager pass of torch. Random weights: this says
nothing about accuracy.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from engine import FRAME_HW, machine_and_commit, random_inputs

from zsseg_rt.profiling.turns import take_turns_locally


@dataclass(frozen=True)
class System:
    """A system at its official size.

    Attributes:
        build: Makes the model with random weights.
        run: One eager pass over an image of the official size with that many classes.
        classes: Number of classes.
    """

    build: Callable[[], Any]
    run: Callable[[Any, int], object]
    classes: int


def zegclip(prompts: int) -> Any:
    """ZegCLIP, ViT-B/16 at 512x512."""
    from zsseg_rt.models.clip.towers import ImageEncoderConfig
    from zsseg_rt.models.descriptor.model import ZegCLIP, ZegCLIPConfig

    return ZegCLIP(ZegCLIPConfig(image_encoder=ImageEncoderConfig(num_prompts=prompts)))


def clip_rc(prompts: int) -> Any:
    """CLIP-RC, ViT-B/16 at 512x512, without the recovery decoder of training."""
    from zsseg_rt.models.clip.towers import ImageEncoderConfig
    from zsseg_rt.models.descriptor.model import ClipRC, ClipRCConfig

    encoder = ImageEncoderConfig(num_prompts=prompts, num_cells=16)
    return ClipRC(ClipRCConfig(image_encoder=encoder, with_recovery=False))


def dense_clip() -> Any:
    """Plain CLIP ViT-B/16 with NACLIP's last block at 512x512."""
    from zsseg_rt.models.clip.towers import ImageEncoderConfig
    from zsseg_rt.models.dense.dense_clip import DenseCLIP, DenseCLIPConfig

    encoder = ImageEncoderConfig(grid_side=14, num_prompts=0, num_deep_prompts=0)
    return DenseCLIP(DenseCLIPConfig(image_encoder=encoder, size_hw=(512, 512)))


def zegformer(depths: tuple[int, ...]) -> Any:
    """ZegFormer with CLIP ViT-B/16 on 100 regions."""
    from zsseg_rt.models.clip.towers import ImageEncoderConfig, TextEncoderConfig
    from zsseg_rt.models.zegformer.decoder import ResNetConfig
    from zsseg_rt.models.zegformer.model import ZegFormer, ZegFormerConfig

    return ZegFormer(
        ZegFormerConfig(
            backbone=ResNetConfig(depths=depths),
            clip_image=ImageEncoderConfig(grid_side=14, num_prompts=0, num_deep_prompts=0),
            clip_text=TextEncoderConfig(),
            seen_classes=tuple(range(15)),
        )
    )


def zeroseg() -> Any:
    """ZeroSeg, ViT-B/16 at 448x448, without the reconstruction head of training."""
    from zsseg_rt.models import create_model

    return create_model("zeroseg", with_decoder=False)


def run_plain(side: int) -> Callable[[Any, int], object]:
    """One pass of a model that takes an image and class embeddings."""

    def run(model: Any, classes: int) -> object:
        import torch

        _, text = random_inputs(512, classes)
        return model(torch.zeros(1, 3, side, side), torch.from_numpy(text))

    return run


def run_zeroseg(model: Any, classes: int) -> object:
    """One pass over a 448x448 image; classes enter only after the networks."""
    import torch

    return model(torch.zeros(1, 3, 448, 448))


def run_zegformer(model: Any, classes: int) -> object:
    """One pass of ZegFormer over a 512x512 image."""
    import torch

    _, text = random_inputs(512, classes)
    features = torch.from_numpy(text)
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (3, 512, 512), np.uint8))
    return model([image], features, features, [(512, 512)])


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


SYSTEMS = {
    "zegclip-voc": System(lambda: zegclip(10), run_plain(512), 20),
    "zegclip-coco": System(lambda: zegclip(100), run_plain(512), 171),
    "clip_rc-voc": System(lambda: clip_rc(10), run_plain(512), 20),
    "clip_rc-coco": System(lambda: clip_rc(100), run_plain(512), 171),
    "dense_clip-naclip": System(dense_clip, run_plain(512), 20),
    "cat_seg-20": System(random_model, run_plain(384), 20),
    "cat_seg-150": System(random_model, run_plain(384), 150),
    "zeroseg": System(zeroseg, run_zeroseg, 20),
    "zegformer-r50": System(lambda: zegformer((3, 4, 6, 3)), run_zegformer, 20),
    "zegformer-r101": System(lambda: zegformer((3, 4, 23, 3)), run_zegformer, 20),
}


def main() -> int:
    """Parse arguments, count and time, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--precision", default="float32", help="the engines' precision")
    parser.add_argument("--no-time", action="store_true", help="count only")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ZSSEG_HOME"] = str(Path(folder) / "cache")
        report = measure(args, Path(folder))
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Count all, then let all engines take turns."""
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows: dict[str, dict[str, Any]] = {}
    engines = {}
    for name in args.only:
        # torch's counter fails on ZegFormer's modules when their weights require gradients
        model = SYSTEMS[name].build().eval().requires_grad_(False)
        rows[name] = count(model, SYSTEMS[name])
        if not args.no_time:
            engines[name] = open_engine(model, SYSTEMS[name].classes, folder / name, args)
        del model
    for name, (engine, _) in engines.items():
        rows[name] |= {"precision": engine.precision, "backend": engine.backend}
    calls = {
        name: functools.partial(engine.segment, frame) for name, (engine, frame) in engines.items()
    }
    if calls:
        taken = take_turns_locally(calls, rounds=args.rounds)
        for name in calls:
            rows[name]["engine_ms"] = taken.median_ms(name)
    report = {"machine": machine_and_commit(), "threads": args.threads, "frame_hw": FRAME_HW}
    return report | {"rounds": args.rounds, "systems": rows}


def count(model: Any, system: System) -> dict[str, Any]:
    """Parameters without the text tower, and multiply-accumulates of one pass."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def is_text(name: str) -> bool:
        return "text_encoder" in name or "clip_text" in name

    parameters = sum(p.numel() for n, p in model.named_parameters() if not is_text(n))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        system.run(model, system.classes)
    macs = counter.get_total_flops() / 2
    return {"classes": system.classes, "parameters": parameters, "macs": macs}


def open_engine(
    model: Any, classes: int, folder: Path, args: argparse.Namespace
) -> tuple[Any, np.ndarray]:
    """Export to a bundle without text tower and load it with random class embeddings."""
    from zsseg_rt import Engine, EngineConfig
    from zsseg_rt.export import export_bundle

    bundle = folder.with_suffix(".zsseg")
    options = {"precisions": ("float32",), "text_encoder": None, "verify": False}
    export_bundle(model, bundle, **options)
    settings = {"precision": args.precision, "num_threads": args.threads}
    engine = Engine(bundle, EngineConfig(device="cpu", **settings))
    width = engine.bundle.text.embed_dim
    frame, text = random_inputs(width, classes)
    engine.set_classes([f"class {index}" for index in range(classes)], embeddings=text)
    engine.segment(frame)
    return engine, frame


def print_report(report: dict[str, Any]) -> None:
    """Print one line per system."""
    machine = report["machine"]
    print(f"{machine['cpu']}, {report['threads']} threads, commit {machine['commit']}")
    print(f"{'system':20} {'classes':>7} {'parameters':>11} {'GMAC':>8} {'engine':>11}")
    for name, row in report["systems"].items():
        latency = f"{row['engine_ms']:8.0f} ms {row['precision']}" if "engine_ms" in row else "-"
        size = f"{row['parameters'] / 1e6:9.1f} M"
        print(f"{name:20} {row['classes']:7} {size} {row['macs'] / 1e9:8.1f} {latency:>11}")


if __name__ == "__main__":
    raise SystemExit(main())
