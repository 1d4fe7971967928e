"""The table of ONNX operators: counts of inputs, how they are judged and computed, attributes.

No row goes that an exporter here could write: stored bundles keep loading. Left out are control
flow, random numbers, text, recurrent nets, training, results whose size follows from values
(NonZero, Unique), and operators that read where computed numbers point (GridSample, RoiAlign).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from zsseg_rt.onnx import rules, runs
from zsseg_rt.onnx.network import Node, Weight
from zsseg_rt.onnx.operations import DTYPES
from zsseg_rt.onnx.reader import check_shape

MANY = 1 << 16
_ALL = 99  # inputs: all may be tensors of a device


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A row of the table."""

    # (since this operator set, fewest inputs, most inputs), the oldest first
    arity: tuple[tuple[int, int, int], ...]
    rule: Callable[..., Any]  # Judges a call, and says the types and shapes of its results
    run: Callable[..., Any] | None  # Computes it; None where only other runtimes do
    attributes: frozenset[str]  # Those that it may have
    # Fewest and most outputs. The places that MaxPool took and the statistics of norms serve
    # training
    outputs: tuple[int, int] = (1, 1)
    host: int = _ALL  # Inputs from this place on are sizes and axes, which stay on the host

    def inputs(self, opset: int) -> tuple[int, int] | None:
        """Fewest and most inputs in an operator set; None where graphs may not use it."""
        fitting = [(low, high) for since, low, high in self.arity if since <= opset]
        return fitting[-1] if fitting else None


OPERATORS: dict[str, Operator] = {}


def _add(name: str, arity: str, rule: Any, run: Any, attributes: str = "", **more: Any) -> None:
    """Add a row; ``arity`` is ``"SINCE:FEWEST-MOST ..."``, of operator set 11 if unsaid."""
    parsed = []
    for each in arity.split():
        since, _, counts = each.rpartition(":")
        low, _, high = counts.partition("-")
        parsed.append((int(since or 11), int(low), MANY if high == "*" else int(high or low)))
    OPERATORS[name] = Operator(
        arity=tuple(parsed), rule=rule, run=run, attributes=frozenset(attributes.split()), **more
    )


_WINDOWS = "auto_pad dilations kernel_shape pads strides"
_PLACES, _SCALED = "axis keepdims select_last_index", "axis block_size output_dtype"
_NORM, _BATCH = "epsilon stash_type", "epsilon momentum training_mode"
_RESIZE = """antialias axes coordinate_transformation_mode cubic_coeff_a exclude_outside
extrapolation_value keep_aspect_ratio_policy mode nearest_mode"""

# From the schemas of ONNX, except that the ``roi`` of Resize 11 may be left out, as exporters do,
# and Dropout may not train.
# fmt: off
_XPS = "Ceil Cos Erf Exp Floor Log Relu Round Sigmoid Sign Sin Sqrt Tanh"
for _name in _XPS.split():
    _add(_name, "1", rules.same, runs.named(_name.lower()))
for _name, _run in runs.REDUCTIONS.items():
    _arity = "1 13:1-2" if _name == "ReduceSum" else "1 18:1-2"
    _add(_name, _arity, rules.reduce, _run, "axes keepdims noop_with_empty_axes", host=1)

_add("Abs", "1", rules.same, lambda xp, x: abs(x))
_add("Celu", "12:1", rules.same, lambda xp, x, alpha=1.0: runs.elu(xp, x / alpha, alpha), "alpha")
_add("Elu", "1", rules.same, runs.elu, "alpha")
_add("Gelu", "20:1", rules.same,
     lambda xp, x, approximate=b"none": xp.gelu(x, runs.text(approximate)), "approximate")
_add("HardSigmoid", "1", rules.same, runs.hard_sigmoid, "alpha beta")
_add("HardSwish", "14:1", rules.same, lambda xp, x: x * runs.hard_sigmoid(xp, x, 1 / 6))
_add("LeakyRelu", "1", rules.same,
     lambda xp, x, alpha=0.01: xp.where(x < 0, alpha * x, x), "alpha")
_add("Mish", "18:1", rules.same, lambda xp, x: x * xp.tanh(runs.softplus(xp, x)))
_add("Neg", "1", rules.same, lambda xp, x: -x)
_add("Not", "1", rules.same, runs.named("logical_not"))
_add("Reciprocal", "1", rules.same, lambda xp, x: 1 / x)
_add("Selu", "1", rules.same,
     lambda xp, x, alpha=1.67326319217681884, gamma=1.05070102214813232:
     gamma * runs.elu(xp, x, alpha), "alpha gamma")
