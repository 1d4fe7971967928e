"""Write a model's parts as ONNX graphs: one file a graph and precision, no control flow inside.

The dynamo exporter at opset 20 gives one node for LayerNorm and constant attention scales; opset 23
attention is unknown to TensorRT 10.3, and older opsets decompose GELU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import onnx
import onnxscript  # noqa: F401  (torch's exporter needs it: found missing here, not half-way)
import torch
from torch import Tensor, nn

import zsseg_rt
from zsseg_rt.bundle import GraphEntry
from zsseg_rt.errors import BackendError, CheckpointError
from zsseg_rt.export.graph_files import (
    GRAPH_PRECISIONS,
    MAX_CLASSES,
    GraphFiles,
    check_precisions,
    refuse_control_flow,
    save_variants,
    strip_notes,
)

__all__ = [
    "OPSET",
    "FoldsForInference",
    "GraphExport",
    "InferenceGraphs",
    "check_float32_on_cpu",
    "descriptor_graphs",
    "export_graphs",
    "provenance",
    "save_graphs",
    "save_text_encoder",
    "text_encoder_export",
    "to_onnx",
]

OPSET = 20
_MAX_PROMPTS = 65536


class InferenceGraphs(Protocol):
    """What :meth:`zsseg_rt.models.descriptor_model.DescriptorModel.fold_for_inference` gives."""

    image_encoder: nn.Module
    decoder: nn.Module
    descriptor_weight: Tensor
    descriptor_bias: Tensor
    logit_scale: float
    grid_hw: tuple[int, int]
    size_hw: tuple[int, int]
    memory_dim: int
    num_regions: int


class FoldsForInference(Protocol):
    """A model that can cut itself into exportable parts."""

    def fold_for_inference(self, size_hw: tuple[int, int] | None = None) -> Any:
        """Return the parts; see :class:`InferenceGraphs`."""


@dataclass(frozen=True, kw_only=True)
class GraphExport:
    """One module to export.

    Attributes:
        module: What is traced, in evaluation mode.
        inputs: Example inputs by the graph's names.
        outputs: The graph's names of what the module returns.
        dynamic: Axes of inputs that stay open, each with a label and its largest size.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Sequence[str]
    dynamic: Mapping[str, Mapping[int, tuple[str, int]]] = field(default_factory=dict)


def export_graphs(
    model: FoldsForInference,
    folder: Path,
    *,
    size_hw: tuple[int, int] | None = None,
    precisions: Sequence[str] = GRAPH_PRECISIONS,
    text_encoder: nn.Module | None = None,
) -> GraphFiles:
    """Write ``NAME.PRECISION.onnx`` for every graph of a descriptor model.

    Graphs and tensors: ``image_encoder``: ``image`` [1, 3, H, W] to ``patch_embeds`` [1, N, M] and
    ``cls_embed`` [R, D], a row for each region (ZegCLIP: one); ``decoder``: ``queries``
    [R, classes, E] and ``patch_embeds`` to ``class_embeds`` [1, classes, E] and ``patch_keys``
    [1, N, E]; ``text_encoder`` (float32 only: it runs once a phrase): ``token_ids`` int64
    [prompts, L] to ``text_embeds`` [prompts, D]. All floating-point inputs and outputs are float32,
    whatever the precision inside.

    Args:
        model: The model; its weights are not changed.
        folder: Existing folder to write into.
        size_hw: Input size in pixels; None is the model's own.
        precisions: Which variants to write, of ``"float32"`` and ``"float16"``.
        text_encoder: The text tower to write, or None for none.

    Returns:
        ``{graph name: {precision: entry}}``, paths relative to ``folder``.

    Raises:
        BackendError: The exporter failed, or emitted control flow.
        CheckpointError: A weight does not fit into float16.
    """
    check_precisions(precisions)
    graphs = descriptor_graphs(model.fold_for_inference(size_hw))
    return save_graphs(graphs, folder, precisions, text_encoder=text_encoder)


