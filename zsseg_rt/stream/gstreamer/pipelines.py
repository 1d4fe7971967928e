"""Sources of GStreamer's: CSI and network cameras, and the user's own pipelines."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Literal

from zsseg_rt.errors import SourceError, ZssegError
from zsseg_rt.stream.conversion import Uploads
from zsseg_rt.stream.gstreamer.library import (
    Library,
    explain,
    host_planes,
    load,
    missing_elements,
    redact_pipeline,
    require_elements,
)
from zsseg_rt.stream.source import (
    Lateness,
    Picture,
    Reader,
    RecordingTimes,
    check_size,
    log_once,
)
from zsseg_rt.stream.video import ANSWERS_WITHIN, answer_remedy, split_login, why_unreachable

CSI_ELEMENTS = ("nvarguscamerasrc", "nvvidconv", "videoconvert", "appsink")
_JETSON_DECODER = ("nvv4l2decoder", "nvvidconv")


class Pipeline:
    """A pipeline that was built, not started: a Gst.Pipeline, and the appsink that it ends in."""

    # When its encoded frames arrived, by their time stamps, if somebody notes that
    arrivals: OrderedDict[int, float] | None = None
    problem: ZssegError | None = None  # What went wrong outside the pipeline's own messages

    def __init__(self, element: Any, sink: Any) -> None:
        self.element, self.sink = element, sink

    def forget(self) -> None:
        """Disconnect what was connected to it, so that it can be freed."""


class Recipe:
    """How the pipeline of a source is made; anew for each attempt to open it."""

    hint = ""  # Advice for when a camera's pipeline ends

    def build(self, gst: Any, name: str) -> Pipeline:
        """Make the pipeline."""
        raise NotImplementedError

    def explain(self, gst: Any, message: Any, name: str) -> ZssegError:
        """A message of type ``ERROR`` in our words, without passwords."""
        return explain(gst, message, name)


@dataclass(frozen=True, kw_only=True)
class CsiCamera(Recipe):
    """A camera on a Jetson's CSI connector, through NVIDIA's image signal processor."""

    sensor: int  # The camera's number
    size_hw: tuple[int, int] = (720, 1280)  # Height and width that the camera is asked for
    rate: float = 30.0  # Frames per second
    flip: int = 0  # flip-method of nvvidconv, 0 to 7
    hint = (
        "Check the camera's cable and that its driver is set up (jetson-io.py), and that no other "
        "program uses it; then: sudo systemctl restart nvargus-daemon."
    )

    def build(self, gst: Any, name: str) -> Pipeline:
        require_elements(gst, CSI_ELEMENTS, name)
        height, width = self.size_hw
        rate = Fraction(self.rate).limit_denominator(1001)
        text = (
            f"nvarguscamerasrc name=camera sensor-id={self.sensor} "
            f"! video/x-raw(memory:NVMM),format=NV12,width={width},height={height},"
            f"framerate={rate.numerator}/{rate.denominator} "
            f"! nvvidconv flip-method={self.flip} ! video/x-raw,format=BGRx "
            "! videoconvert ! appsink"
        )
        return parse(gst, text, name)

    def explain(self, gst: Any, message: Any, name: str) -> ZssegError:
        return explain(gst, message, name, hint=self.hint)


@dataclass(frozen=True, kw_only=True)
class UserPipeline(Recipe):
    """The user's own pipeline."""

    # As for gst-launch-1.0. Unless its last element is an appsink, it is continued with !
    # videoconvert ! appsink
    text: str = field(repr=False)
    hint = "Check its source. If it plays a file, write gst-file: for gst:."

    def build(self, gst: Any, name: str) -> Pipeline:
        ends = self.text.rpartition("!")[2].split()[:1] == ["appsink"]
        return parse(gst, self.text if ends else f"{self.text} ! videoconvert ! appsink", name)


def parse(gst: Any, text: str, name: str) -> Pipeline:
    """Make a pipeline of its text."""
    from gi.repository import GLib

    context = gst.ParseContext.new()
    try:
        element = gst.parse_launch_full(text, context, gst.ParseFlags.FATAL_ERRORS)
    except GLib.Error as exc:
        require_elements(gst, dict.fromkeys(context.get_missing_elements() or ()), name)
        raise SourceError(
            f"{name}: expected a pipeline as gst-launch-1.0 takes it, got one that GStreamer "
            f"refuses: {redact_pipeline(exc.message)}. Try it there."
        ) from None
    sink = None
    if isinstance(element, gst.Bin):
        _, sink = element.iterate_all_by_element_factory_name("appsink").next()
    if sink is None:
        raise SourceError(f"{name}: expected a pipeline that ends in raw video, got a whole one")
    return Pipeline(element, sink)


