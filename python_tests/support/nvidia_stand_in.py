"""Stand-ins for NVIDIA's libraries: ``nvidia_stand_in.c``, and the arrays that they copy to.

:func:`use` puts them in the place of the real ones, in this process.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from support.required import without_streams

SOURCE = Path(__file__).with_suffix(".c")
NV12_709_ER = 34
ABSENT = 4  # instead of a call that fails, libraries
_used = SimpleNamespace(library=None, colour=NV12_709_ER, in_blocks=False)


def build(folder: Path) -> Path:
    """Compile the stand-ins."""
    compiler = shutil.which("cc")
    if compiler is None:
        without_streams("no C compiler found (cc): apt install gcc")
    library = folder / "libnvidia_stand_in.so"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, SOURCE, "-o", library], check=True)
    return library


class HostArray:
    """In the place of a device array."""

    uploads = 0

    def __init__(self, shape):
        self.array, self.shape, self.dtype = np.zeros(shape, np.uint8), tuple(shape), "uint8"

    @classmethod
    def empty(cls, shape, dtype, device, stream):
        assert (dtype, device, stream) == ("uint8", 0, 7)
        return cls(shape)

    @property
    def __cuda_array_interface__(self):
        return {"data": (self.array.ctypes.data, False)}

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
    """In the place of our core, as far as frames need it to come to a GPU."""
    stream = SimpleNamespace(handle=7, synchronize=lambda: None)
    return SimpleNamespace(
        DeviceArray=HostArray,
        PinnedArray=HostPinned,
        Stream=lambda _: stream,
        cuda_set_device=lambda _: None,
        cuda_device_properties=lambda _: {"integrated": integrated},
        outside_captures=lambda work: work(),
    )


def use(library: Path, fails: int, colour: int, in_blocks: bool) -> None:
    """Let frames go through the stand-ins; the call of this number fails."""
    from zsseg_rt import ops
    from zsseg_rt.stream.gstreamer import gpu_frames

    ops.core = host_core()
    surfaces = "libabsent.so" if fails == ABSENT else str(library)
    gpu_frames.LIBRARIES = {"cu": (str(library),), "Nv": (surfaces,)}
    _used.library, _used.in_blocks, _used.colour = ctypes.CDLL(str(library)), in_blocks, colour
    ctypes.c_int.in_dll(_used.library, "stand_in_in_blocks").value = in_blocks
    ctypes.c_int.in_dll(_used.library, "stand_in_fails").value = fails


def facts(*names: str) -> dict[str, int]:
    """What is held, and how often calls were made."""
    names = names or ("images", "resources", "copies")
    return {n: ctypes.c_int.in_dll(_used.library, f"stand_in_{n}").value for n in names}


def surface_of(nv12, height, width, *, in_blocks):
    """The bytes of an NvBufSurface that holds a frame; its planes are never freed."""
    room = ctypes.create_string_buffer(512)
    make = _used.library.stand_in_surface
    make.restype = ctypes.c_size_t
    data = np.ascontiguousarray(nv12)
    size = make(
        ctypes.c_void_p(data.ctypes.data),
        height,
        width,
        _used.colour,
        int(in_blocks or _used.in_blocks),
        room,
    )
    return room.raw[:size]