def save_graphs(
    graphs: Mapping[str, GraphExport],
    folder: Path,
    precisions: Sequence[str],
    *,
    text_encoder: nn.Module | None = None,
) -> GraphFiles:
    """Write ``NAME.PRECISION.onnx`` for every graph and precision, and the text tower if any.

    Raises:
        BackendError: The exporter failed, or emitted control flow.
        CheckpointError: A weight does not fit into float16.
    """
    files = {}
    for name, job in graphs.items():
        graph = to_onnx(name, job)
        files[name] = save_variants(graph, name, folder, precisions)
    if text_encoder is not None:
        files["text_encoder"] = save_text_encoder(text_encoder, folder)
    return files


def save_text_encoder(module: nn.Module, folder: Path) -> dict[str, GraphEntry]:
    """Write a text tower: float32 only, for it runs once a phrase."""
    graph = to_onnx("text_encoder", text_encoder_export(module))
    return save_variants(graph, "text_encoder", folder, ("float32",))


def descriptor_graphs(parts: InferenceGraphs) -> dict[str, GraphExport]:
    """What a descriptor bundle consists of; see :func:`export_graphs`."""
    return {"image_encoder": _image_encoder(parts), "decoder": _decoder(parts)}


def _image_encoder(parts: InferenceGraphs) -> GraphExport:
    return GraphExport(
        module=parts.image_encoder,
        inputs={"image": torch.zeros(1, 3, *parts.size_hw)},
        outputs=("patch_embeds", "cls_embed"),
    )


def _decoder(parts: InferenceGraphs) -> GraphExport:
    query_dim = parts.descriptor_weight.shape[0]
    num_patches = parts.grid_hw[0] * parts.grid_hw[1]
    return GraphExport(
        module=parts.decoder,
        inputs={
            "queries": torch.zeros(parts.num_regions, 3, query_dim),
            "patch_embeds": torch.zeros(1, num_patches, parts.memory_dim),
        },
        outputs=("class_embeds", "patch_keys"),
        dynamic={"queries": {1: ("classes", MAX_CLASSES)}},
    )


def text_encoder_export(module: nn.Module) -> GraphExport:
    """How a text tower is exported: ``token_ids`` to ``text_embeds``, any number of prompts."""
    config: Any = module.config
    token_ids = torch.arange(3 * config.context_length).reshape(3, -1) % config.vocab_size
    return GraphExport(
        module=module,
        inputs={"token_ids": token_ids},
        outputs=("text_embeds",),
        dynamic={"token_ids": {0: ("prompts", _MAX_PROMPTS)}},
    )


def check_float32_on_cpu(model: nn.Module) -> None:
    """Refuse a model that is not exported as it is.

    Raises:
        CheckpointError: A weight is not float32 or not on the CPU.
    """
    devices = {parameter.device.type for parameter in model.parameters()}
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if devices != {"cpu"} or dtypes != {torch.float32}:
        raise CheckpointError(
            "model: expected float32 weights on the CPU, got "
            f"{', '.join(sorted(map(str, dtypes)))} on {', '.join(sorted(devices))}. "
            "Call model.float().cpu() first."
        )


def provenance(source: str) -> dict[str, Any]:
    """What a manifest says about how its graphs were made."""
    return {
        "package": f"zsseg_rt {zsseg_rt.__version__}",
        "torch": str(torch.__version__),
        "opset": OPSET,
        "source": source,
    }


def to_onnx(name: str, job: GraphExport) -> onnx.ModelProto:
    """Trace a module into one graph.

    Args:
        name: Name of the graph.
        job: Module, example inputs and names.

    Returns:
        The graph, without notes about the computer it was made on.

    Raises:
        BackendError: The exporter failed, or emitted control flow.
    """
    module = job.module.eval()
    dims = {
        tensor: {
            axis: torch.export.Dim(label, min=1, max=most) for axis, (label, most) in axes.items()
        }
        for tensor, axes in job.dynamic.items()
    }
    shapes = [dims.get(tensor) for tensor in job.inputs]
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(job.inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            input_names=list(job.inputs),
            output_names=list(job.outputs),
            dynamic_shapes=tuple(shapes),
            verbose=False,
        )
    if program is None:
        raise BackendError(f"{name}: expected an ONNX program from the exporter, got none")
    graph: onnx.ModelProto = program.model_proto
    strip_notes(graph, name)
    refuse_control_flow(graph, name)
    return graph
