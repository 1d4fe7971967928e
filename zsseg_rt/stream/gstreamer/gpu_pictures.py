"""Painted pictures on their way to an encoder, in a GPU's memory; the CPU sees no pixel.

``nvidia`` has the calls. A picture is copied once, within that memory, into a buffer of GStreamer's
CUDA pool (gstcudabufferpool.h, since 1.22) or, on a Jetson, into an ``NvBufSurface`` that a buffer
wraps as NVIDIA's elements do: its bytes are the structure.
"""

from __future__ import annotations

import ctypes as c
import functools
import math
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from zsseg_rt.stream.gstreamer import nvidia
from zsseg_rt.stream.gstreamer.frames import mapped_at
from zsseg_rt.stream.gstreamer.library import Library
from zsseg_rt.stream.gstreamer.messages import NotMappedError
from zsseg_rt.stream.gstreamer.nvidia import Calls, Place

MOST = 16
"""Buffers of one size that encoders may hold; 2 wait in an appsrc, an encoder keeps a few."""
COLOURS = MappingProxyType({"bt601": "bt601", "bt709": "bt709", "bt601-full": "1:4:0:0"})
"""What caps call a colour matrix."""
_WRITE = 2  # GST_MAP_WRITE
_READ_AND_WRITE = 0  # CU_GRAPHICS_MAP_RESOURCE_FLAGS_NONE
_DONT_WAIT = 2  # GST_BUFFER_POOL_ACQUIRE_FLAG_DONTWAIT
# Of NvBufSurfaceColorFormat.
_FORMATS = MappingProxyType(
    {**{("NV12", matrix): number for number, matrix in nvidia.NV12.items()}, ("I420", "bt601"): 2,
     ("I420", "bt601-full"): 4}
)  # fmt: skip
_NEEDS = MappingProxyType(
    {
        "nvmm": (
            "cuMemcpy2DAsync_v2", *nvidia.EGL_CALLS, "NvBufSurfaceCreate", "NvBufSurfaceDestroy",
            "gst_buffer_new_wrapped_full", "gst_mini_object_unref", "gst_sample_set_buffer",
        ),
        "cuda": (
            "cuMemcpy2DAsync_v2", "cuDevicePrimaryCtxRetain", "gst_cuda_load_library",
            "gst_cuda_memory_init_once", "gst_cuda_context_new_wrapped",
            "gst_context_new_cuda_context", "gst_cuda_buffer_pool_new",
            "gst_buffer_pool_get_config", "gst_buffer_pool_config_set_params",
            "gst_buffer_pool_set_config", "gst_buffer_pool_set_active",
            "gst_buffer_pool_acquire_buffer", "gst_element_set_context", "gst_object_unref",
            "gst_mini_object_unref", "gst_sample_set_buffer",
        ),
    }
)  # fmt: skip


class _Buffers(Protocol):
    """Buffers of one size and colour matrix."""

    def take(self, held: ExitStack) -> tuple[Any, list[Place]]:
        """A free ``Gst.Buffer``, and where its planes may be written until the block ends."""

    def close(self) -> None:
        """Free those that no encoder holds now, and the rest once they are given back."""


