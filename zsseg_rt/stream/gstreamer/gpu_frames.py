"""Frames out of GStreamer's buffers: from the CPU's memory, or copied within a Jetson's.

Buffers of ``memory:NVMM`` hold an ``NvBufSurface``, which CUDA reads as an EGL image:
nvbufsurface.h of JetPack 6 (jetson_multimedia_api) and cudaEGL.h of CUDA 12 describe the calls and
structures, NVIDIA's sample code NvCudaProc.cpp their order. The CPU sees no pixel.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from zsseg_rt.runtime.frames import Nv12Frame
from zsseg_rt.stream.conversion import Uploads, gpu_index, host_picture
from zsseg_rt.stream.gstreamer.library import (
    Library,
    NotMappedError,
    host_planes,
    mapped,
    missing_elements,
)
from zsseg_rt.stream.gstreamer.pipelines import NVMM_DECODER

LIBRARIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cuda": ("libcuda.so.1",),
        "nvbufsurface": ("libnvbufsurface.so.1.0.0", "libnvbufsurface.so"),
    }
)
_SURFACE_ARRAY = 4  # NVBUF_MEM_SURFACE_ARRAY
# Of NvBufSurfaceColorFormat: NV12, NV12_ER, NV12_709, NV12_709_ER; ER is the full range.
_NV12 = MappingProxyType({6: "bt601", 7: "bt601-full", 33: "bt709", 34: "bt709-full"})
_DEVICE, _ARRAY = 2, 3  # CUmemorytype
_EGL_PITCH = 1  # CUeglFrameType; 0 is an array
_READ_ONLY = 1  # CU_GRAPHICS_MAP_RESOURCE_FLAGS_READ_ONLY
_PLANES = 4  # NVBUF_MAX_PLANES; reserved fields come in fours too
_EVEN = "width=[2,32766,2],height=[2,32766,2]"

_u32, _pointer = c.c_uint32, c.c_void_p


class _PlaneParams(c.Structure):  # NvBufSurfacePlaneParams
    _fields_ = (
        ("num_planes", _u32), ("width", _u32 * _PLANES), ("height", _u32 * _PLANES),
        ("pitch", _u32 * _PLANES), ("offset", _u32 * _PLANES), ("psize", _u32 * _PLANES),
        ("bytes_per_pixel", _u32 * _PLANES), ("reserved", _pointer * (4 * _PLANES)),
    )  # fmt: skip


class _SurfaceParams(c.Structure):  # NvBufSurfaceParams, with its NvBufSurfaceMappedAddr
    _fields_ = (
        ("width", _u32), ("height", _u32), ("pitch", _u32), ("color_format", c.c_int),
        ("layout", c.c_int), ("buffer_desc", c.c_uint64), ("data_size", _u32),
        ("data", _pointer), ("planes", _PlaneParams), ("mapped", _pointer * _PLANES),
        ("egl_image", _pointer), ("mapped_reserved", _pointer * 4), ("reserved", _pointer * 4),
    )  # fmt: skip


class _Surface(c.Structure):  # NvBufSurface
    _fields_ = (
        ("gpu", _u32), ("batch_size", _u32), ("num_filled", _u32), ("contiguous", c.c_bool),
        ("memory", c.c_int), ("surfaces", c.POINTER(_SurfaceParams)), ("reserved", _pointer * 4),
    )  # fmt: skip


class _EglFrame(c.Structure):  # CUeglFrame
    _fields_ = (
        ("planes", _pointer * 3), ("width", c.c_uint), ("height", c.c_uint), ("depth", c.c_uint),
        ("pitch", c.c_uint), ("plane_count", c.c_uint), ("channels", c.c_uint),
        ("kind", c.c_int), ("color_format", c.c_int), ("format", c.c_int),
    )  # fmt: skip


class _Copy(c.Structure):  # CUDA_MEMCPY2D
    _fields_ = (
        ("src_x", c.c_size_t), ("src_y", c.c_size_t), ("src_memory", c.c_int),
        ("src_host", _pointer), ("src_device", c.c_uint64), ("src_array", _pointer),
        ("src_pitch", c.c_size_t), ("dst_x", c.c_size_t), ("dst_y", c.c_size_t),
        ("dst_memory", c.c_int), ("dst_host", _pointer), ("dst_device", c.c_uint64),
        ("dst_array", _pointer), ("dst_pitch", c.c_size_t), ("width", c.c_size_t),
        ("height", c.c_size_t),
    )  # fmt: skip


# Functions that return 0 where they succeed: their library and arguments.
_CALLS: Mapping[str, tuple[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "cuMemcpy2DAsync_v2": ("cuda", (c.POINTER(_Copy), _pointer)),
        "cuGraphicsEGLRegisterImage": ("cuda", (c.POINTER(_pointer), _pointer, c.c_uint)),
        "cuGraphicsResourceGetMappedEglFrame": (
            "cuda", (c.POINTER(_EglFrame), _pointer, c.c_uint, c.c_uint),
        ),
        "cuGraphicsUnregisterResource": ("cuda", (_pointer,)),
        "NvBufSurfaceMapEglImage": ("nvbufsurface", (c.POINTER(_Surface), c.c_int)),
        "NvBufSurfaceUnMapEglImage": ("nvbufsurface", (c.POINTER(_Surface), c.c_int)),
    }
)  # fmt: skip


class _Place(NamedTuple):
    """Where a plane lies: a ``CUmemorytype``, an address or array, bytes from row to row."""

    memory: int
    at: int
    pitch: int


class _Calls:
    """The functions, with their signatures."""

    def __init__(self) -> None:
        self._functions = {name: _function(name) for name in _CALLS}

    def __call__(self, name: str, *arguments: Any) -> None:
        if (result := self._functions[name](*arguments)) != 0:
            raise NotMappedError(f"{name}: expected 0, got {result}")

    def copy(self, source: _Place, target: _Place, size: tuple[int, int], stream: int) -> None:
        """Enqueue the copy of a plane of so many rows, each of so many bytes."""
        copy = _Copy(width=size[1], height=size[0])
        for end, place in (("src", source), ("dst", target)):
            setattr(copy, f"{end}_memory", place.memory)
            setattr(copy, f"{end}_array" if place.memory == _ARRAY else f"{end}_device", place.at)
            setattr(copy, f"{end}_pitch", place.pitch)
        self("cuMemcpy2DAsync_v2", c.byref(copy), stream)

    def planes_of(self, surface: Any, block: ExitStack) -> list[_Place]:
        """Map the planes of a surface for CUDA, until the block ends."""
        params = surface.contents.surfaces[0]
        self("NvBufSurfaceMapEglImage", surface, 0)
        block.callback(self._functions["NvBufSurfaceUnMapEglImage"], surface, 0)
        resource, frame = _pointer(), _EglFrame()
        self("cuGraphicsEGLRegisterImage", c.byref(resource), params.egl_image, _READ_ONLY)
        block.callback(self._functions["cuGraphicsUnregisterResource"], resource)
        self("cuGraphicsResourceGetMappedEglFrame", c.byref(frame), resource, 0, 0)
        kind = _DEVICE if frame.kind == _EGL_PITCH else _ARRAY
        pitches = params.planes.pitch if kind == _DEVICE else [0] * _PLANES
        return [_Place(kind, frame.planes[i], pitches[i]) for i in range(2)]


def _function(name: str) -> Any:
    library, arguments = _CALLS[name]
    problem: Exception | None = None
    for file in LIBRARIES[library]:
        try:
            function = c.CDLL(file)[name]  # of its own, whose signature nobody else sets
        except (OSError, AttributeError) as exc:
            problem = problem or exc
        else:
            function.argtypes = arguments
            return function
    raise NotMappedError(f"{name}: expected it in {LIBRARIES[library][0]}, found none: {problem}")


class HostFrames:
    """Takes frames out of the CPU's memory: converted, or to be uploaded as they were decoded."""

    path = "host"

    def __init__(self, library: Library, channel_order: str, device: str, *, rgb: bool) -> None:
        self._library = library
        self.caps = f"video/x-raw,format={channel_order.upper()}"
        self._uploads = None if device == "cpu" else Uploads(device, channel_order)
        if not rgb:
            self.caps = f"video/x-raw,format={{NV12,I420}},{_EVEN};{self.caps}"

    def take(self, sample: Any) -> dict[str, Any]:
        """A picture's fields from a sample: ``image``, for an engine on a GPU also ``on_gpu``."""
        with host_planes(self._library, sample) as (planes, matrix):
            if self._uploads is None:
                return {"image": planes[0].copy()}
            if len(planes) == 1:
                return self._uploads.image(planes[0])
            if matrix is None:
                raise NotMappedError("colours: expected BT.601 or BT.709, got others")
            return self._uploads.planes(planes[0], planes[1:], matrix)


