"""Measure every operation against torch and OpenCV, side by side in one run.

    python tools/benchmark_kernels.py [--op NAME] [--device auto|cpu|cuda] [--threads N] [--json F]

Each result is first compared with ops.reference; a wrong kernel is not timed (exit status 1). Then
all candidates of a case take turns, round by round, so that a busy moment affects all of them,
and the medians are printed: milliseconds, gigabytes of inputs and outputs per second, and how many
times faster the kernel is than each rival. A turn is a pause, a cold call, warm-up calls, and
a warm one: a call in a loop over one kernel is warm, one that follows a network in a frame is cold.
Rivals that are not installed are left out.

On CUDA a call between two events is mostly Python and its launch. So 100 launches that take turns
on several sets of buffers are captured, and their replay is timed too: milliseconds a launch, and
the share of the floor, which is the time to move the bytes at the speed of a large copy or to
do the products at that of a large one, both measured in the same run. Captures need torch with
CUDA; what cannot be captured is named.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Beside this file is profile.py, which must not be taken for Python's own module of that name.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import functools
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.kernels.captures import LAUNCHES, CaptureRefusedError, capture_launches
from tools.kernels.device_timer import EventTimer
from zsseg_rt import ops
from zsseg_rt.evaluation.provenance import describe_commit, describe_machine
from zsseg_rt.ops import reference
from zsseg_rt.profiling.meter import TurnPlan
from zsseg_rt.profiling.turns import take_turns_locally

ROOT = Path(__file__).resolve().parents[1]
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
SLOW_SECONDS = 10.0  # a case takes this much per candidate at most
TURN = TurnPlan(pause_ms=5.0, warming_ms=10.0, measuring_ms=0.0)


class MismatchError(Exception):
    """A kernel's result differs from the reference's."""


@dataclass
class Case:
    """One operation at one size; the first candidate is ours."""

    op: str
    sizes: str
    num_bytes: int
    check: Callable[[], None]
    candidates: dict[str, Callable[[], Any]] = field(default_factory=dict)
    flops: int = 0  # of its products


class CpuBench:
    """Places arrays on the CPU."""

    name = "cpu"
    sets = 1  # of buffers
    stream = 0
    timer: EventTimer | None = None

    def __init__(self, threads: int) -> None:
        ops.set_num_threads(threads)
        self.torch = installed("torch")
        self.cv2 = installed("cv2")
        if self.torch:
            self.torch.set_num_threads(threads)
        if self.cv2:
            self.cv2.setNumThreads(threads)

    def place(self, array: np.ndarray) -> Any:
        """Return our array."""
        return array

    def tensor(self, array: np.ndarray) -> Any:
        """Return torch's array of the same content."""
        return self.torch.from_numpy(array)

    def zeros(self) -> Any:
        """The memory in which products and votes meet; None on the CPU, which needs none."""
        return None

    def fetch(self, array: Any) -> np.ndarray:
        """Return a NumPy array."""
        return np.asarray(array)


class CudaBench(CpuBench):
    """The same on the first GPU, timed by events on one stream that torch shares."""

    name = "cuda"
    sets = 8

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.cv2 = None
        self._owner = ops.Stream(0)
        self.stream = self._owner.handle
        self.timer = EventTimer(self.stream)
        if self.torch and not self.torch.cuda.is_available():
            self.torch = None
        if self.torch:
            self.torch.cuda.set_stream(self.torch.cuda.ExternalStream(self.stream))

    def place(self, array: np.ndarray) -> Any:
        """Copy to the GPU."""
        return ops.DeviceArray.from_numpy(array, 0, self.stream)

    def tensor(self, array: np.ndarray) -> Any:
        """Copy to the GPU, as a tensor."""
        return self.torch.from_numpy(array).cuda()

    def zeros(self) -> Any:
        """The memory in which products and votes meet, of this case alone."""
        return self.place(np.zeros(ops.DEPTH_WORKSPACE_BYTES, np.uint8))

    def fetch(self, array: Any) -> np.ndarray:
        """Copy from the GPU."""
        return array.numpy(self.stream)


