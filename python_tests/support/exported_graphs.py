"""Graphs of tiny models, as the exporter writes them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.export.architectures.descriptor import export_descriptor
from zsseg_rt.export.graph_files import save_graphs
from zsseg_rt.export.options import ExportOptions


def export_descriptor_graphs(
    model: Any, folder: Path, *, half: Collection[str] = FAMILIES["descriptor"].half_tensors
) -> dict[str, Path]:
    """Write image encoder and decoder of a ZegCLIP or CLIP-RC in float32 and float16.

    The float16 graphs take and give ``half`` in float16, by default as bundles have them.

    Returns the files by ``"NAME.PRECISION"``.
    """
    exported = export_descriptor(model, ExportOptions(text_encoder=None))
    save_graphs(exported.graphs, folder, ("float32", "float16"), half)
    return {path.name.removesuffix(".onnx"): path for path in folder.glob("*.onnx")}
