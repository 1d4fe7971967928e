"""The model that engine benchmarks measure: ZegCLIP with random weights, and its bundle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def build_model(size: str) -> Any:
    """Make a ZegCLIP model with random weights: ViT-B/16 at 512x512, or a tiny one."""
    sys.path.insert(0, str(ROOT / "python_tests"))
    from support import tiny

    if size == "tiny":
        return tiny.zegclip_model(seen_classes=(0, 1, 3))
    sizes = tiny.TinySizes(
        width=768,
        num_heads=12,
        num_layers=12,
        grid_side=32,
        embed_dim=512,
        num_prompts=10,
        decoder_heads=8,
        num_classes=20,
        seen=tuple(range(15)),
    )
    return with_signs(tiny.zegclip_model(sizes))


def with_signs(model: Any) -> Any:
    """Leave of each matrix its signs and one size, which float16 holds exactly."""
    import torch

    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim > 1:
                size = tensor.std().half().float()
                tensor.copy_(torch.where(tensor < 0, -size, size))
    return model


def export(model: Any, path: Path, precisions: tuple[str, ...] = ("float32",)) -> None:
    """Write the bundle."""
    from zsseg_rt.export import export_bundle

    export_bundle(model, path, class_names=class_names(20), precisions=precisions)


def class_names(count: int) -> list[str]:
    """Names for random embeddings."""
    return [f"class {index}" for index in range(count)]
