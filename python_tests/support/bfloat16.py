"""bfloat16 arrays, which NumPy has not: their bits as uint16, handed over by DLPack."""

import ctypes
from typing import Any

import numpy as np

DLPACK_UINT, DLPACK_BFLOAT = 1, 4
# Bytes from the start of the managed tensor to its dtype's code, by the capsule's name.
CODE_AT = {b"dltensor": 20, b"dltensor_versioned": 52}


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    """The same numbers as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Bfloat16Array:
    """An array of bits, on any device, as a library with a bfloat16 type would hand it over."""

    def __init__(self, bits: Any) -> None:
        self.bits = bits

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self.bits.__dlpack_device__()
        return int(kind), int(index)

    def __dlpack__(self, **wishes: Any) -> Any:
        capsule, api = self.bits.__dlpack__(**wishes), ctypes.pythonapi
        get_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)
        get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
        name = get_name(("PyCapsule_GetName", api))(capsule)
        pointer = get_pointer(("PyCapsule_GetPointer", api))(capsule, name)
        code = ctypes.c_uint8.from_address(pointer + CODE_AT[name])
        assert code.value == DLPACK_UINT
        code.value = DLPACK_BFLOAT
        return capsule
