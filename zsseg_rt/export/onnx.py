"""Make ONNX graphs from a model's parts, without control flow inside.

The dynamo exporter at opset 20 gives one node for LayerNorm and constant attention scales; opset 23
attention is unknown to TensorRT 10.3, and older opsets decompose GELU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import onnxscript  # noqa: F401  (torch's exporter needs it: if missing, fail here, not half-way)
import torch
from torch import Tensor, nn

from zsseg_rt.errors import BackendError
from zsseg_rt.export.graph_files import name_nodes, refuse_control_flow, strip_notes
from zsseg_rt.onnx.network import OPSET


@dataclass(frozen=True, kw_only=True)
class GraphExport:
    """One module to export.

    Attributes:
        module: What is traced, in evaluation mode.
        inputs: Example inputs, by their names in the graph.
        outputs: Names in the graph of what the module returns.
        dynamic: Axes of inputs that stay open, each with a label and its largest size.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Sequence[str]
    dynamic: Mapping[str, Mapping[int, tuple[str, int]]] = field(default_factory=dict)

    def to_onnx(self, name: str) -> onnx.ModelProto:
        """Trace the module into one graph, without notes about the computer it is made on."""
        labels = {place for axes in self.dynamic.values() for place in axes.values()}
        sizes = {label: torch.export.Dim(label, min=1, max=most) for label, most in labels}
        dims = {
            tensor: {axis: sizes[label] for axis, (label, _) in axes.items()}
            for tensor, axes in self.dynamic.items()
        }
        with torch.no_grad():
            program = torch.onnx.export(
                self.module.eval(),
                tuple(self.inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                input_names=list(self.inputs),
                output_names=list(self.outputs),
                dynamic_shapes=tuple(dims.get(tensor) for tensor in self.inputs),
                verbose=False,
            )
        if program is None:
            raise BackendError(f"{name}: expected an ONNX program from the exporter, got none")
        graph: onnx.ModelProto = program.model_proto
        name_nodes(graph)
        strip_notes(graph, name)
        refuse_control_flow(graph, name)
        return graph


def image_graph(
    module: nn.Module, size_hw: tuple[int, int], outputs: Sequence[str], window_batch: int = 1
) -> GraphExport:
    """How an image encoder is exported: from ``image`` [B, 3, H, W] of one size; B is 1 or open."""
    return GraphExport(
        module=module,
        inputs={"image": torch.zeros(window_batch, 3, *size_hw)},
        outputs=outputs,
        dynamic=windows_open(window_batch, "image"),
    )


def windows_open(window_batch: int, *tensors: str) -> dict[str, dict[int, tuple[str, int]]]:
    """The first axis of these inputs, open where graphs take more than one window."""
    return {name: {0: ("windows", window_batch)} for name in tensors if window_batch > 1}
