"""Kinds of frame that an engine takes, each beside the RGB pixels that it stands for."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.host_backend import ForeignArray
from zsseg_rt import Engine, EngineConfig, Nv12Frame, ops
from zsseg_rt.ops import reference
from zsseg_rt.results.visualize import palette

STORED = Path(__file__).parents[1] / "bundles" / "v1"


def frame(seed: int = 1, height: int = 31, width: int = 47) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def planes(seed: int = 1, height: int = 30, width: int = 46) -> tuple[np.ndarray, np.ndarray]:
    """Every brightness beside every colour, out of the limited range too."""
    rng = np.random.default_rng(seed)
    luma = rng.integers(0, 256, (height, width), np.uint8)
    return luma, rng.integers(0, 256, (height // 2, width // 2, 2), np.uint8)


def rgb_of(frame: Any, matrix: str = "bt601") -> np.ndarray:
    """The RGB frame of two planes, by the NumPy definition."""
    settings = {"size_hw": frame[0].shape, "mean": (0, 0, 0), "std": (1, 1, 1)}
    result = reference.preprocess(frame, colour_matrix=matrix, **settings)
    return np.ascontiguousarray(np.rint(255 * result).astype(np.uint8).transpose(1, 2, 0))


def on_device(array: Any, stream: int = 0) -> Any:
    if isinstance(array, tuple):
        return tuple(on_device(plane, stream) for plane in array)
    return ops.DeviceArray.from_numpy(array, 0, stream)


def pitched(array: np.ndarray, row_bytes: int) -> np.ndarray:
    """The same in rows that lie further apart, with other numbers between them."""
    row = array[0].size
    memory = np.full((len(array), row_bytes), 99, np.uint8)
    memory[:, :row] = array.reshape(len(array), row)
    return np.lib.stride_tricks.as_strided(
        memory, array.shape, (row_bytes, *array.strides[1:]), writeable=False
    )


class PitchedOnDevice:
    """A plane with gaps between its rows, as a decoder describes it."""

    def __init__(self, array: np.ndarray, row_bytes: int) -> None:
        rows = pitched(array, row_bytes)
        self.shape, self.dtype = array.shape, array.dtype
        self._memory = on_device(np.array(rows.base.base))
        self.__cuda_array_interface__ = {
            **self._memory.__cuda_array_interface__, "shape": array.shape, "strides": rows.strides
        }  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How arrays on the host become a frame, and the matrix of its colours where it is planes."""

    give: Callable[[Any], Any]
    matrix: str | None = None
    is_labelled_on_device: bool = False


def pitched_planes(plane: type | Callable[..., Any], chroma_bytes: int) -> Callable[[Any], Any]:
    return lambda arrays: Nv12Frame(plane(arrays[0], 64), plane(arrays[1], chroma_bytes))


KINDS = {
    "RGB": Kind(lambda pixels: pixels),
    "planes": Kind(lambda arrays: arrays, "bt601"),
    "planes of HD": Kind(lambda arrays: Nv12Frame(*arrays, "bt709"), "bt709"),
    "planes in pitched rows": Kind(pitched_planes(pitched, 80), "bt601"),
    "RGB on the GPU": Kind(on_device, None, True),
    "RGB of another library": Kind(lambda pixels: ForeignArray(on_device(pixels)), None, True),
    "planes on the GPU": Kind(on_device, "bt601", True),
    "HD planes of another library": Kind(
        lambda arrays: Nv12Frame(*map(ForeignArray, on_device(arrays)), "bt709"), "bt709", True
    ),
    "pitched planes on the GPU": Kind(pitched_planes(PitchedOnDevice, 128), "bt601", True),
    "planes fetched from the GPU": Kind(lambda a: Nv12Frame(*on_device(a)), "bt601"),
}
ON_THE_HOST = tuple(KINDS)[:4]


def label(
    engine: Engine, name: str, seed: int, *, as_pixels: bool = False, alpha: float | None = None,
    size: tuple[int, int] | None = None, **settings: Any
) -> dict[str, Any]:  # fmt: skip
    """An engine's result for a frame."""
    kind, order = KINDS[name], engine.config.channel_order
    arrays = (planes if kind.matrix else frame)(seed, *(size or ()))
    if kind.is_labelled_on_device and not as_pixels:
        drawn = {} if alpha is None else {"with_overlay": True, "alpha": alpha}
        result = engine.segment_device(kind.give(arrays), **drawn, **settings)
        image = None if result.picture is None else result.picture.numpy()
        assert (image is None) == (alpha is None)
        result = result.to_host()
    else:
        pixels = rgb_of(arrays, kind.matrix) if kind.matrix else arrays
        if kind.matrix and order == "bgr":
            pixels = np.ascontiguousarray(pixels[..., ::-1])
        result = engine.segment(pixels if as_pixels else kind.give(arrays), **settings)
        image = None
        if alpha is not None:
            colours = palette(result.names)[:, :: 1 if order == "rgb" else -1]
            matrix = {"colour_matrix": kind.matrix} if kind.matrix else {}
            image = reference.overlay(
                arrays, result.labels, colours, alpha=alpha, channel_order=order, **matrix
            )
    return compared(result) | {"picture": image}


def compared(result: Any) -> dict[str, Any]:
    """The fields of a result on the host that are compared."""
    fields = ("labels", "scores", "class_scores", "candidates", "names", "unknown", "reused")
    return {name: getattr(result, name) for name in fields} | {"stages": set(result.times)}


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if name == "stages" and expected.get("picture") is not None:
            continue
        assert getattr(actual[name], "dtype", None) == getattr(value, "dtype", None), name
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def open_engine(bundle: str | Path, placed: dict[str, Any], **settings: Any) -> Engine:
    usual = {"precision": "float32", "with_scores": True, "with_times": True, "use_cache": False}
    path = STORED / f"{bundle}.zsseg" if isinstance(bundle, str) else bundle
    return Engine(path, EngineConfig(**usual | placed | settings))


def half_bundle(family: str, folder: Path) -> Path:
    """A bundle of float16 graphs: ``descriptor``, or ``clip_rc`` with a query for each cell."""
    for package in ("onnx", "torch"):
        pytest.importorskip(package, reason="needs pip install '.[train]'")
    from support.half_bundles import half_and_wide, stored_in_half

    if family == "descriptor":
        return stored_in_half(family, folder)
    return half_and_wide(family, folder)[0]


def vocabulary(
    engine: Engine, count: int, *, seed: int = 0, synonyms: bool = False, background: int = 0
) -> dict[str, Any]:
    """Arguments of set_classes: so many phrases with embeddings of their own."""
    names = [f"name {index}" for index in range(count)]
    rng = np.random.default_rng(100 + seed)
    rows = rng.normal(size=(count + background, engine.bundle.text.embed_dim)).astype(np.float32)
    return {
        "class_names": [names[:2], *names[2:]] if synonyms else names,
        "embeddings": rows / np.linalg.norm(rows, axis=1, keepdims=True),
        "background": [f"thing {index}" for index in range(background)],
    }
