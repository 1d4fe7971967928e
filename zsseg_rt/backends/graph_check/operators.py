"""Which ONNX operators a graph of bundle format 1 may use: inputs, outputs and attributes.

These are what the exporters of this package and common image encoders are made of, and what
``rules_*`` can judge before a graph runs. Rows may be added, never taken away: stored bundles keep
loading. Left out are control flow, random numbers, text, file formats, recurrent nets, training,
results whose size follows from values (Compress, NonZero, Unique), and operators that read where
computed numbers point (GridSample, RoiAlign, NonMaxSuppression).
"""

from __future__ import annotations

from typing import Any

from zsseg_rt.backends.graph_check.graph import WeightTensor

OPSETS = range(11, 25)  # the exporters here write 20; encoders made elsewhere use 11 to 24

_MANY = 1 << 16
# (since this operator set, fewest inputs, most inputs, names); a later row replaces an earlier one.
# From the schemas of ONNX, except that the `roi` of Resize 11 may be left out, as exporters do, and
# Dropout may not be told to train.
_INPUTS = (
    (11, 0, 0, "Constant"),
    (11, 1, 1, "Abs ArgMax ArgMin AveragePool Cast Ceil ConstantOfShape Cos DepthToSpace Dropout"),
    (11, 1, 1, "Elu Erf Exp Flatten Floor GlobalAveragePool GlobalMaxPool HardSigmoid Identity"),
    (11, 1, 1, "LRN LeakyRelu Log LogSoftmax LpNormalization MaxPool Neg Not Reciprocal ReduceL1"),
    (11, 1, 1, "ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd"),
    (11, 1, 1, "ReduceSum ReduceSumSquare Relu Round Selu Shape Sigmoid Sign Sin Size Softmax"),
    (11, 1, 1, "Softplus Softsign SpaceToDepth Split Sqrt Squeeze Tanh ThresholdedRelu Transpose"),
    (11, 1, 1, "Unsqueeze"),
    (11, 1, 3, "Clip"),
    (11, 1, 4, "Resize"),
    (11, 1, _MANY, "Concat Max Mean Min Sum"),
    (
        11,
        2,
        2,
        "Add And CumSum Div Equal Expand Gather GatherElements GatherND Greater Less MatMul",
    ),
    (11, 2, 2, "Mod Mul Or PRelu Pow Reshape Sub Tile TopK Xor"),
    (11, 2, 3, "Conv ConvTranspose DequantizeLinear Gemm Pad QuantizeLinear"),
    (11, 3, 3, "InstanceNormalization OneHot Range ScatterElements ScatterND Where"),
    (11, 3, 5, "Slice"),
    (11, 5, 5, "BatchNormalization"),
    (12, 1, 1, "Celu"),
    (12, 1, 2, "Dropout"),
    (12, 1, _MANY, "Einsum"),
    (12, 2, 2, "GreaterOrEqual LessOrEqual"),
    (13, 1, 2, "ReduceSum Split Squeeze"),
    (13, 2, 2, "Unsqueeze"),
    (14, 1, 1, "HardSwish"),
    (14, 1, 2, "Trilu"),
    (15, 2, 2, "CastLike"),
    (17, 2, 3, "LayerNormalization"),
    (18, 1, 1, "Mish"),
    (18, 1, 2, "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin"),
    (18, 1, 2, "ReduceProd ReduceSumSquare"),
    (18, 2, 4, "Pad"),
    (20, 1, 1, "Gelu"),
    (21, 3, 3, "GroupNormalization"),
    (23, 2, 2, "RMSNormalization"),
    (23, 3, 4, "Attention"),
    (24, 1, 1, "Swish"),
)
# Outputs, where they are not exactly one. The places that MaxPool took and the statistics of norms
# serve training.
_OUTPUTS = {"Dropout": (1, 2), "Split": (1, _MANY), "TopK": (2, 2)}

