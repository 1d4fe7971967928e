"""Sources of frames, their times, and their names without a password."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.arrays import Array
from zsseg_rt.errors import SourceError
from zsseg_rt.runtime.frames import Nv12Frame

_USUAL_STEP = 1 / 25  # seconds between frames of recordings that state no rate
# As FFmpeg: seconds by which times may be out of order, or leap ahead, until they begin anew.
_BACK, _LEAP = 0.1, {True: 10.0, False: 108_000.0}
_NONE = float("-inf")

_SKEW = 2e-4  # how much slower than ours a clock may run: cheap crystals are 100 ppm off

# The largest frame that H.264 and H.265 allow up to level 6.2, such as 8192x4352. A few hundred
# kilobytes can claim more, and a frame takes some 20 bytes per pixel until it is labelled.
MOST_PIXELS = 139_264 * 256

_log = logging.getLogger(__name__)

# An address in a text, without what closes the sentence or the quotation.
_ADDRESS = re.compile(
    r"""\b(?!(?:test|csi|v4l2)://)[a-z][a-z0-9+.-]*://(?:\\\s|\S)*?(?=['")\].,:;]*(?:\s|$))""", re.I
)
_PLAIN_HOST = re.compile(r"[^:]*(?::[0-9]*)?|\[[0-9A-Fa-f:.%]*\](?::[0-9]*)?")
_OPEN_PATH = re.compile(r"(?:/(?![^/?#;&]*(?:=|%(?:25)*3[dD]))[^/?#;&]*)*/?")


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A frame as its source gives it; see :class:`zsseg_rt.results.segmentation.Frame`."""

    # uint8 [H, W, 3], the source's to give away, or what makes it of on_gpu
    image: npt.NDArray[np.uint8] | Callable[[], npt.NDArray[np.uint8]] = field(repr=False)
    captured_at: float
    clock: Literal["driver", "pipeline", "arrival", "file"]
    pts_seconds: float | None = None
    late: float = 0.0  # Seconds that it came later than the source's best, after captured_at
    dropped_before: int = 0  # Frames that the source itself dropped since the last picture
    on_gpu: Array | Nv12Frame | None = field(default=None, repr=False)


class Lateness:
    """How much later than the source's best each frame comes, by the source's own clock."""

    def __init__(self) -> None:
        self._newest: tuple[float, float] | None = None  # the last frame's stamp and arrival
        self._best = 0.0  # the least of arrival less stamp

    def of(self, stamp: float | None, arrived_at: float) -> float:
        if stamp is None:
            return 0.0
        offset = arrived_at - stamp
        if self._newest is None or stamp < self._newest[0]:  # the source set its clock back
            self._best = offset
        else:
            self._best = min(self._best + _SKEW * (arrived_at - self._newest[1]), offset)
        self._newest = stamp, arrived_at
        return offset - self._best


class RecordingTimes:
    """The times of a recording's frames: they begin at 0, rise, and keep the frames' distances."""

    # One frame after the last come a frame that tells no time, and one whose time begins anew:
    # where recordings were joined, which some formats are made for, or a camera's clock was set.

    def __init__(self, name: str, rate: float | None, *, joined: bool = False) -> None:
        self._name, self._leap = name, _LEAP[joined]
        self._step = 1 / float(rate) if rate and 0.001 <= rate <= 1000 else _USUAL_STEP
        self._last = -self._step
        self._offset: float | None = None  # from stamps to times
        # The last stamps of either kind, and how many did not rise: FFmpeg chooses by that.
        self._stamps, self._faults = [_NONE, _NONE], [0, 0]

    def of(self, stamp: float | None, decoding: float | None = None) -> float:
        """The time of the next frame; ``decoding`` is when its packet was to be decoded."""
        if stamp is None and decoding is None:
            text = f"{self._name}: tells no times; {1 / self._step:g} frames count as a second"
            log_once(logging.WARNING, text)
        stamp, due = self._likelier(stamp, decoding), self._last + self._step
        time = due if stamp is None or self._offset is None else stamp + self._offset
        begins = self._offset is None or not -_BACK <= time - self._last <= self._leap
        if stamp is not None and begins:
            time, self._offset = due, due - stamp
        self._last = max(time, self._last + self._step / 2)
        return self._last

    def begin_again(self) -> None:
        """The next frame is the first of another recording, whose times go on from here."""
        self._offset, self._stamps = None, [_NONE, _NONE]

    def _likelier(self, *stamps: float | None) -> float | None:
        for kind, stamp in enumerate(stamps):
            if stamp is not None:
                self._faults[kind] += stamp <= self._stamps[kind]
                self._stamps[kind] = stamp
        is_worse = self._stamps[1] > _NONE and self._faults[0] > self._faults[1]
        return stamps[is_worse or stamps[0] is None]


@functools.lru_cache(maxsize=256)
def log_once(level: int, text: str) -> None:
    """Log what need not be said again."""
    _log.log(level, "%s", text)


class GivenName(str):
    """A source's name that the user chose; other sources are called by their address."""


class Reader(Protocol):
    """Who reads a source."""

    def wait(self, seconds: float) -> bool:
        """Wait for so many seconds; returns true, at once, if the source shall stop."""

    def count_damaged(self) -> None:
        """Count a packet or frame that could not be decoded."""


class Source(Protocol):
    """Where frames come from. It may be opened again after it was lost."""

    @property
    def name(self) -> str:
        """Its URI without a password; what messages and frames call it."""

    @property
    def live(self) -> bool:
        """Whether it is a camera: frames that nobody takes are gone, and no end is its own."""

    def pictures(self, reader: Reader) -> Generator[Picture, None, None]:
        """Open the source and give its pictures; closing the iterator closes the source.

        Args:
            reader: Who reads.

        Raises:
            SourceError: It cannot be opened or read, or has no picture at all.
            BackendUnavailableError: A package that it needs is not installed.
        """


def check_size(name: str, width: int, height: int) -> None:
    """Refuse frames that are larger than any camera's."""
    if width * height > MOST_PIXELS:
        raise SourceError(
            f"{name}: expected frames of at most {MOST_PIXELS} pixels, got {width}x{height} = "
            f"{width * height}. Make them smaller with ffmpeg, or in the camera's settings."
        )


def shown(address: str) -> str:
    """Scheme, host, port and path up to a part with ``=``; the scheme alone where ``@`` is unclear.

    Example:
        >>> shown("rtsp://admin:pa@ss@camera:554/live/1?channel=2")
        'rtsp://camera:554/live/1'
    """
    scheme, mark, rest = address.partition("://")
    if "@" in scheme or not mark:
        return "***"
    host, path = _split(rest)
    if "@" in path:
        if "@" in host or _PLAIN_HOST.fullmatch(host):
            return f"{scheme}://***"
        host, path = _split(rest.rpartition("@")[2])  # a password with / or ? in it
    open_path = _OPEN_PATH.match(path)
    return f"{scheme}://{host.rpartition('@')[2]}{open_path[0] if open_path else ''}"


def _split(rest: str) -> tuple[str, str]:
    """The host with its login, and what comes behind it."""
    length = len(re.split(r"[/?#]", rest, maxsplit=1)[0])
    return rest[:length], rest[length:]


def redact(text: str) -> str:
    """A text whose addresses are as :func:`shown` gives them; settings of ours stay whole."""
    return _ADDRESS.sub(lambda match: shown(match[0]), text)