_add("Softplus", "1", rules.same, runs.softplus)
_add("Softsign", "1", rules.same, lambda xp, x: x / (1 + abs(x)))
_add("Swish", "24:1", rules.same, lambda xp, x, alpha=1.0: x * xp.sigmoid(alpha * x), "alpha")
_add("ThresholdedRelu", "1", rules.same,
     lambda xp, x, alpha=1.0: xp.where(x > alpha, x, 0 * x), "alpha")

_add("Add", "2", rules.combine, lambda xp, a, b: a + b)
_add("And", "2", rules.combine, runs.named("logical_and"))
_add("Div", "2", rules.divide,  # integers are cut towards zero
     lambda xp, a, b: a / b if xp.is_float(a) else xp.sign(a) * (abs(a) // b))
_add("Equal", "2", rules.compare, lambda xp, a, b: a == b)
_add("Greater", "2", rules.compare, lambda xp, a, b: a > b)
_add("GreaterOrEqual", "12:2", rules.compare, lambda xp, a, b: a >= b)
_add("Less", "2", rules.compare, lambda xp, a, b: a < b)
_add("LessOrEqual", "12:2", rules.compare, lambda xp, a, b: a <= b)
_add("Max", "1-*", rules.combine, lambda xp, *inputs: reduce(xp.maximum, inputs))
_add("Mean", "1-*", rules.combine, lambda xp, *inputs: reduce(xp.add, inputs) / len(inputs))
_add("Min", "1-*", rules.combine, lambda xp, *inputs: reduce(xp.minimum, inputs))
_add("Mod", "2", rules.divide,
     lambda xp, a, b, fmod=0: xp.fmod(a, b) if fmod else xp.remainder(a, b), "fmod")
_add("Mul", "2", rules.combine, lambda xp, a, b: a * b)
_add("Or", "2", rules.combine, runs.named("logical_or"))
_add("PRelu", "2", rules.prelu, lambda xp, x, slope: xp.where(x < 0, slope * x, x))
_add("Pow", "2", lambda call, a, b: rules.broadcast(a.shape, b.shape),
     lambda xp, a, b: xp.cast(a**b, xp.dtype_name(a)))
_add("Sub", "2", rules.combine, lambda xp, a, b: a - b)
_add("Sum", "1-*", rules.combine, lambda xp, *inputs: reduce(xp.add, inputs))
_add("Where", "3", rules.where, runs.named("where"))
_add("Xor", "2", rules.combine, runs.named("logical_xor"))

_add("ArgMax", "1", rules.pick, lambda xp, x, **rule: runs.place(xp, xp.argmax, x, **rule), _PLACES)
_add("ArgMin", "1", rules.pick, lambda xp, x, **rule: runs.place(xp, xp.argmin, x, **rule), _PLACES)
_add("Attention", "23:3-4", rules.attention, runs.attention, "is_causal scale")
_add("AveragePool", "1", rules.pool, runs.average_pool, f"{_WINDOWS} ceil_mode count_include_pad")
_add("BatchNormalization", "5", rules.channel_norm, runs.batch_norm, _BATCH)
_add("Cast", "1", rules.cast,
     lambda xp, x, to, saturate=1: xp.cast(x, DTYPES[to]), "saturate to")
_add("CastLike", "15:2", lambda call, x, like: rules.Value(like.dtype, x.shape),
     lambda xp, x, like, saturate=1: xp.cast(x, xp.dtype_name(like)), "saturate")
_add("Clip", "1-3", rules.clip, runs.clip, host=1)
_add("Concat", "1-*", rules.concat, lambda xp, *parts, axis: xp.concat(parts, axis), "axis")
_add("Constant", "0", None, runs.constant, "value value_float value_floats value_int value_ints")
_add("ConstantOfShape", "1", rules.constant_of_shape, runs.constant_of_shape, "value", host=0)
_add("Conv", "2-3", rules.conv, runs.conv, f"{_WINDOWS} group")
_add("ConvTranspose", "2-3", rules.conv, runs.conv_transpose, f"{_WINDOWS} group output_padding")
_add("CumSum", "2", rules.cumsum, runs.cumsum, "exclusive reverse", host=1)
_add("DepthToSpace", "1", rules.depth_to_space, runs.depth_to_space, "blocksize mode")
_add("DequantizeLinear", "2-3", rules.quantise, None, _SCALED)
_add("Dropout", "1 12:1-2",
     lambda call, x, *_: [x, rules.Value("bool", x.shape)][: call.num_outputs],
     lambda xp, x, *_, **__: (x, x == x), "ratio seed", outputs=(1, 2))
_add("Einsum", "12:1-*", rules.einsum,
     lambda xp, *inputs, equation: xp.einsum(runs.text(equation).replace(" ", ""), *inputs),
     "equation")
_add("Expand", "2", lambda call, x, sizes: rules.broadcast(x.shape, rules.sizes_of(sizes, 0)),
     runs.expand, host=1)
_add("Flatten", "1", rules.flatten, runs.flatten, "axis")
_add("Gather", "2", rules.gather, runs.gather, "axis", host=1)
_add("GatherElements", "2", rules.gather_elements,
     lambda xp, x, indices, axis=0: xp.take_along(x, indices, axis), "axis")
_add("GatherND", "2", rules.gather_nd, runs.gather_nd, "batch_dims")
_add("Gemm", "2-3", rules.gemm, runs.gemm, "alpha beta transA transB")
_add("GlobalAveragePool", "1", rules.pool,
     lambda xp, x: xp.mean(x, axis=tuple(range(2, x.ndim)), keepdims=True))
_add("GlobalMaxPool", "1", rules.pool,
     lambda xp, x: xp.amax(x, axis=tuple(range(2, x.ndim)), keepdims=True))
_add("GroupNormalization", "21:3", rules.channel_norm, runs.group_norm, f"{_NORM} num_groups")
_add("Identity", "1", lambda call, x: x, lambda xp, x: x)
_add("InstanceNormalization", "3", rules.channel_norm, runs.group_norm, "epsilon")
_add("LayerNormalization", "17:2-3", rules.layer_norm, runs.layer_norm, f"axis {_NORM}")
_add("LogSoftmax", "1", rules.along, runs.log_softmax, "axis")
_add("LpNormalization", "1", rules.along,
     lambda xp, x, axis=-1, p=2: x / runs.REDUCTIONS[f"ReduceL{p}"](xp, x, [axis]), "axis p")
_add("MatMul", "2", rules.matmul, runs.named("matmul"))
_add("MaxPool", "1", rules.pool, runs.max_pool, f"{_WINDOWS} ceil_mode storage_order")
_add("Pad", "2-3 18:2-4", rules.pad, runs.pad, "mode", host=1)
_add("QuantizeLinear", "2-3", rules.quantise, None, f"{_SCALED} precision saturate")
_add("RMSNormalization", "23:2", rules.layer_norm, runs.rms_norm, f"axis {_NORM}")
_add("Range", "3", rules.range_, runs.range_, host=0)
_add("Reshape", "2", rules.reshape, runs.reshape, "allowzero", host=1)
_add("Resize", "1-4", rules.resize, runs.resize, _RESIZE, host=1)
_add("ScatterND", "3", rules.scatter_nd, runs.scatter_nd, "reduction")
_add("Shape", "1", rules.shape, runs.shape, "end start")
_add("Size", "1", rules.shape, lambda xp, x: np.array(math.prod(x.shape), np.int64))
_add("Slice", "3-5", rules.slice_, runs.slice_, host=1)
_add("Softmax", "1", rules.along, runs.softmax, "axis")
_add("SpaceToDepth", "1", rules.space_to_depth, runs.space_to_depth, "blocksize")
_add("Split", "1 13:1-2", rules.split, runs.split, "axis num_outputs split", outputs=(1, MANY),
     host=1)
_add("Squeeze", "1 13:1-2", rules.squeeze, runs.squeeze, "axes", host=1)
_add("Tile", "2", rules.tile, lambda xp, x, times: xp.tile(x, tuple(runs.numbers(times))), host=1)
_add("TopK", "2", rules.top_k, runs.top_k, "axis largest sorted", outputs=(2, 2), host=1)
_add("Transpose", "1", rules.transpose, runs.transpose, "perm")
_add("Trilu", "14:1-2", rules.trilu,
     lambda xp, x, offset=0, upper=1: (xp.triu if upper else xp.tril)(x, runs.numbers(offset)[0]),
     "upper", host=1)
_add("Unsqueeze", "1 13:2", rules.unsqueeze, runs.unsqueeze, "axes", host=1)
# fmt: on


# --- attributes; what is one integer is not listed ---

_KINDS: dict[str, Any] = {}
for _kind, _names in (
    (float, "alpha beta cubic_coeff_a epsilon extrapolation_value gamma momentum ratio scale"),
    (float, "value_float"),
    ([int], "axes dilations kernel_shape output_padding pads perm split strides value_ints"),
    ([float], "value_floats"),
    (bytes, "approximate auto_pad coordinate_transformation_mode equation"),
    (bytes, "keep_aspect_ratio_policy mode nearest_mode reduction"),
    (Weight, "value"),
):
    _KINDS |= dict.fromkeys(_names.split(), _kind)
# What texts may say; the first is the default.
CHOICES = {
    "approximate": ("none", "tanh"),
    "auto_pad": ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"),
    "coordinate_transformation_mode": (
        "half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"
    ),
    "keep_aspect_ratio_policy": ("stretch",),
    "nearest_mode": ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"),
    "reduction": ("none", "add"),
    "mode Resize": ("nearest", "linear", "cubic"),
    "mode Pad": ("constant", "reflect", "edge"),
    "mode DepthToSpace": ("DCR", "CRD"),
}  # fmt: skip
_STEPS = ("kernel_shape", "strides", "dilations", "blocksize", "group")
_MAX_STEP = 1 << 16
_BY_AXIS = 13  # the operator set since which a softmax takes one axis, and not all behind it


def check_node(where: str, node: Node, opset: int) -> None:
    """Check a node by itself: operator, counts of inputs and outputs, attributes."""
    operator = OPERATORS.get(node.kind)
    inputs = None if operator is None else operator.inputs(opset)
    if operator is None or inputs is None:
        kind = node.kind if "'" in node.kind else repr(node.kind)
        raise ValueError(
            f"{where}: expected an operator that encoders use, in the standard operator set "
            f"{opset}, got {kind}. Cut the graph before that node, or replace it"
        )
    fewest, most = inputs
    _check_count(where, "inputs", node.inputs, len(node.inputs) if most == MANY else fewest, inputs)
    _check_count(where, "outputs", node.outputs, operator.outputs[0], operator.outputs)
    for name, value in node.attributes.items():
        if value is None:
            raise ValueError(
                f"{where}: {name}: expected a number, text or tensor of its type, "
                "got a subgraph or another type"
            )
        if name not in operator.attributes or not _has_kind(name, value):
            raise ValueError(
                f"{where}: expected attributes of {node.kind} "
                f"({', '.join(sorted(operator.attributes))}), each of its type, got {name!r}"
            )
        choices = CHOICES.get(name) or CHOICES.get(f"{name} {node.kind}")
        if choices and value not in map(str.encode, choices):
            raise ValueError(
                f"{where}: {name}: expected one of {', '.join(choices)}, got {value!r}"
            )
        _check_sizes(f"{where}: {name}", name, value if isinstance(value, list) else [value])


def newest(node: Node, opset: int) -> Node:
    """The node with attributes that say what an older operator set takes for granted."""
    attributes = dict(node.attributes)
    if node.kind == "Split":
        attributes.setdefault("num_outputs", len(node.outputs))
    elif node.kind in ("Softmax", "LogSoftmax") and opset < _BY_AXIS:
        attributes = {"axis": 1, **attributes, "flattened": 1}
    else:
        return node
    return node._replace(attributes=attributes)


def _check_count(
    where: str, what: str, names: Sequence[str], stated: int, expected: tuple[int, int]
) -> None:
    """Refuse too few or too many names, and one of the first ``stated`` that is left out."""
    if "" in names[:stated] or not expected[0] <= len(names) <= expected[1]:
        raise ValueError(
            f"{where}: expected {expected[0]} to {expected[1]} {what}, got "
            f"{[name or None for name in names]}"
        )


def _has_kind(name: str, value: Any) -> bool:
    """Whether an attribute's value is of the type that its name has in every operator."""
    kind = _KINDS.get(name, int)
    if isinstance(kind, list):
        return isinstance(value, list) and all(type(item) is kind[0] for item in value)
    return type(value) is kind


def _check_sizes(where: str, name: str, values: Sequence[Any]) -> None:
    """Check the sizes that an attribute states."""
    if name in _STEPS and not all(1 <= value <= _MAX_STEP for value in values):
        raise ValueError(f"{where}: expected 1 to {_MAX_STEP}, got {values}")
    if name in ("num_outputs", "strides"):
        check_shape(where, values)
    if name in ("pads", "output_padding"):  # the first half lies before each axis
        half = len(values) // 2
        check_shape(where, [abs(pad) + 1 for pad in values[2 * half :]])
        pairs = zip(values, values[half:], strict=False)
        check_shape(where, [abs(a) + abs(b) + 1 for a, b in pairs])
