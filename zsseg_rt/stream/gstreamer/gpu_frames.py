"""Frames that GStreamer holds in a GPU's memory, copied to arrays of ours; the CPU sees no pixel.

On a Jetson, buffers of ``memory:NVMM`` hold an ``NvBufSurface``, which CUDA reads as an EGL
image: nvbufsurface.h of JetPack 6 (jetson_multimedia_api) and cudaEGL.h of CUDA 12 describe the
calls and structures, NVIDIA's sample code NvCudaProc.cpp their order. On other machines, buffers of
``memory:CUDAMemory`` (gst-plugins-bad, gstcudamemory.h) are mapped with ``GST_MAP_CUDA``.
"""

from __future__ import annotations

import ctypes as c
import functools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from zsseg_rt.runtime.frames import Nv12Frame
from zsseg_rt.stream.conversion import Uploads, host_picture
from zsseg_rt.stream.gstreamer.library import (
    Library,
    MapInfo,
    NotMappedError,
    copy_image,
    host_planes,
    mapped,
    matrix_of,
)
from zsseg_rt.stream.gstreamer.pipelines import CUDA_DECODERS, NVMM_DECODER, path_of_decoder

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
    """Functions of these libraries, with their signatures."""

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
        """Call a function."""
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


_READ_ONLY = 1  # CU_GRAPHICS_MAP_RESOURCE_FLAGS_READ_ONLY
_NEEDS = MappingProxyType(
    {
        "nvmm": ("cuMemcpy2DAsync_v2", *EGL_CALLS),
        "cuda": (
            "cuMemcpy2DAsync_v2", "gst_cuda_memory_sync", "cuDevicePrimaryCtxRetain",
            "gst_cuda_load_library", "gst_cuda_memory_init_once", "gst_cuda_context_new_wrapped",
            "gst_context_new_cuda_context", "gst_element_set_context", "gst_mini_object_unref",
        ),
    }
)  # fmt: skip
_EVEN = "width=[2,32766,2],height=[2,32766,2]"
_Planes = tuple[tuple[int, int], str, Sequence[Place]]
"""Height and width, colour matrix, and where the two planes lie."""


class HostFrames:
    """Takes frames out of the CPU's memory: converted, or to be uploaded as they were decoded."""

    path = "host"

    def __init__(self, library: Library, channel_order: str, device: str, *, rgb: bool) -> None:
        self._library = library
        self.caps = f"video/x-raw,format={channel_order.upper()}"
        self._uploads = None if device == "cpu" else Uploads(device, channel_order)
        if not rgb:
            self.caps = f"video/x-raw,format={{NV12,I420}},{_EVEN};{self.caps}"

    def lend_context(self, element: Any) -> None:
        """Nothing of the element is on a GPU."""

    def take(self, sample: Any) -> dict[str, Any]:
        """What a picture has of a sample: ``image``, for an engine on a GPU also ``on_gpu``."""
        if self._uploads is None:
            return {"image": copy_image(self._library, sample)}
        with host_planes(self._library, sample) as (planes, matrix):
            if len(planes) == 1:
                return self._uploads.image(planes[0])
            if matrix is None:
                raise NotMappedError("colours: expected BT.601 or BT.709, got others")
            return self._uploads.planes(planes[0], planes[1:], matrix)


