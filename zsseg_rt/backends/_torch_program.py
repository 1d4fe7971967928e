"""An ONNX graph run by torch, node by node, by the functions of the one operator table."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zsseg_rt.errors import BackendError
from zsseg_rt.onnx.arrays import compute
from zsseg_rt.onnx.network import Network, Node, Weight
from zsseg_rt.onnx.on_torch import OnTorch
from zsseg_rt.onnx.table import OPERATORS, newest

_FAILS = (RuntimeError, IndexError, ValueError, TypeError, KeyError)
_FUSED = "FusedAttention"


class Program:
    """A graph's nodes in order, and its constants: numbers as tensors, integers on the host.

    Integers that meet values of the device have a copy there, made once for all runs.
    """

    def __init__(self, network: Network, what: str = "graph") -> None:
        self._xp = OnTorch(torch)
        self._inputs = {spec.name: spec.dtype for spec in network.inputs}
        self._outputs = {spec.name: spec.dtype for spec in network.outputs}
        self.constants = {name: _constant(weight) for name, weight in network.weights.items()}
        self.nodes = [newest(node, network.opset) for node in self._folded(network.nodes)]
        for node in self.nodes:
            if OPERATORS[node.kind].run is None:
                raise BackendError(
                    f"{what}: node {node.name!r}: expected an operator that backend 'torch' "
                    f"supports, got {node.kind!r}. Use backend 'openvino' or 'tensorrt'."
                )
            for name in node.inputs[OPERATORS[node.kind].host :]:
                constant = self.constants.get(name)
                if isinstance(constant, Tensor):  # bounds and factors stay on the host as well
                    self.constants[name] = constant.float().numpy()
        used = {name for node in self.nodes for name in node.inputs} | set(self._outputs)
        self.constants = {
            name: constant for name, constant in self.constants.items() if name in used
        }
        self._prepare()

    def _folded(self, nodes: Sequence[Node]) -> list[Node]:
        """The nodes that are left once what follows from constants alone is computed."""
        left = []
        for node in nodes:
            is_constant = all(name in self.constants for name in node.inputs if name)
            if not is_constant or OPERATORS[node.kind].run is None:
                left.append(node)
                continue
            for name, result in zip(
                node.outputs, self._compute(node, node.inputs, {}), strict=True
            ):
                self.constants[name] = _settled(result)
        return left

    def fuse_attention(self) -> int:
        """Let one kernel compute each attention that a scope names; returns how many there are."""
        producers = {name: node for node in self.nodes for name in node.outputs}
        outside = Node("", "", (), (), {})  # who runs the graph reads its outputs
        consumers: dict[str, list[Node]] = {name: [outside] for name in self._outputs}
        for node in self.nodes:
            for name in node.inputs:
                consumers.setdefault(name, []).append(node)
        fused: dict[str, Node] = {}
        dropped: set[str] = set()
        for node in (node for node in self.nodes if node.kind == "Softmax"):
            attention = _find_attention(node, producers, consumers)
            if attention is not None:
                last, inner, inputs = attention
                fused[last.outputs[0]] = Node(last.name, _FUSED, inputs, last.outputs, {})
                dropped |= {each.outputs[0] for each in inner}
        self.nodes = [
            fused.get(node.outputs[0], node)
            for node in self.nodes
            if node.outputs[0] not in dropped
        ]
        self._prepare()
        return len(fused)

    def place(self, device: torch.device) -> None:
        """Move the weights to a device; integers stay on the host."""
        for name, constant in self.constants.items():
            if isinstance(constant, Tensor):
                self.constants[name] = constant.to(device)
        masks = {name for node in self.nodes if node.kind == _FUSED for name in node.inputs[3:]}
        for name in masks & self.constants.keys():
            self.constants[name] = _aligned(self.constants[name])
        for node in self.nodes if device.type != "cpu" else ():
            for name in node.inputs:
                constant = self.constants.get(name)
                if isinstance(constant, np.ndarray) and constant.ndim > 0:
                    self._xp.keep(constant, device)

    def run(
        self, feeds: Mapping[str, Tensor], on_node: Callable[[], None] | None = None
    ) -> dict[str, Tensor]:
        """Compute the graph's outputs, of the dtypes that its file states."""
        values: dict[str, Any] = {name: self._take(name, feed) for name, feed in feeds.items()}
        for node, last_uses in zip(self.nodes, self._last_uses, strict=True):
            results = self._compute(node, node.inputs, values)
            values.update(zip(node.outputs, results, strict=False))
            for name in last_uses:
                values.pop(name, None)
            if on_node is not None:
                on_node()
        device = next(iter(feeds.values())).device
        return {
            name: self._give(
                dtype, values[name] if name in values else self.constants[name], device
            )
            for name, dtype in self._outputs.items()
        }

    def _compute(
        self, node: Node, names: Sequence[str], values: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        constants = self.constants
        inputs: list[Any] = [
            None if not name else values[name] if name in values else constants[name]
            for name in names
        ]
        try:
            if node.kind == _FUSED:
                return (_attention(*inputs),)
            result = compute(node.kind, inputs, node.attributes, self._xp)
        except _FAILS as exc:
            raise BackendError(f"{node.kind} {node.name!r} failed: {exc}") from exc
        return result if isinstance(result, tuple) else (result,)

    def _prepare(self) -> None:
        """Note, for each node, the values that no later one reads; they are freed after it."""
        lasting = set(self._outputs) | {""}
        final = {name: place for place, node in enumerate(self.nodes) for name in node.inputs}
        self._last_uses: list[list[str]] = [[] for _ in self.nodes]
        for name, place in final.items():
            if name not in lasting and name not in self.constants:
                self._last_uses[place].append(name)

    def _take(self, name: str, feed: Tensor) -> Tensor:
        stated = self._xp.dtypes[self._inputs[name]]
        return feed.to(stated) if feed.is_floating_point() else feed

    def _give(self, dtype: str, result: Any, device: torch.device) -> Tensor:
        tensor: Tensor = result
        if not isinstance(result, Tensor):
            tensor = torch.from_numpy(np.array(result)).to(device)
        return tensor.to(self._xp.dtypes[dtype]) if tensor.is_floating_point() else tensor


def stored_precision(network: Network) -> str:
    """The precision of a graph's weights; those that a Cast widens are float32."""
    stored = dict(network.weights)
    values = [(node, node.attributes.get("value")) for node in network.nodes]
    stored |= {node.outputs[0]: each for node, each in values if isinstance(each, Weight)}
    read = {name for node in network.nodes if node.kind != "Cast" for name in node.inputs}
    kinds = {weight.dtype for name, weight in stored.items() if name in read}
    return next((name for name in ("float16", "bfloat16") if name in kinds), "float32")


def _constant(weight: Weight) -> Any:
    if weight.dtype == "bfloat16" and weight.array.dtype.kind == "u":
        bits = np.array(weight.array).view(np.int16)
        return torch.from_numpy(bits).view(torch.bfloat16)
    constant = _settled(weight.array)
    return constant.to(getattr(torch, weight.dtype)) if isinstance(constant, Tensor) else constant


def _settled(value: Any) -> Any:
    """Numbers as a tensor, integers as NumPy's."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else value.numpy()
    array = np.array(value)  # a copy: the file may change while the graph is in use
    return torch.from_numpy(array) if array.dtype.kind == "f" else array


# --- attention ---


def _find_attention(
    softmax: Node, producers: Mapping[str, Node], consumers: Mapping[str, Sequence[Node]]
) -> tuple[Node, list[Node], tuple[str, ...]] | None:
    """The last node, those inside and the inputs of a scope ``attention``, with casts or none."""
    if softmax.name.replace("/", ".").split(".")[-2:-1] != ["attention"]:
        return None
    inner = [softmax]

    def above(name: str) -> Node | None:
        """The node before any cast whose result nothing else reads."""
        node = producers.get(name)
        while node is not None and len(consumers[node.outputs[0]]) == 1:
            inner.append(node)
            if node.kind != "Cast":
                return node
            node = producers.get(node.inputs[0])
        return None

    scores, mask = above(softmax.inputs[0]), tuple[str, ...]()
    if scores is not None and scores.kind == "Add":
        names = scores.inputs
        sides = [name for name in names if name in producers and producers[name].kind in _PRODUCTS]
        if len(sides) != 1:
            return None
        mask = tuple(name for name in names if name != sides[0])
        scores = above(sides[0])
    weights = softmax.outputs[0]
    while len(consumers[weights]) == 1 and consumers[weights][0].kind == "Cast":
        inner.append(consumers[weights][0])
        weights = inner[-1].outputs[0]
    last = consumers[weights][0]
    whole = len(consumers[weights]) == 1 and last.kind == "MatMul" and last.inputs[0] == weights
    if scores is None or scores.kind != "MatMul" or not whole:
        return None
    # queries, turned keys, values and mask
    return last, inner, (*scores.inputs, last.inputs[1], *mask)


_PRODUCTS = ("MatMul", "Cast")


def _attention(q: Tensor, turned: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    k = turned.transpose(-1, -2)
    is_one = q.ndim == k.ndim == v.ndim == 3
    if is_one:  # torch has fused kernels for [B, H, N, D] alone
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    mask = mask if mask is None else mask.to(q.dtype)
    attended = F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
    return attended.squeeze(0) if is_one else attended


def _aligned(mask: Tensor) -> Tensor:
    """A mask [..., N, M] whose rows begin at multiples of 8, as fused kernels on GPUs want them."""
    columns = mask.shape[-1]
    return F.pad(mask, (0, -columns % 8))[..., :columns]


# --- settings of torch for the whole process ---


class SharedSetting:
    """A setting that several threads share: the first one makes it, the last undoes it."""

    def __init__(self, make: Callable[[], Callable[[], None]]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._inside = 0
        self._undo: Callable[[], None] = lambda: None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._undo = self._make()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._undo()


def _leave_cudnn_out() -> Callable[[], None]:
    cuda: Any = torch.backends.cuda
    before = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(False)
    return lambda: cuda.enable_cudnn_sdp(before)


no_cudnn_attention = SharedSetting(_leave_cudnn_out)
"""Inside the block, torch takes another attention than cuDNN's, which plans for each new shape."""


def _switch_off_tf32() -> Callable[[], None]:
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    # torch 2.9 and newer keep an older and a newer setting of one thing, and refuse to compute
    # where the two contradict each other: both are set.
    places: list[tuple[Any, str, Any]] = [(matmul, "allow_tf32", False)]
    places.append((cudnn, "allow_tf32", False))
    if hasattr(matmul, "fp32_precision"):
        places += [(each, "fp32_precision", "ieee") for each in (matmul, cudnn.conv, cudnn.rnn)]
    before = [(place, name, _value(place, name)) for place, name, _ in places]
    try:
        is_medium = torch.get_float32_matmul_precision() == "medium"  # which no flag can say
    except RuntimeError:  # the two contradict each other already
        is_medium = False

    def set_all(values: Sequence[tuple[Any, str, Any]]) -> None:
        for place, name, value in values:
            setattr(place, name, value)

    def give_back() -> None:
        set_all(before[:2])
        if is_medium:
            torch.set_float32_matmul_precision("medium")
        set_all(before[2:])

    set_all(places)
    return give_back


def _value(place: Any, name: str) -> Any:
    """A setting; "none" where it is inherited, of which torch reports only what results."""
    backends: Any = torch.backends
    if name == "fp32_precision":
        above = backends if place is backends.cuda.matmul else backends.cudnn
        return "none" if place.fp32_precision == above.fp32_precision else place.fp32_precision
    try:
        return getattr(place, name)
    except RuntimeError:  # it contradicts the newer one
        return place.fp32_precision != "tf32"


exact_float32 = SharedSetting(_switch_off_tf32)
"""Inside the block, TF32 is off in matrix products and convolutions."""
