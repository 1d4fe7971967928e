"""A sound graph of one node for every operator that bundles may use; tools/torture takes it too."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from support.graphs import FLOAT, make_graph

INT32, INT64, BOOL = TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL
IMAGE, ROWS = [1, 4, 6, 8], [2, 6]


@dataclass
class Fed:
    """An input that is fed when the graph runs."""

    shape: list[int | str]
    dtype: int = FLOAT


@dataclass
class Sample:
    """A node: constants are arrays, None is an input left out."""

    inputs: list[Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    results: tuple[int, ...] = (FLOAT,)
    opset: int = 20


def ints(*numbers):
    return np.array(numbers, np.int64)


def floats(*shape):
    return np.linspace(0.1, 1, max(int(np.prod(shape)), 1), dtype=np.float32).reshape(shape)


def _fed(*shapes, results=(FLOAT,), dtype=FLOAT, opset=20, **attributes):
    fed = [Fed(list(shape), dtype) for shape in shapes]
    return Sample(fed, attributes, results, opset)


_UNARY = """Abs Ceil Celu Cos Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Log
LogSoftmax LpNormalization Mish Neg Reciprocal Relu Round Selu Sigmoid Sign Sin Softmax Softplus
Softsign Sqrt Tanh ThresholdedRelu"""
_BINARY = "Add Div Max Mean Min Mul PRelu Pow Sub Sum"
_REDUCE = """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
ReduceProd ReduceSum ReduceSumSquare"""

SAMPLES = {
    **{name: _fed(ROWS) for name in _UNARY.split()},
    **{name: Sample([Fed(ROWS), floats(6)]) for name in _BINARY.split()},
    **{name: Sample([Fed(IMAGE), ints(1, 2)], {"keepdims": 0}) for name in _REDUCE.split()},
    **{name: _fed(ROWS, ROWS, dtype=BOOL, results=(BOOL,)) for name in ("And", "Or", "Xor")},
    **{
        name: Sample([Fed(ROWS), floats(6)], results=(BOOL,))
        for name in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    },
    "ArgMax": _fed(ROWS, results=(INT64,), axis=1),
    "ArgMin": _fed(ROWS, results=(INT64,), axis=-1, keepdims=0),
    "Attention": Sample([Fed([1, 2, 5, 8])] * 3, {"scale": 0.3}, opset=23),
    "AveragePool": _fed(IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "BatchNormalization": Sample([Fed(IMAGE), *[floats(4)] * 4]),
    "Cast": _fed(ROWS, to=INT64, results=(INT64,)),
    "CastLike": Sample([Fed(ROWS), ints(1)], results=(INT64,)),
    "Clip": Sample([Fed(ROWS), floats(), np.array(6, np.float32)]),
    "Concat": Sample([Fed(ROWS), floats(2, 3)], {"axis": 1}),
    "Constant": Sample([], {"value": numpy_helper.from_array(floats(2, 6))}),
    "ConstantOfShape": Sample([ints(2, 6)], {"value": numpy_helper.from_array(floats(1))}),
    "Conv": Sample([Fed(IMAGE), floats(6, 2, 3, 3), floats(6)], {"group": 2, "pads": [1] * 4}),
    "ConvTranspose": Sample([Fed(IMAGE), floats(4, 2, 3, 3)], {"strides": [2, 2]}),
    "CumSum": Sample([Fed(ROWS), np.array(1)]),
    "DepthToSpace": _fed(IMAGE, blocksize=2),
    "DequantizeLinear": Sample(
        [Fed(IMAGE, TensorProto.UINT8), floats(4), np.zeros(4, np.uint8)], {"axis": 1}
    ),
    "Dropout": _fed(ROWS, results=(FLOAT, BOOL)),
    "Einsum": _fed([2, 3], [3, 4], equation="ij,jk->ik"),
    "Expand": Sample([Fed([2, 1]), ints(3, 2, 6)]),
    "Flatten": _fed(IMAGE, axis=2),
    "Gather": Sample([Fed(IMAGE), ints(0, -1, 3)], {"axis": 2}),
    "GatherElements": Sample([Fed(ROWS), np.array([[0, 5], [1, -6]])], {"axis": 1}),
    "GatherND": Sample([Fed(ROWS), np.array([[0, 5], [-1, 2]])]),
    "Gemm": Sample([Fed(ROWS), floats(6, 3), floats(3)]),
    "GlobalAveragePool": _fed(IMAGE),
    "GlobalMaxPool": _fed(IMAGE),
    "GroupNormalization": Sample([Fed(IMAGE), floats(4), floats(4)], {"num_groups": 2}, opset=21),
    "InstanceNormalization": Sample([Fed(IMAGE), floats(4), floats(4)]),
    "LayerNormalization": Sample([Fed(ROWS), floats(6), floats(6)]),
    "MatMul": Sample([Fed(ROWS), floats(6, 3)]),
    "MaxPool": _fed(IMAGE, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "Mod": Sample([Fed(ROWS, INT64), ints(3)], results=(INT64,)),
    "Not": _fed(ROWS, dtype=BOOL, results=(BOOL,)),
    "Pad": Sample([Fed(IMAGE), ints(0, 0, 1, 2, 0, 0, 2, 1), floats()]),
    "QuantizeLinear": Sample(
        [Fed(IMAGE), floats(4), np.zeros(4, np.int8)], {"axis": 1}, (TensorProto.INT8,)
    ),
    "RMSNormalization": Sample([Fed(ROWS), floats(6)], opset=23),
    "Range": Sample([np.array(1), np.array(9), np.array(2)], results=(INT64,)),
    "Reshape": Sample([Fed(IMAGE), ints(0, -1, 16)]),
    "Resize": Sample([Fed(IMAGE), None, np.array([1, 1, 2, 0.5], np.float32)], {"mode": "linear"}),
    "ScatterND": Sample([Fed(ROWS), np.array([[0, 5], [-1, 2]]), floats(2)]),
    "Shape": _fed(IMAGE, results=(INT64,), start=1),
    "Size": _fed(IMAGE, results=(INT64,)),
    "Slice": Sample([Fed(IMAGE), ints(1, -1), ints(9, -9), ints(2, 3), ints(2, -2)]),
    "SpaceToDepth": _fed(IMAGE, blocksize=2),
    "Split": Sample([Fed(ROWS), ints(1, 5)], {"axis": 1}, (FLOAT, FLOAT)),
    "Squeeze": Sample([Fed([1, 6, 1]), ints(0, -1)]),
    "Swish": _fed(ROWS, opset=24),
    "Tile": Sample([Fed(ROWS), ints(2, 3)]),
    "TopK": Sample([Fed(ROWS), ints(3)], {"axis": 1}, (FLOAT, INT64)),
    "Transpose": _fed(IMAGE, perm=[0, 2, 3, 1]),
    "Trilu": Sample([Fed(ROWS), np.array(1)], {"upper": 0}),
    "Unsqueeze": Sample([Fed(ROWS), ints(0, -1)]),
    "Where": Sample([Fed(ROWS, BOOL), floats(6), floats(2, 1)]),
}


def operator_model(name, sample):
    """The graph of a sample."""
    names = ["" if each is None else f"i{at}" for at, each in enumerate(sample.inputs)]
    operands = {name: each for name, each in zip(names, sample.inputs, strict=True) if name}
    feeds = {n: (each.dtype, each.shape) for n, each in operands.items() if isinstance(each, Fed)}
    weights = {n: each for n, each in operands.items() if not isinstance(each, Fed)}
    outputs = {f"o{at}": (kind, None) for at, kind in enumerate(sample.results)}
    node = helper.make_node(name, names, list(outputs), "node", **sample.attributes)
    feeds = feeds or {"unused": (FLOAT, [1])}  # every graph has an input
    return make_graph([node], feeds, outputs, weights, sample.opset)
