"""Frames that GStreamer holds in a GPU's memory, copied to arrays of ours; the CPU sees no pixel.

``nvidia`` has the calls.
"""

from __future__ import annotations

import ctypes as c
import functools
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import Any

from zsseg_rt.runtime.frames import Nv12Frame
from zsseg_rt.stream.conversion import Uploads, host_picture
from zsseg_rt.stream.gstreamer import nvidia
from zsseg_rt.stream.gstreamer.frames import MapInfo, copy_image, host_planes, mapped, matrix_of
from zsseg_rt.stream.gstreamer.library import Library
from zsseg_rt.stream.gstreamer.messages import NotMappedError
from zsseg_rt.stream.gstreamer.nvidia import Calls, Place
from zsseg_rt.stream.gstreamer.rtsp_camera import CUDA_DECODERS, NVMM_DECODER, path_of_decoder

_READ_ONLY = 1  # CU_GRAPHICS_MAP_RESOURCE_FLAGS_READ_ONLY
_NEEDS = MappingProxyType(
    {
        "nvmm": ("cuMemcpy2DAsync_v2", *nvidia.EGL_CALLS),
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
    """Takes frames out of NVIDIA's memory, in one thread.

    Args:
        library: GStreamer.
        path: ``"nvmm"`` or ``"cuda"``.
        device: The engine's GPU, ``"cuda:N"``.
        channel_order: Of the picture that is made if the CPU wants one after all.

    Raises:
        NotMappedError: A library or one of its functions is missing.
    """

    def __init__(self, library: Library, path: str, device: str, channel_order: str) -> None:
        from zsseg_rt.ops import core

        self.path = path
        self.caps = f"video/x-raw({nvidia.FEATURES[path]}),format=NV12"
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
        """What a picture has of a sample; the sample's memory is free again afterwards.

        Raises:
            NotMappedError: CUDA cannot have it.
        """
        with ExitStack() as held:
            flags = nvidia.MAP_CUDA if self.path == "cuda" else 0
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
        surface = c.cast(info.data, c.POINTER(nvidia.Surface))
        batch = surface.contents
        if batch.memory not in (0, nvidia.SURFACE_ARRAY) or batch.batch_size < 1:
            raise NotMappedError(
                f"NvBufSurface: expected a surface array, got memory {batch.memory}"
            )
        params = batch.surfaces[0]
        if params.color_format not in nvidia.NV12 or params.planes.num_planes != 2:
            raise NotMappedError(
                f"NvBufSurface: expected NV12, got colour format {params.color_format}"
            )
        places = self._calls.planes_of(surface, _READ_ONLY, held)
        return (params.height, params.width), nvidia.NV12[params.color_format], places

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
            Place(nvidia.UNIFIED, memory.data + layout.offset[i], layout.stride[i])
            for i in range(2)
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
            target = Place(nvidia.DEVICE, plane.__cuda_array_interface__["data"][0], width)
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
