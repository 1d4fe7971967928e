"""From what a user types to sources: URIs, paths, and files that list them."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, urlsplit

from zsseg_rt.common.files import is_file, is_folder
from zsseg_rt.common.schema import printable
from zsseg_rt.demo import DEFAULT, DEMOS
from zsseg_rt.errors import ArgumentError, BackendUnavailableError, ConfigError, SourceError
from zsseg_rt.photos import HEIF_SUFFIXES, SUFFIXES
from zsseg_rt.stream.gstreamer.library import load, redact_pipeline, require_elements
from zsseg_rt.stream.gstreamer.pipelines import (
    CsiCamera,
    GstSource,
    RtspCamera,
    UserPipeline,
    decoder_of,
    rtsp_elements,
)
from zsseg_rt.stream.photo_folder import DEFAULT_SIZES, DemoCamera, PhotoSource
from zsseg_rt.stream.source import GivenName, Source, log_once, shown
from zsseg_rt.stream.video import VideoSource
from zsseg_rt.stream.writers import VIDEO_SUFFIXES, what_is_not_ours
from zsseg_rt.text.name_lists import read_lines

_log = logging.getLogger(__name__)
_MOST_VIDEOS = 64
_LISTENS = re.compile(r"rtsp://(@|[^/@]+@(|localhost|127[.\d]*|0\.0\.0\.0|\[::1?\])[:/])", re.I)
_MOST_PIXELS = 1 << 26
_KNOWN = (
    "test://, rtsp://, http://, https://, csi://N, v4l2:///dev/videoN, a number, gst:PIPELINE, or "
    "a path"
)
_MOST_SENSORS = 16

_Number = TypeVar("_Number", int, float)


def open_sources(
    uris: str | Path | Sequence[str | Path], channel_order: str = "rgb"
) -> list[Source]:
    """Read which sources are meant; none is opened yet."""
    texts = [uris] if isinstance(uris, (str, Path)) else list(uris)
    for text in map(str, texts):
        if re.search("[\ud800-\udc7f\udd00-\udfff]", text):  # no name of a file has these
            raise ArgumentError(f"source: expected {_KNOWN}; got {text!r}")
    asked = [asked for text in texts for asked in _expand(str(text))]
    if not asked:
        raise ArgumentError(f"source: expected {_KNOWN}; got none")
    cameras = [re.sub(r"(?<=://)[^/?#]*@", "", uri) for _, uri in asked]  # whoever logs in
    times, taken = Counter(cameras), set[str]()
    sources: list[Source] = []
    for number, (given_name, uri) in enumerate(asked, 1):
        source = _source(uri, channel_order)
        source = _named(source, printable(source.name))  # for messages, files and pages
        if times[cameras[number - 1]] > 1:
            raise ArgumentError(f"source: expected different sources, got {source.name} twice")
        name: str | None = given_name
        if name is None and source.name in taken:
            name = f"{source.name} #{number}"  # addresses that differ where it is not shown
        sources.append(source if name is None else _named(source, name))
        taken.add(sources[-1].name)
    _check_names([source.name for source in sources])
    return sources


def is_source(text: str) -> bool:
    """Whether a word names what is read, rather than a place to write results to."""
    if _LISTENS.match(text):
        return False
    path = Path(text)
    is_place = text.endswith("/") or is_folder(path) or path.suffix.lower() in (".mp4", ".jsonl")
    if "://" in text or not is_place or any(mark in text for mark in "*?["):
        return True
    return path.suffix.lower() != ".jsonl" and bool(what_is_not_ours(path))


def source_names(uris: Sequence[str]) -> list[str]:
    """Names of sources that everybody may read; a list stays ``@FILE``."""
    return [text if text.startswith("@") else open_sources(text)[0].name for text in uris]


def _named(source: Source, name: str) -> Source:
    return replace(source, name=name)  # type: ignore[type-var]  # all are dataclasses


def _check_names(names: Sequence[str]) -> None:
    """Refuse names that files could not tell apart."""
    numbers = [str(n) for n, name in enumerate(names, 1) if not isinstance(name, GivenName)]
    own = [name for name in names if isinstance(name, GivenName)]
    counts = Counter(tag.casefold() for tag in (*numbers, *own))
    for name in own:
        if counts[name.casefold()] > 1 or re.fullmatch(r"\d{8}T\d{6}Z", name, re.IGNORECASE):
            raise ArgumentError(
                "source: expected names that also differ without their case, from other sources' "
                f"numbers and from time stamps, got {name!r}. Choose another name."
            )


def _expand(text: str) -> list[tuple[GivenName | None, str]]:
    """Names and URIs of what is given."""
    if not text.startswith("@"):
        return [(None, video) for video in _videos(text)] or [(None, text)]
    path = Path(text[1:])
    lines = read_lines(path, SourceError)
    entries = [_name(line) for line in lines if line and not line.startswith("#")]
    if not entries:
        raise SourceError(f"{path}: expected one source per line, found none")
    return [
        (name and GivenName(f"{name}-{number}"), video) if videos else (name, uri)
        for name, uri in entries
        for videos in [_videos(uri)]
        for number, video in enumerate(videos or [uri], 1)
    ]


def _videos(text: str) -> list[str]:
    """The videos of a folder or pattern in which there are no photos, but for our own overlays."""
    path, is_pattern = Path(text), any(mark in text for mark in "*?[") and "://" not in text
    if "\0" in text or is_file(path) or not (is_pattern or is_folder(path)):
        return []
    files = sorted(path.glob("[!.]*") if is_folder(path) else map(Path, glob.glob(text)))  # noqa: PTH207
    videos = [str(p) for p in files if p.suffix.lower() in VIDEO_SUFFIXES and what_is_not_ours(p)]
    if videos and any(p.suffix.lower() in SUFFIXES for p in files):
        _log.warning("%s: photos are read, %d videos are not: name these alone", text, len(videos))
        return []
    if len(videos) > _MOST_VIDEOS:
        raise ArgumentError(
            f"source: expected at most {_MOST_VIDEOS} videos, which are read at the same time, got "
            f"{len(videos)} in {text}. Take fewer at a time."
        )
    return videos


def _name(line: str) -> tuple[GivenName | None, str]:
    """The name and the URI of a line ``NAME = URI``; a name has nothing of an address in it."""
    parts = re.fullmatch(r"([^=:/?]*)=(.*)", line)
    if parts is None:
        return None, line
    name, uri = parts[1].strip(), parts[2].strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or not uri:
        raise ArgumentError(
            "source: expected NAME = URI with a NAME of at most 64 letters, digits, - and _, got "
            f"NAME {name!r}{'' if uri else ' without a URI'}. A path with = begins with ./"
        )
    return GivenName(name), uri


def _source(uri: str, order: str) -> Source:
    scheme = uri.split(":", 1)[0].lower() if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", uri) else ""
    if scheme in _SOURCES:
        uri = scheme + uri[len(scheme) :]  # libraries know them in small letters alone
        return _SOURCES[scheme](uri, order)
    if uri.isdecimal() or uri.startswith("/dev/video"):
        return _device(uri, order)
    if "://" in uri:
        raise ArgumentError(f"source: expected {_KNOWN}; got {shown(uri)}")
    return _path(uri, order)


def _path(text: str, order: str) -> Source:
    if not text or "\0" in text:
        raise ArgumentError(f"source: expected {_KNOWN}; got {text!r}")
    path = Path(text)
    is_there = is_file(path) or is_folder(path)
    if re.search(r":[^/]*@", text) and not is_there:
        raise ArgumentError(  # a login, and nothing that says so
            "source: expected an address with its scheme, such as rtsp://, got one without. Put "
            "the scheme before it."
        )
    is_pattern = any(mark in text for mark in "*?[") and not is_there
    if is_folder(path) or path.suffix.lower() in (*SUFFIXES, *HEIF_SUFFIXES) or is_pattern:
        return PhotoSource(name=text, path=text, channel_order=order)
    # A path is no address of FFmpeg's, whatever it begins with.
    return VideoSource(name=text, url=f"file:{text}", kind="file", channel_order=order)


def _pipeline(uri: str, order: str) -> Source:
    scheme, _, text = uri.partition(":")
    if not text.strip() or "\0" in text:
        raise ArgumentError(f"source: expected {scheme}:PIPELINE, got no pipeline")
    recipe = UserPipeline(text=text.strip())
    live = scheme == "gst"
    return GstSource(name=redact_pipeline(uri), recipe=recipe, channel_order=order, live=live)


def _csi(uri: str, order: str) -> Source:
    number = re.fullmatch(r"csi://([0-9]{1,2})(?:\?.*)?", uri, re.DOTALL)
    if number is None or int(number[1]) >= _MOST_SENSORS:
        raise ArgumentError(f"source: expected csi://0 to csi://{_MOST_SENSORS - 1}, got {uri}")
    query = _Query(uri, "size", "rate", "flip")
    recipe = CsiCamera(
        sensor=int(number[1]),
        size_hw=query.size_hw((720, 1280)),
        rate=query.number("rate", 30.0, 1, 1000),
        flip=query.number("flip", 0, 0, 7),
    )
    return GstSource(name=uri, recipe=recipe, channel_order=order)


def rtsp_library() -> str:
    """Which library reads network cameras, as ``ZSSEG_RTSP_LIBRARY`` says."""
    libraries = ("auto", "gstreamer", "pyav")
    library = os.environ.get("ZSSEG_RTSP_LIBRARY") or "auto"
    if library not in libraries:
        raise ConfigError(
            f"ZSSEG_RTSP_LIBRARY: expected one of {', '.join(libraries)}, got {library!r}"
        )
    return library


def _rtsp(uri: str, order: str) -> Source:
    """A network camera, read with GStreamer where it is complete, else with PyAV."""
    if not re.fullmatch(r"rtsps?://[^/?#\s][^\s]*", uri):
        raise ArgumentError(f"source: expected rtsp://HOST/PATH without spaces, got {shown(uri)}")
    library, reason = rtsp_library(), ""
    # GStreamer refuses the certificates that cameras sign themselves.
    if library == "gstreamer" or (library == "auto" and not uri.startswith("rtsps:")):
        try:
            gst, _, version = load()
            require_elements(gst, rtsp_elements(gst), "rtsp")
        except BackendUnavailableError as exc:
            if library == "gstreamer":
                raise
            reason = f", since GStreamer is not complete: {exc}"
        else:
            decoder = decoder_of(gst, "H264")[0]
            _tell_library(f"GStreamer {version}, H.264 decoded by {decoder}")
            return GstSource(name=shown(uri), recipe=RtspCamera(url=uri), channel_order=order)
    _tell_library(f"PyAV{reason}")
    return VideoSource(name=shown(uri), url=uri, kind="rtsp", channel_order=order)


def _tell_library(text: str) -> None:
    text = f"rtsp: read with {text.rstrip('.')}. ZSSEG_RTSP_LIBRARY chooses another."
    log_once(logging.INFO, text)


def _http(uri: str, order: str) -> Source:
    return VideoSource(name=shown(uri), url=uri, kind="http", channel_order=order)


def _demo_camera(uri: str, order: str) -> Source:
    query = _Query(uri, "demo", "size", "rate", "seed", "frames")
    demo = query.texts.get("demo", DEFAULT)
    if demo not in DEMOS:
        raise ArgumentError(f"source: expected demo={'|'.join(DEMOS)} in {uri}, got {demo!r}")
    return DemoCamera(
        name=uri,
        demo=demo,
        size_hw=query.size_hw(DEFAULT_SIZES[demo]),
        rate=query.number("rate", 30.0, 0.01, 1000),
        seed=query.number("seed", 0, 0, 2**63),
        num_frames=query.number("frames", 0, 0, 10**9) or None,
        channel_order=order,
    )


def _device(uri: str, order: str) -> Source:
    query = _Query(uri if "?" in uri else "", "size", "rate", "format")
    path = f"/dev/video{uri}" if uri.isdecimal() else uri.split("?")[0].removeprefix("v4l2://")
    if not path.startswith("/dev/"):
        raise ArgumentError(f"source: expected v4l2:///dev/videoN, got {uri}")
    asked = {
        "size": ("video_size", "{1}x{0}".format(*query.size_hw((0, 0)))),
        "rate": ("framerate", str(query.number("rate", 30.0, 0.01, 1000))),
        "format": ("input_format", query.texts.get("format", "")),
    }
    options = dict(asked[key] for key in query.texts)
    return VideoSource(name=uri, url=path, kind="v4l2", channel_order=order, options=options)


_SOURCES: dict[str, Callable[[str, str], Source]] = {
    "csi": _csi, "gst": _pipeline, "gst-file": _pipeline, "http": _http, "https": _http,
    "rtsp": _rtsp, "rtsps": _rtsp, "test": _demo_camera, "v4l2": _device,
}  # fmt: skip


class _Query:
    """The settings of a URI, behind its question mark."""

    def __init__(self, uri: str, *keys: str) -> None:
        try:
            parts = urlsplit(uri)
        except ValueError as exc:
            raise ArgumentError(f"source: expected {_KNOWN}; got {uri}: {exc}") from None
        if parts.scheme == "test" and (parts.netloc or parts.path):
            form = "&".join(f"{key}=.." for key in keys)
            raise ArgumentError(f"source: expected test://?{form}, got {uri}")
        self._uri, self.texts = uri, dict(parse_qsl(parts.query, keep_blank_values=True))
        for key in self.texts:
            if key not in keys:
                raise ArgumentError(f"source: expected {', '.join(keys)} in {uri}, got {key!r}")

    def size_hw(self, default: tuple[int, int]) -> tuple[int, int]:
        if "size" not in self.texts:
            return default
        text = self.texts["size"]
        sides = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
        if sides is None or int(sides[1]) * int(sides[2]) > _MOST_PIXELS:
            raise ArgumentError(f"source: expected size=WIDTHxHEIGHT in {self._uri}, got {text!r}")
        return int(sides[2]), int(sides[1])

    def number(self, key: str, default: _Number, low: float, high: float) -> _Number:
        """A number in a range, of the default's type."""
        text = self.texts.get(key, str(default))
        try:
            value = type(default)(text)
            fits = low <= value <= high
        except ValueError:
            fits = False
        if not fits:
            raise ArgumentError(
                f"source: expected {key} from {low} to {high} in {self._uri}, got {text!r}"
            )
        return value