# What arrives -> what unpacks it; the last decodes it without NVIDIA's decoder.
_CODECS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "H264": ("rtph264depay", "h264parse", "avdec_h264"),
        "H265": ("rtph265depay", "h265parse", "avdec_h265"),
        "JPEG": ("rtpjpegdepay", "jpegdec"),
    }
)
_RTSP_ELEMENTS = ("rtspsrc", "videoconvert", "appsink")


def decoder_of(gst: Any, encoding: str) -> tuple[str, ...]:
    """The elements that decode a stream: those of a Jetson's decoder where it is present."""
    if encoding != "JPEG" and not missing_elements(gst, _JETSON_DECODER):
        return _JETSON_DECODER
    return _CODECS[encoding][-1:]


def rtsp_elements(gst: Any) -> list[str]:
    """All elements that H.264 and H.265 cameras need here."""
    decoding = [(*_CODECS[one][:-1], *decoder_of(gst, one)) for one in ("H264", "H265")]
    return list(dict.fromkeys([*_RTSP_ELEMENTS, *decoding[0], *decoding[1]]))


@dataclass(frozen=True, kw_only=True)
class RtspCamera(Recipe):
    """A camera that speaks RTSP."""

    url: str = field(repr=False)  # Where it is; may hold a login
    hint = "Check the camera, and that it is on."

    def build(self, gst: Any, name: str) -> Pipeline:
        require_elements(gst, _RTSP_ELEMENTS, name)
        # Mode none: the camera's own times, not fitted to arrivals: lateness shows by them.
        wait = round(ANSWERS_WITHIN * 1e6)
        text = (
            "rtspsrc name=camera protocols=tcp buffer-mode=none latency=50 "
            f"tcp-timeout={wait} timeout={wait} videoconvert name=convert ! appsink"
        )
        built = parse(gst, text, name)
        camera = built.element.get_by_name("camera")
        location, login = split_login(self.url)
        camera.set_property("location", location)
        if login is not None:
            camera.set_property("user-id", login[0])
            camera.set_property("user-pw", login[1])
        return _CameraPipeline(gst, built, name)

    def explain(self, gst: Any, message: Any, name: str) -> ZssegError:
        """As of a recipe; rtspsrc hides system errors."""
        error, debug = message.parse_error()
        last = (debug or "").strip().rpartition("\n")[2]
        answer = re.fullmatch(r"(.+) \(([3-5]\d\d)\)", last)
        if answer is not None:
            remedy = answer_remedy(answer[2], self.url)
            return SourceError(f"{name}: cannot be read: {answer[2]} {answer[1]}. {remedy}")
        if "Failed to connect" in last and (reason := why_unreachable(self.url)):
            return SourceError(
                f"{name}: cannot be read: {reason}. Check address and port, and that the camera is "
                "on."
            )
        if error.matches(gst.ResourceError.quark(), gst.ResourceError.READ):
            return explain(gst, message, name, hint="Check the address, and that the camera is on.")
        return explain(gst, message, name)


