"""Small encoders: frames beside ViT-B/16 at 512, in other precisions, and exports from files.

    python benchmarks/small_encoders.py --json FILE                # about 8 minutes
    python benchmarks/small_encoders.py --only tinyclip_8m --sides 336
    python benchmarks/small_encoders.py --quick                    # small networks: it runs

Weights are random, in the models' shapes; bundles are written from files, without torch. A frame
has 640x480 pixels, 20 classes, the whole frame in one window, float32 on two threads. In every
round each candidate labels the same frame once, by the engine, or by OpenVINO with labels made in
torch. Exports run in processes of their own, of whole files with both towers and tokenizer, with
every check; memory is the process's largest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import precision
from engine import class_names, random_inputs
from safetensors.numpy import save_file

from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.export.clip_file import DenseHead, export_clip_file
from zsseg_rt.profiling.worker import Stopwatch

CLASSES = 20
RIVAL = ", OpenVINO and torch"
QUICK: dict[str, Any] = {"width": 64, "blocks": 12, "side": 96}


@dataclass(frozen=True)
class Shape:
    """A model's towers; no frame meets the text tower."""

    width: int  # Channels
    blocks: int  # Residual blocks
    text: tuple[int, int]  # Width and blocks of the text tower, in exports
    head: str = "naclip"  # The dense head
    side: int = 224  # Pixels that the positions are stored for
    activation: str = "gelu"  # The MLPs'
    kind: str = "clip"  # "clip", "pe" or "siglip"
    dtype: str = "float32"  # Of the published file
    seconds: float = math.inf  # An export may take

    @property
    def joint(self) -> int:
        """Width of the joint space."""
        return self.width if self.kind == "siglip" else 512


SHAPES = {
    "vit_b16": Shape(768, 12, (512, 12), activation="quick_gelu"),
    "tinyclip_8m": Shape(256, 10, (256, 3), seconds=6),
    "tinyclip_39m": Shape(512, 12, (512, 6), "sfp", dtype="float16", seconds=6),
    "pe_core_t16": Shape(192, 12, (512, 12), "value_mlp", 384, kind="pe"),
    "pe_core_s16": Shape(384, 12, (512, 12), "value_mlp", 384, kind="pe"),
    "siglip2_b16": Shape(768, 12, (768, 12), "value_mlp", 256, "gelu_tanh", "siglip", seconds=20),
}
SIDES = {
    "vit_b16": (512,), "tinyclip_8m": (224, 336, 448), "tinyclip_39m": (224, 336, 448),
    "pe_core_t16": (384,), "pe_core_s16": (384,), "siglip2_b16": (256,),
}  # fmt: skip


