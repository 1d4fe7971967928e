"""Make ONNX graphs from a model's parts, without control flow inside.

The dynamo exporter at opset 20 gives one node for LayerNorm and constant attention scales; opset 23
attention is unknown to TensorRT 10.3, and older opsets decompose GELU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnxscript  # noqa: F401  (torch's exporter needs it: if missing, fail here, not half-way)
import torch
from torch import Tensor, nn

import zsseg_rt
from zsseg_rt.errors import BackendError, CheckpointError
from zsseg_rt.export.graph_files import name_nodes, refuse_control_flow, strip_notes
from zsseg_rt.onnx.network import OPSET

_MAX_PROMPTS = 65536


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
    """Refuse a model that cannot be exported as it is."""
    devices = {parameter.device.type for parameter in model.parameters()}
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if devices != {"cpu"} or dtypes != {torch.float32}:
        raise CheckpointError(
            "model: expected float32 weights on the CPU, got "
            f"{', '.join(sorted(map(str, dtypes)))} on {', '.join(sorted(devices))}. "
            "Call model.float().cpu() first."
        )


def provenance() -> dict[str, Any]:
    """What a manifest says about how its graphs were made."""
    return {
        "package": f"zsseg_rt {zsseg_rt.__version__}",
        "torch": str(torch.__version__),
        "opset": OPSET,
    }