def installed(name: str) -> Any | None:
    """Import an optional rival."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def expect_close(got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Raise unless all values agree, relative to the largest."""
    worst = float(np.abs(got.astype(np.float64) - expected).max())
    limit = tolerance * max(1.0, float(np.abs(expected).max()))
    if not worst <= limit:
        raise MismatchError(f"differs from the reference by {worst:.3g}, more than {limit:.3g}")


def variant(dtype: np.dtype, in_frame: bool) -> str:
    """What distinguishes a case from one of the same sizes."""
    return (" float16" if dtype == np.float16 else "") + (" in a frame" if in_frame else "")


# ---- cases ---------------------------------------------------------------------------------------


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
    settings: dict[str, Any] = {"size_hw": (side, side), "mean": MEAN, "std": STD}
    placed = tuple(map(bench.place, frame)) if nv12 else bench.place(frame)
    out = bench.place(np.empty((3, side, side), dtype))

    def ours() -> Any:
        return ops.preprocess(placed, **settings, out=out, stream=bench.stream)

    def check() -> None:
        tolerance = 1e-5 if dtype == np.float32 else 5e-4  # float16 has 11 bits
        expect_close(bench.fetch(ours()), reference.preprocess(frame, **settings), tolerance)

    sizes = f"{height}x{width}{' NV12' if nv12 else ''} -> {side}x{side} {np.dtype(dtype).name}"
    num_bytes = sum(plane.nbytes for plane in (frame if nv12 else (frame,))) + out.nbytes
    case = Case("preprocess", sizes, num_bytes, check, {"zsseg_rt": ours})
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


def descriptor_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """Queries of 20 and 171 classes."""
    embed_dim, query_dim = (32, 48) if quick else (512, 768)
    for classes in (5,) if quick else (20, 171):
        shapes = (1, embed_dim), (classes, embed_dim), (query_dim, 2 * embed_dim), (query_dim,)
        arrays = [np.random.default_rng(0).standard_normal(shape, np.float32) for shape in shapes]
        yield descriptor_case(bench, arrays)
        yield descriptor_case(bench, arrays, in_frame=True)
        half = [array.astype(np.float16) for array in arrays[:3]]
        yield descriptor_case(bench, [*half, arrays[3]], in_frame=True)


def descriptor_case(bench: CpuBench, arrays: list[np.ndarray], *, in_frame: bool = False) -> Case:
    """Measure against torch, which materialises the concatenation.

    ``in_frame``: as a frame calls it, with the text's half given and memory to share sums in.
    """
    (classes, embed_dim), query_dim = arrays[1].shape, arrays[3].size
    dtype = arrays[0].dtype
    placed = [bench.place(array) for array in arrays]
    out = bench.place(np.empty((1, classes, query_dim), dtype))
    given: dict[str, Any] = {}
    if in_frame:
        text = reference.relationship_descriptor_text(*arrays[1:]).astype(np.float32)
        given = {"text_queries": bench.place(text), "workspace": bench.zeros()}

    def ours() -> Any:
        return ops.relationship_descriptor(*placed, **given, out=out, stream=bench.stream)

    def check() -> None:
        tolerance = 1e-5 if dtype == np.float32 else 2e-3  # float16 has 11 bits
        expect_close(bench.fetch(ours()), reference.relationship_descriptor(*arrays), tolerance)

    num_bytes = sum(array.nbytes for array in arrays) + out.nbytes
    sizes = f"C={classes} D={embed_dim} E={query_dim}{variant(dtype, in_frame)}"
    case = Case("relationship_descriptor", sizes, num_bytes, check, {"zsseg_rt": ours},
                flops=(2 if in_frame else 4) * classes * embed_dim * query_dim)  # fmt: skip
    if (torch := bench.torch) and not in_frame:
        cls, text, weight, bias = (bench.tensor(array) for array in arrays)

        def in_torch() -> Any:
            related = cls[:, None] * text
            joined = torch.cat([related, text[None]], dim=-1)
            return torch.nn.functional.linear(joined, weight, bias)

        case.candidates["torch"] = in_torch
    return case


