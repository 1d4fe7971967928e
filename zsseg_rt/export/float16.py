"""Read ONNX graphs as networks, and turn them into float16 as networks are."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from io import BytesIO

import onnx

from zsseg_rt.onnx.flow import Flow
from zsseg_rt.onnx.half import to_half
from zsseg_rt.onnx.network import Network
from zsseg_rt.onnx.reader import read_network
from zsseg_rt.onnx.writer import write_onnx

_FLOAT = 1  # TensorProto's float32


def to_float16(model: onnx.ModelProto, *, half: Collection[str] = ()) -> onnx.ModelProto:
    """Return a float16 version of a float32 graph; see :mod:`zsseg_rt.onnx.half`.

    Shapes:
        half: Names of inputs and outputs that become float16, where the graph has them and they are
            float32; the others stay as they are.

    Returns:
        A new model; ``model`` is not changed.
    """
    stream = BytesIO()
    write_onnx(to_half(network_of(model), half=half), model.graph.name, stream)
    made = onnx.load_model_from_string(stream.getvalue())
    onnx.checker.check_model(made)
    return made


def network_of(model: onnx.ModelProto) -> Network:
    """Read a graph; its types are followed. ``model`` is not changed."""
    network = read_network(model.SerializeToString())
    values = Flow(network).run().values
    floats = frozenset(name for name, value in values.items() if value.dtype == _FLOAT)
    return replace(network, floats=floats)
