"""Which ONNX operators a graph may use, and how many inputs and outputs each takes.

These are the tensor operators of the default domain that always give the same result for the same
input. Left out are control flow, random numbers, sequences, optionals, text, file
formats, recurrent nets and training: no image or text encoder here needs them.
"""

from __future__ import annotations

__all__ = ["OPSETS", "input_counts", "output_counts"]

OPSETS = range(11, 25)  # the exporters here write 20; encoders made elsewhere use 11 to 24

_MANY = 1 << 16
# (since this operator set, fewest inputs, most inputs, names); a later row replaces an earlier one.
# From the schemas of ONNX, except that the `roi` of Resize 11 may be left out, as exporters do, and
# Dropout may not be told to train.
_INPUTS = (
    (11, 0, 0, "Constant"),
    (11, 1, 1, "Abs Acos Acosh ArgMax ArgMin Asin Asinh Atan Atanh AveragePool Cast Ceil"),
    (11, 1, 1, "ConstantOfShape Cos Cosh DepthToSpace Det Dropout DynamicQuantizeLinear Elu Erf"),
    (11, 1, 1, "Exp EyeLike Flatten Floor GlobalAveragePool GlobalLpPool GlobalMaxPool"),
    (11, 1, 1, "HardSigmoid Hardmax Identity IsInf IsNaN LRN LeakyRelu Log LogSoftmax"),
    (11, 1, 1, "LpNormalization LpPool MaxPool MeanVarianceNormalization Neg NonZero Not"),
    (11, 1, 1, "Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean"),
    (11, 1, 1, "ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Round Selu Shape Shrink"),
    (11, 1, 1, "Sigmoid Sign Sin Sinh Size Softmax Softplus Softsign SpaceToDepth Split Sqrt"),
    (11, 1, 1, "Squeeze Tan Tanh ThresholdedRelu Transpose Unique Unsqueeze"),
    (11, 1, 3, "Clip"),
    (11, 1, 4, "Resize"),
    (11, 1, _MANY, "Concat Max Mean Min Sum"),
    (11, 2, 2, "Add And BitShift Compress CumSum Div Equal Expand Gather GatherElements GatherND"),
    (11, 2, 2, "Greater Less MatMul MaxRoiPool Mod Mul Or PRelu Pow Reshape Sub Tile TopK Xor"),
    (11, 2, 3, "Conv ConvTranspose DequantizeLinear Gemm MaxUnpool Pad QuantizeLinear"),
    (11, 2, 4, "ConvInteger MatMulInteger"),
    (11, 2, 5, "NonMaxSuppression"),
    (11, 3, 3, "InstanceNormalization OneHot Range RoiAlign ScatterElements ScatterND Where"),
    (11, 3, 5, "Slice"),
    (11, 5, 5, "BatchNormalization"),
    (11, 8, 8, "QLinearMatMul"),
    (11, 8, 9, "QLinearConv"),
    (12, 1, 1, "Celu"),
    (12, 1, 2, "Dropout"),
    (12, 1, _MANY, "Einsum"),
    (12, 2, 2, "GreaterOrEqual LessOrEqual"),
    (13, 1, 2, "ReduceSum Split Squeeze"),
    (13, 2, 2, "Unsqueeze"),
    (14, 1, 1, "HardSwish"),
    (14, 1, 2, "Trilu"),
    (15, 2, 2, "CastLike"),
    (16, 2, 2, "GridSample"),
    (17, 1, 2, "DFT"),
    (17, 2, 3, "LayerNormalization"),
    (18, 1, 1, "BitwiseNot Mish"),
    (18, 1, 2, "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin"),
    (18, 1, 2, "ReduceProd ReduceSumSquare"),
    (18, 2, 2, "BitwiseAnd BitwiseOr BitwiseXor CenterCropPad"),
    (18, 2, 4, "Pad"),
    (18, 3, 3, "Col2Im"),
    (19, 3, 5, "DeformConv"),
    (20, 1, 1, "Gelu"),
    (20, 1, 3, "DFT"),
    (20, 2, 2, "AffineGrid"),
    (21, 3, 3, "GroupNormalization"),
    (23, 2, 2, "RMSNormalization"),
    (23, 3, 4, "RotaryEmbedding"),
    (23, 3, 6, "Attention"),
    (24, 1, 1, "Swish"),
    (24, 3, 7, "Attention"),
)
# Outputs, where they are not exactly one. BatchNormalization has more only in training.
_OUTPUTS = {
    "Attention": (1, 4),
    "Dropout": (1, 2),
    "DynamicQuantizeLinear": (3, 3),
    "LayerNormalization": (1, 3),
    "MaxPool": (1, 2),
    "Split": (1, _MANY),
    "TopK": (2, 2),
    "Unique": (1, 4),
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


_COUNTS = _by_opset()


def input_counts(op_type: str, opset: int) -> tuple[int, int] | None:
    """Fewest and most inputs of an operator; None if the operator set has no such operator.

    Args:
        op_type: Name of the operator in the default domain.
        opset: Version of the operator set, one of ``OPSETS``.
    """
    return _COUNTS[opset].get(op_type)


def output_counts(op_type: str) -> tuple[int, int]:
    """Fewest and most outputs of an operator that ``input_counts`` knows."""
    return _OUTPUTS.get(op_type, (1, 1))