class _CameraPipeline(Pipeline):
    """Builds the decoder once it is known what the camera sends, in rtspsrc's threads."""

    def __init__(self, gst: Any, built: Pipeline, name: str) -> None:
        super().__init__(built.element, built.sink)
        self.arrivals = OrderedDict()
        self._gst, self._name = gst, name
        self._has_video = False
        self._probe: tuple[Any, int] | None = None
        self._camera = self.element.get_by_name("camera")
        self._handlers = [
            self._camera.connect("select-stream", self._select),
            self._camera.connect("pad-added", self._link),
        ]

    def _select(self, _camera: Any, _number: int, caps: Any) -> bool:
        """Take the first stream of pictures, and no other."""
        is_first = caps.get_structure(0).get_string("media") == "video" and not self._has_video
        self._has_video |= is_first
        return is_first

    def _link(self, _camera: Any, pad: Any) -> None:
        from gi.repository import GLib

        caps = pad.get_current_caps() or pad.query_caps(None)
        encoding = caps.get_structure(0).get_string("encoding-name") or "unknown"
        try:
            self._decode(pad, encoding.upper())
        except ZssegError as exc:
            self.problem = exc.with_traceback(None)  # which would hold the pipeline
        except GLib.Error as exc:
            self.problem = SourceError(f"{self._name}: cannot be decoded: {exc.message}")

    def _decode(self, pad: Any, encoding: str) -> None:
        gst = self._gst
        if encoding not in _CODECS:
            raise SourceError(
                f"{self._name}: expected H.264, H.265 or JPEG, the camera sends {encoding}. Change "
                "its settings, or set ZSSEG_RTSP_LIBRARY=pyav."
            )
        unpack, decoder = _CODECS[encoding][:-1], decoder_of(gst, encoding)
        require_elements(gst, (*unpack, *decoder), self._name)
        named = (f"{decoder[0]} name=decoder", *decoder[1:])
        text = " ! ".join((*unpack, *named))
        if decoder == _JETSON_DECODER:
            text += " ! capsfilter caps=video/x-raw,format=BGRx"
        chain = gst.parse_bin_from_description(text, True)
        self._prepare(chain.get_by_name("decoder"))
        self.element.add(chain)
        chain.link(self.element.get_by_name("convert"))
        chain.sync_state_with_parent()
        pad.link(chain.get_static_pad("sink"))

    def _prepare(self, decoder: Any) -> None:
        pad = decoder.get_static_pad("sink")
        kinds = self._gst.PadProbeType.BUFFER | self._gst.PadProbeType.EVENT_DOWNSTREAM
        self._probe = pad, pad.add_probe(kinds, self._note)
        for key, value in {"thread-type": "slice", "output-corrupt": "true"}.items():
            # One frame per thread would delay frames; what is corrupt is counted, then dropped.
            if decoder.find_property(key) is not None:
                self._gst.util_set_object_arg(decoder, key, value)

    def _note(self, _pad: Any, info: Any) -> Any:
        """Note when a frame arrives, and keep sizes from the decoder that are too large."""
        if info.type & self._gst.PadProbeType.BUFFER:
            assert self.arrivals is not None, "made with it"
            self.arrivals[info.get_buffer().pts] = time.monotonic()
            if len(self.arrivals) > _MOST_ARRIVALS:
                self.arrivals.popitem(last=False)
        elif (event := info.get_event()).type == self._gst.EventType.CAPS:
            caps = event.parse_caps().get_structure(0)
            try:
                check_size(self._name, *(caps.get_int(side)[1] for side in ("width", "height")))
            except SourceError as exc:
                self.problem = exc.with_traceback(None)
        # A decoder reads the size in the frames too: none must come through.
        returns = self._gst.PadProbeReturn
        return returns.OK if self.problem is None else returns.DROP

    def forget(self) -> None:
        for handler in self._handlers:
            self._camera.disconnect(handler)
        if self._probe is not None:
            pad, number = self._probe
            pad.remove_probe(number)


_LOOK = 0.05  # seconds; how often a source without frames looks whether it shall stop
_EVEN = "width=[2,32766,2],height=[2,32766,2]"
_CONVERTS_WITHIN = 10**10  # nanoseconds
_MOST_ARRIVALS = 64  # frames that a decoder may hold
_SLACK = 10.0  # seconds; a frame whose stamp is further off was not stamped with our clock
_QUEUE = 4  # frames; the reading thread takes them at once, unless it may not


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

    def pictures(self, reader: Reader) -> Generator[Picture, None, None]:
        library = load()
        built = self.recipe.build(library.Gst, self.name)
        with closing(_Player(self, library.Gst, built, reader)) as player:
            frames = _Frames(library, self, built.sink)
            is_live = player.start(frames.caps)
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
                captured_at, clock = self._captured(library.Gst, built, sample, is_live)
                late = 0.0 if built.arrivals is None else lateness.of(seconds, captured_at)
                yield Picture(
                    **frames.take(sample),
                    captured_at=captured_at - late,
                    clock=clock,
                    pts_seconds=seconds,
                    late=late,
                    dropped_before=player.dropped(),
                )

    def _captured(
        self, gst: Any, built: Pipeline, sample: Any, is_live: bool
    ) -> tuple[float, Literal["pipeline", "arrival", "file"]]:
        """When a frame was captured, by ``time.monotonic()``, and whose clock says so."""
        now, stamp = time.monotonic(), sample.get_buffer().pts
        if built.arrivals is not None:
            return built.arrivals.pop(stamp, now), "arrival"
        if not self.live:
            return now, "file"
        if is_live and stamp != gst.CLOCK_TIME_NONE:
            # Pipelines here run on the system's clock, CLOCK_MONOTONIC, and live sources stamp
            # their frames with the time that has run on it since base_time.
            running = sample.get_segment().to_running_time(gst.Format.TIME, stamp)
            seconds = (built.element.get_base_time() + running) / 1e9
            if running != gst.CLOCK_TIME_NONE and abs(now - seconds) < _SLACK:
                return min(seconds, now), "pipeline"
        return now, "arrival"


