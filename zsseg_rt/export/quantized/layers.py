"""The layers of a float32 graph that can be quantised, their ranges, and the graphs they become."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from zsseg_rt.errors import ArgumentError
from zsseg_rt.onnx.check import check_graph, in_opset
from zsseg_rt.onnx.half import to_half
from zsseg_rt.onnx.network import Network, Node, Weight

FloatArray = npt.NDArray[np.float32]

_COLOURS = 3
_OLDEST, _OPSET = 19, 20  # before 19, QuantizeLinear takes neither float16 nor gives E4M3
_SMALLEST_SCALE = float(np.finfo(np.float16).tiny)  # scales are stored in float16
_MOST_ROWS, _ROWS_PER_RUN = 384, 24
_PERCENTILES = (99.5, 99.9, 99.99)

# --- what is stored in 8 bits: whole numbers with a scale, or E4M3 floats with a scale ---


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """A format of 8 bits without an offset."""

    name: str  # Public name of the precision
    dtype: str  # The network's
    largest: float  # The largest number before the scale

    def scale(self, largest: npt.ArrayLike) -> FloatArray:
        """The scale for values up to ``largest``, as float16 holds it; never zero."""
        wanted = np.asarray(largest, np.float32) / self.largest
        least = np.maximum(wanted, _SMALLEST_SCALE)
        return np.asarray(least.astype(np.float16), np.float32)

    def rounded(self, values: FloatArray, scale: npt.ArrayLike) -> FloatArray:
        """Round values to this format: the same shape, in float32."""
        steps, step = self._steps(values, scale)
        return np.asarray(steps * step * np.asarray(scale, np.float32), np.float32)

    def weight(self, values: FloatArray, scale: npt.ArrayLike) -> Weight:
        """Values in this format; ``scale`` broadcasts to them."""
        steps, step = self._steps(values, scale)
        if self.name == "int8":
            return Weight(steps.astype(np.int8), self.dtype)
        whole, exact = np.abs(steps), _e4m3_step(steps * step)  # may have reached the next power
        bits = np.log2(exact * 2.0**9) * 8 + whole * (step / exact)
        return Weight(bits.astype(np.uint8) | np.signbit(steps) * np.uint8(0x80), self.dtype)

    def zeros(self, *shape: int) -> Weight:
        """Zero points, which state the format and nothing else."""
        return Weight(np.zeros(shape, np.int8 if self.name == "int8" else np.uint8), self.dtype)

    def _steps(self, values: FloatArray, scale: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Values as whole numbers of steps, and the steps before the scale."""
        factor = np.asarray(scale, np.float32)
        scaled = np.clip(values / factor, -self.largest, self.largest)
        step = np.ones_like(scaled) if self.name == "int8" else _e4m3_step(scaled)
        return np.rint(scaled / step), step


def _e4m3_step(values: FloatArray) -> FloatArray:
    """An eighth of each value's power of two; below 2^-6 lie E4M3's subnormal numbers."""
    power = np.floor(np.log2(np.maximum(np.abs(values), 2.0**-6)))
    return np.asarray(np.exp2(power - 3), np.float32)


FORMATS = {
    "int8": NumberFormat(name="int8", dtype="int8", largest=127.0),
    "fp8": NumberFormat(name="fp8", dtype="float8_e4m3fn", largest=448.0),
}

