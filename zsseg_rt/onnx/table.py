"""The ONNX operators that a graph may use: inputs, attributes, what is judged and what is computed.

One row per operator. These are what the exporters of this package and common image encoders are
made of. Rows may be added, never taken away: stored bundles keep loading. Left out are control
flow, random numbers, text, file formats, recurrent nets, training, results whose size follows from
values (Compress, NonZero, Unique), and operators that read where computed numbers point
(GridSample, RoiAlign, NonMaxSuppression).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zsseg_rt.onnx import rules, runs
from zsseg_rt.onnx.network import Node, Weight
from zsseg_rt.onnx.reader import check_shape

_MANY = 1 << 16
_ALL = 99  # inputs: all may be tensors of a device


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A row of the table."""

    # (since this operator set, fewest inputs, most inputs), the oldest first
    arity: tuple[tuple[int, int, int], ...]
    rule: Callable[[Any], Any]  # Judges a call, and says the types and shapes of its results
    # Computes it, by RUNS; None where only other runtimes do
    run: Callable[..., Any] | None
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


def _add(names: str, arity: str, rule: Any, attributes: str = "", **more: Any) -> None:
    """Rows that differ by name; ``arity`` is ``"SINCE:FEWEST-MOST ..."``, of set 11 if unsaid.

    From the schemas of ONNX, except that the ``roi`` of Resize 11 may be left out, as exporters do,
    and Dropout may not be told to train.
    """
    parsed = []
    for each in arity.split():
        since, _, counts = each.rpartition(":")
        low, _, high = counts.partition("-")
        parsed.append((int(since or 11), int(low), _MANY if high == "*" else int(high or low)))
    for name in names.split():
        OPERATORS[name] = Operator(
            arity=tuple(parsed), rule=rule, run=runs.RUNS.get(name),
            attributes=frozenset(attributes.split()), **more,
        )  # fmt: skip


_REDUCED = "axes keepdims noop_with_empty_axes"
_WINDOWS = "auto_pad dilations kernel_shape pads strides"
_PLACES, _SCALED = "axis keepdims select_last_index", "axis block_size output_dtype"
_NORM, _BATCH = "epsilon stash_type", "epsilon momentum training_mode"
_RESIZE = """antialias axes coordinate_transformation_mode cubic_coeff_a exclude_outside
extrapolation_value keep_aspect_ratio_policy mode nearest_mode"""

