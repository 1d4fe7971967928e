"""What FFmpeg's errors mean to the one who can mend them."""

from __future__ import annotations

import errno
from typing import Any, Literal

from zsseg_rt.common.extras import install_command, unavailable
from zsseg_rt.errors import SourceError

VideoKind = Literal["file", "http", "rtsp", "v4l2"]

_NO_PLAYLISTS = (
    "Is it a video? Playlists and lists of files are not followed; gst:uridecodebin uri=ADDRESS "
    "plays one."
)
_REMEDIES = {
    "HTTPUnauthorizedError": "Check user and password.",
    "HTTPForbiddenError": "Check user, password and the user's rights.",
    "HTTPNotFoundError": "Check the path behind the address.",
    "ConnectionRefusedError": "Check address and port, and that the camera is on.",
    "TimeoutError": "Check the address, and that the camera is on.",
    "ExitError": "Nothing came for too long. Check the address, and that the camera is on.",
    "FileNotFoundError": "Check the path.",
    "IsADirectoryError": "Name a file in it.",
    "InvalidDataError": "Is it a video?",
    "ArgumentError": _NO_PLAYLISTS,
    "ValueError": _NO_PLAYLISTS,  # as PyAV 15 calls it
    "ProtocolNotFoundError": "PyAV was built without this protocol. Use another.",
}
# FFmpeg calls it invalid data when a camera answers nothing.
_NETWORK_REMEDIES = {
    "InvalidDataError": "Nothing readable came. Check the address, and that the camera is on.",
    "OSError": "Check that the camera is on. If it redirects to another address, give that one: "
    "redirects are not followed.",
}
_DEVICE_REMEDIES = {
    errno.ENOENT: "Plug the camera in; zsseg-rt doctor lists the cameras it finds.",
    errno.ENODEV: "Plug the camera in; zsseg-rt doctor lists the cameras it finds.",
    errno.EACCES: "Allow it: sudo usermod -aG video $USER, then log in again.",
    errno.EBUSY: "Close the program that uses it; fuser /dev/video* names it.",
    errno.ENOTTY: "It is not a camera; zsseg-rt doctor lists the cameras it finds.",
    errno.EIO: "Check its cable and its port.",
    errno.EPROTO: "Check its cable and its port.",
    errno.ENOSPC: "Too many cameras share a USB bus: ask for a smaller size, a lower rate or "
    "format=mjpeg, or use another port.",
    errno.EINVAL: "It has no such format; v4l2-ctl --list-formats-ext lists those it has. Some "
    "cameras have a second device without pictures; zsseg-rt doctor lists both.",
}


def import_av() -> Any:
    """PyAV."""
    try:
        import av
    except ImportError as exc:
        expected = "av: expected PyAV to read and write video"
        raise unavailable(exc, "av", expected, install_command("stream")) from exc
    return av


def explain(error: OSError | ValueError, name: str, kind: VideoKind) -> SourceError:
    """An error of FFmpeg's in our words; FFmpeg's own hold the address with its password."""
    remedies = dict(_REMEDIES)
    if kind in ("http", "rtsp"):
        remedies.update(_NETWORK_REMEDIES)
    remedy = remedies.get(type(error).__name__, "Check it with ffprobe or another player.")
    if kind == "v4l2":
        remedy = _DEVICE_REMEDIES.get(getattr(error, "errno", None) or 0, remedy)
    reason = getattr(error, "strerror", None) or type(error).__name__
    return SourceError(f"{name}: cannot be read: {reason}. {remedy}")
