"""A network as a list of ONNX nodes; weights stay arrays, or views of a file, until written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import TensorSpec

OPSET = 20  # one node for a layer norm and one for a GELU; attention of 23 is unknown to TensorRT


class Node(NamedTuple):
    """One operator; an input called ``""`` was left out."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]  # Of ints, floats, bytes, lists of these, arrays and weights


class Weight(NamedTuple):
    """A constant, or bits of bfloat16, and the dtype that it is cast to when it is written."""

    array: npt.NDArray[Any]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Network:
    """A graph."""

    inputs: tuple[TensorSpec, ...]  # In order; open axes are words
    outputs: tuple[TensorSpec, ...]  # In order
    nodes: tuple[Node, ...]  # Each after those that make its inputs
    weights: Mapping[str, Weight]  # Constants by name
    opset: int = OPSET  # Version of the operators


def weight_of(array: npt.NDArray[Any]) -> Weight:
    """A constant that is written as it is."""
    return Weight(array, np.asarray(array).dtype.name)


def renamed(node: Node, names: Mapping[str, str]) -> Node:
    """The node with other names of what it reads and makes."""
    inputs = tuple(names.get(name, name) for name in node.inputs)
    outputs = tuple(names.get(name, name) for name in node.outputs)
    return node._replace(inputs=inputs, outputs=outputs)
