"""torch: the reference backend, and CUDA without TensorRT.

The ONNX graph is run node by node. Integers (shapes, axes) stay on the host, so a run on CUDA
enqueues without waiting for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from zsseg_rt.backends.base import Array, BackendOptions, Session, TensorSpec
from zsseg_rt.backends.feeds import check_feed, check_names
from zsseg_rt.backends.onnx_header import GraphHeader, read_header
from zsseg_rt.errors import (
    BackendError,
    BackendUnavailableError,
    DeviceError,
    DTypeError,
    PrecisionNotApplied,
    ShapeError,
)
from zsseg_rt.extras import install_command

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["BACKEND", "TorchBackend"]

_LOWERED = ("float16", "bfloat16")


class TorchBackend:
    """Runs graphs in eager torch, on the CPU or on CUDA."""

    @property
    def name(self) -> str:
        """``"torch"``."""
        return "torch"

    def load(
        self, graph_path: Path, *, device: str, precision: str, options: BackendOptions
    ) -> Session:
        """Load one ONNX file; see :class:`zsseg_rt.backends.base.Backend`.

        ``precision="auto"`` is the graph's own. A float32 graph can be lowered to bfloat16 or
        float16: weights and activations are cast, LayerNorm, softmax and norms compute in float32.
        """
        torch = _import_torch()
        target = _check_device(torch, device)
        header = read_header(graph_path)
        program = _Program.read(graph_path)
        applied = _choose_precision(precision, program.precision)
        lowered = applied if applied != program.precision else None
        with torch.inference_mode():
            program.place(target, getattr(torch, lowered) if lowered else None)
        if options.num_threads and device == "cpu":
            torch.set_num_threads(options.num_threads)
        return _TorchSession(program, header, device, applied, options)


@dataclass(frozen=True)
class _Node:
    """One operator with its attributes, decoded."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    last_uses: tuple[str, ...]


