"""A network as a list of ONNX nodes, with weights that stay arrays until they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import TensorSpec

OPSET = 20  # one node for a layer norm and one for a GELU; attention of 23 is unknown to TensorRT


@dataclass(frozen=True)
class Node:
    """One operator; an attribute is an int, a float, bytes, a list of these, or an array."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Weight:
    """A constant, and the dtype that it is written with: it is cast then, not before."""

    array: npt.NDArray[Any]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Network:
    """A graph to write.

    Attributes:
        inputs: In order; open axes are words.
        outputs: In order.
        nodes: Each after those that make its inputs.
        weights: Constants by name.
        floats: Names of all values and weights that are float32.
        opset: Version of the operators.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: tuple[Node, ...]
    weights: Mapping[str, Weight]
    floats: frozenset[str]
    opset: int = OPSET


def weight_of(array: npt.NDArray[Any]) -> Weight:
    """A constant that is written as it is."""
    return Weight(array, np.asarray(array).dtype.name)