_add("Abs Ceil Cos Erf Exp Floor Log Neg Not Reciprocal Relu Round", "1", rules.same)
_add("Sigmoid Sign Sin Softplus Softsign Sqrt Tanh", "1", rules.same)
_add("Add And Div Equal Greater Less Mul Or PRelu Pow Sub Xor", "2", rules.combine)
_add("ArgMax ArgMin", "1", rules.pick, _PLACES)
_add("Attention", "23:3-4", rules.attention, "is_causal scale")
_add("AveragePool", "1", rules.pool, f"{_WINDOWS} ceil_mode count_include_pad")
_add("BatchNormalization", "5", rules.channel_norm, _BATCH)
_add("Cast", "1", rules.cast, "saturate to")
_add("CastLike", "15:2", rules.cast_like, "saturate")
_add("Celu", "12:1", rules.same, "alpha")
_add("Clip", "1-3", rules.clip, host=1)
_add("Concat", "1-*", rules.concat, "axis")
_add("Constant", "0", None, "value value_float value_floats value_int value_ints")
_add("ConstantOfShape", "1", rules.constant_of_shape, "value", host=0)
_add("Conv", "2-3", rules.conv, f"{_WINDOWS} group")
_add("ConvTranspose", "2-3", rules.conv, f"{_WINDOWS} group output_padding")
_add("CumSum", "2", rules.cumsum, "exclusive reverse", host=1)
_add("DepthToSpace", "1", rules.blocks, "blocksize mode")
_add("DequantizeLinear", "2-3", rules.quantise, _SCALED)
_add("Dropout", "1 12:1-2", rules.dropout, "ratio seed", outputs=(1, 2))
_add("Einsum", "12:1-*", rules.einsum, "equation")
_add("Elu LeakyRelu ThresholdedRelu", "1", rules.same, "alpha")
_add("Expand", "2", rules.expand, host=1)
_add("Flatten", "1", rules.flatten, "axis")
_add("Gather", "2", rules.gather, "axis", host=1)
_add("GatherElements", "2", rules.gather_elements, "axis")
_add("GatherND", "2", rules.gather_nd, "batch_dims")
_add("Gelu", "20:1", rules.same, "approximate")
_add("Gemm", "2-3", rules.gemm, "alpha beta transA transB")
_add("GlobalAveragePool GlobalMaxPool", "1", rules.global_pool)
_add("GreaterOrEqual LessOrEqual", "12:2", rules.combine)
_add("GroupNormalization", "21:3", rules.channel_norm, f"{_NORM} num_groups")
_add("HardSigmoid", "1", rules.same, "alpha beta")
_add("HardSwish", "14:1", rules.same)
_add("Identity", "1", rules.same)
_add("InstanceNormalization", "3", rules.channel_norm, "epsilon")
_add("LRN", "1", rules.lrn, "alpha beta bias size")
_add("LayerNormalization", "17:2-3", rules.layer_norm, f"axis {_NORM}")
_add("LogSoftmax Softmax", "1", rules.same, "axis")
_add("LpNormalization", "1", rules.same, "axis p")
_add("MatMul", "2", rules.matmul)
_add("Max Mean Min Sum", "1-*", rules.combine)
_add("MaxPool", "1", rules.pool, f"{_WINDOWS} ceil_mode storage_order")
_add("Mish", "18:1", rules.same)
_add("Mod", "2", rules.combine, "fmod")
_add("OneHot", "3", rules.one_hot, "axis")
_add("Pad", "2-3 18:2-4", rules.pad, "mode", host=1)
_add("QuantizeLinear", "2-3", rules.quantise, f"{_SCALED} precision saturate")
_add("RMSNormalization", "23:2", rules.layer_norm, f"axis {_NORM}")
_add("Range", "3", rules.range_, host=0)
_add("ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp", "1 18:1-2", rules.reduce, _REDUCED, host=1)
_add("ReduceMax ReduceMean ReduceMin ReduceProd", "1 18:1-2", rules.reduce, _REDUCED, host=1)
_add("ReduceSum", "1 13:1-2", rules.reduce, _REDUCED, host=1)
_add("ReduceSumSquare", "1 18:1-2", rules.reduce, _REDUCED, host=1)
_add("Reshape", "2", rules.reshape, "allowzero", host=1)
_add("Resize", "1-4", rules.resize, _RESIZE, host=1)
_add("ScatterElements", "3", rules.scatter_elements, "axis reduction")
_add("ScatterND", "3", rules.scatter_nd, "reduction")
_add("Selu", "1", rules.same, "alpha gamma")
_add("Shape", "1", rules.shape, "end start")
_add("Size", "1", rules.size)
_add("Slice", "3-5", rules.slice_, host=1)
_add("SpaceToDepth", "1", rules.blocks, "blocksize")
_add("Split", "1 13:1-2", rules.split, "axis num_outputs split", outputs=(1, _MANY), host=1)
_add("Squeeze", "1 13:1-2", rules.squeeze, "axes", host=1)
_add("Swish", "24:1", rules.same, "alpha")
_add("Tile", "2", rules.tile, host=1)
_add("TopK", "2", rules.top_k, "axis largest sorted", outputs=(2, 2), host=1)
_add("Transpose", "1", rules.transpose, "perm")
_add("Trilu", "14:1-2", rules.trilu, "upper", host=1)
_add("Unsqueeze", "1 13:2", rules.unsqueeze, "axes", host=1)
_add("Where", "3", rules.where)


# --- attributes; what is one integer is not listed ---

_KINDS: dict[str, Any] = {}
for _kind, _names in (
    (float, "alpha beta bias cubic_coeff_a epsilon extrapolation_value gamma momentum ratio scale"),
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
        "half_pixel",
        "pytorch_half_pixel",
        "align_corners",
        "asymmetric",
    ),
    "keep_aspect_ratio_policy": ("stretch",),
    "nearest_mode": ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"),
    "reduction": ("none", "add"),
    "mode Resize": ("nearest", "linear", "cubic"),
    "mode Pad": ("constant", "reflect", "edge"),
    "mode DepthToSpace": ("DCR", "CRD"),
}
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
    _check_count(where, "inputs", node.inputs, inputs)
    _check_count(where, "outputs", node.outputs, operator.outputs)
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


def _check_count(where: str, what: str, names: Sequence[str], expected: tuple[int, int]) -> None:
    fewest, most = expected
    stated = sum(1 for name in names[:fewest] if name)
    if stated < fewest or len(names) > most:
        raise ValueError(
            f"{where}: expected {fewest} to {most} {what}, got {[name or None for name in names]}"
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
