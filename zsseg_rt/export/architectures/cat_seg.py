"""Export CAT-Seg: family ``aggregation``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsseg_rt.bundles.specs import AggregationSpec, HeadSpec, PreprocessSpec
from zsseg_rt.errors import ArgumentError
from zsseg_rt.export.bundle_writer import ExportedModel
from zsseg_rt.export.folded.cat_seg import CatSegParts, fold_cat_seg, packed_text_encoder
from zsseg_rt.export.golden import NUMBERED_NAMES, as_numpy, golden_frame, preprocess_frame
from zsseg_rt.export.graph_files import MAX_CLASSES, provenance
from zsseg_rt.export.onnx import GraphExport, image_graph
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.export.text_side import TextSide
from zsseg_rt.models import functional
from zsseg_rt.models.cat_seg.model import TEMPLATES, CatSeg

_IMAGE_PARTS = ("patch_embeds", "spatial", "near_map", "far_map")


def _refuse_other_towers(model: CatSeg, options: ExportOptions) -> None:
    """CLIP's own text tower has the same width, but the fine-tuned image tower left its space."""
    for name, other in (
        (
            "text_encoder",
            model.text_encoder is not None and options.text_encoder not in ("auto", None),
        ),
        ("space", options.space not in (None, model.text_space)),
    ):
        if other:
            raise ArgumentError(
                f"{name}: expected none for cat_seg, whose text tower was trained with it, got "
                "another. Leave it out."
            )


def export_cat_seg(model: CatSeg, options: ExportOptions) -> ExportedModel:
    """Split a CAT-Seg into a bundle's parts; the engine looks at the whole frame once.

    Graphs and tensors: ``image_encoder``: ``image`` [1, 3, v, v] to ``patch_embeds`` [1, N, D],
    ``spatial`` [8, N, h], ``near_map`` and ``far_map``; ``head``: these, ``text_embeds``
    [classes, D], ``class_halves`` [classes, 4 h] and ``padding`` [1] to ``mask_logits``
    [1, classes, 4 g, 4 g]; ``head_1`` to ``head_3``: the same for vocabularies in several parts,
    cut where classes meet. See :mod:`zsseg_rt.export.folded.cat_seg`.
    """
    if options.size_hw not in (None, model.size_hw):
        raise ArgumentError(
            f"size_hw: expected None or {model.size_hw} for cat_seg, whose windows fit one size, "
            f"got {options.size_hw}. Leave it out."
        )
    tower = model.text_encoder
    _refuse_other_towers(model, options)
    text = TextSide(
        options,
        embed_dim=model.config.image_encoder.embed_dim,
        templates=TEMPLATES,
        template_set="CAT-Seg",
        space=model.text_space,
        tower=None if tower is None else packed_text_encoder(tower),
    )
    parts = fold_cat_seg(model)
    padding, most = model.config.aggregator.padding, model.config.most_classes
    shown = min(most or MAX_CLASSES, MAX_CLASSES)
    head = HeadSpec(
        logit_scale=1.0,
        normalize=True,
        activation="sigmoid",
        grid_hw=(parts.grid, parts.grid),
        max_classes=MAX_CLASSES,
    )
    preprocess = PreprocessSpec(size_hw=model.size_hw, mean=model.image_mean, std=model.image_std)
    names = list(options.class_names or NUMBERED_NAMES)[:shown]
    return ExportedModel(
        family="aggregation",
        architecture=model.architecture,
        graphs={
            "image_encoder": image_graph(parts.image_encoder, model.size_hw, _IMAGE_PARTS),
            **_head_graphs(model, parts, shown),
        },
        weights={name: value.numpy() for name, value in parts.weights.items()},
        preprocess=preprocess,
        head=head,
        sections={"aggregation": AggregationSpec(padding=padding, most=most)},
        text=text,
        golden=partial(_golden, model, parts, preprocess, text, names),
        provenance=provenance(),
    )


