"""Graphs of tiny models, as the exporter writes them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.export.folded.descriptor import fold_descriptor
from zsseg_rt.export.graph_files import save_graphs
from zsseg_rt.export.onnx import GraphExport, image_graph


def export_descriptor_graphs(
    model: Any, folder: Path, *, half: Collection[str] = FAMILIES["descriptor"].half_tensors
) -> dict[str, Path]:
    """Write image encoder and decoder of a ZegCLIP or CLIP-RC in float32 and float16.

    The float16 graphs take and give ``half`` in float16, by default as bundles have them.

    Returns the files by ``"NAME.PRECISION"``.
    """
    parts = fold_descriptor(model)
    query_dim, num_patches = parts.descriptor_weight.shape[0], parts.grid_hw[0] * parts.grid_hw[1]
    decoder = GraphExport(
        module=parts.decoder,
        inputs={
            "queries": torch.zeros(parts.num_cells, 3, query_dim),
            "patch_embeds": torch.zeros(1, num_patches, parts.memory_dim),
        },
        outputs=("class_embeds", "patch_keys"),
        dynamic={"queries": {1: ("classes", 1024)}},
    )
    encoder = image_graph(parts.image_encoder, parts.size_hw, ("patch_embeds", "cls_embed"))
    graphs = {"image_encoder": encoder, "decoder": decoder}
    save_graphs(graphs, folder, ("float32", "float16"), half)
    return {path.name.removesuffix(".onnx"): path for path in folder.glob("*.onnx")}