_ATTRIBUTES = (
    ("allowzero", "Reshape"),
    ("alpha", "Celu Elu Gemm HardSigmoid LRN LeakyRelu Selu Swish ThresholdedRelu"),
    ("antialias axes coordinate_transformation_mode cubic_coeff_a exclude_outside", "Resize"),
    ("extrapolation_value keep_aspect_ratio_policy mode nearest_mode", "Resize"),
    ("approximate", "Gelu"),
    ("auto_pad dilations kernel_shape pads strides", "AveragePool Conv ConvTranspose MaxPool"),
    ("axes", "Squeeze Unsqueeze"),
    ("axes keepdims noop_with_empty_axes", "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp"),
    ("axes keepdims noop_with_empty_axes", "ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum"),
    ("axes keepdims noop_with_empty_axes", "ReduceSumSquare"),
    ("axis", "ArgMax ArgMin Concat DequantizeLinear Flatten Gather GatherElements"),
    ("axis", "LayerNormalization LogSoftmax LpNormalization OneHot QuantizeLinear"),
    ("axis", "RMSNormalization ScatterElements Softmax Split TopK"),
    ("batch_dims", "GatherND"),
    ("beta", "Gemm HardSigmoid LRN"),
    ("bias size", "LRN"),
    ("blocksize", "DepthToSpace SpaceToDepth"),
    ("ceil_mode", "AveragePool MaxPool"),
    ("count_include_pad", "AveragePool"),
    ("end start", "Shape"),
    ("epsilon", "BatchNormalization GroupNormalization InstanceNormalization LayerNormalization"),
    ("epsilon", "RMSNormalization"),
    ("equation", "Einsum"),
    ("exclusive reverse", "CumSum"),
    ("fmod", "Mod"),
    ("gamma", "Selu"),
    ("group", "Conv ConvTranspose"),
    ("is_causal scale", "Attention"),
    ("keepdims select_last_index", "ArgMax ArgMin"),
    ("largest sorted", "TopK"),
    ("mode", "DepthToSpace Pad"),
    ("momentum training_mode", "BatchNormalization"),
    ("num_groups stash_type", "GroupNormalization"),
    ("num_outputs split", "Split"),
    ("output_dtype saturate block_size precision", "QuantizeLinear"),
    ("block_size output_dtype", "DequantizeLinear"),
    ("output_padding", "ConvTranspose"),
    ("p", "LpNormalization"),
    ("perm", "Transpose"),
    ("ratio seed", "Dropout"),
    ("reduction", "ScatterElements ScatterND"),
    ("saturate", "Cast CastLike"),
    ("stash_type", "LayerNormalization RMSNormalization"),
    ("storage_order", "MaxPool"),
    ("to", "Cast"),
    ("transA transB", "Gemm"),
    ("upper", "Trilu"),
    ("value", "Constant ConstantOfShape"),
    ("value_float value_floats value_int value_ints", "Constant"),
)
_TYPES = (  # of attributes that are not one integer
    (float, "alpha beta bias cubic_coeff_a epsilon extrapolation_value gamma momentum ratio scale"),
    (float, "value_float"),
    ([int], "axes dilations kernel_shape output_padding pads perm split strides value_ints"),
    ([float], "value_floats"),
    (memoryview, "approximate auto_pad coordinate_transformation_mode equation"),
    (memoryview, "keep_aspect_ratio_policy mode nearest_mode reduction"),
    (WeightTensor, "value"),
)
_TYPE_OF: dict[str, Any] = {name: kind for kind, names in _TYPES for name in names.split()}
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


def _by_opset() -> dict[int, dict[str, tuple[int, int]]]:
    return {
        opset: {
            name: (fewest, most)
            for since, fewest, most, names in _INPUTS
            if since <= opset
            for name in names.split()
        }
        for opset in OPSETS
    }


def _by_operator() -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for names, operators in _ATTRIBUTES:
        for operator in operators.split():
            found.setdefault(operator, set()).update(names.split())
    return {operator: frozenset(names) for operator, names in found.items()}


_COUNTS = _by_opset()
_ALLOWED = _by_operator()


def input_counts(op_type: str, opset: int) -> tuple[int, int] | None:
    """Fewest and most inputs of an operator; None if graphs may not use it."""
    return _COUNTS[opset].get(op_type)


def output_counts(op_type: str) -> tuple[int, int]:
    """Fewest and most outputs of an operator that ``input_counts`` knows."""
    return _OUTPUTS.get(op_type, (1, 1))


def allowed_attributes(op_type: str) -> frozenset[str]:
    """The attributes that an operator may have."""
    return _ALLOWED.get(op_type, frozenset())


def has_type(name: str, value: Any) -> bool:
    """Whether an attribute's value is of the type that its name has in every operator."""
    kind = _TYPE_OF.get(name, int)
    if isinstance(kind, list):
        return isinstance(value, list) and all(type(item) is kind[0] for item in value)
    return type(value) is kind