class GpuPictures:
    """Puts planes on a GPU into GStreamer's buffers there, for one thread at a time.

    Args:
        library: GStreamer.
        path: ``"nvmm"`` or ``"cuda"``.
        device: The GPU on which planes lie, ``"cuda:N"``.
        layout: ``"NV12"`` or ``"I420"``.

    Raises:
        NotMappedError: A library or one of its functions is missing or fails.
    """

    def __init__(self, library: Library, path: str, device: str, layout: str) -> None:
        from zsseg_rt.ops import core

        self.path, self.layout = path, layout
        self._library, self._core = library, core
        self._calls, self._index = Calls(_NEEDS[path]), int(device.partition(":")[2])
        if path == "cuda" and self._index > 0:
            raise NotMappedError(f"device: expected cuda:0, on which encoders work, got {device}")
        core.cuda_set_device(self._index)
        self._stream = core.Stream(self._index)
        self._context = _context(self._index) if path == "cuda" else None
        self._kind: tuple[tuple[int, int], str] | None = None
        self._buffers: _Buffers | None = None

    def plane(self, host: npt.NDArray[np.uint8]) -> Any:
        """A copy of a plane on the GPU."""
        return self._core.DeviceArray.from_numpy(host, self._index, self._stream.handle)

    def caps(self, size_hw: tuple[int, int], matrix: str, rate: int) -> str:
        """The caps of pictures of this size and colour matrix."""
        return (
            f"video/x-raw({nvidia.FEATURES[self.path]}),format={self.layout},width={size_hw[1]},"
            f"height={size_hw[0]},framerate={rate}/1,colorimetry={COLOURS[matrix]}"
        )

    def lend_context(self, element: Any) -> None:
        """Let an element and what it holds work in our CUDA context.

        An encoder in a context of its own would fetch each picture to the CPU and upload it again.
        """
        if self._context is not None:
            shared = self._calls("gst_context_new_cuda_context", self._context)
            self._calls("gst_element_set_context", hash(element), shared)
            self._calls("gst_mini_object_unref", shared)

    def buffer(self, planes: Sequence[Any], matrix: str) -> Any:
        """A ``Gst.Buffer`` that holds a copy of planes on the GPU.

        Shapes:
            planes: uint8 [H, W], then [H / 2, W / 2, 2] of NV12 or two [H / 2, W / 2] of I420.

        Raises:
            NotMappedError: GStreamer cannot have it.
        """
        self._core.cuda_set_device(self._index)  # its context becomes this thread's
        kind = ((planes[0].shape[0], planes[0].shape[1]), matrix)
        if self._buffers is None or kind != self._kind:
            self.close()
            made: Any = _Pool if self.path == "cuda" else _Surfaces
            self._buffers, self._kind = made(self, *kind), kind
        with ExitStack() as held:
            buffer, places = self._buffers.take(held)
            for plane, place in zip(planes, places, strict=True):
                bytes_wide = math.prod(plane.shape[1:])
                at = plane.__cuda_array_interface__["data"][0]
                self._calls.copy(
                    Place(nvidia.DEVICE, at, bytes_wide), place, (plane.shape[0], bytes_wide),
                    self._stream.handle,
                )  # fmt: skip
            self._stream.synchronize()
        return buffer

    def close(self) -> None:
        """Free the buffers; those that an encoder holds once it gives them back."""
        if self._buffers is not None:
            self._buffers.close()
        self._buffers = self._kind = None


def path_to(gst: Any, element: str) -> str:
    """In which memory an encoder takes pictures: ``"nvmm"``, ``"cuda"`` or only ``"host"``."""
    factory, sink = gst.ElementFactory.find(element), gst.PadDirection.SINK
    pads = [] if factory is None else factory.get_static_pad_templates()
    taken = "".join(pad.get_caps().to_string() for pad in pads if pad.direction == sink)
    return next((path for path, name in nvidia.FEATURES.items() if name in taken), "host")


def how_pictures_reach(gst: Any, element: str) -> tuple[str, str]:
    """The path of pictures on a GPU to an encoder, and why it is not a shorter one."""
    path = path_to(gst, element)
    try:
        Calls(_NEEDS[path]) if path != "host" else None
    except NotMappedError as exc:
        return "host", str(exc)
    return path, "" if path != "host" else f"{element} takes no memory of a GPU"


class _Pool:
    """GStreamer's buffers of CUDA memory."""

    def __init__(self, of: GpuPictures, size_hw: tuple[int, int], matrix: str) -> None:
        self._calls, self._library = of._calls, of._library
        caps = of._library.Gst.Caps.from_string(of.caps(size_hw, matrix, 30))
        self._pool = self._calls("gst_cuda_buffer_pool_new", of._context)
        try:
            config = self._calls("gst_buffer_pool_get_config", self._pool)
            self._calls("gst_buffer_pool_config_set_params", config, hash(caps), 0, 0, MOST)
            self._calls("gst_buffer_pool_set_config", self._pool, config)
            self._calls("gst_buffer_pool_set_active", self._pool, 1)
        except NotMappedError:
            self._calls("gst_object_unref", self._pool)
            raise

    def take(self, held: ExitStack) -> tuple[Any, list[Place]]:
        address, how = c.c_void_p(), _AcquireParams(flags=_DONT_WAIT)
        self._calls("gst_buffer_pool_acquire_buffer", self._pool, c.byref(address), c.byref(how))
        with ExitStack() as failing:
            self._calls.later(failing, "gst_mini_object_unref", address)
            info = held.enter_context(mapped_at(address, _WRITE | nvidia.MAP_CUDA))
            failing.pop_all()
        buffer = _as_buffer(self._calls, self._library.Gst, address)
        meta = self._library.GstVideo.buffer_get_video_meta(buffer)
        return buffer, [
            Place(nvidia.UNIFIED, info.data + meta.offset[i], meta.stride[i])
            for i in range(meta.n_planes)
        ]

    def close(self) -> None:
        self._calls("gst_buffer_pool_set_active", self._pool, 0)
        self._calls("gst_object_unref", self._pool)


