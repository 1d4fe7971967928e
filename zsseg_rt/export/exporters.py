"""One entry for every torch model: find the exporter of its architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.errors import CheckpointError
from zsseg_rt.export.architectures.cat_seg import export_cat_seg
from zsseg_rt.export.architectures.descriptor import export_descriptor
from zsseg_rt.export.architectures.tips import export_tips
from zsseg_rt.export.architectures.zegformer import export_zegformer
from zsseg_rt.export.architectures.zeroseg import export_zeroseg
from zsseg_rt.export.bundle_writer import ExportedModel, write_model_bundle
from zsseg_rt.export.clip_file import export_dense_clip
from zsseg_rt.export.graph_files import GraphFiles, save_graphs
from zsseg_rt.export.options import MODEL_OPTIONS, ExportOptions, read_options


class Exporter(NamedTuple):
    """How models of one architecture are exported."""

    # Takes the model, in evaluation mode; returns what its bundle is written from
    export: Callable[[Any, ExportOptions], ExportedModel]
    reads: frozenset[str] = MODEL_OPTIONS  # Names of the options that export reads


EXPORTERS: Mapping[str, Exporter] = {
    "cat_seg": Exporter(export_cat_seg),
    "clip_rc": Exporter(export_descriptor),
    "cosine_head": Exporter(export_dense_clip),
    "dense_clip": Exporter(export_dense_clip),
    "tips": Exporter(export_tips, MODEL_OPTIONS | {"tokenizer"}),
    "zegclip": Exporter(export_descriptor),
    "zegformer": Exporter(export_zegformer, MODEL_OPTIONS | {"region_templates"}),
    "zeroseg": Exporter(export_zeroseg),
}
"""The exporter of every architecture, by the name stored in its models."""


def export_bundle(model: Any, path: str | Path, **options: Any) -> Path:
    """Write a model as a bundle that the engine runs without torch.

    The engine stretches a whole frame to one size. Class rules, calibration and thresholds come
    from the model. The graphs, then the whole engine, are compared with what NumPy computes of its
    network before the bundle appears under its name; a bundle that disagrees is not written.

    Args:
        model: A model that :func:`zsseg_rt.models.from_official` or
            :func:`zsseg_rt.models.create_model` made.
        path: Folder to write, ``NAME.zsseg``.
        **options: Those of :class:`zsseg_rt.export.options.ExportOptions` that the model's exporter
            reads; see :data:`EXPORTERS`.

    Returns:
        The bundle folder.

    Raises:
        ArgumentError: An option does not exist, or not for this architecture.
        BundleError: The folder exists, cannot be written, or the bundle disagrees with the model.
        CheckpointError: The model cannot be exported, or does not fit float16.
        ShapeError: The model does not take images of ``size_hw``.
        VocabularyError: Names, templates or the text bank are unusable.
    """
    exported, export_options = _cut(model, options)
    return write_model_bundle(Path(path), lambda: exported, export_options)


def export_graphs(model: Any, folder: Path, **options: Any) -> GraphFiles:
    """Write only a model's graphs, ``NAME.PRECISION.onnx``, into an existing folder.

    Options and errors are those of :func:`export_bundle`; ``text_encoder`` is None by default.

    Returns:
        ``{graph name: {precision: entry}}``, paths relative to ``folder``.
    """
    exported, export_options = _cut(model, {"text_encoder": None, **options})
    half = FAMILIES[exported.family].half_tensors
    graphs = save_graphs(exported.graphs, folder, export_options.precisions, half)
    return graphs | exported.text.write_graph(folder)


def _cut(model: Any, options: Mapping[str, Any]) -> tuple[ExportedModel, ExportOptions]:
    """The parts of a model, and the options that were checked for it."""
    architecture = getattr(model, "architecture", None)
    exporter = EXPORTERS.get(architecture or "")
    if exporter is None:
        raise CheckpointError(
            f"model: expected a zsseg_rt model ({', '.join(EXPORTERS)}), got "
            f"{type(model).__name__}. "
            "Build it with zsseg_rt.models.from_official('zegclip', state_dict)."
        )
    export_options = read_options(options, exporter.reads, f"architecture {architecture!r}")
    devices = {parameter.device.type for parameter in model.parameters()}
    dtypes = {str(parameter.dtype) for parameter in model.parameters()}
    if devices != {"cpu"} or dtypes != {"torch.float32"}:
        raise CheckpointError(
            "model: expected float32 weights on the CPU, got "
            f"{', '.join(sorted(dtypes))} on {', '.join(sorted(devices))}. "
            "Call model.float().cpu() first."
        )
    return exporter.export(model.eval(), export_options), export_options
