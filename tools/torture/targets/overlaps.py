"""Arrays of one memory: an operation that would write where it reads refuses, or is right."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from tools.torture.target import Attempt, target
from tools.torture.targets.values import OPERATIONS, on_gpu, sound_call
from zsseg_rt import ops

_PAIRED = ("upsample_argmax", "label_regions")
_NAMES = [name for name in OPERATIONS if name != "upsample_argmax_overlay"]


@target("overlaps", "arrays that share memory with what an operation writes", weight=2)
def _overlaps(_: Path) -> Attempt:
    isas = ops.available_cpu_isas()

    def attempt(draw: random.Random) -> None:
        ops.set_cpu_isa(draw.choice(isas))
        _try(draw, gpu=False)

    return attempt


@target("overlaps-cuda", "the same on an emulated GPU", group="emulated")
def _overlaps_cuda(_: Path) -> Attempt:
    return lambda draw: _try(draw, gpu=True)


def _try(draw: random.Random, *, gpu: bool) -> None:
    name = draw.choice(_NAMES)
    arrays, settings = sound_call(name, draw)
    if name == "ink":
        _try_ink(**arrays, **settings, draw=draw)
        return
    sound = getattr(ops, name)(**arrays, **settings)
    written = [a for a in (sound if name in _PAIRED else (sound,)) if a is not None]
    movable = [key for key, a in arrays.items() if isinstance(a, np.ndarray) and a.nbytes]
    movable = [key for key in movable if not gpu or key not in ("regions", "boxes")]
    if not movable:
        return
    moved, result = arrays[draw.choice(movable)], draw.choice(written)
    memory, begin, start = _places(moved, result, draw)
    whole, part = (ops.DeviceArray.from_numpy(memory), _Part) if gpu else (memory, _slice)
    place = on_gpu if gpu else lambda _, array: array
    inputs = {key: part(whole, start, a) if a is moved else place(key, a)
              for key, a in arrays.items()}  # fmt: skip
    outs = [
        part(whole, begin, a) if a is result else place("out", np.zeros_like(a)) for a in written
    ]
    out = (*outs, None)[:2] if name in _PAIRED else outs[0]
    getattr(ops, name)(**inputs, **settings, out=out)
    for mine, wanted in zip(outs, written, strict=True):
        if not gpu and not np.array_equal(mine, wanted, equal_nan=mine.dtype.kind == "f"):
            raise AssertionError(f"{name} accepted an overlap and gave another result")


def _try_ink(picture: Any, weights: Any, draw: random.Random, **settings: Any) -> None:
    """It writes on its first argument."""
    if not weights.nbytes:
        return
    memory, begin, start = _places(weights, picture, draw)
    inputs = _slice(memory, begin, picture), _slice(memory, start, weights)
    inputs[0][...] = picture
    wanted = ops.ink(inputs[0].copy(), inputs[1].copy(), **settings)
    if not np.array_equal(ops.ink(*inputs, **settings), wanted):
        raise AssertionError("ink accepted an overlap and gave another result")


def _places(moved: Any, result: Any, draw: random.Random) -> tuple[Any, int, int]:
    """Memory for both that holds the first, where the result begins in it, and where the first."""
    begin, past = (-(-array.nbytes // 64) * 64 for array in (moved, result))
    size = begin + past + moved.nbytes
    memory = np.zeros(size + 64, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :][:size]
    start = begin + draw.randrange(-moved.nbytes, result.nbytes + 1)
    start = draw.choice((begin, begin + past, *[start - start % moved.itemsize] * 4))
    _slice(memory, start, moved)[...] = moved
    return memory, begin, start


def _slice(memory: Any, at: int, like: Any) -> Any:
    return memory[at : at + like.nbytes].view(like.dtype).reshape(like.shape)


class _Part:
    """Part of a GPU's memory."""

    def __init__(self, memory: ops.DeviceArray, at: int, like: Any) -> None:
        self._memory = memory
        fields = memory.__cuda_array_interface__
        self.__cuda_array_interface__ = {
            **fields,
            "data": (fields["data"][0] + at, False),
            "shape": like.shape,
            "typestr": like.dtype.str,
        }