def _head_graphs(model: CatSeg, parts: CatSegParts, most: int) -> dict[str, GraphExport]:
    """The head for one part of the vocabulary that is all of it, and for several."""
    config, cells = model.config.aggregator, parts.grid**2
    near, far = config.decoder
    classes, heads = min(3, most), config.num_heads
    width = config.hidden // heads
    sums = {
        "products": torch.zeros(cells, heads, width, width),
        "totals": torch.zeros(cells, heads, width, 1),
    }
    given = sums | {
        "patch_embeds": torch.zeros(1, cells, config.embed_dim),
        "spatial": torch.zeros(8, cells, config.hidden),
        "near_map": torch.zeros(1, near, 2 * parts.grid, 2 * parts.grid),
        "far_map": torch.zeros(1, far, 4 * parts.grid, 4 * parts.grid),
        "text_embeds": torch.zeros(classes, config.embed_dim),
        "class_halves": torch.zeros(classes, 4 * config.hidden),
        "padding": torch.zeros(1),
        "tokens": torch.zeros(classes, cells, config.hidden),
        # one tensor for two inputs would be traced as one input
        **{f"first_{name}": zeros.clone() for name, zeros in sums.items()},
    }
    of_classes = ("text_embeds", "class_halves", "tokens")
    found = {}
    for name, (module, inputs, outputs) in _HEADS.items():
        taken = inputs.split()
        found[name] = GraphExport(
            module=module(parts),
            inputs={one: given[one] for one in taken},
            outputs=outputs.split(),
            dynamic={one: {0: ("classes", most)} for one in taken if one in of_classes},
        )
    return found


_HEADS: Mapping[str, tuple[Callable[[CatSegParts], nn.Module], str, str]] = {
    "head": (
        lambda parts: parts.head,
        "patch_embeds spatial near_map far_map text_embeds class_halves padding",
        "mask_logits",
    ),
    "head_1": (
        lambda parts: parts.stages[0],
        "patch_embeds spatial text_embeds class_halves products totals",
        "tokens products_out totals_out",
    ),
    "head_2": (
        lambda parts: parts.stages[1],
        "tokens first_products first_totals spatial class_halves padding products totals",
        "tokens_out products_out totals_out",
    ),
    "head_3": (
        lambda parts: parts.stages[2],
        "tokens products totals near_map far_map class_halves padding",
        "mask_logits",
    ),
}
"""By graph: its module, its inputs in their order, and its outputs."""


def class_halves(parts: CatSegParts, text_embeds: Tensor) -> Tensor:
    """What names add to queries and keys, ``[C, 4 h]``."""
    w = parts.weights
    named = F.relu(F.linear(text_embeds, w["text_guidance.weight"], w["text_guidance.bias"]))
    return F.linear(named, w["class_halves.weight"], w["class_halves.bias"])


@torch.no_grad()
def _golden(
    model: CatSeg,
    parts: CatSegParts,
    preprocess: PreprocessSpec,
    text: TextSide,
    names: Sequence[str],
) -> dict[str, npt.NDArray[Any]]:
    """Intermediates; ``patch_embeds`` and ``mask_logits`` are the model's as trained."""
    frame, (embeds, extra) = golden_frame(), text.embed_golden(names)
    image = torch.from_numpy(preprocess_frame(preprocess))
    text_embeds = torch.from_numpy(embeds)
    output = model(image, text_embeds)
    _, spatial, near_map, far_map = parts.image_encoder(image)
    labels, scores = functional.upsample_argmax(
        output.mask_logits,
        (frame.shape[0], frame.shape[1]),
        activation="sigmoid",
        with_scores=True,
    )
    assert scores is not None
    arrays = {
        "image": image,
        "patch_embeds": F.normalize(output.patch_embeds, dim=1).flatten(2).transpose(1, 2),
        "spatial": spatial,
        "near_map": near_map,
        "far_map": far_map,
        "class_halves": class_halves(parts, text_embeds),
        "padding": torch.tensor([float(max(0, model.config.aggregator.padding - len(names)))]),
        "mask_logits": output.mask_logits,
        "logits_in_parts": output.mask_logits,
        "labels": labels[0],
        "scores": scores[0],
    }
    given = {"frame": frame, "class_names": np.array(list(names)), "text_embeds": embeds}
    return as_numpy(arrays) | given | extra
