"""Turn a float32 ONNX graph into a float16 one that keeps what overflows in float32.

LayerNorm, softmax and L2 norms stay float32 between explicit casts; every other floating-point
operation and weight becomes float16. So do the inputs and outputs that are named; the others stay
float32.

A float32 graph may store as float16 what float16 holds exactly: CLIP was published in float16
(Radford et al., ICML 2021), so most weights of systems that freeze it are copies of such numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from zsseg_rt.errors import CheckpointError

# Squares and exponentials: x * x overflows float16 from |x| = 256 on.
_FLOAT32_OPS = {"LayerNormalization", "InstanceNormalization", "Softmax"}
_FLOAT32_OPS |= {"ReduceL2", "ReduceSum", "ReduceMean", "Sqrt"}
_MOVES = {"Slice", "Gather", "Reshape", "Transpose", "Split", "Squeeze", "Unsqueeze", "Identity"}
_FLOAT16_MAX = float(np.finfo(np.float16).max)
_MIN_ELEMENTS = 1024  # below this, the cast node takes about as much as float16 saves


def to_float16(model: onnx.ModelProto, *, half: Collection[str] = ()) -> onnx.ModelProto:
    """Return a float16 version of a float32 graph.

    Shapes:
        half: Names of inputs and outputs that become float16, where the graph has them and they are
            float32; the others stay as they are.

    Returns:
        A new model; ``model`` is not changed.
    """
    return _Converter(model, half).convert()


def store_exact_halves(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with every large weight that float16 holds exactly stored as float16.

    Returns:
        A new model whose nodes see the same float32 values; ``model`` itself if nothing changes.
    """
    halves = {
        tensor.name: half for tensor in model.graph.initializer if (half := _exact_half(tensor))
    }
    if not halves:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        if tensor.name in halves:
            tensor.CopyFrom(halves[tensor.name])
    casts = [
        helper.make_node("Cast", [half.name], [name], name=f"cast_{name}", to=TensorProto.FLOAT)
        for name, half in halves.items()
    ]
    nodes = [*casts, *result.graph.node]
    result.graph.ClearField("node")
    result.graph.node.extend(nodes)
    onnx.checker.check_model(result)
    return result


def _exact_half(tensor: TensorProto) -> TensorProto | None:
    """The same numbers as float16, or None if float16 does not hold them exactly."""
    if tensor.data_type != TensorProto.FLOAT:
        return None
    values = numpy_helper.to_array(tensor)
    if values.size < _MIN_ELEMENTS:
        return None
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), values):
        return None
    return numpy_helper.from_array(half, f"{tensor.name}.half")


class _Converter:
    def __init__(self, model: onnx.ModelProto, half: Collection[str]) -> None:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        self._model = model
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._is_float = {
            value.name
            for value in _values(inferred.graph)
            if value.type.tensor_type.elem_type == TensorProto.FLOAT
        } | {n for n, t in self._initializers.items() if t.data_type == TensorProto.FLOAT}
        self._half = set(half) & self._is_float
        inputs = {value.name for value in model.graph.input}
        self._in_float32 = (inputs & self._is_float) - self._half
        self._read = {name for node in model.graph.node for name in node.input}
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, TensorProto] = {}
        self._casts: dict[tuple[str, int], str] = {}

    def convert(self) -> onnx.ModelProto:
        outputs = {value.name for value in self._model.graph.output}
        for node in self._model.graph.node:
            self._convert_node(node, outputs)
        result = onnx.ModelProto()
        result.CopyFrom(self._model)
        for field in ("node", "initializer", "value_info"):
            result.graph.ClearField(field)
        result.graph.node.extend(self._nodes)
        result.graph.initializer.extend(self._weights.values())
        for value in (*result.graph.input, *result.graph.output):
            if value.name in self._half:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16
        onnx.checker.check_model(result)
        return result

    def _convert_node(self, node: onnx.NodeProto, outputs: set[str]) -> None:
        wide = self._stays_float32(node)
        kind = TensorProto.FLOAT if wide else TensorProto.FLOAT16
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:]
        copy.input.extend(self._take(name, kind) for name in node.input)
        _retype_attributes(copy, kind)
        self._nodes.append(copy)
        for index, name in enumerate(node.output):
            if name not in self._is_float:
                continue
            if name in outputs and wide == (name in self._half):
                self._cast_output(copy, index)
            elif wide:
                self._in_float32.add(name)

    def _cast_output(self, node: onnx.NodeProto, index: int) -> None:
        """Give an output of the graph the type it is stated with; both stay available inside."""
        name = node.output[index]
        narrow = name in self._half
        inside = f"{name}.float32" if narrow else f"{name}.float16"
        node.output[index] = inside
        kind = TensorProto.FLOAT16 if narrow else TensorProto.FLOAT
        self._nodes.append(_cast(inside, name, kind))
        self._casts[name, TensorProto.FLOAT if narrow else TensorProto.FLOAT16] = inside
        if not narrow:
            self._in_float32.add(name)

    def _stays_float32(self, node: onnx.NodeProto) -> bool:
        if node.op_type in _FLOAT32_OPS:
            return True
        data = [name for name in node.input if name in self._is_float]
        computed = [name for name in data if name not in self._initializers]
        if node.op_type == "Div":  # the division by a norm
            return any(name in self._in_float32 for name in computed)
        if node.op_type not in _MOVES or not computed or self._only_leaves_as_half(node):
            return False
        return set(computed) <= self._in_float32

    def _only_leaves_as_half(self, node: onnx.NodeProto) -> bool:
        """Whether results leave the graph in float16: parts of one tensor then share its cast."""
        return all(name in self._half and name not in self._read for name in node.output)

    def _take(self, name: str, kind: int) -> str:
        """The name under which a value is available as ``kind``; casts it at most once."""
        if name in self._initializers:
            return self._take_weight(name, kind)
        if name not in self._is_float or (name in self._in_float32) == (kind == TensorProto.FLOAT):
            return name
        if (name, kind) not in self._casts:
            suffix = "float32" if kind == TensorProto.FLOAT else "half"
            self._casts[name, kind] = f"{name}.{suffix}"
            self._nodes.append(_cast(name, self._casts[name, kind], kind))
        return self._casts[name, kind]

    def _take_weight(self, name: str, kind: int) -> str:
        tensor = self._initializers[name]
        if name not in self._is_float or kind == TensorProto.FLOAT:
            self._weights[name] = tensor
            return name
        half = f"{name}.half"
        if half not in self._weights:
            self._weights[half] = _half(tensor, half)
        return half


def _half(tensor: TensorProto, name: str) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    finite = values[np.isfinite(values)]
    largest = float(np.abs(finite).max(initial=0.0))
    if largest > _FLOAT16_MAX:
        raise CheckpointError(
            f"{tensor.name}: expected weights up to {_FLOAT16_MAX:.0f} for float16, got "
            f"{largest:.3g}. Export with precisions=('float32',)."
        )
    return numpy_helper.from_array(values.astype(np.float16), name)


def _retype_attributes(node: onnx.NodeProto, kind: int) -> None:
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = kind
        is_value = attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT
        if is_value and kind == TensorProto.FLOAT16:
            attribute.t.CopyFrom(_half(attribute.t, attribute.t.name))


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=kind)


def _values(graph: onnx.GraphProto) -> Iterable[onnx.ValueInfoProto]:
    yield from graph.input
    yield from graph.output
    yield from graph.value_info