# --- layers ---


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers that read one tensor and so share its range; they are quantised together."""

    graph: str  # The graph's name
    name: str  # The name of the first layer; it stands for all of them
    tensor: str  # What they read
    nodes: tuple[int, ...]  # The layers' places among the graph's nodes
    convolves: bool  # Whether they are convolutions


def read_plain(path: Path) -> Network:
    """Read a graph; weights that are stored in float16 and cast become float32 weights."""
    flow = check_graph(path)
    network = flow.network
    if any(node.kind in ("QuantizeLinear", "DequantizeLinear") for node in network.nodes):
        raise ArgumentError(
            f"bundle: expected a graph in float32, got {path.name}, which is quantised already. "
            "Export the bundle again with --precision float32."
        )
    if network.opset < _OLDEST:
        try:
            network = in_opset(flow, _OPSET)
        except ValueError as exc:
            raise ArgumentError(
                f"bundle: expected graphs of operator set {_OLDEST} or newer, got {network.opset} "
                f"in {path.name}, which cannot be converted: {exc} Export it at opset {_OPSET}."
            ) from exc
    weights, nodes = dict(network.weights), []
    for node in network.nodes:
        stored = weights.get(node.inputs[0]) if node.kind == "Cast" else None
        if stored is None or stored.dtype != "float16":
            nodes.append(node)
        else:
            weights[node.outputs[0]] = Weight(stored.array, "float32")
    return _with_nodes(network, nodes, weights)


def find_groups(network: Network, graph: str = "") -> tuple[Group, ...]:
    """Linear layers and convolutions with constant weights, but convolutions of an image."""
    readers = defaultdict[str, list[int]](list)
    for place, node in enumerate(network.nodes):
        if _can_quantise(node, network.weights):
            readers[node.inputs[0]].append(place)
    names = Counter(node.name for node in network.nodes)
    groups = []
    for tensor, places in readers.items():
        nodes = [network.nodes[place] for place in places]
        first = nodes[0]
        is_named = first.name and names[first.name] == 1
        groups.append(
            Group(
                graph=graph,
                name=first.name.removesuffix("/MatMul") if is_named else first.outputs[0],
                tensor=tensor,
                nodes=tuple(places),
                convolves=any(node.kind == "Conv" for node in nodes),
            )
        )
    return tuple(groups)


def _can_quantise(node: Node, weights: Mapping[str, Weight]) -> bool:
    if node.kind not in ("MatMul", "Gemm", "Conv") or node.inputs[0] in weights:
        return False
    weight, attributes = weights.get(node.inputs[1]), node.attributes
    if weight is None or weight.dtype != "float32":
        return False
    shape = weight.array.shape
    if node.kind == "Conv":
        return len(shape) == 4 and shape[1] * attributes.get("group", 1) != _COLOURS
    plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
    return len(shape) == 2 and plain and not attributes.get("transA", 0)


def _weight_axis(node: Node) -> int:
    """The axis of a layer's weight that counts its outputs."""
    return 0 if node.kind == "Conv" or node.attributes.get("transB", 0) else 1


# --- ranges: of several candidates per layer the one with the smallest error is taken ---


@dataclass
class TensorStats:
    """Magnitudes and samples of one tensor, from calibration."""

    largest: float = 0.0
    rows: list[FloatArray] = field(default_factory=list)  # Samples [R, K]; of convolutions [R, 1]

    def add(self, values: npt.NDArray[Any], *, convolves: bool, rng: np.random.Generator) -> None:
        """Take in one run's values: [..., K], or [B, C, H, W] of a convolution."""
        flat = values.reshape(-1, 1 if convolves else values.shape[-1]).astype(np.float32)
        self.largest = float(np.maximum(self.largest, np.abs(flat).max()))  # NaN stays
        if sum(len(rows) for rows in self.rows) < _MOST_ROWS * (64 if convolves else 1):
            count = min(len(flat), _ROWS_PER_RUN * (64 if convolves else 1))
            self.rows.append(flat[rng.choice(len(flat), count, replace=False)])


class Range(NamedTuple):
    """How one tensor is quantised."""

    scale: float
    error: float  # Squared error of the layers' results relative to their squares, on the samples


def choose_range(network: Network, group: Group, stats: TensorStats, kind: NumberFormat) -> Range:
    """Try every clipping on the samples; take the one with the smallest error."""
    sample, most = np.concatenate(stats.rows), float(np.finfo(np.float16).max)
    if not stats.largest <= most:  # NaN too
        raise ArgumentError(
            f"photos: expected numbers up to {most:g} before {group.name}, got "
            f"{stats.largest:g}: all but the layers is in float16. Use float32 or bfloat16."
        )
    exact, rounded = sample, None
    if not group.convolves:  # of these the values' own error counts
        matrices = [_matrix(network.nodes[place], network.weights) for place in group.nodes]
        matrix = np.concatenate(matrices, 1)
        exact = sample @ matrix
        rounded = kind.rounded(matrix, kind.scale(np.abs(matrix).max(axis=0)))
    power = float(np.square(exact, dtype=np.float64).sum()) or 1.0
    results = []
    for clip in (*np.percentile(np.abs(sample), _PERCENTILES), stats.largest):
        scale = float(kind.scale(clip))
        narrow = kind.rounded(sample, scale)
        off = (narrow if rounded is None else narrow @ rounded) - exact
        results.append(Range(scale, float(np.square(off, dtype=np.float64).sum()) / power))
    return min(results, key=lambda one: one.error)


def _matrix(node: Node, weights: Mapping[str, Weight]) -> FloatArray:
    """A linear layer's weight as float32 [inputs, outputs]."""
    weight = np.asarray(weights[node.inputs[1]].array, np.float32)
    return weight if _weight_axis(node) == 1 else weight.T


# --- graphs ---


