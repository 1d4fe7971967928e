"""What every golden sample holds, and the arrays of a dense bundle; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.ops import reference

FRAME_HW = (120, 160)
GOLDEN_NAMES = ("road", "person", "car", "tree", "sky")
NUMBERED_NAMES = tuple(f"class {i}" for i in range(5))
_MOST_NAMES = 16
GOLDEN_TEMPLATES = 2  # of a longer list: a golden sample needs embeddings, not the best ones


def golden_names(class_names: Sequence[str] | None, usual: Sequence[str]) -> list[str]:
    """The names of a golden sample: the first few of those given, which show as much as all."""
    return list(class_names or usual)[:_MOST_NAMES]


def golden_frame() -> npt.NDArray[np.uint8]:
    """A frame with edges, gradients and noise, uint8 [120, 160, 3]; always the same."""
    rng = np.random.default_rng(20230618)
    rows, columns = np.mgrid[0 : FRAME_HW[0], 0 : FRAME_HW[1]]
    shades = np.stack([rows * 2, columns, 255 - rows - columns // 2], axis=-1) % 256
    blocks = rng.integers(0, 256, (6, 8, 3)).repeat(20, axis=0).repeat(20, axis=1)
    noise = rng.integers(-12, 13, (*FRAME_HW, 3))
    return np.clip(0.5 * shades + 0.5 * blocks + noise, 0, 255).astype(np.uint8)


def unit_rows(count: int, width: int) -> npt.NDArray[np.float32]:
    """Random unit vectors that stand for class embeddings, float32 [count, width]."""
    rows = np.random.default_rng(count).standard_normal((count, width))
    unit: npt.NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(
        np.float32
    )
    return unit


def preprocess_frame(spec: PreprocessSpec, align: str = "half_pixel") -> npt.NDArray[np.float32]:
    """The golden frame as the encoder's input, float32 [1, 3, h, w]."""
    frame, size_hw = golden_frame(), spec.size_hw
    image = reference.preprocess(frame, size_hw=size_hw, mean=spec.mean, std=spec.std, align=align)
    return np.ascontiguousarray(image[None], np.float32)


def dense_golden(
    image: npt.NDArray[np.float32],
    patch_embeds: npt.NDArray[np.float32],
    head: HeadSpec,
    classes: tuple[Sequence[str], npt.NDArray[np.float32]],
) -> dict[str, npt.NDArray[Any]]:
    """Every intermediate of a dense bundle, by the NumPy definitions of the kernels.

    Shapes:
        patch_embeds: The original encoder's output for it, float32 [1, N, D].
        classes: Names and their embeddings float32 [C, D].
    """
    names, embeds = classes
    stages = {"text_embeds": embeds, "image": image, "patch_embeds": patch_embeds}
    return stages | labels_golden(patch_embeds, embeds, head, names)


def labels_golden(
    patches: npt.NDArray[np.float32],
    classes: npt.NDArray[np.float32],
    head: HeadSpec,
    names: Sequence[str],
) -> dict[str, npt.NDArray[Any]]:
    """Masks and labels of patches [1, N, E] and classes [C, E] or [1, C, E]; frame and names."""
    frame = golden_frame()
    logits = reference.patch_text_similarity(
        patches, classes, logit_scale=head.logit_scale, normalize=head.normalize
    ).reshape(1, len(names), *head.grid_hw)
    labels, scores = reference.upsample_argmax(
        logits,
        frame.shape[:2],
        activation=head.activation,
        seen=np.isin(list(names), head.seen) if head.seen else None,
        seen_bias=head.seen_bias,
        with_scores=True,
        align=head.align,
    )
    assert scores is not None
    return {
        "frame": frame,
        "class_names": np.array(list(names)),
        "mask_logits": logits,
        "labels": labels[0],
        "scores": scores[0],
    }
