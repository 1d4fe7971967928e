"""ZegCLIP models with random weights, as a torch file and as a bundle, and inputs for them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from engine_model import ROOT, build_model, export

NUM_EXPORTED = 20  # classes of the golden sample; 15 of them were "seen"
_DEMO: dict[str, Any] = {
    "width": 128, "num_heads": 2, "num_layers": 6, "grid_side": 8, "embed_dim": 128,
    "num_prompts": 10, "decoder_heads": 4, "num_classes": NUM_EXPORTED, "seen": tuple(range(15)),
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A model on disk.

    Attributes:
        bundle: The bundle's folder.
        torch_file: The torch model, pickled.
    """

    bundle: Path
    torch_file: Path


def build_demo_model() -> Any:
    """A ZegCLIP of the demo's size with random weights, the same for every call."""
    sys.path.insert(0, str(ROOT / "python_tests"))
    from support import tiny

    return tiny.zegclip_model(tiny.TinySizes(**_DEMO))


def store_model(size: str, folder: Path) -> Stored:
    """Write a model to a folder unless it is there.

    Args:
        size: ``"real"``, ViT-B/16 at 512x512; ``"demo"``; or ``"tiny"``.
        folder: Where to.
    """
    import torch

    stored = Stored(folder / f"{size}.zsseg", folder / f"{size}.pt")
    if not stored.bundle.exists() or not stored.torch_file.exists():
        model = build_demo_model() if size == "demo" else build_model(size)
        torch.save(model, stored.torch_file)
        if not stored.bundle.exists():
            export(model, stored.bundle)
    return stored


def smooth_logits(classes: int, grid: int = 32) -> npt.NDArray[np.float32]:
    """Logits [1, C, grid, grid] as networks give them: slow over the image, noise in every cell."""
    from zsseg_rt.ops import reference

    generator = np.random.default_rng(0)
    slow = generator.standard_normal((1, classes, 8, 8), np.float32)
    noise = generator.standard_normal((1, classes, grid, grid), np.float32)
    logits = 3 * reference.upsample_bilinear(slow, (grid, grid)) + np.float32(0.1) * noise
    return np.ascontiguousarray(logits, np.float32)
