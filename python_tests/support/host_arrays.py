"""Arrays of the CPU in the place of a GPU's, as far as frames need it to come to one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np


class HostArray:
    """In the place of a device array."""

    uploads = 0

    def __init__(self, shape):
        self.array, self.shape, self.dtype = np.zeros(shape, np.uint8), tuple(shape), "uint8"

    @classmethod
    def empty(cls, shape, dtype, device, stream):
        assert (dtype, device, stream) == ("uint8", 0, 7)
        return cls(shape)

    def copy_from(self, array, stream):
        assert array.shape == self.shape
        assert stream == 7
        HostArray.uploads += 1
        self.array[...] = array

    def numpy(self):
        return self.array.copy()


class HostPinned:
    """In the place of pinned memory."""

    def __init__(self, shape, dtype, device):
        assert (dtype, device) == ("uint8", 0)
        self.host, self.shape = np.full(shape, 99, np.uint8), tuple(shape)

    def mapped(self, stream):
        array = HostArray(self.shape)
        array.array = self.host
        return array


def host_core(*, integrated=False):
    """In the place of our core."""
    stream = SimpleNamespace(handle=7, synchronize=lambda: None)
    return SimpleNamespace(
        DeviceArray=HostArray,
        PinnedArray=HostPinned,
        Stream=lambda _: stream,
        cuda_set_device=lambda _: None,
        cuda_device_properties=lambda _: {"integrated": integrated},
        outside_captures=lambda work: work(),
    )
