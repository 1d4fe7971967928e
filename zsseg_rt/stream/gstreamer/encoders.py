"""Which element encodes H.264 here: a Jetson's encoder, NVENC, or x264 on the CPU."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from zsseg_rt.stream.gstreamer.library import known_settings, missing_elements, require_elements

NVENC = Path("/dev/v4l2-nvenc")
"""The device of a Jetson's encoder; an Orin Nano has none."""

OUTPUT_ELEMENTS = ("appsrc", "videoconvert", "x264enc", "rtph264pay")
_HARDWARE = ("nvv4l2h264enc", "nvvidconv", "h264parse")
_NVENC, _NVENC_SIDES = ("nvh264enc", "h264parse"), (160, 4096)
_BITS_PER_PIXEL, _RATE = 0.15, 30  # overlays have hard edges, which take more than a plain picture
_log = logging.getLogger(__name__)
_told = threading.Event()


def has_nvenc(gst: Any) -> bool:
    """Whether a Jetson's encoder can be used."""
    return NVENC.exists() and not missing_elements(gst, _HARDWARE)


def encoder_of(gst: Any) -> str:
    """The element that encodes pictures of usual sizes."""
    if has_nvenc(gst):
        return _HARDWARE[0]
    return "x264enc" if missing_elements(gst, _NVENC) else _NVENC[0]


def encoder_text(gst: Any, size_hw: tuple[int, int], name: str) -> str:
    """The part of a pipeline that encodes raw video with little delay."""
    bits = max(int(size_hw[0] * size_hw[1] * _RATE * _BITS_PER_PIXEL), 500_000)
    if has_nvenc(gst):
        settings = known_settings(gst, "nvv4l2h264enc", {
            "bitrate": bits, "insert-sps-pps": "true", "idrinterval": _RATE,
            "iframeinterval": _RATE,
        })  # fmt: skip
        return (
            "videoconvert ! video/x-raw,format=BGRx ! nvvidconv "
            "! video/x-raw(memory:NVMM),format=NV12 "
            f"! nvv4l2h264enc name=encoder {settings} ! h264parse"
        )
    smallest, largest = _NVENC_SIDES
    if encoder_of(gst) == "nvh264enc" and smallest <= min(size_hw) <= max(size_hw) <= largest:
        settings = known_settings(gst, "nvh264enc", {
            "bitrate": bits // 1000, "gop-size": _RATE, "bframes": 0, "zerolatency": "true",
        })  # fmt: skip
        return (
            "videoconvert ! video/x-raw,format=NV12 "
            f"! nvh264enc name=encoder {settings} ! h264parse"
        )
    require_elements(gst, OUTPUT_ELEMENTS, name)
    if not missing_elements(gst, ("nvvidconv",)) and not _told.is_set():
        _told.set()
        _log.warning("this Jetson has no encoder (%s): x264enc encodes on the CPU", NVENC)
    # Of more threads each encodes a slice, and FFmpeg shows some of those as green pictures.
    return (
        "videoconvert ! video/x-raw,format=I420 ! x264enc name=encoder tune=zerolatency "
        f"speed-preset=superfast threads=1 key-int-max={_RATE} bitrate={bits // 1000}"
    )