class _AcquireParams(c.Structure):  # GstBufferPoolAcquireParams
    _fields_ = (
        ("format", c.c_int), ("start", c.c_int64), ("stop", c.c_int64), ("flags", c.c_int),
        ("reserved", nvidia.pointer * 4),
    )  # fmt: skip


class _Surfaces:
    """Surfaces of a Jetson, used in turns."""

    def __init__(self, of: GpuPictures, size_hw: tuple[int, int], matrix: str) -> None:
        self._calls, self._library = of._calls, of._library
        self._params = nvidia.SurfaceCreateParams(
            width=size_hw[1], height=size_hw[0], color_format=_FORMATS[of.layout, matrix],
            memory=nvidia.SURFACE_ARRAY,
        )  # fmt: skip
        self._lock, self._free = threading.Lock(), list[Any]()
        self._made, self._is_closed = 0, False

    def take(self, held: ExitStack) -> tuple[Any, list[Place]]:
        surface = self._taken()
        at, size = c.addressof(surface.contents), c.sizeof(nvidia.Surface)
        _lent[at] = self, surface
        address = self._calls(
            "gst_buffer_new_wrapped_full", 0, at, size, 0, size, at, _when_returned
        )
        buffer = _as_buffer(self._calls, self._library.Gst, address)
        return buffer, self._calls.planes_of(surface, _READ_AND_WRITE, held)

    def give_back(self, surface: Any) -> None:
        """An encoder needs a surface no longer; in any thread."""
        with self._lock:
            if not self._is_closed:
                self._free.append(surface)
                return
        self._calls("NvBufSurfaceDestroy", surface)

    def close(self) -> None:
        with self._lock:
            self._is_closed, free = True, self._free
        for surface in free:
            self._calls("NvBufSurfaceDestroy", surface)

    def _taken(self) -> Any:
        with self._lock:
            if self._free:
                return self._free.pop()
        if self._made == MOST:
            raise NotMappedError(f"NvBufSurface: the encoder holds all {MOST}")
        surface = c.POINTER(nvidia.Surface)()
        self._calls("NvBufSurfaceCreate", c.byref(surface), 1, c.byref(self._params))
        self._made += 1
        surface.contents.num_filled = 1
        return surface


_lent: dict[int, tuple[_Surfaces, Any]] = {}


def _give_back(address: int) -> None:
    owner, surface = _lent.pop(address)
    owner.give_back(surface)


_when_returned = nvidia.RETURNED(_give_back)


def _as_buffer(calls: Calls, gst: Any, address: Any) -> Any:
    """The ``Gst.Buffer`` at an address, whose reference is ours no longer."""
    sample = gst.Sample.new(None, None, None, None)
    calls("gst_sample_set_buffer", hash(sample), address)  # PyGObject's hash is the C address
    calls("gst_mini_object_unref", address)
    return sample.get_buffer()


@functools.cache
def _context(index: int) -> Any:
    """GStreamer's name for the context in which this process works on a GPU; kept until its end."""
    calls, primary = Calls(_NEEDS["cuda"]), c.c_void_p()
    calls("gst_cuda_load_library")
    calls("gst_cuda_memory_init_once")
    calls("cuDevicePrimaryCtxRetain", c.byref(primary), index)
    return calls("gst_cuda_context_new_wrapped", primary, index)
