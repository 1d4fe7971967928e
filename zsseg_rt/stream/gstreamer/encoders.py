"""Which element encodes H.264 here: a Jetson's encoder, NVENC, or x264 on the CPU."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any, NamedTuple

from zsseg_rt.stream.gstreamer.library import (
    known_settings,
    missing_elements,
    require_elements,
)

NVENC = Path("/dev/v4l2-nvenc")
"""The device of a Jetson's encoder; an Orin Nano has none."""

OUTPUT_ELEMENTS = ("appsrc", "videoconvert", "x264enc", "rtph264pay")
_TRIAL_ELEMENTS = ("h264parse", "videotestsrc")
_HARDWARE = ("nvv4l2h264enc", "nvvidconv", *_TRIAL_ELEMENTS)
_NVENC, _NVENC_SIDES = ("nvh264enc", *_TRIAL_ELEMENTS), (160, 4096)
NVIDIA = (_HARDWARE[0], _NVENC[0])
"""Encoders that may be there and not work."""
_BITS_PER_PIXEL, _RATE = 0.15, 30  # overlays have hard edges, which take more than a plain picture
_log = logging.getLogger(__name__)
_told = threading.Event()
_failed: set[str] = set()  # elements that are there and do not encode
_END = "fakesink name=end sync=false"
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


class Encoding(NamedTuple):
    """The part of a pipeline that encodes raw video of the CPU's memory with little delay.

    Attributes:
        element: What encodes.
        text: Its conversion, the encoder and what follows it.
    """

    element: str
    text: str


def working_encoding(gst: Any, size_hw: tuple[int, int], name: str) -> Encoding:
    """As :func:`encoding_for`, of an encoder that has encoded a picture of this size.

    NVIDIA's that cannot is not asked again in this process; one warning says why.
    """
    while True:
        found = encoding_for(gst, size_hw, name)
        if found.element not in NVIDIA:
            return found
        height, width = size_hw
        caps = f"video/x-raw,format=RGB,width={width},height={height},framerate={_RATE}/1"
        trial = gst.parse_launch(f"videotestsrc num-buffers=1 ! {caps} ! {found.text} ! {_END}")
        trial.set_state(gst.State.PLAYING)
        problem = _what_fails(gst, trial)
        if problem is None:
            return found
        leave(found.element, problem)


def leave(element: str, problem: str) -> None:
    """Do not ask an encoder again in this process; one warning says why."""
    _failed.add(element)
    _log.warning("%s cannot be used: %s. Another encoder is taken", element, problem)


def _what_fails(gst: Any, trial: Any) -> str | None:
    """Wait for a running pipeline's end; returns what kept it from that."""
    wanted = gst.MessageType.ERROR | gst.MessageType.EOS
    message = trial.get_bus().timed_pop_filtered(_TRIAL, wanted)
    encoded = trial.get_by_name("end").get_property("last-sample")
    trial.set_state(gst.State.NULL)
    if message is not None and message.type == gst.MessageType.ERROR:
        return str(message.parse_error()[0].message)
    return "it encoded nothing" if message is None or encoded is None else None


def encoding_for(gst: Any, size_hw: tuple[int, int], name: str) -> Encoding:
    """What encodes pictures of a size here."""
    bits = max(int(size_hw[0] * size_hw[1] * _RATE * _BITS_PER_PIXEL), 500_000)
    if has_nvenc(gst):
        settings = known_settings(gst, "nvv4l2h264enc", {
            "bitrate": bits, "insert-sps-pps": "true", "idrinterval": _RATE,
            "iframeinterval": _RATE,
        })  # fmt: skip
        return Encoding(
            "nvv4l2h264enc",
            "videoconvert ! video/x-raw,format=BGRx ! nvvidconv "
            "! video/x-raw(memory:NVMM),format=NV12 "
            f"! nvv4l2h264enc name=encoder {settings} ! h264parse",
        )
    smallest, largest = _NVENC_SIDES
    if encoder_of(gst) == "nvh264enc" and smallest <= min(size_hw) <= max(size_hw) <= largest:
        settings = known_settings(gst, "nvh264enc", {
            "bitrate": bits // 1000, "gop-size": _RATE, "bframes": 0, "zerolatency": "true",
        })  # fmt: skip
        return Encoding(
            "nvh264enc",
            "videoconvert ! video/x-raw,format=NV12 "
            f"! nvh264enc name=encoder {settings} ! h264parse",
        )
    require_elements(gst, OUTPUT_ELEMENTS, name)
    is_jetson = not (_failed or missing_elements(gst, ("nvvidconv",)))
    if is_jetson and not _told.is_set():
        _told.set()
        _log.warning("this Jetson has no encoder (%s): x264enc encodes on the CPU", NVENC)
    # Of more threads each encodes a slice, and FFmpeg shows some of those as green pictures.
    return Encoding(
        "x264enc",
        "videoconvert ! video/x-raw,format=I420 ! x264enc name=encoder tune=zerolatency "
        f"speed-preset=superfast threads=1 key-int-max={_RATE} bitrate={bits // 1000}",
    )
