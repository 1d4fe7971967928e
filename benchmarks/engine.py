"""Measure the engine end to end against torch with the same weights, side by side in one run.

    python benchmarks/engine.py [--size real|tiny] [--rounds 7] [--threads 2] [--json FILE]
    python benchmarks/engine.py --device cuda [--size real|tiny] [--backend torch|tensorrt]
        [--bundle DIR] [--against eager|compiled|none] [--seconds T] [--json FILE]

A frame of 640x480 goes in, labels of 640x480 come out. The torch side does the same work: resize,
normalise, model, upsample, sigmoid, argmax. Weights are random: speed and agreement are measured,
not accuracy; of the large model's, only signs are, so that its bundle packs into 26 MB. Rounds are
interleaved, so that a busy moment affects every candidate. On CUDA there are several frame sizes
and numbers of classes; see engine_cuda.py.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from engine_model import build_model, class_names, export

from zsseg_rt import ops
from zsseg_rt.common.files import write_whole
from zsseg_rt.profiling.turns import ChildCandidate, take_turns_locally
from zsseg_rt.profiling.worker import read_memory_mb

ROOT = Path(__file__).resolve().parents[1]
FRAME_HW = (480, 640)
SECOND_FLAG = "--second"


def main() -> int:
    """Parse arguments, run everything, print a report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bundle", type=Path, help="reuse or keep the exported bundle here")
    parser.add_argument("--backend", default="auto", help="on CUDA: torch or tensorrt")
    parser.add_argument("--against", choices=("eager", "compiled", "none"), default="eager")
    parser.add_argument("--seconds", type=float, default=math.inf, help="on CUDA: in all, about")
    args = parser.parse_args()
    if args.device == "cuda" and ops.cuda_device_count() == 0:
        print("--device: expected a CUDA device, got none. Use --device cpu.", file=sys.stderr)
        return 4
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        bundle = args.bundle or scratch / "benchmark.zsseg"
        if args.device == "cuda":
            os.environ.setdefault("ZSSEG_HOME", str(scratch / "cache"))
            report = run_on_cuda(args, bundle)
        else:
            os.environ["ZSSEG_HOME"] = str(scratch / "cache")
            report = run_all(args, bundle)
    print_report(report)
    keep_report(report, args.json)
    return 1 if report.get("failed") else 0


def keep_report(report: dict[str, Any], file: Path | None) -> None:
    """Write what was measured so far."""
    if file:
        write_whole(file, (json.dumps(report, indent=2) + "\n").encode())


def run_all(args: argparse.Namespace, bundle: Path) -> dict[str, Any]:
    """Build the model, export it, measure every candidate."""
    import torch

    torch.set_num_threads(args.threads)
    model = build_model(args.size)
    if not bundle.exists():
        export(model, bundle)
    report: dict[str, Any] = {"machine": machine_and_commit(), "rounds": args.rounds}
    report |= {"threads": args.threads, "size": args.size, "frame_hw": FRAME_HW}
    report["fresh_process"] = measure_processes(bundle, args.threads)
    report["second"] = measure_second(bundle, args.threads)
    report["latency_ms"], report["stages_ms"] = measure_latency(model, bundle, args)
    report["agreement"] = measure_agreement(model, bundle, args.threads)
    report["ratios"] = compute_ratios(report)
    return report


def run_on_cuda(args: argparse.Namespace, bundle: Path) -> dict[str, Any]:
    """The same on a GPU; a given bundle needs no exporter, and without rivals no torch."""
    import engine_cuda

    make_model = functools.cache(functools.partial(build_model, args.size))
    if not bundle.exists():
        export(make_model(), bundle, ("float32", "float16"))
    few: dict[str, Any] = {}
    if args.against == "compiled":  # which takes a minute for every size
        few = {"sizes_hw": ((512, 512),), "class_counts": (20,)}
    if args.size == "tiny":
        few = {"sizes_hw": ((30, 40),), "class_counts": (5,)}
    setting = engine_cuda.Setting(
        torch_device=engine_cuda.torch_on_gpu(),
        engine={"device": "cuda:0", "backend": args.backend},
        rivals=args.against,
        seconds=args.seconds,
        rounds=args.rounds if args.size == "tiny" else 40,
        **few,
    )
    return engine_cuda.run(
        bundle, setting, make_model, lambda report: keep_report(report, args.json)
    )


