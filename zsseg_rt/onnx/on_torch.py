"""The functions that operators are computed with, over torch, which is handed in.

LayerNorm, softmax and norms compute in float32 whatever they are given. Nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zsseg_rt.onnx.runs import Windows


class OnTorch:
    """torch's functions by the names that :class:`zsseg_rt.onnx.arrays.Numpy` has and explains."""

    def __init__(self, torch: Any) -> None:
        self._torch, self._functional = torch, torch.nn.functional
        self._placed: dict[Any, Any] = {}  # by array and device
        self.dtypes = {
            name: getattr(torch, name)
            for name in ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16")
        } | {name: getattr(torch, name) for name in ("int32", "int64", "bool")}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def holds(self, value: Any) -> bool:
        return isinstance(value, self._torch.Tensor)

    def asarray(self, value: Any, like: Any) -> Any:
        """The value as a tensor, where the other one is."""
        if self.holds(value):
            return value
        entry = self._placed.get((id(value), like.device))
        if entry is not None:
            return entry[1]
        array = np.asarray(value)
        if array.ndim == 0:  # beside a device's values, a number of the host costs no copy
            return self._torch.tensor(array.item(), dtype=self.dtypes[array.dtype.name])
        if not array.flags.writeable or not array.flags.c_contiguous:
            array = array.copy()
        return self._torch.from_numpy(array).to(like.device)

    def keep(self, array: Any, device: Any) -> Any:
        """Copy an array to a device once: as long as it is not dropped, its copy is used there."""
        key = (id(array), device)
        if key not in self._placed:
            self._placed[key] = (array, self._torch.from_numpy(np.array(array)).to(device))
        return self._placed[key][1]

    def is_float(self, x: Any) -> bool:
        return bool(x.is_floating_point())

    def dtype_name(self, x: Any) -> str:
        return str(x.dtype).removeprefix("torch.")

    def cast(self, x: Any, dtype: str) -> Any:
        return x.to(self.dtypes[dtype])

    def concat(self, parts: Sequence[Any], axis: int) -> Any:
        return self._torch.cat(list(parts), dim=axis)

    def take(self, x: Any, places: Any, axis: int) -> Any:
        if not self.holds(places):
            places = self.asarray(places, x)
        wrapped = self._torch.remainder(places.reshape(-1), x.shape[axis]).long()
        picked = x.index_select(axis, wrapped.to(x.device))
        return picked.reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])

    def take_along(self, x: Any, places: Any, axis: int) -> Any:
        return x.gather(axis, self._torch.remainder(places, x.shape[axis]).long())

    def order(self, x: Any, axis: int, *, descending: bool) -> Any:
        return self._torch.argsort(x, dim=axis, descending=descending, stable=True)

    def pad(self, x: Any, each: Sequence[tuple[int, int]], value: Any) -> Any:
        flat = [number for pair in reversed(each) for number in pair]
        return self._functional.pad(x, flat, value=float(value)) if any(flat) else x

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        return x.clamp(low, high)

    def gelu(self, x: Any, approximate: str) -> Any:
        return self._functional.gelu(x, approximate=approximate)

    def softmax(self, x: Any, axis: int) -> Any:
        return x.softmax(axis)

    def norm(self, x: Any, axis: Any, keepdims: bool) -> Any:
        wide = self._torch.linalg.vector_norm(x.float(), dim=axis, keepdim=keepdims)
        return wide.to(x.dtype)

    def layer_norm(self, x: Any, axis: int, scale: Any, bias: Any, eps: float) -> Any:
        shape = x.shape[axis:]
        if scale.shape != shape or (bias is not None and bias.shape != shape):
            scale, bias = scale.expand(shape), None if bias is None else bias.expand(shape)
        return self._normed(self._functional.layer_norm, x, shape, scale, bias, eps)

    def group_norm(self, x: Any, groups: int, scale: Any, bias: Any, eps: float) -> Any:
        return self._normed(self._functional.group_norm, x, groups, scale, bias, eps)

    @staticmethod
    def _normed(norm: Any, x: Any, over: Any, scale: Any, bias: Any, eps: float) -> Any:
        """Torch's norms compute in float32 inside; where the types differ, they are given it."""
        if x.dtype == scale.dtype and (bias is None or bias.dtype == x.dtype):
            return norm(x, over, scale, bias, eps)
        bias = None if bias is None else bias.float()
        return norm(x.float(), over, scale.float(), bias, eps).to(x.dtype)

    def conv(self, x: Any, weight: Any, bias: Any, lie: Windows, groups: int) -> Any:
        pads = [before for before, _ in lie.around]
        if any(before != after for before, after in lie.around):
            x, pads = self.pad(x, [(0, 0), (0, 0), *lie.around], 0), [0] * len(pads)
        function = getattr(self._torch, f"conv{len(pads)}d")
        return function(x, weight, bias, lie.strides, pads, lie.dilations, groups)

    def conv_transpose(
        self, x: Any, weight: Any, bias: Any, lie: Windows, more: Sequence[int], groups: int
    ) -> Any:
        pads = [before for before, _ in lie.around]
        if any(before != after for before, after in lie.around):
            raise ValueError(f"pads: expected the same at both ends, got {lie.around}")
        function = getattr(self._torch, f"conv_transpose{len(pads)}d")
        return function(x, weight, bias, lie.strides, pads, more, groups, lie.dilations)

    def max_pool(self, x: Any, lie: Windows) -> Any:
        function = getattr(self._functional, f"max_pool{len(lie.kernel)}d")
        return function(x, tuple(lie.kernel), tuple(lie.strides), 0, tuple(lie.dilations))

    def mean_pool(self, x: Any, lie: Windows) -> Any:
        if any(step != 1 for step in lie.dilations):
            raise ValueError(f"dilations: expected 1, got {list(lie.dilations)}")
        function = getattr(self._functional, f"avg_pool{len(lie.kernel)}d")
        return function(x, tuple(lie.kernel), tuple(lie.strides))