class GpuFrames:
    """Takes frames out of a Jetson's memory, in one thread."""

    path = "nvmm"
    caps = "video/x-raw(memory:NVMM),format=NV12"

    def __init__(self, channel_order: str, device: str) -> None:
        from zsseg_rt.ops import core

        self._core, self._order, self._calls = core, channel_order, _Calls()
        self._index = gpu_index(device)
        core.cuda_set_device(self._index)  # its context becomes this thread's
        self._stream = core.Stream(self._index)

    def take(self, sample: Any) -> dict[str, Any]:
        """The fields of a picture from a sample; the sample's memory is free again afterwards."""
        with ExitStack() as block:
            info = block.enter_context(mapped(sample.get_buffer()))
            surface = c.cast(info.data, c.POINTER(_Surface))
            if not surface or surface.contents.memory not in (0, _SURFACE_ARRAY):
                raise NotMappedError("NvBufSurface: expected a surface array, got other memory")
            params = surface.contents.surfaces[0]
            if params.color_format not in _NV12 or params.planes.num_planes != 2:
                raise NotMappedError(
                    f"NvBufSurface: expected NV12, got colour format {params.color_format}"
                )
            frame = self._copied(params, self._calls.planes_of(surface, block))
            self._stream.synchronize()
        return {"image": partial(host_picture, frame, self._order), "on_gpu": frame,
                "path": self.path}  # fmt: skip

    def _copied(self, params: Any, places: Sequence[_Place]) -> Nv12Frame:
        """Copy the planes; they are there once the stream has been waited for."""
        height, width = params.height, params.width
        if height % 2 or width % 2:
            raise NotMappedError(f"frames: expected even sides, got {width}x{height}")
        planes = []
        for source, shape in zip(
            places, ((height, width), (height // 2, width // 2, 2)), strict=True
        ):
            plane = self._core.DeviceArray.empty(
                shape, "uint8", device=self._index, stream=self._stream.handle
            )
            target = _Place(_DEVICE, plane.__cuda_array_interface__["data"][0], width)
            self._calls.copy(source, target, (shape[0], width), self._stream.handle)
            planes.append(plane)
        return Nv12Frame(planes[0], planes[1], _NV12[params.color_format])


def how_frames_reach_gpus(gst: Any) -> tuple[str, str]:
    """The path of cameras' frames to a GPU here, and why it is not the shorter one."""
    if missing_elements(gst, NVMM_DECODER):
        return "host", f"no {NVMM_DECODER[0]}"
    try:
        _Calls()
    except NotMappedError as exc:
        return "host", str(exc)
    return "nvmm", ""
