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
_TRIAL_ELEMENTS = ("h264parse", "videotestsrc")
_HARDWARE = ("nvv4l2h264enc", "nvvidconv", *_TRIAL_ELEMENTS)
_NVENC, _NVENC_SIDES = ("nvh264enc", *_TRIAL_ELEMENTS), (160, 4096)
_BITS_PER_PIXEL, _RATE = 0.15, 30  # overlays have hard edges, which take more than a plain picture
_log = logging.getLogger(__name__)
_told = threading.Event()
_failed: set[str] = set()  # elements that are there and do not encode
_TRIAL = 10 * 10**9  # nanoseconds; the first picture makes a CUDA context


def has_nvenc(gst: Any) -> bool:
    """Whether a Jetson's encoder can be used."""
    return _HARDWARE[0] not in _failed and NVENC.exists() and not missing_elements(gst, _HARDWARE)


def encoder_of(gst: Any) -> str:
    """The element that encodes pictures of usual sizes."""
    if has_nvenc(gst):
        return _HARDWARE[0]
    is_absent = _NVENC[0] in _failed or missing_elements(gst, _NVENC)
    return "x264enc" if is_absent else _NVENC[0]


def working_encoder_text(gst: Any, size_hw: tuple[int, int], name: str) -> str:
    """As :func:`encoder_text`, of an encoder that has encoded a picture of this size.

    NVIDIA's that cannot is not asked again in this process; one warning says why.
    """
    while True:
        text = encoder_text(gst, size_hw, name)
        element = next((e for e in (_HARDWARE[0], _NVENC[0]) if f"! {e} name=" in text), None)
        problem = None if element is None else _what_fails(gst, text, size_hw)
        if element is None or problem is None:
            return text
        _failed.add(element)
        _log.warning("%s cannot be used: %s. Another encoder is taken", element, problem)


def _what_fails(gst: Any, text: str, size_hw: tuple[int, int]) -> str | None:
    """Encode one picture; returns what kept it from that."""
    height, width = size_hw
    caps = f"video/x-raw,format=RGB,width={width},height={height},framerate={_RATE}/1"
    trial = gst.parse_launch(f"videotestsrc num-buffers=1 ! {caps} ! {text} ! fakesink sync=false")
    trial.set_state(gst.State.PLAYING)
    wanted = gst.MessageType.ERROR | gst.MessageType.EOS
    message = trial.get_bus().timed_pop_filtered(_TRIAL, wanted)
    trial.set_state(gst.State.NULL)
    if message is None:
        return "it encoded nothing for 10 s"
    return message.parse_error()[0].message if message.type == gst.MessageType.ERROR else None


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
    is_jetson = not (_failed or missing_elements(gst, ("nvvidconv",)))
    if is_jetson and not _told.is_set():
        _told.set()
        _log.warning("this Jetson has no encoder (%s): x264enc encodes on the CPU", NVENC)
    # Of more threads each encodes a slice, and FFmpeg shows some of those as green pictures.
    return (
        "videoconvert ! video/x-raw,format=I420 ! x264enc name=encoder tune=zerolatency "
        f"speed-preset=superfast threads=1 key-int-max={_RATE} bitrate={bits // 1000}"
    )
