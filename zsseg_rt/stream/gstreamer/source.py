"""A source whose frames come from a GStreamer pipeline."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from zsseg_rt.errors import ConfigError, SourceError, ZssegError
from zsseg_rt.stream.gstreamer.gpu_frames import GpuFrames, HostFrames
from zsseg_rt.stream.gstreamer.library import Library, NotMappedError, load, stamp_of
from zsseg_rt.stream.gstreamer.pipelines import Pipeline, Recipe
from zsseg_rt.stream.source import Lateness, Picture, Reader, RecordingTimes

_LOOK = 0.05  # seconds; how often a source without frames looks whether it shall stop
_QUEUE = 4  # frames; the reading thread takes them at once, unless it may not
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GstSource:
    """Gives the frames that arrive at the end of a pipeline."""

    name: str  # What messages and frames call it, without a password
    recipe: Recipe = field(repr=False)  # How its pipeline is made
    channel_order: str = "rgb"  # Of the frames
    # Whether it is a camera. Its frames are dropped where nobody takes them, and its end is a loss;
    # the pipeline of a file waits until its frames are taken
    live: bool = True
    # The GPU that its frames are for, "cuda:N"; "cpu" keeps them in host memory
    device: str = "cpu"
    # Why frames did not stay on the GPU, once that was tried in vain; then it is not tried again
    refusals: list[str] = field(default_factory=list, repr=False)

    def pictures(self, reader: Reader) -> Generator[Picture, None, None]:
        library = load()
        *others, last = self._ways(library)
        for open_frames in others:
            num_frames = 0
            try:
                for picture in self._play(library, open_frames(), reader):
                    num_frames += 1
                    yield picture
            except SourceError as exc:
                may_be_mapped = isinstance(exc, NotMappedError) or "not-negotiated" in str(exc)
                if num_frames or not may_be_mapped:
                    raise
                self.refusals.append(str(exc))
                _log.warning("%s: frames pass through the CPU's memory: %s", self.name, exc)
            else:
                return
        yield from self._play(library, last(), reader)

    def _ways(self, library: Library) -> list[Callable[[], GpuFrames | HostFrames]]:
        """How frames may come, best first, without those that were refused."""
        order, device = self.channel_order, self.device
        ways: list[Callable[[], GpuFrames | HostFrames]] = [
            partial(HostFrames, library, order, device, rgb=True)
        ]
        if device != "cpu":
            ways.insert(0, partial(HostFrames, library, order, device, rgb=False))
            if not keeps_to_host() and self.recipe.path(library.Gst) == GpuFrames.path:
                ways.insert(0, partial(GpuFrames, order, device))
        return ways[len(self.refusals) :]

    def _play(
        self, library: Library, frames: GpuFrames | HostFrames, reader: Reader
    ) -> Generator[Picture, None, None]:
        built = self.recipe.build(library.Gst, self.name, frames.path)
        player = _Player(self, library.Gst, built, reader)
        with closing(player), self._playing(library.Gst, built, frames.caps) as is_live:
            start: float | None = None
            times: RecordingTimes | None = None
            lateness = Lateness()
            for sample in player.samples():
                stamp = _stamp_of(library.Gst, sample)
                start = stamp if start is None else start
                seconds = None if stamp is None or start is None else stamp - start
                if not self.live:
                    times = times or RecordingTimes(self.name, _rate_of(sample), joined=True)
                    seconds = times.of(stamp)
                captured_at, clock = self._captured(library, built, sample, is_live)
                late = 0.0 if built.arrivals is None else lateness.of(seconds, captured_at)
                yield Picture(
                    **frames.take(sample),
                    captured_at=captured_at - late,
                    clock=clock,
                    pts_seconds=seconds,
                    late=late,
                    dropped_before=player.dropped(),
                )

    @contextmanager
    def _playing(self, gst: Any, built: Pipeline, caps: str) -> Iterator[bool]:
        """Start the pipeline, and stop it; tells whether its source is live."""
        sink, pipeline = built.sink, built.element
        sink.set_property("caps", gst.Caps.from_string(caps))
        sink.set_property("max-buffers", _QUEUE)
        sink.set_property("drop", self.live)
        sink.set_property("sync", False)
        sink.set_property("enable-last-sample", False)
        pipeline.use_clock(gst.SystemClock.obtain())
        try:
            is_live = pipeline.set_state(gst.State.PAUSED) == gst.StateChangeReturn.NO_PREROLL
            # What is no camera runs as fast as it can unless its frames wait for their time.
            sink.set_property("sync", self.live and not is_live)
            pipeline.set_state(gst.State.PLAYING)
            yield is_live
        finally:
            built.forget()
            pipeline.set_state(gst.State.NULL)

    def _captured(
        self, library: Library, built: Pipeline, sample: Any, is_live: bool
    ) -> tuple[float, Literal["pipeline", "arrival", "file"]]:
        captured_at = None
        if built.arrivals is not None:
            captured_at = built.arrivals.take(sample.get_buffer().pts)
        elif self.live and is_live:
            captured_at = stamp_of(library, sample, built.element.get_base_time())
            if captured_at is not None:
                return captured_at, "pipeline"
        captured_at = time.monotonic() if captured_at is None else captured_at
        return captured_at, "arrival" if self.live else "file"


def _stamp_of(gst: Any, sample: Any) -> float | None:
    stamp = sample.get_buffer().pts
    return None if stamp == gst.CLOCK_TIME_NONE else float(stamp / 1e9)


def _rate_of(sample: Any) -> float | None:
    is_stated, frames, seconds = sample.get_caps().get_structure(0).get_fraction("framerate")
    return frames / seconds if is_stated and seconds else None


def keeps_to_host() -> bool:
    """Whether frames pass through the CPU's memory in any case, by ``ZSSEG_CAMERA_FRAMES``."""
    value = os.environ.get("ZSSEG_CAMERA_FRAMES") or "auto"
    if value not in ("auto", "host"):
        raise ConfigError(f"ZSSEG_CAMERA_FRAMES: expected auto or host, got {value!r}")
    return value == "host"


