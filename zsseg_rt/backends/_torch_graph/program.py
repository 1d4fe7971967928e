"""An ONNX graph as a list of torch operations, run node by node."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from zsseg_rt.backends._torch_graph.graph import Graph, Node
from zsseg_rt.errors import BackendError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Operators whose integer inputs are values, or indices, rather than sizes and axes.
_MEET_VALUES = ("Add", "Concat", "Div", "Equal", "Gather", "Mul", "Sub")


class Program:
    """A graph's nodes in order, and its constants as tensors.

    Shapes:
        precision: ``"float16"`` if any weight is float16, otherwise ``"float32"``.
    """

    def __init__(
        self, graph: Graph, precision: str, output_dtypes: Mapping[str, torch.dtype]
    ) -> None:
        self.precision = precision
        self._output_dtypes = output_dtypes
        self.lowered: torch.dtype | None = None
        self._placed: dict[str, Tensor] = {}
        self._graph = graph
        self._last_uses = graph.last_uses()

    @classmethod
    def read(cls, path: Path) -> Program:
        """Decode an ONNX file."""
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        try:
            proto = onnx.load(path).graph
            constants = {t.name: _to_tensor(t) for t in proto.initializer}
        except (OSError, DecodeError, ValueError, TypeError) as exc:
            raise BackendError(f"{path}: expected an ONNX graph, got {exc}") from exc
        outputs = tuple(value.name for value in proto.output)
        nodes = _decode_nodes(proto, constants, path)
        graph = Graph(nodes, constants, outputs, _dtypes(proto.input))
        used = {name for node in nodes for name in node.inputs} | set(outputs)
        graph.constants = {name: held for name, held in constants.items() if name in used}
        kinds = {str(tensor.dtype) for tensor in graph.constants.values()}
        precision = "float16" if "torch.float16" in kinds else "float32"
        return cls(graph, precision, _dtypes(proto.output))

    @property
    def nodes(self) -> list[Node]:
        """The operators, in the order they run."""
        return self._graph.nodes

    @property
    def constants(self) -> dict[str, Tensor]:
        """Weights and the like, by name."""
        return self._graph.constants

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the results."""
        return self._graph.outputs

    def rewrite(self) -> dict[str, int]:
        """Fuse what can be fused, before the weights are placed; returns what was, by name."""
        from zsseg_rt.backends._torch_graph.rewrite import rewrite

        counts = rewrite(self._graph)
        self._last_uses = self._graph.last_uses()
        return counts

    def place(self, device: torch.device, lowered: torch.dtype | None) -> None:
        """Move the weights to a device and cast them; integers stay on the host.

        Integers that meet values of the device have a copy there, made once for all runs.
        """
        self.lowered = lowered
        for node in self.nodes if device.type != "cpu" else ():
            for name in node.inputs if node.op_type in _MEET_VALUES else ():
                held = self.constants.get(name)
                # torch takes a host scalar beside a device's values without a copy
                if held is not None and held.ndim > 0 and not held.is_floating_point():
                    self._placed[name] = held.to(device)
        norms = (node for node in self.nodes if node.op_type in ("AddNorm", "StartRows"))
        wide = {name for node in norms for name in node.inputs[2:4]}
        for name, tensor in self.constants.items():
            if tensor.is_floating_point():
                dtype = tensor.dtype if name in wide else lowered or tensor.dtype
                self.constants[name] = tensor.to(device=device, dtype=dtype)
        fused = (node for node in self.nodes if node.op_type == "FusedAttention")
        for name in {name for node in fused for name in node.inputs[3:]}:
            self.constants[name] = _aligned(self.constants[name])

    def run(
        self,
        feeds: dict[str, Tensor],
        on_node: Callable[[], None] | None = None,
        *,
        kept: dict[Hashable, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the graph's outputs, of the dtypes that its file states.

        ``kept`` holds what runs of one session share; it grows with the first run.
        """
        from zsseg_rt.backends._torch_graph.fused_operators import KEEPERS, RUNNABLE

        kept = {} if kept is None else kept

        values = {name: self._take(name, tensor) for name, tensor in feeds.items()}
        for node, last_uses in zip(self.nodes, self._last_uses, strict=True):
            inputs = [self._value(values, name) for name in node.inputs]
            if node.op_type in _MEET_VALUES and _needs_device(node, inputs):
                inputs = [
                    self._placed.get(name, held)
                    for name, held in zip(node.inputs, inputs, strict=True)
                ]
            try:
                if node.op_type in KEEPERS:
                    key = (node.outputs[0], *inputs[0].shape)
                    if key not in kept:
                        kept[key] = KEEPERS[node.op_type](node.attributes, *inputs)
                    inputs[-1] = kept[key]
                result = RUNNABLE[node.op_type](node.attributes, *inputs)
                results: Any = (result,) if hasattr(result, "dtype") else result
                values.update(zip(node.outputs, map(self._lower, results), strict=True))
            except (RuntimeError, IndexError, ValueError, TypeError) as exc:
                raise BackendError(f"{node.op_type} {node.name!r} failed: {exc}") from exc
            for name in last_uses:
                values.pop(name, None)
            if on_node is not None:
                on_node()
        return {name: self._give(name, self._value(values, name)) for name in self.outputs}

    def _value(self, values: dict[str, Tensor], name: str) -> Any:
        if not name:
            return None  # an optional input that was left out
        return values[name] if name in values else self.constants[name]

    def _take(self, name: str, feed: Tensor) -> Tensor:
        stated = self._graph.input_dtypes.get(name, feed.dtype)
        return self._lower(feed.to(stated) if feed.is_floating_point() else feed)

    def _give(self, name: str, result: Tensor) -> Tensor:
        stated = self._output_dtypes.get(name, result.dtype)
        return result.to(stated) if result.is_floating_point() else result

    def _lower(self, tensor: Tensor) -> Tensor:
        lower = self.lowered is not None and tensor.is_floating_point()
        return tensor.to(self.lowered) if lower else tensor


def _to_tensor(proto: Any) -> Tensor:
    import torch
    from onnx import numpy_helper

    values = np.array(numpy_helper.to_array(proto))  # a copy: torch requires writable memory
    return torch.from_numpy(values)


def _decode_nodes(proto: Any, constants: dict[str, Tensor], path: Path) -> list[Node]:
    from onnx import helper

    from zsseg_rt.backends._torch_graph.operators import OPERATORS

    nodes: list[Node] = []
    for node in proto.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        inputs = tuple(node.input)
        if node.op_type == "Constant" and "value" in attributes:
            constants[node.output[0]] = _to_tensor(attributes["value"])
            continue
        if node.op_type == "Cast" and node.input[0] in constants:  # a weight stored in fewer bytes
            narrow: Any = constants[node.input[0]]
            constants[node.output[0]] = cast("Tensor", OPERATORS["Cast"](attributes, narrow))
            continue
        if node.op_type == "Clip":
            inputs = _clip_bounds(node, constants, attributes)
        if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
            raise BackendError(
                f"{path}: node {node.name!r}: expected an operator that backend 'torch' supports, "
                f"got {node.op_type!r}. Use backend 'openvino' or 'tensorrt'."
            )
        nodes.append(
            Node(
                name=node.name,
                op_type=node.op_type,
                inputs=inputs,
                outputs=tuple(node.output),
                attributes=attributes,
            )
        )
    return nodes


def _clip_bounds(
    node: Any, constants: Mapping[str, Tensor], attributes: dict[str, Any]
) -> tuple[str, ...]:
    """Turn bounds that the graph holds into attributes; returns the inputs that are left."""
    left = list(node.input)
    for place, name in ((1, "min"), (2, "max")):
        if place < len(left) and left[place] in constants:
            attributes[name] = constants[left[place]].item()
            left[place] = ""
    return tuple(left)


def _needs_device(node: Node, inputs: Sequence[Any]) -> bool:
    """Whether host integers among the inputs must be on the device: they meet values there."""
    from zsseg_rt.backends._torch_graph.operators import is_run

    if all(held is None or held.device.type == "cpu" for held in inputs):
        return False
    return node.op_type != "Gather" or not is_run(inputs[1])


def _dtypes(values: Any) -> dict[str, torch.dtype]:
    """What inputs or outputs are, by name."""
    from zsseg_rt.backends._torch_graph.operators import TORCH_DTYPES

    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    return {name: TORCH_DTYPES[kind] for name, kind in kinds.items() if kind in TORCH_DTYPES}


def _aligned(mask: Tensor) -> Tensor:
    """A mask [..., N, M] whose rows begin at multiples of 8, as fused kernels on GPUs want them."""
    import torch.nn.functional as F

    columns = mask.shape[-1]
    return F.pad(mask, (0, -columns % 8))[..., :columns]
