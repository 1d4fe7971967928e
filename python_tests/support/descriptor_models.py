"""Results of ZegCLIP and CLIP-RC in torch, to compare with their bundles'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from support import tiny
from support.graph_runs import run_file
from zsseg_rt.export.architectures.descriptor import parts_of
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.ops import reference


def run_parts(
    model: Any, image: Tensor, text: Tensor, graphs: Mapping[str, Path] | None = None
) -> Tensor:
    """Low-resolution logits by NumPy, or of graphs by OpenVINO, in the runtime's order."""
    parts, text_embeds = parts_of(model), text.numpy()

    def encode(image: np.ndarray) -> Any:
        if graphs is None:
            return parts.encode(Arrays(), image)
        outputs = run_file(graphs["image_encoder"], {"image": image})
        return outputs["patch_embeds"], outputs["cls_embed"]

    def decode(queries: np.ndarray, patch_embeds: np.ndarray) -> Any:
        if graphs is None:
            return parts.decode(Arrays(), queries, patch_embeds)
        feeds = {"queries": queries, "patch_embeds": patch_embeds}
        outputs = run_file(graphs["decoder"], feeds)
        return outputs["class_embeds"], outputs["patch_keys"]

    (weight, bias), logit_scale = parts.projection()
    logits = []
    for one in image.split(1):
        patch_embeds, cls_embed = encode(one.numpy())
        queries = reference.relationship_descriptor(cls_embed, text_embeds, weight, bias)
        class_embeds, patch_keys = decode(queries, patch_embeds)
        logits.append(logit_scale * class_embeds @ patch_keys.transpose(0, 2, 1))
    grid_hw = parts.tower.grid_hw(tuple(image.shape[2:]))
    return torch.from_numpy(np.concatenate(logits).reshape(len(image), len(text), *grid_hw))


def make_inputs(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A frame of coloured blocks, and embeddings of ``count`` classes."""
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 256, (9, 11, 3)).astype(np.uint8).repeat(9, 0).repeat(7, 1)
    return np.ascontiguousarray(frame), tiny.text_embeds(count, 32, f"s{seed}").numpy()


def torch_scores(model: Any, frame: np.ndarray, embeds: np.ndarray) -> np.ndarray:
    """The model's scores at frame size, in the engine's order: upsample, sigmoid, seen bias."""
    statistics = {"mean": model.image_mean, "std": model.image_std}
    image = reference.preprocess(frame, size_hw=(64, 64), **statistics)
    with torch.inference_mode():
        logits = model(torch.from_numpy(image[None]), torch.from_numpy(embeds)).mask_logits
        up = F.interpolate(logits, frame.shape[:2], mode="bilinear", align_corners=False)
    scores = up[0].sigmoid().numpy()
    for index in (i for i in model.config.seen_classes if i < len(embeds)):
        scores[index] -= model.config.seen_bias
    return scores


def assert_labels_are_the_models(labels: np.ndarray, scores: np.ndarray) -> None:
    """Equal to the scores' argmax, where the two best are clearly apart."""
    top = np.sort(scores, axis=0)
    clear = np.ones(labels.shape, bool) if len(scores) == 1 else top[-1] - top[-2] > 1e-4
    assert clear.mean() > 0.9
    assert (labels == scores.argmax(0))[clear].mean() >= 0.999
