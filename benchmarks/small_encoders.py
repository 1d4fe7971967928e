"""Small encoders beside ViT-B/16 at 512, and beside OpenVINO with labels made in torch.

    python benchmarks/small_encoders.py --json FILE                # about 5 minutes
    python benchmarks/small_encoders.py --only tinyclip_8m --sides 336
    python benchmarks/small_encoders.py --quick                    # small networks: it runs

Weights are random, in the models' shapes; bundles are written from files, without torch. A frame
has 640x480 pixels, 20 classes, the whole frame in one window, float32 on two threads. In every
round each candidate labels the same frame once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
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
QUICK: dict[str, Any] = {"width": 64, "blocks": 12, "side": 96}


@dataclass(frozen=True)
class Shape:
    """A model's image tower; its text tower, which no frame meets, is one narrow block.

    Attributes:
        width: Channels.
        blocks: Residual blocks.
        head: The dense head.
        side: Pixels that the positions are stored for.
        activation: The MLPs'.
        kind: ``"clip"``, ``"pe"`` or ``"siglip"``.
    """

    width: int
    blocks: int
    head: str = "naclip"
    side: int = 224
    activation: str = "gelu"
    kind: str = "clip"

    @property
    def joint(self) -> int:
        """Width of the joint space."""
        return self.width if self.kind == "siglip" else 512


SHAPES = {
    "vit_b16": Shape(768, 12, activation="quick_gelu"),
    "tinyclip_8m": Shape(256, 10),
    "tinyclip_39m": Shape(512, 12, "sfp"),
    "pe_core_t16": Shape(192, 12, "value_mlp", 384, kind="pe"),
    "pe_core_s16": Shape(384, 12, "value_mlp", 384, kind="pe"),
    "siglip2_b16": Shape(768, 12, "value_mlp", 256, "gelu_tanh", "siglip"),
}
SIDES = {
    "vit_b16": (512,), "tinyclip_8m": (224, 336, 448), "tinyclip_39m": (224, 336, 448),
    "pe_core_t16": (384,), "pe_core_s16": (384,), "siglip2_b16": (256,),
}  # fmt: skip


def random_file(shape: Shape, folder: Path) -> Path:
    """Weights of this shape under CLIP's names, as a ``.safetensors`` file."""
    generator, made = np.random.default_rng(0), dict[str, Any]()
    width, cells = shape.width, (shape.side // 16) ** 2

    def add(name: str, *sizes: int) -> None:
        numbers = generator.standard_normal(sizes, np.float32)
        scale = np.sqrt(np.prod(sizes[1:])) if len(sizes) > 1 else 10
        made[name] = numbers / np.float32(scale) + np.float32("ln" in name and "weight" in name)

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
    text = width if shape.kind == "siglip" else 64
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
    blocks("", text, 1)
    lengths = {"clip": 77, "pe": 32, "siglip": 64}
    add("positional_embedding", lengths[shape.kind], text)
    add("token_embedding.weight", 260 if shape.kind == "siglip" else 49408, text)
    path = folder / "weights.safetensors"
    save_file({name: np.ascontiguousarray(value, np.float32) for name, value in made.items()}, path)
    vocab = {f"<0x{code:02X}>": code for code in range(256)}
    vocab |= {name: 256 + place for place, name in enumerate(("<unk>", "a", "b", "c"))}
    model = {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
    return path


def write_bundle(shape: Shape, side: int, folder: Path) -> Path:
    """A bundle of random weights at an input size, with 20 classes in its bank."""
    names = class_names(CLASSES)
    settings = DenseHead(head=shape.head, size_hw=(side, side), activation=shape.activation)
    return export_clip_file(
        random_file(shape, folder), folder / f"random{side}.zsseg", settings,
        precisions=("float32",), verify=False, overwrite=True, templates=["{}"],
        text_bank=(names, random_inputs(shape.joint, CLASSES)[1]),
    )  # fmt: skip


def table_case(name: str) -> Callable[[argparse.Namespace, Path], Iterable[dict[str, Any]]]:
    """Rows of ``models_table.py``: every precision of this CPU, INT8 by ``quantize``."""

    def case(args: argparse.Namespace, folder: Path) -> Iterable[dict[str, Any]]:
        photos = folder / "noise"
        photos.mkdir()
        for index in range(precision.PICTURES):
            small = np.random.default_rng(index).integers(0, 256, (12, 16, 3)).astype(np.uint8)
            cv2.imwrite(str(photos / f"{index}.png"), cv2.resize(small, (640, 480)))
        shape = replace(SHAPES[name], **QUICK) if args.quick else SHAPES[name]
        names = class_names(CLASSES)
        for side in (128,) if args.quick else SIDES[name]:
            bundle = write_bundle(shape, side, folder)
            row, made = precision.quantised(bundle, photos, names, ("int8",), precision.ANY)
            yield {"side": side, **row, **precision.compared(made, photos, names, args)}

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
        made = self._request.infer({0: image.numpy()})
        embeds = torch.from_numpy(next(iter(made.values()))[0])
        logits = (self._text @ embeds.T).reshape(1, len(self._text), *self._grid)
        labels: np.ndarray = F.interpolate(logits, frame.shape[:2], **settings).argmax(1).numpy()
        return labels


def main(arguments: list[str] | None = None) -> int:
    """Measure and print one row for each candidate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sides", nargs="+", type=int, help="default: each model's own")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--quick", action="store_true", help="small networks, one round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, run in _candidates(args, Path(folder)).items():
            rows.append({"name": name, "run": run, "ms": []})
        frame = random_inputs(8, 1)[0]
        for round_ in range(1 if args.quick else args.rounds + 2):
            for row in rows:
                watch = Stopwatch()
                row["run"](frame)
                ms = 1e3 * watch.seconds
                if round_ >= 2 or args.quick:  # the first two warm up
                    row["ms"].append(ms)
    report = [
        {"name": row["name"], "median_ms": float(np.median(row["ms"])), "least_ms": min(row["ms"])}
        for row in rows
    ]
    for line in report:
        share = report[0]["median_ms"] / line["median_ms"]
        print(
            f"{line['name']:34} {line['median_ms']:8.1f} ms (least {line['least_ms']:.1f}), "
            f"1/{share:.1f} of {report[0]['name']}"
        )
    if args.json:
        whole: Mapping[str, Any] = {
            "machine": precision.machine_and_commit(), "threads": args.threads,
            "load": os.getloadavg(), "rows": report,
        }  # fmt: skip
        args.json.write_text(json.dumps(whole, indent=2) + "\n")
    return 0


def _candidates(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[Any], Any]]:
    """ViT-B/16 at 512 first, then each model and size, by the engine and by OpenVINO and torch."""
    os.environ["ZSSEG_HOME"] = str(folder / "cache")
    made: dict[str, Callable[[Any], Any]] = {}
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
            made[f"{name} {side}"] = engine.segment
            text = random_inputs(shape.joint, CLASSES)[1]
            rival = OpenVinoAndTorch(bundle, text, args.threads)
            made[f"{name} {side}, OpenVINO and torch"] = rival
    return made


if __name__ == "__main__":
    sys.exit(main())
