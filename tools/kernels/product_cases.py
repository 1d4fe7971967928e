"""Products of patches, names and queries, and what is done with logits on the grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tools.kernels.benches import Case, CpuBench, compared, smooth_logits, variant
from zsseg_rt.ops import reference


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
    given: dict[str, Any] = {}
    if in_frame:
        text = reference.relationship_descriptor_text(*arrays[1:]).astype(np.float32)
        given = {"text_queries": bench.place(text), "workspace": bench.zeros()}
    case = compared(
        bench,
        "relationship_descriptor",
        f"C={classes} D={embed_dim} E={query_dim}{variant(dtype, in_frame)}",
        arrays,
        np.empty((1, classes, query_dim), dtype),
        tolerance=1e-5 if dtype == np.float32 else 2e-3,  # float16 has 11 bits
        given=given,
        flops=(2 if in_frame else 4) * classes * embed_dim * query_dim,
    )
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
    given: dict[str, Any] = {}
    if in_frame:
        given = {"finite": bench.place(np.zeros(1, np.uint8)), "workspace": bench.zeros()}
    case = compared(
        bench,
        "patch_text_similarity",
        f"N={num_patches} C={classes} D={embed_dim}{variant(text.dtype, in_frame)}",
        [patches, text],
        np.empty((1, classes, num_patches), np.float32),
        tolerance=1e-5,
        given=given,
        flops=2 * num_patches * classes * embed_dim,
        normalize=not in_frame,
    )
    if (torch := bench.torch) and not in_frame:
        normalize = torch.nn.functional.normalize
        left, right = bench.tensor(patches), bench.tensor(text)
        case.candidates["torch"] = lambda: (
            normalize(right, dim=-1) @ normalize(left, dim=-1).transpose(1, 2)
        )
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
    sizes = f"C={logits.shape[1]} {grid[0]}x{grid[1]}"
    case = compared(bench, "warp_blend", sizes, arrays, np.empty_like(logits))
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
