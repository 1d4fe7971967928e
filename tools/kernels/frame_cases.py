"""Cases of what every frame passes: its preparation, labels, overlay and counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tools.kernels.benches import (
    Case,
    CpuBench,
    MismatchError,
    compared,
    expect_close,
    smooth_logits,
)
from zsseg_rt import ops
from zsseg_rt.ops import reference

MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


def preprocess_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """A full-HD frame, RGB and NV12, to a network's input in float32 and in half precision."""
    height, width, side = (90, 160, 64) if quick else (1080, 1920, 512)
    generator = np.random.default_rng(0)
    frame = generator.integers(0, 256, (height, width, 3), np.uint8)
    chroma = generator.integers(0, 256, (height // 2, width // 2, 2), np.uint8)
    for dtype in (np.float32, np.float16):
        yield preprocess_case(bench, frame, side, dtype)
    yield preprocess_case(bench, (frame[..., 0].copy(), chroma), side, np.float16)


def preprocess_case(bench: CpuBench, frame: Any, side: int, dtype: Any) -> Case:
    """Measure against torch and OpenCV, where the frame is RGB."""
    nv12 = isinstance(frame, tuple)
    height, width = (frame[0] if nv12 else frame).shape[:2]
    sizes = f"{height}x{width}{' NV12' if nv12 else ''} -> {side}x{side} {np.dtype(dtype).name}"
    tolerance = 1e-5 if dtype == np.float32 else 5e-4  # float16 has 11 bits
    case = compared(bench, "preprocess", sizes, [frame], np.empty((3, side, side), dtype),
                    tolerance=tolerance, size_hw=(side, side), mean=MEAN, std=STD)  # fmt: skip
    if not nv12:
        case.candidates |= preprocess_rivals(bench, frame, side, dtype)
    return case


def preprocess_rivals(
    bench: CpuBench, frame: np.ndarray, side: int, dtype: Any
) -> dict[str, Callable[[], Any]]:
    """Return other ways to compute the same planes."""
    rivals: dict[str, Callable[[], Any]] = {}
    if torch := bench.torch:
        tensor = bench.tensor(frame)
        mean, std = (bench.tensor(np.array(v, np.float32).reshape(3, 1, 1)) for v in (MEAN, STD))

        def in_torch() -> Any:
            planes = tensor.permute(2, 0, 1)[None].float()
            resized = torch.nn.functional.interpolate(planes, (side, side), mode="bilinear")
            normalised = (resized[0] / 255 - mean) / std
            return normalised if dtype == np.float32 else normalised.half()

        rivals["torch"] = in_torch
    if cv2 := bench.cv2:
        shift, scale = np.array(MEAN, np.float32), np.array(STD, np.float32)

        def in_opencv() -> Any:
            resized = cv2.resize(frame, (side, side), interpolation=cv2.INTER_LINEAR)
            normalised = (resized.astype(np.float32) / 255 - shift) / scale
            return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype)

        rivals["OpenCV"] = in_opencv
    return rivals


def upsample_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """Smooth logits and white noise; first labels alone, then with ZegCLIP's settings.

    The last two: logits in float16, and labels by a table of 171 phrases' 20 classes.
    """
    if quick:
        logits, table = smooth_logits(5, 4), np.arange(5, dtype=np.uint8) % 3
        yield upsample_case(bench, "smooth", logits, (18, 20), {})
        yield upsample_case(bench, "smooth", logits.astype(np.float16), (18, 20), {})
        yield upsample_case(bench, "smooth", logits, (18, 20), {"label_table": table})
        return
    sizes = ((20, (512, 512)), (171, (512, 512)), (20, (1080, 1920)), (150, (1080, 1920)))
    for classes, out_hw in sizes:
        yield upsample_case(bench, "smooth", smooth_logits(classes, 32), out_hw, {})
    for classes in (20, 171):
        settings = {
            "activation": "sigmoid",
            "seen": np.arange(classes) % 4 != 0,
            "seen_bias": 0.1,
            "with_scores": True,
        }
        yield upsample_case(bench, "smooth", smooth_logits(classes, 32), (512, 512), settings)
    noise = np.random.default_rng(0).standard_normal((1, 171, 32, 32), np.float32)
    yield upsample_case(bench, "noise", noise, (512, 512), {})
    logits, table = smooth_logits(171, 32), np.arange(171, dtype=np.uint8) % 20
    yield upsample_case(bench, "smooth", logits.astype(np.float16), (512, 512), {})
    yield upsample_case(bench, "smooth", logits, (512, 512), {"label_table": table})


def upsample_case(
    bench: CpuBench, kind: str, logits: np.ndarray, out_hw: tuple[int, int], settings: dict
) -> Case:
    """Measure against both reductions of torch and a running maximum in OpenCV."""
    placed, scored = bench.place(logits), bool(settings.get("with_scores"))
    labels = bench.place(np.empty((1, *out_hw), np.uint8))
    scores = bench.place(np.empty((1, *out_hw), np.float32)) if scored else None
    placed_settings = dict(settings)
    if "label_table" in placed_settings:
        placed_settings["label_table"] = bench.place(placed_settings["label_table"])

    def ours() -> Any:
        return ops.upsample_argmax(
            placed, out_hw, **placed_settings, out=(labels, scores), stream=bench.stream
        )[0]

    def check() -> None:
        expected, _ = reference.upsample_argmax(logits, out_hw, **settings)
        share = np.mean(bench.fetch(ours()) != expected)
        if share > (1e-4 if scored else 0.0):  # with an activation, near ties may differ
            raise MismatchError(f"{share:.2%} of the labels differ from the reference")

    grid = "x".join(str(side) for side in logits.shape[2:])
    name = f"{kind} C={logits.shape[1]} {grid} -> {out_hw[0]}x{out_hw[1]}"
    name += " sigmoid, seen bias, scores" if scored else ""
    name += " by a table" if "label_table" in settings else ""
    name += "" if logits.dtype == np.float32 else f" {logits.dtype}"
    num_bytes = logits.nbytes + labels.nbytes * (5 if scored else 1)
    case = Case("upsample_argmax", name, num_bytes, check, {"zsseg_rt": ours})
    case.candidates |= upsample_rivals(bench, logits, out_hw, settings)
    return case


def upsample_rivals(
    bench: CpuBench, logits: np.ndarray, out_hw: tuple[int, int], settings: dict
) -> dict[str, Callable[[], Any]]:
    """Return other ways to compute the same labels."""
    rivals: dict[str, Callable[[], Any]] = {}
    if torch := bench.torch:
        tensor = bench.tensor(logits)
        seen = bench.tensor(settings["seen"])[:, None, None] if "seen" in settings else None
        table = bench.tensor(settings["label_table"]) if "label_table" in settings else None

        def full_size() -> Any:
            values = torch.nn.functional.interpolate(tensor, out_hw, mode="bilinear")
            return values if seen is None else values.sigmoid() - settings["seen_bias"] * seen

        def classes_of(phrases: Any) -> Any:
            return phrases if table is None else table[phrases]

        rivals["torch argmax"] = lambda: classes_of(full_size().argmax(1))
        rivals["torch max"] = lambda: classes_of(full_size().max(1).indices)
    if bench.cv2 and not settings and logits.dtype == np.float32:
        rivals["OpenCV running max"] = lambda: opencv_running_max(bench.cv2, logits[0], out_hw)
    return rivals


def opencv_running_max(cv2: Any, logits: np.ndarray, out_hw: tuple[int, int]) -> np.ndarray:
    """Resize class after class, keeping the best so far."""
    size = out_hw[::-1]
    best = cv2.resize(logits[0], size, interpolation=cv2.INTER_LINEAR)
    labels = np.zeros(out_hw, np.uint8)
    for index in range(1, len(logits)):
        values = cv2.resize(logits[index], size, interpolation=cv2.INTER_LINEAR)
        labels[cv2.compare(values, best, cv2.CMP_GT) != 0] = index
        cv2.max(values, best, dst=best)
    return labels


def overlay_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """A full-HD frame and its labels."""
    out_hw = (90, 160) if quick else (1080, 1920)
    generator = np.random.default_rng(0)
    frame = generator.integers(0, 256, (*out_hw, 3), np.uint8)
    labels = generator.integers(0, 20, out_hw, np.uint8).repeat(8, axis=1)[:, : out_hw[1]].copy()
    palette = generator.integers(0, 256, (20, 3), np.uint8)
    sizes = f"{out_hw[0]}x{out_hw[1]}"
    case = compared(bench, "overlay", sizes, [frame, labels, palette], np.empty_like(frame))
    if torch := bench.torch:
        pixels, indices, colours = (bench.tensor(array) for array in (frame, labels, palette))
        case.candidates["torch"] = lambda: (
            (0.5 * pixels + 0.5 * colours[indices.long()]).round().to(torch.uint8)
        )
    if cv2 := bench.cv2:
        case.candidates["OpenCV"] = lambda: cv2.addWeighted(
            frame, 0.5, np.take(palette, labels, axis=0), 0.5, 0
        )
    yield case


def ink_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """A name with its outline on a full-HD picture, as sparse as letters are."""
    size, of_name = ((90, 160), (12, 40)) if quick else ((1080, 1920), (60, 400))
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (*size, 3), np.uint8)
    weights = generator.integers(0, 256, (2, *of_name), np.uint8)
    weights *= generator.random(weights.shape) < 0.3
    own, where = image.copy(), ((size[0] // 2, size[1] // 2), [(0, 0, 0), (255, 255, 255)])

    def ours() -> Any:
        return ops.ink(own, weights, *where)

    def check() -> None:
        inked = ops.ink(image.copy(), weights, *where)
        expect_close(inked, reference.ink(image.copy(), weights, *where), 0.0)

    yield Case("ink", "x".join(map(str, of_name)), weights.nbytes, check, {"zsseg_rt": ours})


def finite_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """ZegCLIP's class logits of 171 names and ZegFormer's hundred masks."""
    for shape in [(3, 8, 8)] if quick else [(171, 32, 32), (100, 128, 128)]:
        yield finite_case(bench, np.ones(shape, np.float32))


def finite_case(bench: CpuBench, values: np.ndarray) -> Case:
    """Measure against torch's and NumPy's per-value test and reduction."""
    sizes = "x".join(str(side) for side in values.shape)
    case = compared(bench, "all_finite", sizes, [values], np.empty(1, np.uint8))
    if bench.torch:
        tensor = bench.tensor(values)
        case.candidates["torch"] = lambda: tensor.isfinite().all()
    if bench.name == "cpu":
        case.candidates["NumPy"] = lambda: np.isfinite(values).all()
    return case


def count_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """720p labels of 20 and of 1203 names, as they come out of smooth logits."""
    grid, size = (8, (60, 70)) if quick else (32, (720, 1280))
    for classes in (12,) if quick else (20, 1203):
        labels, _ = ops.upsample_argmax(smooth_logits(classes, grid), size)
        yield count_case(bench, np.asarray(labels)[0], classes)


def count_case(bench: CpuBench, labels: np.ndarray, classes: int) -> Case:
    """Measure against bincount, which widens labels to int64, and OpenCV's histogram of bytes."""
    sizes = f"C={classes} {labels.shape[0]}x{labels.shape[1]} {labels.dtype}"
    counts = np.empty(classes + 1, np.int64)
    case = compared(bench, "count_labels", sizes, [labels], counts, num_classes=classes)
    flat = labels.reshape(-1)
    if bench.torch:
        tensor = bench.tensor(flat.astype(np.int16) if labels.itemsize > 1 else flat)
        case.candidates["torch"] = lambda: tensor.bincount(minlength=classes)
    if bench.cv2 and labels.itemsize == 1:
        case.candidates["OpenCV"] = lambda: bench.cv2.calcHist([labels], [0], None, [256], [0, 256])
    if bench.name == "cpu":
        case.candidates["NumPy"] = lambda: np.bincount(flat, minlength=classes)
    return case
