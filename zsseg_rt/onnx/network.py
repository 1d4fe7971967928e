"""A network as a list of ONNX nodes: what is written, and what is read.

Weights stay arrays until they are written; of a file that was read they are views of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import TensorSpec

OPSET = 20  # one node for a layer norm and one for a GELU; attention of 23 is unknown to TensorRT


class Node(NamedTuple):
    """One operator; an input called ``""`` was left out.

    An attribute is an int, a float, bytes, a list of these, an array, or a :class:`Weight`; None if
    it is of another type, which no operator takes.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


class Weight(NamedTuple):
    """A constant, and the dtype that it is written with: it is cast then, not before.

    The bits of dtypes that NumPy lacks, such as bfloat16's, are unsigned integers of their width;
    those of 4 bits have a byte each.
    """

    array: npt.NDArray[Any]
    dtype: str


class Stated(NamedTuple):
    """A value as a file declares it: data type, 0 if not stated, and sizes, None if not stated."""

    dtype: int
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True, kw_only=True)
class Network:
    """A graph."""

    inputs: tuple[TensorSpec, ...]  # In order; open axes are words
    outputs: tuple[TensorSpec, ...]  # In order
    nodes: tuple[Node, ...]  # Each after those that make its inputs
    weights: Mapping[str, Weight]  # Constants by name
    floats: frozenset[str] = frozenset()  # Names of all values and weights that are float32
    opset: int = OPSET  # Version of the operators
    # What the file says of its values; nothing where none was read
    stated: Mapping[str, Stated] = field(default_factory=dict)


def weight_of(array: npt.NDArray[Any]) -> Weight:
    """A constant that is written as it is."""
    return Weight(array, np.asarray(array).dtype.name)


def renamed(node: Node, names: Mapping[str, str]) -> Node:
    """The node with other names of what it reads and makes."""
    inputs = tuple(names.get(name, name) for name in node.inputs)
    outputs = tuple(names.get(name, name) for name in node.outputs)
    return node._replace(inputs=inputs, outputs=outputs)