class _Program:
    """A graph's nodes in order, and its constants as tensors."""

    def __init__(
        self, nodes: list[_Node], constants: dict[str, Tensor], outputs: tuple[str, ...]
    ) -> None:
        self.nodes, self.constants, self.outputs = nodes, constants, outputs
        self.lowered: torch.dtype | None = None

    @classmethod
    def read(cls, path: Path) -> _Program:
        """Decode an ONNX file.

        Raises:
            BackendError: The file is damaged or uses an operator that is not offered.
        """
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        try:
            graph = onnx.load(path).graph
            constants = {t.name: _to_tensor(t) for t in graph.initializer}
        except (OSError, DecodeError, ValueError, TypeError) as exc:
            raise BackendError(f"{path}: expected an ONNX graph, got {exc}") from exc
        outputs = tuple(value.name for value in graph.output)
        nodes = _decode_nodes(graph, constants, outputs, path)
        used = {name for node in nodes for name in node.inputs} | set(outputs)
        return cls(nodes, {n: t for n, t in constants.items() if n in used}, outputs)

    @property
    def precision(self) -> str:
        """``"float16"`` if any weight is, else ``"float32"``."""
        kinds = {str(tensor.dtype) for tensor in self.constants.values()}
        return "float16" if "torch.float16" in kinds else "float32"

    def place(self, device: torch.device, lowered: torch.dtype | None) -> None:
        """Move the weights to a device and cast them; integers stay on the host."""
        self.lowered = lowered
        for name, tensor in self.constants.items():
            if tensor.is_floating_point():
                self.constants[name] = tensor.to(device=device, dtype=lowered or tensor.dtype)

    def run(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the graph's outputs; floating-point results are float32."""
        from zsseg_rt.backends._onnx_ops_torch import OPERATORS

        values = {name: self._lower(tensor) for name, tensor in feeds.items()}
        for node in self.nodes:
            inputs = [self._value(values, name) for name in node.inputs]
            try:
                result = OPERATORS[node.op_type](node.attributes, *inputs)
            except (RuntimeError, IndexError, ValueError, TypeError) as exc:
                raise BackendError(f"{node.op_type} {node.name!r} failed: {exc}") from exc
            results: Any = (result,) if hasattr(result, "dtype") else result
            lowered = map(self._lower, results)
            values.update(zip(node.outputs, lowered, strict=True))
            for name in node.last_uses:
                values.pop(name, None)
        return {name: _widen(self._value(values, name)) for name in self.outputs}

    def _value(self, values: dict[str, Tensor], name: str) -> Any:
        if not name:
            return None  # an optional input that was left out
        return values[name] if name in values else self.constants[name]

    def _lower(self, tensor: Tensor) -> Tensor:
        lower = self.lowered is not None and tensor.is_floating_point()
        return tensor.to(self.lowered) if lower else tensor


class _TorchSession:
    def __init__(
        self,
        program: _Program,
        header: GraphHeader,
        device: str,
        precision: str,
        options: BackendOptions,
    ) -> None:
        self._program: _Program | None = program
        self._header, self._device, self._precision = header, device, precision
        self._ranges = options.dynamic_axes

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._header.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._header.outputs

    @property
    def device(self) -> str:
        return self._device

    @property
    def precision(self) -> str:
        return self._precision

    def run(self, feeds: Mapping[str, Array], *, stream: int = 0) -> dict[str, Array]:
        import torch

        if self._program is None:
            raise BackendError("session: expected an open one, got a closed one. Load it again.")
        check_names(feeds, self.inputs)
        with torch.inference_mode(), self._on_stream(stream):
            tensors = {
                spec.name: self._read(spec, feeds[spec.name], stream) for spec in self.inputs
            }
            results = self._program.run(tensors)
            ready = {name: tensor.contiguous() for name, tensor in results.items()}
        if self._device == "cpu":
            return {name: tensor.numpy() for name, tensor in ready.items()}
        return dict(ready)

    def close(self) -> None:
        self._program = None

    @contextlib.contextmanager
    def _on_stream(self, stream: int) -> Iterator[None]:
        """Enqueue on the caller's stream, with float32 meaning float32 (no TF32)."""
        import torch

        if self._device == "cpu":
            yield
            return
        own: Any = torch.cuda.default_stream(self._device)
        if stream:
            own = torch.cuda.ExternalStream(stream, self._device)  # type: ignore[no-untyped-call]
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(own),
                torch.backends.cudnn.flags(allow_tf32=False),
            ):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def _read(self, spec: TensorSpec, array: Array, stream: int) -> Tensor:
        if self._device == "cpu":
            return _read_host(spec, array, self._ranges)
        return _read_device(spec, array, self._device, self._ranges)


def _read_host(spec: TensorSpec, array: Array, ranges: Any) -> Tensor:
    import torch

    if not isinstance(array, np.ndarray):
        raise DTypeError(
            f"{spec.name}: expected a NumPy array on device 'cpu', got {type(array).__name__}. "
            "Feed arrays of the session's device."
        )
    check_feed(spec, array.dtype.name, array.shape, ranges)
    if not array.flags.c_contiguous:
        raise ShapeError(
            f"{spec.name}: expected a C-contiguous array, got strides {array.strides}. "
            "Call numpy.ascontiguousarray first."
        )
    # torch refuses to borrow read-only memory without a warning; only such a feed is copied.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _read_device(spec: TensorSpec, array: Array, device: str, ranges: Any) -> Tensor:
    import torch

    if not hasattr(array, "__dlpack__") and not hasattr(array, "__cuda_array_interface__"):
        raise DTypeError(
            f"{spec.name}: expected an array on {device} with __dlpack__ or "
            f"__cuda_array_interface__, got {type(array).__name__}."
        )
    try:
        borrowed = (
            torch.utils.dlpack.from_dlpack(array)
            if hasattr(array, "__dlpack__")
            else torch.as_tensor(array, device=device)
        )
    except (RuntimeError, BufferError, TypeError, ValueError) as exc:
        raise DeviceError(f"{spec.name}: expected an array on {device}, got {exc}") from exc
    if borrowed.device != torch.device(device):
        raise DeviceError(f"{spec.name}: expected an array on {device}, got {borrowed.device}.")
    check_feed(spec, str(borrowed.dtype).removeprefix("torch."), tuple(borrowed.shape), ranges)
    if not borrowed.is_contiguous():
        raise ShapeError(f"{spec.name}: expected a C-contiguous array, got {borrowed.stride()}")
    return borrowed


