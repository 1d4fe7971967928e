"""The ladder of precisions: what a frame takes in each, and what the labels lose.

    python benchmarks/precision.py --json FILE [--only zegclip clip_rc dense_clip scenes photos
        camvid] [--sizes 512 448 384 336] [--rounds 7] [--camvid-bundle NAME.zsseg]
    python benchmarks/precision.py --quick              # small models, to see that everything runs

ViT-B/16 with random weights at several input sizes, a 640x480 frame, 20 classes: engines of all
precisions take turns; medians of their rounds. "Same" is the share of cells with float32's label,
among those where it is clear by the rule of ``zsseg-rt quantize``; random weights say nothing about
accuracy, and their logits are multiplied by ten so that labels are clear. INT8 is quantised for
every size, FP8, which no CPU computes, for the largest, by its own report. Networks that ship or
lie in --data are compared on masks, behind the usual gate; the head for street photos is what
``benchmarks/camvid.py --seeds 1 --out NAME.zsseg`` keeps. The JSON file is written after every
case.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import camvid
import cv2
import numpy as np
import real_photos
from engine import class_names, machine_and_commit, random_inputs

from zsseg_rt import Bundle, Engine, EngineConfig, PrecisionNotApplied
from zsseg_rt.evaluation.datasets import create_dataset
from zsseg_rt.evaluation.evaluate import EngineSegmenter, evaluate
from zsseg_rt.export import export_bundle
from zsseg_rt.export.quantized.bundle import CLEAR, QuantizeSettings, quantize_bundle
from zsseg_rt.models import from_official
from zsseg_rt.profiling.turns import take_turns_locally
from zsseg_rt.profiling.worker import Stopwatch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python_tests")]
from support import tiny  # noqa: E402
from tools.scenes import SceneDataset  # noqa: E402

PRECISIONS = ("float32", "bfloat16", "float16", "int8")
SIZES, QUICK_SIZES = (512, 448, 384, 336), (64,)
CLASSES, PICTURES, SCENES, SHARPER = 20, 8, 300, 10.0
ENCODER = "encoders/deeplabv3_mnv2_voc_clipspace"
GATED = QuantizeSettings(overwrite=True)
ANY = dataclasses.replace(GATED, min_agreement=1e-9)


def main(arguments: list[str] | None = None) -> int:
    """Parse arguments, measure, keep and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="multiples of 16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--camvid-bundle", type=Path, help="what camvid.py --out kept")
    parser.add_argument("--quick", action="store_true", help="small models and few pictures")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    watch, rows = Stopwatch(), []
    report: dict[str, Any] = {
        "machine": machine_and_commit(),
        "threads": args.threads,
        "rows": rows,
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ZSSEG_HOME"] = str(Path(folder) / "cache")
        for name in args.only:
            for row in CASES[name](args, Path(folder)):
                rows.append({"case": name, **row})
                report |= {"load": os.getloadavg(), "seconds": watch.seconds}
                print(json.dumps(rows[-1]))
                if args.json:
                    args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def sizes_of(quick: bool) -> tiny.TinySizes:
    """A small network's sizes, or those of ViT-B/16."""
    if quick:
        return tiny.TinySizes(num_layers=12)  # SFP needs eleven before its own
    return tiny.TinySizes(
        width=768, num_heads=12, num_layers=12, grid_side=32, embed_dim=512, num_prompts=10,
        num_cells=16, decoder_heads=8, num_classes=CLASSES, seen=tuple(range(15)),
    )  # fmt: skip


def sharper(build: Callable[[tiny.TinySizes], Any], last: str, sizes: tiny.TinySizes) -> Any:
    """A random model whose logits are larger: ``last`` names weights that they are linear in."""
    model = build(sizes)
    weights = [
        weight.data.mul_(SHARPER) for name, weight in model.named_parameters() if last in name
    ]
    assert len(weights) == 2
    return model


def dense_clip(sizes: tiny.TinySizes, head: str = "naclip") -> Any:
    """Plain CLIP with the last block of NACLIP, or of another head."""
    weights = tiny.clip_state_dict(sizes)
    visual = {k.removeprefix("visual."): v for k, v in weights.items() if k.startswith("visual.")}
    return from_official(
        "dense_clip", visual, head=head, num_heads=sizes.num_heads, logit_scale=SHARPER
    )


def random_case(
    build: Callable[[tiny.TinySizes], Any],
    args: argparse.Namespace,
    folder: Path,
    largest: Sequence[str] = ("int8", "fp8"),
) -> Iterator[dict[str, Any]]:
    """A row for every input size; the largest is quantised to ``largest``."""
    model, photos = build(sizes_of(args.quick)), folder / "noise"
    photos.mkdir(exist_ok=True)
    for index in range(PICTURES):
        small = np.random.default_rng(index).integers(0, 256, (12, 16, 3)).astype(np.uint8)
        cv2.imwrite(str(photos / f"{index}.png"), cv2.resize(small, (640, 480)))
    sides = QUICK_SIZES if args.quick else args.sizes
    for side in sides:
        bundle, names = folder / "random.zsseg", class_names(CLASSES)
        dim = sizes_of(args.quick).embed_dim
        export_bundle(
            model, bundle, text_encoder=None, size_hw=(side, side),
            text_bank=(names, random_inputs(dim, CLASSES)[1]), precisions=("float32",),
            verify=False, overwrite=True,
        )  # fmt: skip
        kinds = largest if side == max(sides) else ("int8",)
        row, smaller = quantised(bundle, photos, names, kinds, ANY)
        yield {"side": side, **row, **compared(smaller, photos, names, args)}


def quantised(
    bundle: Path,
    photos: Path,
    names: list[Any],
    kinds: Sequence[str] = ("int8", "fp8"),
    settings: QuantizeSettings = GATED,
    dataset: Any = None,
) -> tuple[dict[str, Any], Path]:
    """Add graphs in INT8, and see what FP8 would lose.

    Returns:
        Groups of layers in 8 bits, agreement; and the bundle, which has no INT8 if its gate fails.
    """
    row, written = dict[str, Any](gate={}, layers={}), bundle
    for kind in kinds:
        out = bundle.with_name(f"{bundle.stem}-{kind}.zsseg")
        asked = dataclasses.replace(settings, precision=kind)
        smaller = quantize_bundle(Bundle.load(bundle), out, photos, names, asked, dataset=dataset)
        groups = [one for layers in smaller.spec.layers.values() for one in layers.values()]
        row["layers"][kind] = [groups.count(kind), len(groups)]
        row["gate"][kind] = smaller.spec.agreement
        if kind == "int8" and smaller.path is not None:
            written = out
    return row, written


def engines_of(bundle: Path, threads: int) -> dict[str, Engine]:
    """An engine for each precision that this CPU has."""
    engines = {}
    for precision in PRECISIONS:
        config = EngineConfig(
            device="cpu", backend="openvino", precision=precision, num_threads=threads,
            with_class_scores="low", use_cache=False,
        )  # fmt: skip
        try:
            engines[precision] = Engine(bundle, config)
        except PrecisionNotApplied as exc:
            print(exc, file=sys.stderr)
    return engines


def compared(
    bundle: Path, photos: Path, names: list[Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds of every precision, and how it labels the pictures."""
    engines = engines_of(bundle, args.threads)
    for engine in engines.values():
        engine.set_classes(names)
    images = [real_photos.read_photo(path) for path in sorted(photos.iterdir())[:4]]
    scores = {
        name: [engine.segment(image).class_scores for image in images]
        for name, engine in engines.items()
    }
    calls = {name: functools.partial(engine.segment, images[0]) for name, engine in engines.items()}
    taken = take_turns_locally(calls, rounds=1 if args.quick else args.rounds)
    for engine in engines.values():
        engine.close()
    same = {
        name: same_labels(scores["float32"], precision_scores)
        for name, precision_scores in scores.items()
    }
    return {"ms": {name: taken.median_ms(name) for name in engines}, "same": same}


def same_labels(expected: list[Any], actual: list[Any]) -> float | None:
    """Share of cells with the expected best class, where that is clear."""
    first, second = np.stack(expected), np.stack(actual)
    ranked = np.sort(first, axis=1)
    clear = ranked[:, -1] - ranked[:, -2] > CLEAR * np.abs(ranked[:, -1])
    equal = first.argmax(axis=1) == second.argmax(axis=1)
    return float(equal[clear].mean()) if clear.any() else None


def scenes_case(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The ZegCLIP that ships, on drawn scenes with nine unseen classes."""
    photos = folder / "scenes"
    photos.mkdir()
    count, length = (PICTURES, 8) if args.quick else (32, SCENES)
    drawn = SceneDataset("train")
    held_out = SceneDataset("val", length=length)
    for index in range(count):
        cv2.imwrite(str(photos / f"{index}.png"), drawn[index].image[..., ::-1])
    names = list(drawn.class_names)
    demo = folder / "scenes.zsseg"
    demo.symlink_to(Bundle.demo("scenes").path)
    row, bundle = quantised(demo, photos, names, dataset=held_out)
    row |= {"side": 128} | compared(bundle, photos, names, args)
    yield row | with_masks(bundle, names, held_out, args.threads)


def camvid_case(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The head that learnt eight classes of street photos, on frames with three more."""
    frames = args.data / "camvid"
    if args.camvid_bundle is None or not frames.exists():
        print("camvid: left out, needs --camvid-bundle and its frames in --data", file=sys.stderr)
        return
    held_out = create_dataset("camvid", frames, "val", unseen=camvid.UNSEEN)
    names, photos = [camvid.WORDS[name] for name in held_out.class_names], folder / "frames"
    photos.mkdir()
    for frame in sorted((frames / "train").iterdir())[::6]:
        (photos / frame.name).symlink_to(frame.resolve())
    plain = folder / "camvid.zsseg"
    plain.symlink_to(args.camvid_bundle.resolve())
    row, bundle = quantised(plain, photos, names, dataset=held_out)
    row |= {"side": camvid.SIDE} | compared(bundle, photos, names, args)
    yield row | with_masks(bundle, names, held_out, args.threads)


def with_masks(bundle: Path, names: list[Any], held_out: Any, threads: int) -> dict[str, Any]:
    """The figures of every precision: mIoU of all classes, of seen and of unseen ones."""
    by_precision = {}
    for precision, engine in engines_of(bundle, threads).items():
        scores = evaluate(EngineSegmenter(engine, names), held_out).scores.as_reported()
        by_precision[precision] = scores
        engine.close()
    groups = {"miou": "mIoU", "seen": "mIoU(S)", "unseen": "mIoU(U)"}
    return {
        key: {precision: scores[group] for precision, scores in by_precision.items()}
        for key, group in groups.items()
    }


def photos_case(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A DeepLab in CLIP's space on real photos; three quarters of them also set the ranges."""
    stem, photos = args.data / ENCODER, args.data / "tinycoco"
    if not photos.exists():
        print(f"photos: left out, no {photos}", file=sys.stderr)
        return
    encoder, rows, words = (
        stem.with_name(stem.name + end)
        for end in (".onnx", "_train_text_rows.npy", "_classes.json")
    )
    plain = real_photos.export(encoder, rows, words, folder / "voc.zsseg")
    bank = Bundle.load(plain).text_bank
    assert bank is not None
    names = list(bank.names)
    row, bundle = quantised(plain, photos / "images", names)
    row |= {"side": 513} | compared(bundle, photos / "images", names, args)
    row["miou"] = {}
    for precision in row["ms"]:
        figures = real_photos.evaluate(bundle, photos, precision=precision)
        row["miou"][precision] = 100 * figures["miou_classes_in_truth"]
    yield row


zegclip = functools.partial(sharper, tiny.zegclip_model, "layers.2.multihead_attn.q.")
clip_rc = functools.partial(sharper, tiny.clip_rc_model, "decoder_q.layers.2.norm3.")
CASES: Mapping[str, Callable[[argparse.Namespace, Path], Iterator[dict[str, Any]]]] = {
    "zegclip": functools.partial(random_case, zegclip),
    "clip_rc": functools.partial(random_case, clip_rc),
    "dense_clip": functools.partial(random_case, dense_clip),
    "scenes": scenes_case,
    "photos": photos_case,
    "camvid": camvid_case,
}
if __name__ == "__main__":
    sys.exit(main())
