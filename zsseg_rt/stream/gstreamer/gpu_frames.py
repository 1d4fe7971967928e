"""Frames out of GStreamer's buffers: from the CPU's memory, or copied within a Jetson's."""

from __future__ import annotations

import ctypes as c
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from types import MappingProxyType
from typing import Any

from zsseg_rt.common.arrays import gpu_index
from zsseg_rt.runtime.frames import Nv12Frame
from zsseg_rt.stream.conversion import Uploads, host_picture
from zsseg_rt.stream.gstreamer.library import (
    Library,
    NotMappedError,
    host_planes,
    mapped,
    missing_elements,
)
from zsseg_rt.stream.gstreamer.pipelines import NVMM_DECODER

# Buffers of memory:NVMM hold an NvBufSurface, which CUDA reads as an EGL image: nvbufsurface.h of
# JetPack 6 (jetson_multimedia_api) and cudaEGL.h of CUDA 12 describe the calls and structures,
# NVIDIA's sample code NvCudaProc.cpp their order.
LIBRARIES: Mapping[str, Sequence[str]] = {
    "cu": ("libcuda.so.1",), "Nv": ("libnvbufsurface.so.1.0.0", "libnvbufsurface.so"),
}  # fmt: skip
"""The files with the functions whose names begin so."""
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


class _Calls:
    """NVIDIA's functions, which return 0 where they succeed."""

    def __init__(self) -> None:
        self._libraries = {prefix: _load(files) for prefix, files in LIBRARIES.items()}

    def __call__(self, name: str, *arguments: Any) -> None:
        if (result := self._libraries[name[:2]][name](*arguments)) != 0:
            raise NotMappedError(f"{name}: expected 0, got {result}")


def _load(files: Sequence[str]) -> c.CDLL:
    for file in files:
        with suppress(OSError):
            return c.CDLL(file)
    raise NotMappedError(f"{files[0]}: expected NVIDIA's library, found none")


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
        """A picture's fields from a sample: ``image``, on a GPU also ``on_gpu``."""
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
            frame = self._copied(params, self._image_of(surface, block))
            self._stream.synchronize()
        return {"image": partial(host_picture, frame, self._order), "on_gpu": frame,
                "path": self.path}  # fmt: skip

    def _image_of(self, surface: Any, block: ExitStack) -> _EglFrame:
        calls, resource, frame = self._calls, _pointer(), _EglFrame()
        calls("NvBufSurfaceMapEglImage", surface, 0)
        block.callback(calls, "NvBufSurfaceUnMapEglImage", surface, 0)
        image = _pointer(surface.contents.surfaces[0].egl_image)
        calls("cuGraphicsEGLRegisterImage", c.byref(resource), image, _READ_ONLY)
        block.callback(calls, "cuGraphicsUnregisterResource", resource)
        calls("cuGraphicsResourceGetMappedEglFrame", c.byref(frame), resource, 0, 0)
        return frame

    def _copied(self, params: Any, image: _EglFrame) -> Nv12Frame:
        """Copy the planes; they are there once the stream has been waited for."""
        height, width, stream = params.height, params.width, self._stream.handle
        if height % 2 or width % 2:
            raise NotMappedError(f"frames: expected even sides, got {width}x{height}")
        planes = []
        for i, shape in enumerate(((height, width), (height // 2, width // 2, 2))):
            plane = self._core.DeviceArray.empty(shape, "uint8", device=self._index, stream=stream)
            copy = _Copy(width=width, height=shape[0], dst_memory=_DEVICE, dst_pitch=width)
            copy.dst_device = plane.__cuda_array_interface__["data"][0]
            if image.kind == _EGL_PITCH:
                copy.src_memory, copy.src_device = _DEVICE, image.planes[i]
                copy.src_pitch = params.planes.pitch[i]
            else:
                copy.src_memory, copy.src_array = _ARRAY, image.planes[i]
            self._calls("cuMemcpy2DAsync_v2", c.byref(copy), _pointer(stream))
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
