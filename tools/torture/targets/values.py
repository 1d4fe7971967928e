"""What programs pass in memory: names, embeddings and the arrays of every operation."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tools.torture.damage import odd_array, odd_layout, odd_text, odd_value
from tools.torture.target import BUNDLES, Attempt, target
from tools.torture.targets.bundles import CONFIG
from zsseg_rt import Bundle, Engine, ops

WORDS = ("red ball", "blue sky", "green grass", "yellow wall", "grey floor")


@target("names", "class names, synonyms, backgrounds and templates, with a text encoder", weight=2)
def _names(_: Path) -> Attempt:
    engine = Engine(Bundle.demo("scenes"), CONFIG)
    frame = np.zeros((16, 16, 3), np.uint8)

    def attempt(draw: random.Random) -> None:
        settings: dict[str, Any] = {}
        if draw.random() < 0.3:
            settings["background"] = draw.choice(("auto", ["sky"], odd_value(draw), odd_text(draw)))
        if draw.random() < 0.2:
            settings["templates"] = draw.choice((["a {}"], [odd_text(draw)], odd_value(draw)))
        engine.set_classes(_odd_classes(draw), **settings)
        if draw.random() < 0.1:
            engine.segment(frame).present()

    return attempt


def _odd_classes(draw: random.Random) -> Any:
    kind = draw.randrange(6)
    if kind == 0:
        return odd_value(draw)
    if kind == 1:
        return odd_text(draw)
    names: list[Any] = [draw.choice(WORDS) for _ in range(draw.randrange(1, 4))]
    for _ in range(draw.randrange(1, 3)):
        near = f"{draw.choice(WORDS)} {odd_text(draw)[:20]}"
        odd = draw.choice((near, near, [near], odd_text(draw), odd_value(draw), [], [["a"]], b"a"))
        names.insert(draw.randrange(len(names) + 1), odd)
    if kind == 2:
        return {str(name): [odd_text(draw)] for name in names}
    return tuple(names) if kind == 3 else names


@target("embeddings", "embeddings that are given with the names")
def _embeddings(_: Path) -> Attempt:
    engines = [Engine(BUNDLES / f"{f}.zsseg", CONFIG) for f in ("dense", "descriptor", "proposals")]
    frame = np.zeros((16, 16, 3), np.uint8)

    def attempt(draw: random.Random) -> None:
        engine = draw.choice(engines)
        width, count = engine.bundle.text.embed_dim, draw.choice((0, 1, 2, 5, 300))
        rows: Any = np.random.default_rng(draw.getrandbits(32)).standard_normal((count, width))
        rows = rows.astype(np.float32)
        kind = draw.randrange(4)
        if kind == 0:
            rows = odd_array(draw)
        elif kind == 1 and rows.size:
            rows.flat[draw.randrange(rows.size)] = draw.choice((np.nan, np.inf, 1e38, 1e-38))
        elif kind == 2:
            rows = odd_value(draw)
        names = [f"name {i}" for i in range(max(1, count + draw.choice((0, 0, 0, 1, -1))))]
        engine.set_classes(names, embeddings=odd_layout(rows, draw) if kind == 3 else rows)
        engine.segment(frame)

    return attempt


def _floats(draw: random.Random, *shape: int) -> Any:
    return np.random.default_rng(draw.getrandbits(32)).standard_normal(shape).astype(np.float32)


def _bytes(draw: random.Random, *shape: int) -> Any:
    return np.random.default_rng(draw.getrandbits(32)).integers(0, 256, shape, np.uint8)


def _side(draw: random.Random) -> int:
    return draw.choice((1, 2, 3, 5, 8, 17, 33))


def _sides(draw: random.Random) -> tuple[int, int]:
    return _side(draw), _side(draw)


# A sound call of each operation: positional arguments and settings, without `out`.
_Call = tuple[list[Any], dict[str, Any]]


def _preprocess(d: random.Random) -> _Call:
    return [_bytes(d, *_sides(d), 3)], {"size_hw": _sides(d), "mean": [0.5] * 3, "std": [0.2] * 3}


def _descriptor(d: random.Random) -> _Call:
    classes, width, out = d.choice((1, 3, 70)), d.choice((4, 64)), d.choice((5, 64))
    arrays = [_floats(d, 2, width), _floats(d, classes, width), _floats(d, out, 2 * width)]
    return [*arrays, _floats(d, out)], {}


def _descriptor_text(d: random.Random) -> _Call:
    return [_floats(d, 3, 8), _floats(d, 5, 16), _floats(d, 5)], {}


def _similarity(d: random.Random) -> _Call:
    width = d.choice((1, 8, 67))
    settings = {"logit_scale": d.choice((1.0, 100.0)), "normalize": d.random() < 0.5}
    return [
        _floats(d, 1, d.choice((1, 9, 64)), width),
        _floats(d, d.choice((1, 5, 90)), width),
    ], settings


def _upsample(d: random.Random) -> _Call:
    classes = d.choice((1, 2, 20, 300))
    settings = {
        "activation": d.choice(("none", "sigmoid", "softmax")),
        "with_scores": d.random() < 0.5,
    }
    return [_floats(d, 1, classes, *_sides(d)), (_side(d) * 3, _side(d) * 3)], settings


def _warp(d: random.Random) -> _Call:
    height, width = _sides(d)
    logits = [_floats(d, 1, 4, height, width) for _ in range(2)]
    return [
        *logits,
        _floats(d, 1, height, width, 2),
        np.full((1, height, width), 0.5, np.float32),
    ], {}


def _overlay(d: random.Random) -> _Call:
    height, width = _sides(d)
    return [_bytes(d, height, width, 3), _bytes(d, height, width), _bytes(d, 256, 3)], {
        "alpha": 0.5
    }


def _ink(d: random.Random) -> _Call:
    place = d.choice((0, 3, -40)), d.choice((0, -2, 1 << 62))
    arrays = [_bytes(d, *_sides(d), 3), _bytes(d, 2, *_sides(d))]
    return [*arrays, place, [(0, 0, 0), (255, 9, 1)]], {}


def _windows(d: random.Random) -> _Call:
    height, width = _sides(d)
    places = [(d.choice((0, 1, 32766)), d.choice((0, 3, 40000))) for _ in range(2)]
    return [_floats(d, 2, 5, height, width), _floats(d, *_sides(d)), places], {}


def _finite(d: random.Random) -> _Call:
    return [_floats(d, *_sides(d))], {}


def _count(d: random.Random) -> _Call:
    return [_bytes(d, *_sides(d)), d.choice((0, 1, 254, 65534))], {}


def _boxes(d: random.Random) -> _Call:
    return [_floats(d, 3, *_sides(d)), _sides(d)], {}


def _crops(d: random.Random) -> _Call:
    logits, canvas = _floats(d, 3, *_sides(d)), (32, 32)
    boxes = np.array([[0, 0, 32, 32], [3, 5, 9, 30]], np.int32)
    return [_floats(d, 3, *canvas), logits, np.arange(2, dtype=np.int32), boxes], {"side": 8}


def _label_regions(d: random.Random) -> _Call:
    return [_floats(d, 3, *_sides(d)), _floats(d, 4, 3)], {
        "canvas_hw": (32, 32),
        "out_hw": _sides(d),
    }


CALLS: dict[str, Callable[[random.Random], _Call]] = {
    "preprocess": _preprocess,
    "relationship_descriptor": _descriptor,
    "relationship_descriptor_text": _descriptor_text,
    "patch_text_similarity": _similarity,
    "upsample_argmax": _upsample,
    "warp_blend": _warp,
    "merge_windows": _windows,
    "overlay": _overlay,
    "ink": _ink,
    "all_finite": _finite,
    "count_labels": _count,
    "mask_boxes": _boxes,
    "crop_regions": _crops,
    "label_regions": _label_regions,
}


@target("ops", "every operation on every instruction set: odd arrays, settings and `out`", weight=4)
def _ops(_: Path) -> Attempt:
    isas = ops.available_cpu_isas()

    def attempt(draw: random.Random) -> None:
        ops.set_cpu_isa(draw.choice(isas))
        _call_oddly(draw, lambda values: values)

    return attempt


@target("ops-sanitized", "the same in a build that watches memory and undefined behaviour",
        group="sanitized", weight=2)  # fmt: skip
def _ops_sanitized(folder: Path) -> Attempt:
    return _ops(folder)


@target("ops-cuda", "the same in the CUDA kernels, on an emulated GPU", group="emulated", weight=2)
def _ops_cuda(_: Path) -> Attempt:
    def attempt(draw: random.Random) -> None:
        _call_oddly(draw, on_gpu)

    return attempt


def on_gpu(value: Any) -> Any:
    """A device array of what the GPU holds; regions and boxes (int32) stay in host memory."""
    if (
        not isinstance(value, np.ndarray)
        or value.dtype.kind not in "uf"
        or not value.dtype.isnative
    ):
        return value
    return ops.DeviceArray.from_numpy(np.ascontiguousarray(value))


def _call_oddly(draw: random.Random, place: Callable[[Any], Any]) -> None:
    name = draw.choice(list(CALLS))
    arguments, settings = CALLS[name](draw)
    for _ in range(draw.choice((0, 1, 1, 2))):
        index = draw.randrange(len(arguments))
        arguments[index] = _odd_argument(arguments[index], draw)
    if draw.random() < 0.3:
        output = [] if name in ("label_regions", "ink") else ["out"]
        settings[draw.choice([*settings, *output, "stream"])] = _odd_argument(None, draw)
    getattr(ops, name)(*(place(value) for value in arguments), **settings)


def _odd_argument(sound: Any, draw: random.Random) -> Any:
    kind = draw.randrange(5)
    if kind == 0:
        return odd_value(draw)
    if not isinstance(sound, np.ndarray) or kind == 1:
        return odd_array(draw)
    if kind == 2:
        return odd_layout(sound, draw)
    if kind == 3 and sound.ndim:  # one side differs from what the others say
        axis = draw.randrange(sound.ndim)
        return np.ascontiguousarray(np.concatenate([sound, sound], axis))
    if sound.dtype.kind == "f" and sound.size:
        spoilt = sound.copy()
        spoilt.flat[draw.randrange(sound.size)] = draw.choice(
            (np.nan, np.inf, -np.inf, 1e38, -1e38)
        )
        return spoilt
    return odd_array(draw, sound.shape)