def quantised_graph(
    network: Network,
    ranges: Mapping[Group, Range],
    kind: NumberFormat,
    half: Collection[str] = (),
    *,
    emulated: bool = False,
) -> Network:
    """The network whose chosen layers multiply 8-bit numbers; all else is float16.

    ``emulated`` is one in float32 that computes with the numbers that E4M3 holds: runtimes on CPUs
    store FP8, and do not compute with it as GPUs do (OpenVINO 2026.4 gives other numbers).
    """
    before: dict[int, list[Node]] = defaultdict(list)
    layers, weights = list(network.nodes), dict(network.weights)
    for group, value_range in ranges.items():
        for place in group.nodes:
            node = layers[place]
            if place == group.nodes[0]:
                round_values = _emulated_rounding if emulated else _rounding
                before[place], constants = round_values(group, value_range, kind)
                weights |= constants
            name, axis = f"{node.outputs[0]}.weight", _weight_axis(node)
            array = np.asarray(weights[node.inputs[1]].array, np.float32)
            others = tuple(other for other in range(array.ndim) if other != axis)
            scale = kind.scale(np.abs(array).max(axis=others, keepdims=True))
            output = f"{name}.rounded"
            if emulated:
                weights[output] = Weight(kind.rounded(array, scale), "float32")
            else:
                stored = (name, f"{name}.scale", f"{name}.zero")
                before[place].append(
                    Node(f"{name}/DQ", "DequantizeLinear", stored, (output,), {"axis": axis})
                )
                weights[stored[0]] = kind.weight(array, scale)
                weights[stored[1]] = Weight(scale.reshape(-1), "float32")
                weights[stored[2]] = kind.zeros(scale.size)
            inputs = (f"{group.tensor}.rounded", output, *node.inputs[2:])
            layers[place] = node._replace(inputs=inputs)
    nodes = [one for place, node in enumerate(layers) for one in (*before[place], node)]
    rounded = _with_nodes(network, nodes, weights)
    return rounded if emulated else to_half(rounded, half=half)


def _with_nodes(network: Network, nodes: Sequence[Node], weights: Mapping[str, Weight]) -> Network:
    """The network with other nodes, and those weights that they read."""
    read = {name for node in nodes for name in node.inputs}
    weights = {name: weight for name, weight in weights.items() if name in read}
    return replace(network, nodes=tuple(nodes), weights=weights)


def _scalar(number: float) -> Weight:
    return Weight(np.array(number, np.float32), "float32")


_Added = tuple[list[Node], dict[str, Weight]]  # nodes, and the weights that they read


def _rounding(group: Group, value_range: Range, kind: NumberFormat) -> _Added:
    name = group.tensor
    scale, zero, narrow, rounded = (f"{name}.{k}" for k in ("scale", "zero", "narrow", "rounded"))
    nodes = [
        Node(f"{group.name}/Q", "QuantizeLinear", (name, scale, zero), (narrow,), {}),
        Node(f"{group.name}/DQ", "DequantizeLinear", (narrow, scale, zero), (rounded,), {}),
    ]
    return nodes, {scale: _scalar(value_range.scale), zero: kind.zeros()}


def _emulated_rounding(group: Group, value_range: Range, kind: NumberFormat) -> _Added:
    """Nodes that round a tensor to E4M3: to a step of an eighth of its power of two."""
    name = group.tensor
    numbers = {
        "scale": value_range.scale, "low": -kind.largest, "high": kind.largest, "least": 2.0**-6,
        "per_bit": 1.0 / np.log(2.0), "bits": 3.0, "two": 2.0,
    }  # fmt: skip
    steps = (
        ("Div", "scaled", (name, "scale")), ("Clip", "kept", ("scaled", "low", "high")),
        ("Abs", "magnitude", ("kept",)), ("Max", "normal", ("magnitude", "least")),
        ("Log", "log", ("normal",)), ("Mul", "log2", ("log", "per_bit")),
        ("Floor", "power", ("log2",)), ("Sub", "last", ("power", "bits")),
        ("Pow", "step", ("two", "last")), ("Div", "steps", ("kept", "step")),
        ("Round", "whole", ("steps",)), ("Mul", "narrow", ("whole", "step")),
        ("Mul", "rounded", ("narrow", "scale")),
    )  # fmt: skip
    nodes = []
    for kind_, output, inputs in steps:
        named = tuple(one if one == name else f"{name}.{one}" for one in inputs)
        nodes.append(Node(f"{group.name}/{output}", kind_, named, (f"{name}.{output}",), {}))
    return nodes, {f"{name}.{key}": _scalar(number) for key, number in numbers.items()}