class _Player:
    """Takes the frames of a playing pipeline, hears what it says, and counts what it drops."""

    def __init__(self, source: GstSource, gst: Any, built: Pipeline, reader: Reader) -> None:
        self._source, self._gst, self._built, self._reader = source, gst, built, reader
        self._bus = built.element.get_bus()
        self._error: ZssegError | None = None
        self._has_frames = False
        self._lock = threading.Lock()
        self._waiting = self._dropped = 0
        self._pad = built.sink.get_static_pad("sink")
        self._probe = self._pad.add_probe(gst.PadProbeType.BUFFER, self._add)

    def _add(self, _pad: Any, _info: Any) -> Any:
        with self._lock:  # an appsink drops its oldest frame for each that finds it full
            if self._source.live and self._waiting == _QUEUE:
                self._dropped += 1
            else:
                self._waiting += 1
        return self._gst.PadProbeReturn.OK

    def dropped(self) -> int:
        """How many frames were dropped since the last call."""
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        return dropped

    def close(self) -> None:
        self._pad.remove_probe(self._probe)

    def samples(self) -> Iterator[Any]:
        """Sound frames, until the pipeline ends or the reader has enough."""
        while not self._reader.wait(0.0):
            sample = self._built.sink.try_pull_sample(int(_LOOK * 1e9))
            with self._lock:
                self._waiting = 0 if sample is None else max(self._waiting - 1, 0)
            self._read_bus()
            if sample is None:
                if self._is_over():
                    return
            elif sample.get_buffer().has_flags(self._gst.BufferFlags.CORRUPTED):
                self._reader.count_damaged()
            else:
                yield sample
                self._has_frames = True

    def _read_bus(self) -> None:
        """Take the messages; each that is left unread costs memory."""
        kinds, stream_error = self._gst.MessageType, self._gst.StreamError
        while (message := self._bus.pop_filtered(kinds.ERROR | kinds.WARNING)) is not None:
            if message.type == kinds.WARNING:
                warning, _ = message.parse_warning()
                for code in (stream_error.DECODE, stream_error.FORMAT):
                    if warning.matches(stream_error.quark(), code):
                        self._reader.count_damaged()
            elif self._error is None:
                source = self._source
                self._error = source.recipe.explain(self._gst, message, source.name)

    def _is_over(self) -> bool:
        """Whether the pipeline has come to its end; asked when it has no frame."""
        name, live = self._source.name, self._source.live
        has_ended = bool(self._built.sink.is_eos())
        self._read_bus()  # an error comes before the end that it causes
        error, self._error = self._built.problem or self._error, None  # what follows from it
        if error is not None:
            if live or not self._has_frames:
                try:
                    raise error
                finally:
                    del error  # its traceback holds this frame, and with it the pipeline
            self._reader.count_damaged()  # a file ends where it cannot be read any more
            return True
        if has_ended and live:
            raise SourceError(f"{name}: the camera's stream ended. {self._source.recipe.hint}")
        if has_ended and not self._has_frames:
            raise SourceError(f"{name}: expected a video, got no frame. Is it whole?")
        return has_ended
