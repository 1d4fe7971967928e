"""Values that programs pass in memory: names, embeddings and the arrays of every operation."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tools.torture.damage import odd_array, odd_layout, odd_text, odd_value
from tools.torture.target import BUNDLES, Attempt, target, test_support
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


_CASES = test_support("operation_cases")
OPERATIONS = tuple(_CASES.MAKERS)


def sound_call(name: str, draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call that an operation's contract test would make: its arrays, and its settings."""
    case = _CASES.MAKERS[name](_CASES.Draw(draw.choice))
    halves = {key for key, dtype in case.dtypes.items() if dtype == "float16"}
    arrays = {
        key: array.astype(np.float16) if key in halves else array
        for key, array in case.arrays.items()
    }
    return arrays, case.settings


@target("ops", "every operation on every instruction set: odd arrays, settings and `out`", weight=4)
def _ops(_: Path) -> Attempt:
    isas = ops.available_cpu_isas()

    def attempt(draw: random.Random) -> None:
        ops.set_cpu_isa(draw.choice(isas))
        _call_oddly(draw, lambda _, value: value)

    return attempt


@target("ops-sanitized", "the same in a build that watches memory and undefined behaviour",
        group="sanitized", weight=2)  # fmt: skip
def _ops_sanitized(folder: Path) -> Attempt:
    return _ops(folder)


@target("ops-cuda", "the same in the CUDA kernels, on an emulated GPU", group="emulated", weight=2)
def _ops_cuda(_: Path) -> Attempt:
    return lambda draw: _call_oddly(draw, on_gpu)


def on_gpu(name: str, value: Any) -> Any:
    """A device array of what the GPU holds; regions and their boxes stay in host memory."""
    if isinstance(value, tuple):
        return tuple(on_gpu(name, plane) for plane in value)
    if not isinstance(value, np.ndarray) or name in ("regions", "boxes"):
        return value
    if not value.dtype.isnative or (value.dtype.kind not in "ufb" and value.dtype != np.int32):
        return value
    return ops.DeviceArray.from_numpy(np.ascontiguousarray(value))


def _call_oddly(draw: random.Random, place: Callable[[str, Any], Any]) -> None:
    name = draw.choice(OPERATIONS)
    arrays, settings = sound_call(name, draw)
    for _ in range(draw.choice((0, 1, 1, 2))):
        key = draw.choice(list(arrays))
        arrays[key] = _odd_argument(arrays[key], draw)
    if draw.random() < 0.3:
        output = [] if name in ("label_regions", "ink") else ["out"]
        settings[draw.choice([*settings, *output, "stream"])] = _odd_argument(None, draw)
    arguments = {**arrays, **settings}
    getattr(ops, name)(**{key: place(key, value) for key, value in arguments.items()})


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