def _import_torch() -> Any:
    try:
        import onnx  # noqa: F401
        import torch
    except ImportError as exc:
        raise BackendUnavailableError(
            f"backend: expected the packages torch and onnx, got {exc}. "
            f"Run: {install_command('torch')}"
        ) from exc
    return torch


def _check_device(torch: Any, device: str) -> Any:
    kind, _, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or not index.isdigit()):
        raise DeviceError(f"device: expected 'cpu' or 'cuda:N', got {device!r}")
    if kind == "cuda" and int(index) >= torch.cuda.device_count():
        raise DeviceError(
            f"device: expected one of {torch.cuda.device_count()} CUDA device(s) that torch sees, "
            f"got {device!r}. Use device='cpu', or install a CUDA build of torch and the driver."
        )
    return torch.device(device)


def _choose_precision(asked: str, graph: str) -> str:
    if asked in ("auto", graph):
        return graph
    if graph == "float32" and asked in _LOWERED:
        return asked
    offered = (graph, *_LOWERED) if graph == "float32" else (graph,)
    raise PrecisionNotApplied(
        f"precision: expected one of {', '.join(offered)} for this graph on backend 'torch', "
        f"got {asked!r}. Use precision='auto'."
    )


def _to_tensor(proto: Any) -> Tensor:
    import torch
    from onnx import numpy_helper

    values = np.array(numpy_helper.to_array(proto))  # a copy: torch wants writable memory
    return torch.from_numpy(values)


def _decode_nodes(
    graph: Any, constants: dict[str, Tensor], outputs: tuple[str, ...], path: Path
) -> list[_Node]:
    from onnx import helper

    from zsseg_rt.backends._onnx_ops_torch import OPERATORS

    nodes: list[_Node] = []
    last_use = _last_uses(graph, set(outputs) | set(constants))
    for index, node in enumerate(graph.node):
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            constants[node.output[0]] = _to_tensor(attributes["value"])
            continue
        if node.op_type == "Cast" and node.input[0] in constants:  # a weight stored in fewer bytes
            narrow: Any = constants[node.input[0]]
            constants[node.output[0]] = cast("Tensor", OPERATORS["Cast"](attributes, narrow))
            continue
        if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
            raise BackendError(
                f"{path}: node {node.name!r}: expected an operator that backend 'torch' offers, "
                f"got {node.op_type!r}. Use backend 'openvino' or 'tensorrt'."
            )
        nodes.append(
            _Node(
                name=node.name,
                op_type=node.op_type,
                inputs=tuple(node.input),
                outputs=tuple(node.output),
                attributes=attributes,
                last_uses=tuple(last_use.get(index, ())),
            )
        )
    return nodes


def _last_uses(graph: Any, kept: set[str]) -> dict[int, list[str]]:
    """Which values no later node reads, by node index; they are freed there."""
    final = {name: index for index, node in enumerate(graph.node) for name in node.input}
    uses: dict[int, list[str]] = {}
    for name, index in final.items():
        if name not in kept:
            uses.setdefault(index, []).append(name)
    return uses


def _widen(tensor: Any) -> Tensor:
    widened: Tensor = tensor.float() if tensor.is_floating_point() else tensor
    return widened


BACKEND = TorchBackend()
