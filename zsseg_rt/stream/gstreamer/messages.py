"""What GStreamer's messages mean to the one who can mend them."""

from __future__ import annotations

import re
from typing import Any

from zsseg_rt.errors import BackendUnavailableError, SourceError, ZssegError
from zsseg_rt.stream.source import redact, shown

_VALUE = r"""(?:\([^)]*\)\s*)?(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\S+)"""
_PROPERTY = re.compile(
    r"([\w-]*(?:pass|pwd|psw|pw|token|secret|key(?!-int)|auth|cookie|header|cred|login|sig(?!nal)|user)[\w-]*"
    rf"\s*=\s*){_VALUE}",
    re.IGNORECASE,
)
_SET = re.compile(r'(property "[^"]*" .* to )"(?:[^"\\]|\\.)*"')
_QUOTED = re.compile(r"""(["'])(\w[\w+.-]*://(?:(?!\1).)*)\1""")
_REMEDIES = {
    "NOT_AUTHORIZED": "Check user and password.",
    "NOT_FOUND": "Check the path.",
    "BUSY": "Close the program that uses it.",
    "OPEN_READ": "Check that it is there, and that this user may read it.",
    "OPEN_READ_WRITE": "Check address and port, and that the camera is on.",
    "READ": "Check that the camera is on.",
    "SETTINGS": "It cannot do this size, rate or format.",
}
_NOT_NEGOTIATED = (
    "One element does not take what another gives. End the pipeline in raw video: in videoconvert, "
    "on a Jetson in nvvidconv ! video/x-raw,format=BGRx."
)


class NotMappedError(SourceError):
    """Frames cannot be handed over in a GPU's memory; through the CPU's they can."""


def explain(gst: Any, message: Any, name: str, *, hint: str = "") -> ZssegError:
    """An error on a pipeline's bus in our words, without passwords."""
    error, debug = message.parse_error()
    detail = (debug or "").strip().splitlines()[-1:] or [""]
    detail = [] if "/Gst" in detail[0] else detail  # where in GStreamer's code, nothing else
    parts = [] if detail and detail[0].startswith(error.message) else [error.message.rstrip(". ")]
    reason = redact_pipeline(": ".join([*parts, *detail]).rstrip(". "))
    if error.matches(gst.CoreError.quark(), gst.CoreError.MISSING_PLUGIN):
        return BackendUnavailableError(
            f"{name}: {reason}. Run: sudo apt install gstreamer1.0-libav gstreamer1.0-plugins-good "
            "gstreamer1.0-plugins-bad"
        )
    remedy = hint or _remedy(gst, error, reason)
    element = message.src.get_name() if message.src is not None else "GStreamer"
    return SourceError(f"{name}: cannot be read: {element}: {reason}. {remedy}")


def is_damage(gst: Any, message: Any) -> bool:
    """Whether a warning tells of a packet or frame that could not be decoded."""
    warning, _ = message.parse_warning()
    codes = (gst.StreamError.DECODE, gst.StreamError.FORMAT)
    return any(warning.matches(gst.StreamError.quark(), code) for code in codes)


def redact_pipeline(text: str) -> str:
    """Blank out logins and secrets in the text of a pipeline.

    Example:
        >>> redact_pipeline('rtspsrc location=rtsp://me:pw@cam user-pw="a b" ! decodebin')
        'rtspsrc location=rtsp://cam user-pw=*** ! decodebin'
    """
    text = redact(_QUOTED.sub(lambda found: found[1] + shown(found[2]) + found[1], text))
    return _SET.sub(r'\1"***"', _PROPERTY.sub(r"\1***", text))


def _remedy(gst: Any, error: Any, reason: str) -> str:
    if "not-negotiated" in reason:
        return _NOT_NEGOTIATED
    for code, remedy in _REMEDIES.items():
        if error.matches(gst.ResourceError.quark(), getattr(gst.ResourceError, code)):
            return remedy
    return "Check it with gst-launch-1.0."
