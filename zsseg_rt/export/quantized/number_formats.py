"""What is stored in 8 bits: whole numbers with a scale, or E4M3 floats with a scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

FloatArray = npt.NDArray[np.float32]
_SMALLEST_SCALE = float(np.finfo(np.float16).tiny)  # scales are stored in float16


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """A format of 8 bits without an offset.

    Attributes:
        name: Public name of the precision.
        data_type: ONNX's.
        largest: The largest number before the scale.
    """

    name: str
    data_type: int
    largest: float

    def scale(self, largest: npt.ArrayLike) -> FloatArray:
        """The scale for values up to ``largest``, as float16 holds it; never zero."""
        wanted = np.asarray(largest, np.float32) / self.largest
        least = np.maximum(wanted, _SMALLEST_SCALE)
        return np.asarray(least.astype(np.float16), np.float32)

    def rounded(self, values: FloatArray, scale: npt.ArrayLike) -> FloatArray:
        """What remains of values: the same shape, in float32."""
        factor = np.asarray(scale, np.float32)
        scaled = np.clip(values / factor, -self.largest, self.largest)
        return np.asarray(self._round(scaled) * factor, np.float32)

    def tensor(self, name: str, values: FloatArray, scale: FloatArray) -> TensorProto:
        """A weight in this format; ``scale`` broadcasts to it."""
        scaled = self._round(np.clip(values / scale, -self.largest, self.largest))
        if self.name == "int8":
            return numpy_helper.from_array(scaled.astype(np.int8), name)
        return helper.make_tensor(name, self.data_type, values.shape, scaled.ravel().tolist())

    def zeros(self, name: str, shape: Sequence[int]) -> TensorProto:
        """Zero points, which state the format and nothing else."""
        count = int(np.prod(shape, dtype=np.int64))
        return helper.make_tensor(name, self.data_type, shape, [0] * count)

    def _round(self, scaled: FloatArray) -> FloatArray:
        if self.name == "int8":
            return np.rint(scaled)
        magnitude = np.maximum(np.abs(scaled), 2.0**-6)  # below lie E4M3's subnormal numbers
        step = np.exp2(np.floor(np.log2(magnitude)) - 3).astype(np.float32)
        return np.asarray(np.rint(scaled / step) * step, np.float32)


FORMATS = {
    "int8": NumberFormat(name="int8", data_type=TensorProto.INT8, largest=127.0),
    "fp8": NumberFormat(name="fp8", data_type=TensorProto.FLOAT8E4M3FN, largest=448.0),
}