class GpuFrames:
    """Takes frames out of NVIDIA's memory, in one thread."""

    def __init__(self, library: Library, path: str, device: str, channel_order: str) -> None:
        from zsseg_rt.ops import core

        self.path = path
        self.caps = f"video/x-raw({FEATURES[path]}),format=NV12"
        self._library, self._order = library, channel_order
        self._calls = Calls(_NEEDS[path])
        self._index = int(device.partition(":")[2])
        self._core = core
        core.cuda_set_device(self._index)  # its context becomes this thread's
        self._stream = core.Stream(self._index)

    def lend_context(self, element: Any) -> None:
        """Let an element and what it holds work in our CUDA context; one of its own takes memory.

        ``memory:NVMM`` is of no context.
        """
        if self.path == "cuda":
            shared = self._calls("gst_context_new_cuda_context", _context(self._index))
            self._calls("gst_element_set_context", hash(element), shared)  # its C address
            self._calls("gst_mini_object_unref", shared)

    def take(self, sample: Any) -> dict[str, Any]:
        """What a picture has of a sample; the sample's memory is free again afterwards."""
        with ExitStack() as held:
            flags = MAP_CUDA if self.path == "cuda" else 0
            info = held.enter_context(mapped(sample.get_buffer(), flags))
            if not info.data:
                raise NotMappedError("gst_buffer_map: expected memory, got none")
            from_nvmm = self.path == "nvmm"
            planes = self._of_nvmm(info, held) if from_nvmm else self._of_cuda(info, sample)
            frame = self._copied(*planes)
            self._stream.synchronize()
        return {"image": partial(host_picture, frame, self._order), "on_gpu": frame,
                "path": self.path}  # fmt: skip

    def _of_nvmm(self, info: MapInfo, held: ExitStack) -> _Planes:
        surface = c.cast(info.data, c.POINTER(Surface))
        batch = surface.contents
        if batch.memory not in (0, SURFACE_ARRAY) or batch.batch_size < 1:
            raise NotMappedError(
                f"NvBufSurface: expected a surface array, got memory {batch.memory}"
            )
        params = batch.surfaces[0]
        if params.color_format not in NV12 or params.planes.num_planes != 2:
            raise NotMappedError(
                f"NvBufSurface: expected NV12, got colour format {params.color_format}"
            )
        places = self._calls.planes_of(surface, _READ_ONLY, held)
        return (params.height, params.width), NV12[params.color_format], places

    def _of_cuda(self, memory: MapInfo, sample: Any) -> _Planes:
        """GStreamer's memory may be of another context than ours: addresses are unique."""
        self._calls("gst_cuda_memory_sync", memory.memory)
        video = self._library.GstVideo
        info = video.VideoInfo.new_from_caps(sample.get_caps())
        meta = video.buffer_get_video_meta(sample.get_buffer())
        layout, matrix = info if meta is None else meta, matrix_of(video, info)
        if matrix is None:
            found = info.colorimetry.to_string()
            raise NotMappedError(f"colours: expected BT.601 or BT.709, got {found}")
        places = [
            Place(UNIFIED, memory.data + layout.offset[i], layout.stride[i]) for i in range(2)
        ]
        return (info.height, info.width), matrix, places

    def _copied(self, size_hw: tuple[int, int], matrix: str, places: Sequence[Place]) -> Nv12Frame:
        """Copy the planes; they are there once the stream has been waited for."""
        height, width = size_hw
        if height % 2 or width % 2:
            raise NotMappedError(f"frames: expected even sides, got {width}x{height}")
        planes = []
        for source, shape in zip(
            places, ((height, width), (height // 2, width // 2, 2)), strict=True
        ):
            plane = self._core.DeviceArray.empty(
                shape, "uint8", device=self._index, stream=self._stream.handle
            )
            target = Place(DEVICE, plane.__cuda_array_interface__["data"][0], width)
            self._calls.copy(source, target, (shape[0], width), self._stream.handle)
            planes.append(plane)
        return Nv12Frame(planes[0], planes[1], matrix)


@functools.cache
def _context(index: int) -> Any:
    """GStreamer's name for the context in which this process works on a GPU; kept until its end."""
    calls, primary = Calls(_NEEDS["cuda"]), c.c_void_p()
    calls("gst_cuda_load_library")
    calls("gst_cuda_memory_init_once")
    calls("cuDevicePrimaryCtxRetain", c.byref(primary), index)
    return calls("gst_cuda_context_new_wrapped", primary, index)


def how_frames_reach_gpus(gst: Any) -> tuple[str, str]:
    """The path of cameras' frames to a GPU here, and why it is not a shorter one."""
    path = path_of_decoder(gst)
    try:
        Calls(_NEEDS[path]) if path != "host" else None
    except NotMappedError as exc:
        return "host", str(exc)
    return path, "" if path != "host" else f"no {NVMM_DECODER[0]} and no {CUDA_DECODERS['H264']}"