def random_inputs(embed_dim: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a smooth frame uint8 [480, 640, 3] and unit text embeddings [count, embed_dim]."""
    import cv2

    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)
    frame = cv2.resize(small, FRAME_HW[::-1], interpolation=cv2.INTER_CUBIC)
    text = rng.standard_normal((count, embed_dim))
    return frame, (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32)


def torch_candidate(model: Any, text: np.ndarray, dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Return the eager torch path from frame to labels at a dtype."""
    import torch
    import torch.nn.functional as F

    lowered = model if dtype == torch.float32 else build_lowered(model, dtype)
    embeds = torch.from_numpy(text).to(dtype)
    mean, std, size_hw = model_input(model)
    seen = torch.zeros(len(text), 1, 1)
    seen[list(model.config.seen_classes)] = model.config.seen_bias

    @torch.inference_mode()
    def run(frame: np.ndarray) -> np.ndarray:
        image = preprocess(frame, size_hw, mean, std)
        logits = lowered(torch.from_numpy(image).to(dtype), embeds).mask_logits.float()
        up = F.interpolate(logits, FRAME_HW, mode="bilinear", align_corners=False)[0]
        return (up.sigmoid() - seen).argmax(0).to(torch.uint8).numpy()

    return run


def preprocess(frame: np.ndarray, size_hw: Any, mean: Any, std: Any) -> np.ndarray:
    """Preprocess as torch users do: OpenCV resize, then NumPy."""
    import cv2

    resized = cv2.resize(frame, size_hw[::-1], interpolation=cv2.INTER_LINEAR)
    image = (resized.astype(np.float32) / 255.0 - np.float32(mean)) / np.float32(std)
    return np.ascontiguousarray(image.transpose(2, 0, 1))[None]


def model_input(model: Any) -> tuple[Any, Any, tuple[int, int]]:
    """Mean, std and input size of a ZegCLIP model."""
    from zsseg_rt.models.descriptor.model import IMAGE_MEAN, IMAGE_STD

    side = model.config.image_size
    return IMAGE_MEAN, IMAGE_STD, (side, side)


def build_lowered(model: Any, dtype: Any) -> Any:
    """A copy of the model at another dtype."""
    import copy

    return copy.deepcopy(model).to(dtype)


def engine_candidate(
    bundle: Path, text: np.ndarray, precision: str, threads: int
) -> tuple[Any, Callable[[np.ndarray], Any]]:
    """Return an engine with classes and its segment call."""
    from zsseg_rt import Engine, EngineConfig

    config = EngineConfig(
        device="cpu", backend="openvino", precision=precision, num_threads=threads
    )
    engine = Engine(bundle, config)
    engine.set_classes(class_names(len(text)), embeddings=text)
    return engine, engine.segment


def stage_medians(samples: Any) -> dict[str, float]:
    """Milliseconds of every stage of a candidate's calls: medians."""
    names = dict.fromkeys(stage for sample in samples for stage in sample.stages)
    return {
        stage: statistics.median(s.stages[stage] for s in samples if stage in s.stages)
        for stage in names
    }


def measure_latency(
    model: Any, bundle: Path, args: argparse.Namespace
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Median milliseconds per frame of every candidate, rounds interleaved."""
    import torch

    dim = embed_dim_of(bundle)
    frame, text = random_inputs(dim, 20)
    _, text171 = random_inputs(dim, 171)
    engine32, run32 = engine_candidate(bundle, text, "float32", args.threads)
    engine_auto, run_auto = engine_candidate(bundle, text, "auto", args.threads)
    _, run171 = engine_candidate(bundle, text171, "float32", args.threads)
    precision = engine_auto.precision
    candidates: dict[str, Callable[[np.ndarray], Any]] = {
        "torch float32": torch_candidate(model, text, torch.float32),
        "torch bfloat16": torch_candidate(model, text, torch.bfloat16),
        "engine float32": run32,
        f"engine auto ({precision})": run_auto,
        "engine float32, 171 classes": run171,
    }
    calls = {name: functools.partial(run, frame) for name, run in candidates.items()}
    taken = take_turns_locally(calls, rounds=args.rounds, stages=True)
    engine32.close()
    engine_auto.close()
    staged = {"engine float32": "engine float32", "engine auto": f"engine auto ({precision})"}
    stages = {short: stage_medians(taken.warm(name)) for short, name in staged.items()}
    return {name: taken.median_ms(name) for name in candidates}, stages


def embed_dim_of(bundle: Path) -> int:
    """Width of the bundle's text space."""
    from zsseg_rt import Bundle

    return Bundle.load(bundle).text.embed_dim


def measure_agreement(model: Any, bundle: Path, threads: int) -> dict[str, dict[str, float]]:
    """Share of equal labels, over all pixels and over those with a real margin."""
    import torch
    import torch.nn.functional as F

    from zsseg_rt.ops import reference

    frame, text = random_inputs(embed_dim_of(bundle), 20)
    mean, std, size_hw = model_input(model)
    image = reference.preprocess(frame, size_hw=size_hw, mean=mean, std=std)
    with torch.inference_mode():
        logits = model(torch.from_numpy(image[None]), torch.from_numpy(text)).mask_logits
        scores = F.interpolate(logits, FRAME_HW, mode="bilinear", align_corners=False)[0].sigmoid()
        scores[list(model.config.seen_classes)] -= model.config.seen_bias
        top, best = scores.topk(2, dim=0)
    truth, margin = best[0].numpy(), (top[0] - top[1]).numpy()
    report = {}
    for precision, tolerance in (("float32", 1e-4), ("auto", None)):
        engine, run = engine_candidate(bundle, text, precision, threads)
        limit = tolerance or (1e-4 if engine.precision == "float32" else 1e-2)
        same = run(frame).labels == truth
        real = margin > limit
        report[f"{precision} ({engine.precision})"] = {
            "all_pixels": float(same.mean()),
            "real_margin": float(same[real].mean()),
            "margin": limit,
            "share_with_real_margin": float(real.mean()),
        }
        engine.close()
    return report


def measure_processes(bundle: Path, threads: int) -> dict[str, float]:
    """Load time and peak memory in fresh processes, first without and then with the cache."""
    frame, text = random_inputs(embed_dim_of(bundle), 20)
    with tempfile.TemporaryDirectory() as folder:
        frame_file, text_file = Path(folder) / "frame.npy", Path(folder) / "text.npy"
        np.save(frame_file, frame)
        np.save(text_file, text)
        spec = {
            "bundle": str(bundle),
            "config": {"device": "cpu", "precision": "float32", "num_threads": threads},
            "classes": class_names(20),
            "embeddings": str(text_file),
            "frames": [str(frame_file)],
        }
        first, second = open_in_fresh_process(spec), open_in_fresh_process(spec)
    return {
        "import_s": first["import_s"],
        "first_load_s": first["import_s"] + first["load_s"],
        "first_peak_rss_gb": first["peak_rss_gb"],
        "cached_load_s": second["import_s"] + second["load_s"],
        "cached_first_frame_s": second["first_frame_s"],
        "cached_peak_rss_gb": second["peak_rss_gb"],
    }


def open_in_fresh_process(spec: dict[str, Any]) -> dict[str, float]:
    """Import, load and label one frame; seconds of each, and the peak memory."""
    child = ChildCandidate("engine", spec)
    memory = child.memory or [0.0, 0.0]
    child.close()
    return {**child.started, "peak_rss_gb": memory[1] / 1e3}


def measure_second(bundle: Path, threads: int) -> dict[str, float]:
    """Megabytes that a second lane, and a second engine, add to an engine that labels frames."""
    measured = {}
    for kind in ("lane", "engine"):
        command = [sys.executable, __file__, SECOND_FLAG, kind, str(bundle), str(threads)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        measured[f"second_{kind}_mb"] = float(output.splitlines()[-1])
    return measured


def second(kind: str, bundle: str, threads: int) -> None:
    """In a fresh process: what a second lane or engine adds, the buffers of its frames included."""
    import zsseg_rt

    lanes = 2 if kind == "lane" else 1
    config = zsseg_rt.EngineConfig(
        device="cpu", precision="float32", num_threads=threads, num_lanes=lanes
    )

    def open_engine() -> Any:
        engine = zsseg_rt.Engine(bundle, config)
        engine.set_classes(class_names(20), embeddings=text)
        return engine

    dim = embed_dim_of(Path(bundle))
    frame, text = random_inputs(dim, 20)
    first = open_engine()
    for _ in range(3):
        first.segment(frame)
    before = resident_mb()
    other = first.lane() if kind == "lane" else open_engine()
    for _ in range(3):
        other.segment(frame)
    print(resident_mb() - before)


def resident_mb() -> float:
    """Resident memory now."""
    memory = read_memory_mb()
    if memory is None:
        raise SystemExit("memory: expected /proc/self/status, got nothing. Run this on Linux.")
    return memory[0]


def compute_ratios(report: dict[str, Any]) -> dict[str, float]:
    """The figures for which goals are set."""
    latency = report["latency_ms"]
    auto = next(value for name, value in latency.items() if name.startswith("engine auto"))
    ratios = {
        "torch float32 / engine float32": latency["torch float32"] / latency["engine float32"],
        "torch float32 / engine auto": latency["torch float32"] / auto,
        "torch bfloat16 / engine auto": latency["torch bfloat16"] / auto,
        "171 / 20 classes": latency["engine float32, 171 classes"] / latency["engine float32"],
    }
    for name, stages in report["stages_ms"].items():
        graphs = stages["image_encoder"] + stages["decoder"]
        ratios[f"{name}: share outside the graphs"] = 1.0 - graphs / stages["total"]
    return ratios


def machine_and_commit() -> dict[str, str]:
    """CPU, versions and commit."""
    import openvino
    import torch

    from zsseg_rt.evaluation.provenance import describe_commit, describe_machine

    return describe_machine(torch, openvino) | {"commit": describe_commit(ROOT)}


def print_report(report: dict[str, Any]) -> None:
    """Print the report in human-readable form."""
    for section, content in report.items():
        if section == "cases":
            import engine_cuda

            engine_cuda.print_cases(content)
            continue
        if not isinstance(content, dict):
            print(f"{section}: {content}")
            continue
        print(f"\n{section}")
        for name, value in content.items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"  {name:44} {shown}")


if __name__ == "__main__":
    if SECOND_FLAG in sys.argv:
        second(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        sys.exit(0)
    sys.exit(main())
