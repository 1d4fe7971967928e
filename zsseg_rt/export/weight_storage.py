"""Store float32 weights as float16 where that loses nothing.

CLIP was published in float16 (Radford et al., ICML 2021), so most weights of systems that freeze it
are float32 copies of float16 numbers. Half the bytes hold them exactly, and a cast in the graph
brings them back: a bundle half the size that computes the same.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_MIN_ELEMENTS = 1024  # below this, the cast node takes about as much as float16 saves


def store_exact_halves(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with every large weight that float16 holds exactly stored as float16.

    Returns:
        A new model whose nodes see the same float32 values; ``model`` itself if nothing changes.
    """
    halves = {tensor.name: half for tensor in model.graph.initializer if (half := _half(tensor))}
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


def _half(tensor: TensorProto) -> TensorProto | None:
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