def similarity_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """Cosine similarity of 32 x 32 patches with 20 and 171 classes."""
    num_patches, embed_dim = (16, 32) if quick else (1024, 512)
    for classes in (5,) if quick else (20, 171):
        generator = np.random.default_rng(0)
        patches = generator.standard_normal((1, num_patches, embed_dim), np.float32)
        text = generator.standard_normal((classes, embed_dim), np.float32)
        yield similarity_case(bench, patches, text)
        yield similarity_case(bench, patches, text, in_frame=True)
        half = patches.astype(np.float16), text.astype(np.float16)
        yield similarity_case(bench, *half, in_frame=True)


def similarity_case(
    bench: CpuBench, patches: np.ndarray, text: np.ndarray, *, in_frame: bool = False
) -> Case:
    """Measure against torch's normalisation and matrix product.

    ``in_frame``: as ZegCLIP's frame calls it, without norms, telling whether all is finite.
    """
    num_patches, (classes, embed_dim) = patches.shape[1], text.shape
    placed = bench.place(patches), bench.place(text)
    out = bench.place(np.empty((1, classes, num_patches), np.float32))
    rule = {"normalize": not in_frame}
    given: dict[str, Any] = {}
    if in_frame:
        given = {"finite": bench.place(np.zeros(1, np.uint8)), "workspace": bench.zeros()}

    def ours() -> Any:
        return ops.patch_text_similarity(*placed, **rule, **given, out=out, stream=bench.stream)

    def check() -> None:
        expected = reference.patch_text_similarity(patches, text, **rule)
        expect_close(bench.fetch(ours()), expected, 1e-5)

    num_bytes = patches.nbytes + text.nbytes + out.nbytes
    sizes = f"N={num_patches} C={classes} D={embed_dim}{variant(text.dtype, in_frame)}"
    case = Case("patch_text_similarity", sizes, num_bytes, check, {"zsseg_rt": ours},
                flops=2 * num_patches * classes * embed_dim)  # fmt: skip
    if (torch := bench.torch) and not in_frame:
        normalize = torch.nn.functional.normalize
        left, right = bench.tensor(patches), bench.tensor(text)
        case.candidates["torch"] = lambda: (
            normalize(right, dim=-1) @ normalize(left, dim=-1).transpose(1, 2)
        )
    return case