def random_file(shape: Shape, folder: Path, *, whole: bool = False) -> Path:
    """Weights of this shape under CLIP's names, as a ``.safetensors`` file.

    Unless it is whole, the text tower is one narrow block, and tokens are few.
    """
    generator, tensors = np.random.default_rng(0), dict[str, Any]()
    width, cells = shape.width, (shape.side // 16) ** 2
    text, text_blocks = shape.text if whole else (width if shape.kind == "siglip" else 64, 1)

    def add(name: str, *sizes: int) -> None:
        numbers = generator.standard_normal(sizes, np.float32)
        scale = np.sqrt(np.prod(sizes[1:])) if len(sizes) > 1 else 10
        numbers = numbers / np.float32(scale) + np.float32("ln" in name and "weight" in name)
        tensors[name] = numbers.astype(shape.dtype)

    def linear(name: str, outs: int, ins: int) -> None:
        add(f"{name}weight", outs, ins)
        add(f"{name}bias", outs)

    def blocks(at: str, channels: int, count: int) -> None:
        for index in range(count):
            block = f"{at}transformer.resblocks.{index}."
            for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
                add(block + name, channels)
            linear(f"{block}attn.in_proj_", 3 * channels, channels)
            linear(f"{block}attn.out_proj.", channels, channels)
            linear(f"{block}mlp.c_fc.", 4 * channels, channels)
            linear(f"{block}mlp.c_proj.", channels, 4 * channels)

    names = ["visual.ln_post.weight", "visual.ln_post.bias", "ln_final.weight", "ln_final.bias"]
    add("visual.conv1.weight", width, 3, 16, 16)
    add("visual.positional_embedding", cells + (shape.kind != "siglip"), width)
    if shape.kind == "siglip":
        add("visual.conv1.bias", width)
        linear("text_projection.", text, text)
    else:
        names += ["visual.ln_pre.weight", "visual.ln_pre.bias", "visual.class_embedding"]
        add("visual.proj", width, shape.joint)
        add("text_projection", text, shape.joint)
    if shape.kind != "clip":
        pool = "visual.attn_pool."
        add(f"{pool}probe", 1, 1, width)
        names += [f"{pool}layernorm.weight", f"{pool}layernorm.bias"]
        linear(f"{pool}attn.in_proj_", 3 * width, width)
        linear(f"{pool}attn.out_proj.", width, width)
        linear(f"{pool}mlp.c_fc.", 4 * width, width)
        linear(f"{pool}mlp.c_proj.", width, 4 * width)
    for name in names:
        add(name, text if name.startswith("ln_final") else width)
    blocks("visual.", width, shape.blocks)
    blocks("", text, text_blocks)
    lengths = {"clip": 77, "pe": 32, "siglip": 64}
    add("positional_embedding", lengths[shape.kind], text)
    pieces, merges = random_pieces(256_000 if whole else 260)
    add("token_embedding.weight", len(pieces) if shape.kind == "siglip" else 49408, text)
    path = folder / "weights.safetensors"
    save_file(tensors, path)
    vocab = {piece: number for number, piece in enumerate(pieces)}
    model = {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": merges}
    if shape.kind == "siglip":
        (folder / "tokenizer.json").write_text(json.dumps({"model": model}, indent=2))
    return path


def random_pieces(count: int) -> tuple[list[str], list[list[str]]]:
    """Pieces of a tokenizer with single bytes, and up to 580,604 merges, as many as Gemma's."""
    pieces = [*(f"<0x{code:02X}>" for code in range(256)), "<unk>", "\u2581"]
    for length in range(1, 5):
        words = map("".join, itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=length))
        pieces += itertools.islice(words, count - len(pieces))
    words = (piece for piece in pieces[258:] if len(piece) > 1)
    merges = ([word[:at], word[at:]] for word in words for at in range(1, len(word)))
    return pieces, list(itertools.islice(merges, 580_604))


def write_bundle(shape: Shape, side: int, folder: Path) -> Path:
    """A bundle of random weights at an input size, with 20 classes in its bank."""
    names = class_names(CLASSES)
    settings = DenseHead(head=shape.head, size_hw=(side, side), activation=shape.activation)
    return export_clip_file(
        random_file(shape, folder), folder / f"random{side}.zsseg", settings,
        precisions=("float32",), verify=False, overwrite=True, templates=["{}"],
        text_bank=(names, random_inputs(shape.joint, CLASSES)[1]),
    )  # fmt: skip


def table_case(
    name: str, sides: tuple[int, ...] = ()
) -> Callable[[argparse.Namespace, Path], Iterable[dict[str, Any]]]:
    """Rows of ``models_table.py``: every precision of this CPU, INT8 by ``quantize``."""

    def case(args: argparse.Namespace, folder: Path) -> Iterable[dict[str, Any]]:
        photos = folder / "noise"
        photos.mkdir()
        for index in range(precision.PICTURES):
            small = np.random.default_rng(index).integers(0, 256, (12, 16, 3)).astype(np.uint8)
            cv2.imwrite(str(photos / f"{index}.png"), cv2.resize(small, (640, 480)))
        shape = replace(SHAPES[name], **QUICK) if args.quick else SHAPES[name]
        names = class_names(CLASSES)
        for side in (128,) if args.quick else sides or SIDES[name]:
            bundle = write_bundle(shape, side, folder)
            row, smaller = precision.quantised(bundle, photos, names, ("int8",), precision.ANY)
            yield {"side": side, **row, **precision.compared(smaller, photos, names, args)}

    return case


class OpenVinoAndTorch:
    """The bundle's own graph by OpenVINO; preprocessing, upsampling and argmax by torch."""

    def __init__(self, bundle: Path, text: np.ndarray, threads: int) -> None:
        import openvino
        import torch

        torch.set_num_threads(threads)
        loaded = Bundle.load(bundle)
        self._spec, self._grid = loaded.preprocess, loaded.head.grid_hw
        core, path = openvino.Core(), bundle / loaded.graphs["image_encoder"]["float32"].file
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_PRECISION_HINT": "f32"}  # fmt: skip
        self._request = core.compile_model(str(path), "CPU", settings).create_infer_request()
        self._text = torch.from_numpy(text)
        self._mean, self._std = (
            torch.tensor(values).reshape(3, 1, 1) for values in (self._spec.mean, self._spec.std)
        )

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Labels [H, W] of a frame."""
        import torch
        import torch.nn.functional as F

        size, settings = self._spec.size_hw, {"mode": "bilinear", "align_corners": False}
        planes = torch.from_numpy(frame).permute(2, 0, 1)[None].float().div(255)
        image = (F.interpolate(planes, size, **settings) - self._mean) / self._std
        outputs = self._request.infer({0: image.numpy()})
        embeds = torch.from_numpy(next(iter(outputs.values()))[0])
        logits = (self._text @ embeds.T).reshape(1, len(self._text), *self._grid)
        labels: np.ndarray = F.interpolate(logits, frame.shape[:2], **settings).argmax(1).numpy()
        return labels


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print figures beside what they should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sides", nargs="+", type=int, help="default: each model's own")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--quick", action="store_true", help="small networks, one round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    report: dict[str, Any] = {"machine": precision.machine_and_commit(), "threads": args.threads}
    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            report |= {part: PARTS[part](args, Path(folder))}
    if args.json:
        args.json.write_text(json.dumps(report | {"load": os.getloadavg()}, indent=2) + "\n")
    return 0


def frames(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Milliseconds of a frame, by the engine and by OpenVINO and torch, in turns."""
    rows: list[dict[str, Any]] = [
        {"name": name, "run": run, "ms": []} for name, run in _candidates(args, folder).items()
    ]
    frame = random_inputs(8, 1)[0]
    for round_ in range(1 if args.quick else args.rounds + 2):
        for row in rows:
            watch = Stopwatch()
            row["run"](frame)
            if round_ >= 2 or args.quick:  # the first two warm up
                row["ms"].append(1e3 * watch.seconds)
    report = [
        {"name": row["name"], "median_ms": float(np.median(row["ms"])), "least_ms": min(row["ms"])}
        for row in rows
    ]
    times = {row["name"]: row["median_ms"] for row in report}
    for line in report:
        name = line["name"]
        rival = times.get(f"{name}{RIVAL}")
        print(
            f"{name:34} {line['median_ms']:8.1f} ms (least {line['least_ms']:.1f}), "
            f"1/{report[0]['median_ms'] / line['median_ms']:.1f} of {report[0]['name']}"
            + (f"; {rival / times[name]:.2f} times faster than{RIVAL[1:]}" if rival else "")
        )
    print("goals: tinyclip_8m 336 at most 1/18 of vit_b16 512, and 1.3 times faster than its rival")
    return report


def precisions(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Frames per second of TinyCLIP-8M at 336 in every precision that this CPU has."""
    rows = list(table_case("tinyclip_8m", (336,))(args, folder))
    for row in rows:
        rates = ", ".join(f"{name} {1e3 / ms:.1f}" for name, ms in row["ms"].items() if ms)
        print(f"tinyclip_8m {row['side']}: frames per second: {rates}")
    print("goal: at least 25 with bfloat16 or INT8")
    return rows


def exports(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Seconds and memory of exports from whole files, each in a process of its own."""
    rows = []
    for name in args.only:
        shape = replace(SHAPES[name], **QUICK) if args.quick else SHAPES[name]
        file = random_file(shape, folder, whole=not args.quick)
        side = 128 if args.quick else SIDES[name][-1]
        settings = (str(file), shape.head, str(side), shape.activation)
        command = [sys.executable, str(Path(__file__).with_name("export_once.py")), *settings]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        row = {"name": name, "side": side, **json.loads(result.stdout.splitlines()[-1])}
        width = 4 // np.dtype(shape.dtype).itemsize
        row["weights_mb"] = width * file.stat().st_size / 1e6  # in memory they are float32
        most = 1000 if name == "siglip2_b16" else 3 * row["weights_mb"]
        print(
            f"{name:14} exported at {side} in {row['seconds']:.1f} s (CPU {row['cpu_seconds']:.1f};"
            f" goal {shape.seconds:g}), {row['peak_mb']:.0f} MB (goal {most:.0f})"
        )
        rows.append(row)
    return rows


PARTS = {"frames": frames, "precisions": precisions, "exports": exports}


def _candidates(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[Any], Any]]:
    """ViT-B/16 at 512 first, then each model and size, by the engine and by OpenVINO and torch."""
    os.environ["ZSSEG_HOME"] = str(folder / "cache")
    callables: dict[str, Callable[[Any], Any]] = {}
    for name in dict.fromkeys(["vit_b16", *args.only]):
        shape = replace(SHAPES[name], **QUICK) if args.quick else SHAPES[name]
        asked = SIDES[name] if args.sides is None or name == "vit_b16" else args.sides
        for side in (128,) if args.quick else asked:
            place = folder / f"{name}{side}"
            place.mkdir()
            bundle = write_bundle(shape, side, place)
            engine = Engine(
                bundle,
                EngineConfig(
                    device="cpu", backend="openvino", precision="float32",
                    num_threads=args.threads, use_cache=False,
                ),
            )  # fmt: skip
            engine.set_classes(class_names(CLASSES))
            callables[f"{name} {side}"] = engine.segment
            text = random_inputs(shape.joint, CLASSES)[1]
            rival = OpenVinoAndTorch(bundle, text, args.threads)
            callables[f"{name} {side}{RIVAL}"] = rival
    return callables


if __name__ == "__main__":
    sys.exit(main())
