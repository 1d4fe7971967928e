"""The golden sample of a descriptor bundle: every intermediate array, computed by torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zsseg_rt.bundle import HeadSpec, PreprocessSpec
from zsseg_rt.export.golden import golden_frame
from zsseg_rt.models import functional

__all__ = ["descriptor_golden"]


def _preprocess(frame: npt.NDArray[np.uint8], spec: PreprocessSpec) -> Tensor:
    """The frame as float32 [1, 3, h, w]."""
    planes = functional.preprocess(
        torch.from_numpy(frame), size_hw=spec.size_hw, mean=spec.mean, std=spec.std
    )
    return planes[None]


def _label(
    mask_logits: Tensor, names: Sequence[str], head: HeadSpec, out_hw: tuple[int, int]
) -> dict[str, Tensor]:
    """``labels`` [H, W] and ``scores`` [H, W] of low-resolution logits [1, C, gh, gw]."""
    seen = torch.tensor([name in head.seen for name in names])
    labels, scores = functional.upsample_argmax(
        mask_logits,
        out_hw,
        activation=head.activation,  # type: ignore[arg-type]
        seen=seen if head.seen else None,
        seen_bias=head.seen_bias,
        with_scores=True,
    )
    assert scores is not None
    return {"labels": labels[0], "scores": scores[0]}


@torch.no_grad()
def descriptor_golden(
    model: Any,
    parts: Any,
    spec: PreprocessSpec,
    head: HeadSpec,
    classes: tuple[Sequence[str], npt.NDArray[np.float32]],
) -> dict[str, npt.NDArray[Any]]:
    """Every intermediate of a descriptor model, from its own forward pass.

    ``image``, ``patch_embeds``, ``cls_embed`` and ``mask_logits`` come from the model as trained,
    not from the folded parts, so that an error of the folding shows.

    Args:
        model: The model; called as ``model(image, text_embeds)``.
        parts: What ``model.fold_for_inference`` gave.
        spec: Preprocessing.
        head: Labelling rule.
        classes: Names and their unit embeddings [C, D].
    """
    frame = golden_frame()
    names, embeds = classes
    image, text_embeds = _preprocess(frame, spec), torch.from_numpy(embeds)
    output = model(image, text_embeds)
    patch_embeds, cls_embed = model.encoder_outputs(output)
    queries = functional.relationship_descriptor(
        cls_embed, text_embeds, parts.descriptor_weight, parts.descriptor_bias
    )
    class_embeds, patch_keys = parts.decoder(queries, patch_embeds)
    arrays = {
        "image": image,
        "patch_embeds": patch_embeds,
        "cls_embed": cls_embed,
        "queries": queries,
        "class_embeds": class_embeds,
        "patch_keys": patch_keys,
        "mask_logits": output.mask_logits,
        **_label(output.mask_logits, names, head, frame.shape[:2]),
    }
    return _as_numpy(arrays) | {
        "frame": frame,
        "class_names": np.array(list(names)),
        "text_embeds": embeds,
    }


def _as_numpy(arrays: Mapping[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    return {name: np.ascontiguousarray(array.numpy()) for name, array in arrays.items()}