@functools.cache
def smooth_logits(classes: int, grid: int) -> np.ndarray:
    """Logits as networks produce them: slow variation over the image and noise in every cell."""
    generator = np.random.default_rng(0)
    slow = generator.standard_normal((1, classes, 8, 8), np.float32)
    noise = generator.standard_normal((1, classes, grid, grid), np.float32)
    return 3 * reference.upsample_bilinear(slow, (grid, grid)) + np.float32(0.1) * noise


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
    given = dict(settings)
    if "label_table" in given:
        given["label_table"] = bench.place(given["label_table"])

    def ours() -> Any:
        return ops.upsample_argmax(
            placed, out_hw, **given, out=(labels, scores), stream=bench.stream
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
    placed = [bench.place(array) for array in (frame, labels, palette)]
    out = bench.place(np.empty_like(frame))

    def ours() -> Any:
        return ops.overlay(*placed, out=out, stream=bench.stream)

    def check() -> None:
        expect_close(bench.fetch(ours()), reference.overlay(frame, labels, palette), 0.0)

    num_bytes = 2 * frame.nbytes + labels.nbytes
    sizes = f"{out_hw[0]}x{out_hw[1]}"
    case = Case("overlay", sizes, num_bytes, check, {"zsseg_rt": ours})
    if torch := bench.torch:
        picture, indices, colours = (bench.tensor(array) for array in (frame, labels, palette))
        case.candidates["torch"] = lambda: (
            (0.5 * picture + 0.5 * colours[indices.long()]).round().to(torch.uint8)
        )
    if cv2 := bench.cv2:
        case.candidates["OpenCV"] = lambda: cv2.addWeighted(
            frame, 0.5, np.take(palette, labels, axis=0), 0.5, 0
        )
    yield case


def crop_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """Ten of ZegFormer's masked regions to CLIP's inputs, from mask logits at a quarter size."""
    count, grid, canvas, side = (3, 8, 32, 16) if quick else (10, 128, 512, 224)
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal((1, count, 8, 8)).astype(np.float32)
    masks = np.ascontiguousarray(reference.upsample_bilinear(coarse, (grid, grid))[0])
    image = rng.standard_normal((3, canvas, canvas)).astype(np.float32)
    regions = np.arange(count, dtype=np.int32)
    boxes = np.ascontiguousarray(reference.mask_boxes(masks, (canvas, canvas))[:, :4])
    placed = (bench.place(image), bench.place(masks), regions, boxes)
    out = bench.place(np.empty((count, 3, side, side), np.float32))

    def ours() -> Any:
        return ops.crop_regions(*placed, side=side, out=out, stream=bench.stream)

    def check() -> None:
        expected = reference.crop_regions(image, masks, regions, boxes, side=side)
        expect_close(bench.fetch(ours()), expected, 1e-5)

    sizes = f"{count} of {canvas}x{canvas} -> {side}x{side}"
    num_bytes = image.nbytes + masks.nbytes + out.nbytes
    case = Case("crop_regions", sizes, num_bytes, check, {"zsseg_rt": ours})
    torch, vision = bench.torch, installed("torchvision")
    if torch and vision:
        planes, logits = bench.tensor(image), bench.tensor(masks)[None]
        corners = bench.tensor(boxes.astype(np.float32)).split(1)

        def official() -> Any:
            size = (canvas, canvas)
            inside = torch.nn.functional.interpolate(logits, size=size, mode="bilinear")[0] > 0
            shown = planes * inside[:, None]
            return vision.ops.roi_align(shown, list(corners), side, aligned=True)

        case.candidates["torchvision"] = official
    yield case


def box_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """The boxes of ZegFormer's hundred masks."""
    count, grid, canvas = (3, 8, 32) if quick else (100, 160, 640)
    masks = smooth_logits(count, grid)[0]
    placed, out = bench.place(masks), bench.place(np.empty((count, 5), np.int32))

    def ours() -> Any:
        return ops.mask_boxes(placed, (canvas, canvas), out=out, stream=bench.stream)

    def check() -> None:
        expect_close(bench.fetch(ours()), reference.mask_boxes(masks, (canvas, canvas)), 0.0)

    sizes = f"{count} of {grid}x{grid} -> {canvas}x{canvas}"
    yield Case("mask_boxes", sizes, masks.nbytes + out.nbytes, check, {"zsseg_rt": ours})


def region_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """Labels of a hundred masks that vote for 20 and 171 classes."""
    count, grid, out_hw = (3, 8, (32, 32)) if quick else (100, 128, (480, 640))
    for classes in (5,) if quick else (20, 171):
        masks = smooth_logits(count, grid)[0]
        votes = np.random.default_rng(1).uniform(0, 1, (classes, count)).astype(np.float32)
        yield region_case(bench, masks, votes, out_hw)


def region_case(
    bench: CpuBench, masks: np.ndarray, votes: np.ndarray, out_hw: tuple[int, int]
) -> Case:
    """With the workspace that a frame gives it; labels may differ where scores are equal."""
    (classes, count), grid = votes.shape, masks.shape[1:]
    canvas_hw = (4 * grid[0], 4 * grid[1])
    placed = bench.place(masks), bench.place(votes)
    out = bench.place(np.empty(out_hw, np.uint8))
    work_bytes = (4 * -(-count // 16) * 16 + 16) * -(-classes // 64) * 64
    workspace = bench.place(np.zeros(work_bytes, np.uint8)) if bench.name == "cuda" else None
    rule = {"canvas_hw": canvas_hw, "out_hw": out_hw}

    def ours() -> Any:
        return ops.label_regions(*placed, **rule, out=out, workspace=workspace,
                                 stream=bench.stream)[0]  # fmt: skip

    def check() -> None:
        expected, _ = reference.label_regions(masks, votes, **rule)
        share = float((bench.fetch(ours()) != expected).mean())
        if share > 1e-3:
            raise MismatchError(f"differs from the reference in {share:.3%} of the pixels")

    sizes = f"Q={count} C={classes} {grid[0]}x{grid[1]} -> {out_hw[0]}x{out_hw[1]}"
    num_bytes = masks.nbytes + votes.nbytes + out.nbytes
    flops = 2 * count * classes * canvas_hw[0] * canvas_hw[1]
    return Case("label_regions", sizes, num_bytes, check, {"zsseg_rt": ours}, flops=flops)


def blend_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """Mask logits and cosines of 20 and 171 names, as a frame blends them."""
    for classes, grid in [(3, 8)] if quick else [(20, 32), (171, 32)]:
        for activation in ("sigmoid", "softmax"):
            yield blend_case(bench, smooth_logits(classes, grid), activation)


def blend_case(bench: CpuBench, logits: np.ndarray, activation: str) -> Case:
    """It also tells whether all is finite."""
    classes, *grid = logits.shape[1:]
    weights, shares = np.full(classes, 0.3, np.float32), np.ones(classes, np.float32)
    arrays = (logits, np.ascontiguousarray(logits[:, ::-1]), weights, shares)
    placed, out = [bench.place(a) for a in arrays], bench.place(np.empty_like(logits))
    told = {"finite": bench.place(np.zeros(1, np.uint8)), "workspace": bench.zeros()}

    def ours() -> Any:
        return ops.blend_cosines(*placed, activation=activation, **told, out=out,
                                 stream=bench.stream)  # fmt: skip

    def check() -> None:
        expected = reference.blend_cosines(*arrays, activation=activation)
        expect_close(bench.fetch(ours()), expected, 1e-4)

    sizes = f"C={classes} {grid[0]}x{grid[1]} {activation}"
    num_bytes = sum(array.nbytes for array in arrays) + out.nbytes
    return Case("blend_cosines", sizes, num_bytes, check, {"zsseg_rt": ours})


def finite_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """ZegCLIP's class logits of 171 names and ZegFormer's hundred masks."""
    for shape in [(3, 8, 8)] if quick else [(171, 32, 32), (100, 128, 128)]:
        yield finite_case(bench, np.ones(shape, np.float32))


def finite_case(bench: CpuBench, values: np.ndarray) -> Case:
    """Measure against torch's and NumPy's per-value test and reduction."""
    placed, out = bench.place(values), bench.place(np.empty(1, np.uint8))

    def ours() -> Any:
        return ops.all_finite(placed, out=out, stream=bench.stream)

    def check() -> None:
        expect_close(bench.fetch(ours()), reference.all_finite(values), 0.0)

    sizes = "x".join(str(side) for side in values.shape)
    case = Case("all_finite", sizes, values.nbytes, check, {"zsseg_rt": ours})
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
    placed, out = bench.place(labels), bench.place(np.empty(classes + 1, np.int64))

    def ours() -> Any:
        return ops.count_labels(placed, classes, out=out, stream=bench.stream)

    def check() -> None:
        expect_close(bench.fetch(ours()), reference.count_labels(labels, classes), 0.0)

    sizes = f"C={classes} {labels.shape[0]}x{labels.shape[1]} {labels.dtype}"
    case = Case("count_labels", sizes, labels.nbytes + out.nbytes, check, {"zsseg_rt": ours})
    flat = labels.reshape(-1)
    if bench.torch:
        tensor = bench.tensor(flat.astype(np.int16) if labels.itemsize > 1 else flat)
        case.candidates["torch"] = lambda: tensor.bincount(minlength=classes)
    if bench.cv2 and labels.itemsize == 1:
        case.candidates["OpenCV"] = lambda: bench.cv2.calcHist([labels], [0], None, [256], [0, 256])
    if bench.name == "cpu":
        case.candidates["NumPy"] = lambda: np.bincount(flat, minlength=classes)
    return case


def warp_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """Logits of 28 names on the demo's grid, of 20 and 171 names on a larger one."""
    for classes, grid in [(3, 8)] if quick else [(28, 8), (20, 32), (171, 32)]:
        yield warp_case(bench, smooth_logits(classes, grid))


def warp_case(bench: CpuBench, logits: np.ndarray) -> Case:
    """Measure against torch's grid sampling and blend."""
    grid = logits.shape[2:]
    generator = np.random.default_rng(0)
    flow = generator.uniform(-1, 1, (1, *grid, 2)).astype(np.float32)
    weight = np.full((1, *grid), 0.75, np.float32)
    arrays = (logits, np.ascontiguousarray(logits[:, ::-1]), flow, weight)
    placed, out = [bench.place(a) for a in arrays], bench.place(np.empty_like(logits))

    def ours() -> Any:
        return ops.warp_blend(*placed, out=out, stream=bench.stream)

    def check() -> None:
        expect_close(bench.fetch(ours()), reference.warp_blend(*arrays), 0.0)

    num_bytes = sum(array.nbytes for array in arrays) + out.nbytes
    case = Case("warp_blend", f"C={logits.shape[1]} {grid[0]}x{grid[1]}", num_bytes, check,
                {"zsseg_rt": ours})  # fmt: skip
    if torch := bench.torch:
        new, past, moves, share = (bench.tensor(array) for array in arrays)
        centres = (torch.arange(grid[0], device=new.device) * 2 + 1) / grid[0] - 1
        here = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)

        def in_torch() -> Any:
            moved = torch.nn.functional.grid_sample(
                past, here + moves * (2 / grid[0]), padding_mode="border", align_corners=False
            )
            return torch.lerp(new, moved, share)

        case.candidates["torch"] = in_torch
    return case


def bilateral_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """Logits of 21 names on grids of DeepLab and of CLIP at 448, and of 171 names."""
    for classes, grid in [(3, 8)] if quick else [(21, 33), (21, 28), (171, 28)]:
        yield bilateral_case(bench, smooth_logits(classes, grid))


def bilateral_case(bench: CpuBench, logits: np.ndarray) -> Case:
    """Measure alone: no library of ours has it."""
    side = 5 * logits.shape[2]
    guide = np.random.default_rng(0).random((1, 3, side, side), np.float32)
    placed = [bench.place(logits), bench.place(guide)]
    out = bench.place(np.empty((*logits.shape[:2], side, side), np.float32))

    def ours() -> Any:
        return ops.bilateral_upsample(*placed, out=out, stream=bench.stream)

    def check() -> None:
        expect_close(bench.fetch(ours()), reference.bilateral_upsample(logits, guide), 0.0)

    num_bytes = logits.nbytes + guide.nbytes + out.nbytes
    sizes = f"C={logits.shape[1]} {logits.shape[2]}x{logits.shape[3]} to {side}x{side}"
    return Case("bilateral_upsample", sizes, num_bytes, check, {"zsseg_rt": ours})


CASES: dict[str, Callable[..., Iterator[Case]]] = {
    "preprocess": preprocess_cases,
    "relationship_descriptor": descriptor_cases,
    "patch_text_similarity": similarity_cases,
    "upsample_argmax": upsample_cases,
    "overlay": overlay_cases,
    "blend_cosines": blend_cases,
    "mask_boxes": box_cases,
    "crop_regions": crop_cases,
    "label_regions": region_cases,
    "all_finite": finite_cases,
    "count_labels": count_cases,
    "warp_blend": warp_cases,
    "bilateral_upsample": bilateral_cases,
}


# ---- measuring and reporting ---------------------------------------------------------------------


def measure(bench: CpuBench, case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of every candidate's ``warm`` and ``cold`` calls, in turns."""
    taken = take_turns_locally(
        case.candidates,
        rounds=rounds,
        plan=TURN,
        device_timer=bench.timer,
        max_seconds=SLOW_SECONDS * len(case.candidates),
    )
    return {
        state: {name: taken.median_ms(name, cold=state == "cold") for name in case.candidates}
        for state in ("cold", "warm")
    }


def measure_floor(bench: CpuBench, rounds: int, *, quick: bool) -> dict[str, float]:
    """Gigabytes a second of a large copy, and float32 operations a second of a large product."""
    torch, count, side = bench.torch, (1 << 16) if quick else (1 << 26), 256 if quick else 4096
    source, target = (torch.zeros(count, device="cuda") for _ in range(2))
    left, right = (torch.zeros(side, side, device="cuda") for _ in range(2))
    out = torch.zeros(side, side, device="cuda")
    calls = {"copy": lambda: target.copy_(source),
             "product": lambda: torch.matmul(left, right, out=out)}  # fmt: skip
    replays = {
        name: capture_launches(torch, [call], stream=bench.stream, launches=10)
        for name, call in calls.items()
    }
    taken = take_turns_locally(replays, rounds=rounds, plan=TURN, device_timer=bench.timer)
    copied = 10 * 2 * 4 * count / (taken.median_ms("copy") / 1e3)
    multiplied = 10 * 2 * side**3 / (taken.median_ms("product") / 1e3)
    return {"copy_gigabytes_per_second": copied / 1e9, "product_teraflops": multiplied / 1e12}


def try_floor(bench: CpuBench, rounds: int, *, quick: bool) -> dict[str, float] | None:
    """The floor, or None and a word why nothing is captured."""
    problem = "torch with CUDA is not installed"
    if bench.torch:
        try:
            return measure_floor(bench, rounds, quick=quick)
        except CaptureRefusedError as error:
            problem = f"a plain copy or product was refused: {error}"
    print(f"no captures: {problem}. Times hold Python and the launch.")
    return None


def measure_captures(
    bench: CpuBench, cases: tuple[Case, ...], rounds: int, floor: dict[str, float]
) -> dict[str, Any]:
    """Milliseconds a launch of what can be captured, and why the others cannot."""
    replays, refused = {}, {}
    for name in cases[0].candidates:
        calls = [case.candidates[name] for case in cases]
        try:
            replays[name] = capture_launches(bench.torch, calls, stream=bench.stream)
        except CaptureRefusedError as error:
            refused[name] = str(error)
            cases[0].check()  # it must work as before
    found: dict[str, Any] = {"sets": len(cases), "rotated_bytes": len(cases) * cases[0].num_bytes}
    found |= {"launches": LAUNCHES, "median_ms": {}, "not_captured": refused}
    if replays:
        seconds = SLOW_SECONDS * len(replays)
        taken = take_turns_locally(replays, rounds=rounds, plan=TURN, device_timer=bench.timer,
                                   max_seconds=seconds)  # fmt: skip
        found["median_ms"] = {name: taken.median_ms(name) / LAUNCHES for name in replays}
    moved_ms = cases[0].num_bytes / floor["copy_gigabytes_per_second"] / 1e6
    computed_ms = cases[0].flops / floor["product_teraflops"] / 1e9
    found["floor_ms"] = max(moved_ms, computed_ms)
    if "zsseg_rt" in found["median_ms"]:
        found["share_of_floor"] = found["floor_ms"] / found["median_ms"]["zsseg_rt"]
    return found


def run_case(
    bench: CpuBench, cases: tuple[Case, ...], rounds: int, floor: dict[str, float] | None
) -> dict[str, Any]:
    """Check, measure and describe one case, which is given once for each set of buffers."""
    case = cases[0]
    case.check()
    captures = None if floor is None else measure_captures(bench, cases, rounds, floor)
    medians = measure(bench, case, rounds)
    faster = {
        state: {name: ms / taken["zsseg_rt"] for name, ms in taken.items() if name != "zsseg_rt"}
        for state, taken in medians.items()
    }
    return {
        "op": case.op,
        "sizes": case.sizes,
        "median_ms": medians["warm"],
        "cold_median_ms": medians["cold"],
        "gigabytes_per_second": case.num_bytes / medians["warm"]["zsseg_rt"] / 1e6,
        "times_faster_than": faster["warm"],
        "cold_times_faster_than": faster["cold"],
        "captured": captures,
    }


def machine_of(bench: CpuBench) -> dict[str, str]:
    """Say what the figures were measured on."""
    modules = [module for module in (bench.torch, bench.cv2) if module]
    machine = describe_machine(*modules) | {"isa": ops.cpu_isa()}
    if bench.name == "cuda":
        machine["gpu"] = str(ops.cuda_device_properties(0))
    return machine


def print_result(result: dict[str, Any]) -> None:
    """Print one case: its sizes, then warm and cold calls."""
    print(f"{result['op']}  {result['sizes']}")
    for state, prefix in (("warm", ""), ("cold", "cold_")):
        medians, faster = result[f"{prefix}median_ms"], result[f"{prefix}times_faster_than"]
        rivals = ", ".join(
            f"{name} {medians[name]:.3g} ms ({ratio:.1f}x)" for name, ratio in faster.items()
        )
        speed = f"    {state} {medians['zsseg_rt']:.3f} ms"
        if state == "warm":
            speed += f", {result['gigabytes_per_second']:.1f} GB/s"
        print(f"{speed}; {rivals or 'no rival installed'}")
    if result["captured"] is not None:
        print_captured(result["captured"])


def print_captured(captured: dict[str, Any]) -> None:
    """Print microseconds a launch, and what could not be captured."""
    shown = ", ".join(f"{name} {1e3 * ms:.3g} us" for name, ms in captured["median_ms"].items())
    floor = f"floor {1e3 * captured['floor_ms']:.3g} us"
    if "share_of_floor" in captured:
        floor += f", {captured['share_of_floor']:.0%} of its speed"
    sets = f"{captured['sets']} sets of buffers, {captured['rotated_bytes'] / 1e6:.1f} MB"
    print(f"    captured {shown or 'nothing'}; {floor}; {sets}")
    for name, reason in captured["not_captured"].items():
        print(f"    {name}: not captured, only timed call by call: {reason}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", choices=sorted(CASES), action="append", help="may be repeated")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=ops.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds: expected at least 1")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen cases; return 0, or 1 for a wrong result, or 4 without the device."""
    args = parse_arguments(arguments)
    has_cuda = ops.cuda_device_count() > 0
    if args.device == "cuda" and not has_cuda:
        print("--device: expected a CUDA device, got none. Use --device cpu.", file=sys.stderr)
        return 4
    on_cuda = has_cuda and args.device != "cpu"
    bench = CudaBench(args.threads) if on_cuda else CpuBench(args.threads)
    rounds = 2 if args.quick else args.rounds
    floor = try_floor(bench, rounds, quick=args.quick) if on_cuda else None
    results = []
    for op in args.op or CASES:
        sets = (CASES[op](bench, quick=args.quick) for _ in range(bench.sets if floor else 1))
        for cases in zip(*sets, strict=True):
            try:
                results.append(run_case(bench, cases, rounds, floor))
            except MismatchError as error:
                print(f"{cases[0].op} {cases[0].sizes}: {error}", file=sys.stderr)
                return 1
            print_result(results[-1])
    report = {"device": bench.name, "threads": args.threads, "rounds": rounds, "floor": floor}
    report |= {"machine": machine_of(bench), "commit": describe_commit(ROOT), "results": results}
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
