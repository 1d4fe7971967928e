"""Arrays that cross between this package and torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from zsseg_rt import ops
from zsseg_rt.backends.feeds import check_feed
from zsseg_rt.common.arrays import Array, TensorSpec, typestr_of
from zsseg_rt.errors import DeviceError, DTypeError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor


class DeviceResult:
    """A tensor on a GPU as this package's kernels take it: they use it where it was made, at once.

    torch's own ``__dlpack__`` asks which device and stream are current when it is called. After a
    run those are no longer the session's: each use would wait for the legacy default stream, and be
    refused on any GPU but the first.
    """

    def __init__(self, tensor: Tensor, stream: int) -> None:
        self.tensor, self._stream = tensor, stream
        self.shape = tuple(tensor.shape)
        self.__cuda_array_interface__ = {
            "shape": self.shape,
            "typestr": typestr_of(str(tensor.dtype).removeprefix("torch.")),
            "data": (tensor.data_ptr(), False),
            "strides": None,
            "version": 3,
            "stream": stream or 1,  # 1 is its name for the legacy default stream
        }

    def view(self, shape: tuple[int, ...]) -> DeviceResult:
        """The leading elements with another shape, no copy."""
        leading = self.tensor.reshape(-1)[: math.prod(shape)]
        return DeviceResult(leading.view(shape), self._stream)


def wide(tensor: Tensor) -> Tensor:
    """Half precision as float32, anything else as it is."""
    return tensor.float() if tensor.is_floating_point() else tensor


def read_host(spec: TensorSpec, array: Array, ranges: Any) -> Tensor:
    """Borrow a feed on the CPU."""
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


def read_device(spec: TensorSpec, array: Array, device: str, ranges: Any) -> Tensor:
    """Borrow a feed on a GPU."""
    import torch

    if isinstance(array, DeviceResult) and array.tensor.device == torch.device(device):
        check_feed(spec, str(array.tensor.dtype).removeprefix("torch."), array.shape, ranges)
        return array.tensor
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


def add_norm_rows(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: Sequence[float],
    normed: Tensor,
    total: Tensor | None = None,
    total_after: int = 0,
) -> None:
    """Run :func:`zsseg_rt.ops.add_layer_norm` on tensors of one device, on torch's stream."""
    import torch

    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0

    def lent(held: Tensor | None) -> Any:
        return DeviceResult(held, stream) if held is not None and held.is_cuda else held

    rows, weights = (lent(x), lent(y)), (lent(scale), lent(shift))
    written = {"total": lent(total), "total_after": total_after, "out": lent(normed)}
    ops.add_layer_norm(*rows, *weights, eps=eps, **written, stream=stream)
