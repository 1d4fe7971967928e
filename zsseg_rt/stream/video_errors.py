"""What FFmpeg's errors mean to the one who can mend them."""

from __future__ import annotations

import errno
import re
import socket
import time
from contextlib import suppress
from typing import Any, Literal
from urllib.parse import unquote

from zsseg_rt.common.extras import install_command, unavailable
from zsseg_rt.errors import SourceError

VideoKind = Literal["file", "http", "rtsp", "v4l2"]

_NO_PLAYLISTS = (
    "Is it a video? Playlists and lists of files are not followed; gst:uridecodebin uri=ADDRESS "
    "plays one."
)
ANSWERS_WITHIN = 5.0
"""Seconds that a camera may take to answer, and UDP to bring the first packet."""
_PORTS = {"http://": 80, "https://": 443}
_ASKED_FOR, _LONGEST_ANSWER = 2.0, 1 << 14  # seconds, bytes
_LOGINS = ("basic", "digest", "digest with md5")  # those of FFmpeg and GStreamer
_OFFER = re.compile(
    r'(?im)^WWW-Authenticate:[ \t]*([\w-]{1,20})(?:[^\r\n]*\balgorithm="?([\w-]{1,20}))?', re.ASCII
)
NO_STREAM = "Give the address of the camera's stream itself, not that of its page."
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


def explain(error: OSError | ValueError, name: str, kind: VideoKind, url: str = "") -> SourceError:
    """An error of FFmpeg's in our words; FFmpeg's own hold the address with its password."""
    remedies = dict(_REMEDIES)
    if kind in ("http", "rtsp"):
        remedies.update(_NETWORK_REMEDIES)
    remedy = remedies.get(type(error).__name__, "Check it with ffprobe or another player.")
    if kind == "http" and type(error).__name__ == "InvalidDataError":
        remedy = NO_STREAM
    if kind in ("http", "rtsp") and type(error).__name__ == "HTTPUnauthorizedError":
        remedy = login_remedy(url)
    if kind == "v4l2":
        remedy = _DEVICE_REMEDIES.get(getattr(error, "errno", None) or 0, remedy)
    reason = getattr(error, "strerror", None) or type(error).__name__
    return SourceError(f"{name}: cannot be read: {reason}. {remedy}")


def split_login(url: str) -> tuple[str, tuple[str, str] | None]:
    """Take the login out of a URL.

    Example:
        >>> split_login("rtsp://me:p%40ss@camera:554/1?x=2")
        ('rtsp://camera:554/1?x=2', ('me', 'p@ss'))
    """
    scheme, authority, path = _split(url)
    login, at, host = authority.rpartition("@")
    if not at:
        return url, None
    user, _, password = login.partition(":")
    return f"{scheme}{host}{path}", (unquote(user), unquote(password))


def _split(url: str) -> tuple[str, str, str]:
    """Scheme, authority and the rest; a password may hold what urlsplit stumbles over."""
    found = re.fullmatch(r"(\w+://)([^/?#]*)(.*)", url, re.DOTALL)
    return (found[1], found[2], found[3]) if found else ("", "", url)


def _host_and_port(url: str) -> tuple[str, int]:
    scheme, authority, _ = _split(url)
    host = authority.rpartition("@")[2]
    name, _, port = host.partition(":") if not host.startswith("[") else host[1:].partition("]")
    return name, int(port.removeprefix(":") or _PORTS.get(scheme.lower(), 554))


def login_remedy(url: str) -> str:
    """What to do where a login was refused; asks the camera which kinds of login it takes."""
    bare, login = split_login(url)
    if login is None:
        return "It asks for a login: put USER:PASSWORD@ before its name."
    scheme, _, path = _split(bare)
    request = f"DESCRIBE {bare} RTSP/1.0\r\nCSeq: 1\r\n\r\n"
    if scheme.lower() == "http://":
        request = f"GET {path or '/'} HTTP/1.0\r\n\r\n"
    answer, until = b"", time.monotonic() + _ASKED_FOR
    failures = suppress(OSError, ValueError, OverflowError)
    with failures, socket.create_connection(_host_and_port(url), _ASKED_FOR) as connection:
        connection.sendall(request.encode())
        while b"\r\n\r\n" not in answer and time.monotonic() < until:
            answer += connection.recv(_LONGEST_ANSWER - len(answer)) or b"\r\n\r\n"
    kinds = {" with ".join(filter(None, o)) for o in _OFFER.findall(answer.decode("latin-1"))}
    if not kinds or any(kind.casefold() in _LOGINS for kind in kinds):
        return "Check user and password."
    return (
        f"It takes {' or '.join(sorted(kinds))} alone, which neither FFmpeg nor GStreamer knows. "
        "Let it take Digest with MD5 too, or Basic, in its settings."
    )


def why_unreachable(url: str) -> str:
    """What the system says of connecting; empty if it works."""
    try:
        socket.create_connection(_host_and_port(url), ANSWERS_WITHIN).close()
    except TimeoutError:
        return "No answer"
    except (OSError, ValueError, OverflowError) as exc:
        return str(getattr(exc, "strerror", None) or exc)
    return ""
