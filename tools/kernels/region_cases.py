"""ZegFormer's regions: their boxes, crops and labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tools.kernels.benches import (
    Case,
    CpuBench,
    MismatchError,
    compared,
    installed,
    smooth_logits,
)
from zsseg_rt import ops
from zsseg_rt.ops import reference


def crop_cases(bench: CpuBench, *, quick: bool) -> Iterator[Case]:
    """Ten of ZegFormer's masked regions to CLIP's inputs, from mask logits at a quarter size."""
    count, grid, canvas, side = (3, 8, 32, 16) if quick else (10, 128, 512, 224)
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal((1, count, 8, 8)).astype(np.float32)
    masks = np.ascontiguousarray(reference.upsample_bilinear(coarse, (grid, grid))[0])
    image = rng.standard_normal((3, canvas, canvas)).astype(np.float32)
    regions = np.arange(count, dtype=np.int32)
    boxes = np.ascontiguousarray(reference.mask_boxes(masks, (canvas, canvas))[:, :4])
    sizes = f"{count} of {canvas}x{canvas} -> {side}x{side}"
    out = np.empty((count, 3, side, side), np.float32)
    case = compared(bench, "crop_regions", sizes, [image, masks, regions, boxes], out,
                    tolerance=1e-5, side=side)  # fmt: skip
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
    sizes = f"{count} of {grid}x{grid} -> {canvas}x{canvas}"
    out = np.empty((count, 5), np.int32)
    yield compared(bench, "mask_boxes", sizes, [masks], out, canvas_hw=(canvas, canvas))


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
