"""The C calls that copy frames within a GPU's memory, out of GStreamer's buffers.

On a Jetson, buffers of ``memory:NVMM`` hold an ``NvBufSurface``, which CUDA reads as an EGL
image: nvbufsurface.h of JetPack 6 (jetson_multimedia_api) and cudaEGL.h of CUDA 12 describe the
calls and structures, NVIDIA's sample code NvCudaProc.cpp their order. On other machines, buffers of
``memory:CUDAMemory`` (gst-plugins-bad, gstcudamemory.h) are mapped with ``GST_MAP_CUDA``.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, NamedTuple

from zsseg_rt.stream.gstreamer.messages import NotMappedError

LIBRARIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cuda": ("libcuda.so.1",),
        "gst": ("libgstreamer-1.0.so.0",),
        "gstcuda": ("libgstcuda-1.0.so.0",),
        "nvbufsurface": ("libnvbufsurface.so.1.0.0", "libnvbufsurface.so"),
    }
)
MAP_CUDA = 1 << 17  # GST_MAP_FLAG_LAST is 1 << 16
FEATURES = MappingProxyType({"nvmm": "memory:NVMM", "cuda": "memory:CUDAMemory"})
"""What caps call the memory of each path."""
SURFACE_ARRAY = 4  # NVBUF_MEM_SURFACE_ARRAY
# Of NvBufSurfaceColorFormat: NV12, NV12_ER, NV12_709, NV12_709_ER; ER is the full range.
NV12 = MappingProxyType({6: "bt601", 7: "bt601-full", 33: "bt709", 34: "bt709-full"})
DEVICE, ARRAY, UNIFIED = 2, 3, 4  # CUmemorytype
_EGL_PITCH = 1  # CUeglFrameType; 0 is an array
_PLANES = 4  # NVBUF_MAX_PLANES; reserved fields come in fours too

_u32, pointer = c.c_uint32, c.c_void_p


class _PlaneParams(c.Structure):  # NvBufSurfacePlaneParams
    _fields_ = (
        ("num_planes", _u32), ("width", _u32 * _PLANES), ("height", _u32 * _PLANES),
        ("pitch", _u32 * _PLANES), ("offset", _u32 * _PLANES), ("psize", _u32 * _PLANES),
        ("bytes_per_pixel", _u32 * _PLANES), ("reserved", pointer * (4 * _PLANES)),
    )  # fmt: skip


class _SurfaceParams(c.Structure):  # NvBufSurfaceParams, with its NvBufSurfaceMappedAddr
    _fields_ = (
        ("width", _u32), ("height", _u32), ("pitch", _u32), ("color_format", c.c_int),
        ("layout", c.c_int), ("buffer_desc", c.c_uint64), ("data_size", _u32),
        ("data", pointer), ("planes", _PlaneParams), ("mapped", pointer * _PLANES),
        ("egl_image", pointer), ("mapped_reserved", pointer * 4), ("reserved", pointer * 4),
    )  # fmt: skip


class Surface(c.Structure):
    """NvBufSurface."""

    _fields_ = (
        ("gpu", _u32), ("batch_size", _u32), ("num_filled", _u32), ("contiguous", c.c_bool),
        ("memory", c.c_int), ("surfaces", c.POINTER(_SurfaceParams)), ("reserved", pointer * 4),
    )  # fmt: skip


class _EglFrame(c.Structure):  # CUeglFrame
    _fields_ = (
        ("planes", pointer * 3), ("width", c.c_uint), ("height", c.c_uint), ("depth", c.c_uint),
        ("pitch", c.c_uint), ("plane_count", c.c_uint), ("channels", c.c_uint),
        ("kind", c.c_int), ("color_format", c.c_int), ("format", c.c_int),
    )  # fmt: skip


class _Copy(c.Structure):  # CUDA_MEMCPY2D
    _fields_ = (
        ("src_x", c.c_size_t), ("src_y", c.c_size_t), ("src_memory", c.c_int),
        ("src_host", pointer), ("src_device", c.c_uint64), ("src_array", pointer),
        ("src_pitch", c.c_size_t), ("dst_x", c.c_size_t), ("dst_y", c.c_size_t),
        ("dst_memory", c.c_int), ("dst_host", pointer), ("dst_device", c.c_uint64),
        ("dst_array", pointer), ("dst_pitch", c.c_size_t), ("width", c.c_size_t),
        ("height", c.c_size_t),
    )  # fmt: skip


class Place(NamedTuple):
    """Where a plane lies: a ``CUmemorytype``, an address or array, bytes from row to row."""

    memory: int
    at: int
    pitch: int = 0


NOT_NULL = "an address"
# Name -> library, what it returns on success (None: nothing), and its arguments.
_CALLS: Mapping[str, tuple[str, int | str | None, tuple[Any, ...]]] = MappingProxyType(
    {
        "cuMemcpy2DAsync_v2": ("cuda", 0, (c.POINTER(_Copy), pointer)),
        "cuDevicePrimaryCtxRetain": ("cuda", 0, (c.POINTER(pointer), c.c_int)),
        "cuGraphicsEGLRegisterImage": ("cuda", 0, (c.POINTER(pointer), pointer, c.c_uint)),
        "cuGraphicsResourceGetMappedEglFrame": (
            "cuda", 0, (c.POINTER(_EglFrame), pointer, c.c_uint, c.c_uint),
        ),
        "cuGraphicsUnregisterResource": ("cuda", 0, (pointer,)),
        "NvBufSurfaceMapEglImage": ("nvbufsurface", 0, (c.POINTER(Surface), c.c_int)),
        "NvBufSurfaceUnMapEglImage": ("nvbufsurface", 0, (c.POINTER(Surface), c.c_int)),
        "gst_cuda_memory_sync": ("gstcuda", None, (pointer,)),
        "gst_cuda_load_library": ("gstcuda", 1, ()),
        "gst_cuda_memory_init_once": ("gstcuda", None, ()),
        "gst_cuda_context_new_wrapped": ("gstcuda", NOT_NULL, (pointer, c.c_int)),
        "gst_context_new_cuda_context": ("gstcuda", NOT_NULL, (pointer,)),
        "gst_element_set_context": ("gst", None, (pointer, pointer)),
        "gst_mini_object_unref": ("gst", None, (pointer,)),
    }
)  # fmt: skip
EGL_CALLS = (
    "cuGraphicsEGLRegisterImage", "cuGraphicsResourceGetMappedEglFrame",
    "cuGraphicsUnregisterResource", "NvBufSurfaceMapEglImage", "NvBufSurfaceUnMapEglImage",
)  # fmt: skip


class Calls:
    """Functions of these libraries, with their signatures.

    Raises:
        NotMappedError: A library or one of its functions is missing.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._found: dict[str, Any] = {}
        for name in names:
            library, success, arguments = _CALLS[name]
            self._found[name] = function = _function(library, name)
            function.argtypes = arguments
            function.restype = pointer if success == NOT_NULL else c.c_int
            if success is None:
                function.restype = None

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call a function.

        Raises:
            NotMappedError: It did not succeed.
        """
        result, success = self._found[name](*arguments), _CALLS[name][1]
        if (result is None) if success == NOT_NULL else (result != success):
            raise NotMappedError(f"{name}: expected {success}, got {result}")
        return result

    def later(self, held: ExitStack, name: str, *arguments: Any) -> None:
        """Call a function when the block ends, whatever it returns."""
        held.callback(self._found[name], *arguments)

    def copy(self, source: Place, target: Place, size: tuple[int, int], stream: int) -> None:
        """Enqueue the copy of a plane of so many rows, each of so many bytes."""
        copy = _Copy(width=size[1], height=size[0])
        for end, place in (("src", source), ("dst", target)):
            setattr(copy, f"{end}_memory", place.memory)
            setattr(copy, f"{end}_array" if place.memory == ARRAY else f"{end}_device", place.at)
            setattr(copy, f"{end}_pitch", place.pitch)
        self("cuMemcpy2DAsync_v2", c.byref(copy), stream)

    def planes_of(self, surface: Any, access: int, held: ExitStack) -> list[Place]:
        """Map the planes of a pointer to a :class:`Surface` for CUDA, until the block ends.

        ``access`` is 0 for all, or ``CU_GRAPHICS_MAP_RESOURCE_FLAGS_READ_ONLY``, 1.
        """
        params = surface.contents.surfaces[0]
        self("NvBufSurfaceMapEglImage", surface, 0)
        self.later(held, "NvBufSurfaceUnMapEglImage", surface, 0)
        resource, frame = pointer(), _EglFrame()
        self("cuGraphicsEGLRegisterImage", c.byref(resource), params.egl_image, access)
        self.later(held, "cuGraphicsUnregisterResource", resource)
        self("cuGraphicsResourceGetMappedEglFrame", c.byref(frame), resource, 0, 0)
        kind = DEVICE if frame.kind == _EGL_PITCH else ARRAY
        pitches = params.planes.pitch if kind == DEVICE else [0] * _PLANES
        count = params.planes.num_planes
        return [Place(kind, frame.planes[i], pitches[i]) for i in range(count)]


def _function(library: str, name: str) -> Any:
    problem: Exception | None = None
    for file in LIBRARIES[library]:
        try:
            return c.CDLL(file)[name]  # an object of its own, whose signature nobody else sets
        except (OSError, AttributeError) as exc:
            problem = problem or exc
    raise NotMappedError(f"{name}: expected it in {LIBRARIES[library][0]}, found none: {problem}")
