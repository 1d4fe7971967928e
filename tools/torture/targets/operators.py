"""Graphs of one operator with odd attributes, constants and sizes: refused, or run without harm."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose

from tools.torture.target import Attempt, target, test_support
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import get_backend
from zsseg_rt.onnx.check import check_graph
from zsseg_rt.onnx.reader import OPSETS
from zsseg_rt.onnx.table import CHOICES, OPERATORS

_INTEGERS = (-(2**63), -(2**31) - 1, -(2**31), -65537, -7, *range(-3, 9), 16, 100, 65535, 65536)
_INTEGERS += (2**24, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1)
_FLOATS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-40, 0.5, 1.0, 3e38, 1e9, 2.0**31)
_MOST_FED = 1 << 20  # numbers
_NEAR = (-2, -1, 0, 1, 2, 3, 4)
_TEXTS = tuple(choice for choices in CHOICES.values() for choice in choices)
_TEXTS += ("wrap", "", "tf_crop_and_resize", "ij->", "ij,jk->ik", "ii->i", "...i->i", "ab->ba")
_DTYPES = (np.float32, np.float16, np.float64, np.int64, np.int32, np.int8, np.uint8, np.bool_)


@target(
    "operators",
    "graphs of every operator with odd attributes, constants and sizes, run if they pass",
    group="operators",
    weight=3,
)
def _operators(folder: Path) -> Attempt:
    graphs = test_support("operator_graphs")

    def attempt(draw: random.Random) -> None:
        name = draw.choice(list(graphs.SAMPLES))
        sample = copy.deepcopy(graphs.SAMPLES[name])
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            draw.choice(_CHANGES)(name, sample, draw)
        try:
            model = graphs.operator_model(name, sample)
            if draw.random() < 0.4:
                other = draw.choice(list(graphs.SAMPLES))
                _append(model, graphs.operator_model(other, graphs.SAMPLES[other]))
            content = model.SerializeToString()
        except (ValueError, TypeError, OverflowError):
            return  # what onnx cannot write
        path = folder / "graph.onnx"
        path.unlink(missing_ok=True)  # it may still be mapped
        path.write_bytes(content)
        run_graph(path, draw)

    return attempt


def _append(model: onnx.ModelProto, other: onnx.ModelProto) -> None:
    """Let another operator take what the first one gives; both nodes have one name."""
    model.CopyFrom(onnx.compose.add_prefix(model, "a_", rename_nodes=False))
    graph, more = model.graph, other.graph
    node = more.node[0]
    taken = node.input[0] if node.input else ""
    if node.input:
        node.input[0] = "a_o0"
    graph.node.append(node)
    graph.initializer.extend(tensor for tensor in more.initializer if tensor.name != taken)
    graph.input.extend(value for value in more.input if value.name != taken)
    del graph.output[:]
    graph.output.extend(more.output)


def run_graph(path: Path, draw: random.Random) -> None:
    """Check a graph, and run it with odd numbers; what it gives has the sizes it states."""
    check_graph(path)
    options = BackendOptions(num_threads=draw.choice((1, 2)))
    backend = get_backend("openvino")
    graph = backend.load(path, device="cpu", precision="float32", options=options)
    session = graph.session()
    try:
        for _ in range(2):
            shapes = {
                spec.name: [draw.choice((1, 2, 5)) if isinstance(n, str) else n for n in spec.shape]
                for spec in session.inputs
            }
            if max(map(math.prod, shapes.values())) > _MOST_FED:
                return  # allowed, but slow
            feeds = {
                spec.name: _feed(shapes[spec.name], spec.dtype, draw) for spec in session.inputs
            }
            for result in session.run(feeds).values():
                np.asarray(result).sum(dtype=np.float64)  # reads all of it
    finally:
        session.close()
        graph.close()


def _feed(shape: list[int], dtype: str, draw: random.Random) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(draw.getrandbits(32))
    values = rng.standard_normal(shape) * draw.choice((1, 3, 1000))
    if dtype.startswith("float"):
        values = np.where(rng.random(shape) < 0.05, draw.choice(_FLOATS), values)
        return np.asarray(values).astype(dtype)
    return np.clip(np.asarray(values), 0 if dtype[0] in "ub" else -100, 100).astype(dtype)


def _number(draw: random.Random) -> int:
    return draw.choice(_NEAR) if draw.random() < 0.5 else draw.choice(_INTEGERS)


def _attribute(name: str, sample: Any, draw: random.Random) -> None:
    allowed = sorted(OPERATORS[name].attributes)
    if not allowed:
        return
    attribute, kind = draw.choice(allowed), draw.randrange(8)
    value = sample.attributes.get(attribute)
    if isinstance(value, list) and kind < 4:
        value[draw.randrange(len(value))] = _number(draw)
    elif isinstance(value, int) or kind < 4:
        sample.attributes[attribute] = _number(draw)
    elif kind == 4:
        sample.attributes[attribute] = [_number(draw) for _ in range(draw.randrange(1, 6))]
    elif kind == 5:
        sample.attributes[attribute] = draw.choice(_FLOATS)
    elif kind == 6:
        sample.attributes[attribute] = draw.choice(_TEXTS)
    else:
        sample.attributes.pop(attribute, None)


def _constant(name: str, sample: Any, draw: random.Random) -> None:
    places = [i for i, each in enumerate(sample.inputs) if isinstance(each, np.ndarray)]
    if not places:
        return
    place = draw.choice(places)
    values = sample.inputs[place].copy()
    kind = draw.randrange(6)
    if kind < 3 and values.size:
        odd = _number(draw) if values.dtype.kind in "iu" else draw.choice(_FLOATS)
        low, high = (
            (np.iinfo(values.dtype).min, np.iinfo(values.dtype).max)
            if values.dtype.kind in "iu"
            else (odd, odd)
        )
        values.reshape(-1)[draw.randrange(values.size)] = min(max(odd, low), high)
    elif kind == 3:
        shape = [draw.choice((0, 1, 2, 3, 4, 6)) for _ in range(draw.randrange(4))]
        values = np.resize(values, shape)
    elif kind == 4:
        values = values.astype(draw.choice(_DTYPES))
    else:
        values = np.tile(values, draw.choice((2, 3)))
    sample.inputs[place] = values


def _sizes(name: str, sample: Any, draw: random.Random) -> None:
    fed = [each for each in sample.inputs if hasattr(each, "shape") and hasattr(each, "dtype")]
    fed = [each for each in fed if not isinstance(each, np.ndarray)]
    if not fed:
        return
    tensor = draw.choice(fed)
    tensor.shape = list(tensor.shape)
    kind = draw.randrange(5)
    if kind < 3 and tensor.shape:
        sizes = ("n", "n", "m", 0, 1, 2, 3, 5, 7, 16, 300, 65536)
        tensor.shape[draw.randrange(len(tensor.shape))] = draw.choice(sizes)
    elif kind == 3:
        tensor.shape = [draw.choice((1, 2, 3, 8)) for _ in range(draw.randrange(7))]
    else:
        tensor.dtype = draw.choice((1, 2, 3, 6, 7, 9, 10, 11))


def _inputs(name: str, sample: Any, draw: random.Random) -> None:
    if not sample.inputs:
        return
    place = draw.randrange(len(sample.inputs))
    kind = draw.randrange(3)
    if kind == 0:
        sample.inputs[place] = None
    elif kind == 1:
        sample.inputs.append(copy.deepcopy(draw.choice(sample.inputs)))
    else:
        other = draw.randrange(len(sample.inputs))
        sample.inputs[place] = copy.deepcopy(sample.inputs[other])


def _opset(name: str, sample: Any, draw: random.Random) -> None:
    sample.opset = draw.choice(OPSETS)


_CHANGES = (*[_attribute, _sizes] * 2, *[_constant] * 3, _inputs, _opset)