def _stamp_of(gst: Any, sample: Any) -> float | None:
    stamp = sample.get_buffer().pts
    return None if stamp == gst.CLOCK_TIME_NONE else float(stamp / 1e9)


def _rate_of(sample: Any) -> float | None:
    is_stated, frames, seconds = sample.get_caps().get_structure(0).get_fraction("framerate")
    return frames / seconds if is_stated and seconds else None


class _Frames:
    """Takes frames out of samples: converted, or to be uploaded as they were decoded."""

    def __init__(self, library: Library, source: GstSource, sink: Any) -> None:
        self._library, self._name, self._sink = library, source.name, sink
        order, device = source.channel_order, source.device
        self.caps = self._rgb = f"video/x-raw,format={order.upper()}"
        self._uploads = None if device == "cpu" else Uploads(device, order)
        if self._uploads is not None:
            self.caps = f"video/x-raw,format={{NV12,I420}},{_EVEN};{self._rgb}"

    def take(self, sample: Any) -> dict[str, Any]:
        """A picture's fields from a sample: ``image``, on a GPU also ``on_gpu``."""
        with host_planes(self._library, sample) as (planes, matrix):
            if self._uploads is None:
                return {"image": planes[0].copy()}
            if len(planes) == 1:
                return self._uploads.image(planes[0])
            if matrix is not None:
                return self._uploads.planes(planes[0], planes[1:], matrix)
        return self.take(self._converted(sample))

    def _converted(self, sample: Any) -> Any:
        """A sample of other colours as RGB; the pipeline converts the next ones, if it can."""
        from gi.repository import GLib

        gst, pad = self._library.Gst, self._sink.get_static_pad("sink")
        rgb = gst.Caps.from_string(self._rgb)
        if self.caps != self._rgb and not pad.peer_query_caps(rgb).is_empty():
            self.caps = self._rgb
            self._sink.set_property("caps", rgb)
            pad.push_event(gst.Event.new_reconfigure())
            text = f"{self._name}: frames are converted on the CPU: neither BT.601 nor BT.709"
            log_once(logging.WARNING, text)
        try:  # some are in the sink's queue already
            return self._library.GstVideo.video_convert_sample(sample, rgb, _CONVERTS_WITHIN)
        except GLib.Error as exc:
            raise SourceError(f"{self._name}: cannot be converted: {exc.message}") from None


class _Player:
    """Plays a pipeline: takes its frames, hears what it says, and counts what it drops."""

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

    def start(self, caps: str) -> bool:
        """Start the pipeline; tells whether its source is live."""
        gst, sink, pipeline = self._gst, self._built.sink, self._built.element
        sink.set_property("caps", gst.Caps.from_string(caps))
        sink.set_property("max-buffers", _QUEUE)
        sink.set_property("drop", self._source.live)
        sink.set_property("sync", False)
        sink.set_property("enable-last-sample", False)
        pipeline.use_clock(gst.SystemClock.obtain())
        is_live = pipeline.set_state(gst.State.PAUSED) == gst.StateChangeReturn.NO_PREROLL
        # What is no camera runs as fast as it can unless its frames wait for their time.
        sink.set_property("sync", self._source.live and not is_live)
        pipeline.set_state(gst.State.PLAYING)
        return bool(is_live)

    def close(self) -> None:
        self._pad.remove_probe(self._probe)
        self._built.forget()
        self._built.element.set_state(self._gst.State.NULL)

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
