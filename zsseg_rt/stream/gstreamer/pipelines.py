"""Pipelines that end in raw frames: of CSI and network cameras, and of the user's own making."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from zsseg_rt.errors import SourceError, ZssegError
from zsseg_rt.stream.gstreamer.library import (
    Arrivals,
    NotMappedError,
    explain,
    known_settings,
    missing_elements,
    redact_pipeline,
    require_elements,
)
from zsseg_rt.stream.source import check_size
from zsseg_rt.stream.video import ANSWERS_WITHIN, answer_remedy, split_login, why_unreachable

CSI_ELEMENTS = ("nvarguscamerasrc", "nvvidconv", "videoconvert", "appsink")
NVMM_DECODER = ("nvv4l2decoder", "nvvidconv")


class Pipeline:
    """A pipeline that was built, not started: a Gst.Pipeline, and the appsink that it ends in."""

    arrivals: Arrivals | None = None  # When its encoded frames arrived, if somebody notes that
    problem: ZssegError | None = None  # What went wrong outside the pipeline's own messages

    def __init__(self, element: Any, sink: Any) -> None:
        self.element, self.sink = element, sink

    def forget(self) -> None:
        """Disconnect what was connected to it, so that it can be freed."""


class Recipe:
    """How the pipeline of a source is made; anew for each attempt to open it."""

    hint = ""  # Advice for when a camera's pipeline ends
    nvmm_elements: tuple[str, ...] = ()  # What leaves its frames in a Jetson's memory

    def path(self, gst: Any) -> str:
        """Where its frames may lie on their way to a GPU: ``"nvmm"`` or ``"host"``."""
        stays = self.nvmm_elements and not missing_elements(gst, self.nvmm_elements)
        return "nvmm" if stays else "host"

    def build(self, gst: Any, name: str, path: str = "host") -> Pipeline:
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
    nvmm_elements = CSI_ELEMENTS[:2]

    def build(self, gst: Any, name: str, path: str = "host") -> Pipeline:
        require_elements(gst, CSI_ELEMENTS, name)
        height, width = self.size_hw
        rate = Fraction(self.rate).limit_denominator(1001)
        within, host = within_nvmm(gst), "! video/x-raw,format=BGRx ! videoconvert"
        text = (
            f"nvarguscamerasrc name=camera sensor-id={self.sensor} "
            f"! video/x-raw(memory:NVMM),format=NV12,width={width},height={height},"
            f"framerate={rate.numerator}/{rate.denominator} "
            f"! nvvidconv flip-method={self.flip} {within if path == 'nvmm' else host} ! appsink"
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

    def build(self, gst: Any, name: str, path: str = "host") -> Pipeline:
        ends = self.text.rpartition("!")[2].split()[:1] == ["appsink"]
        return parse(gst, self.text if ends else f"{self.text} ! videoconvert ! appsink", name)


def within_nvmm(gst: Any) -> str:
    """Settings of nvvidconv for frames that stay in NVMM: rows in order, buffers to spare."""
    return known_settings(gst, "nvvidconv", {"bl-output": "false", "output-buffers": 6})


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
    if encoding != "JPEG" and not missing_elements(gst, NVMM_DECODER):
        return NVMM_DECODER
    return _CODECS[encoding][-1:]


def rtsp_elements(gst: Any) -> list[str]:
    """All elements that H.264 and H.265 cameras need here."""
    decoding = [(*_CODECS[one][:-1], *decoder_of(gst, one)) for one in ("H264", "H265")]
    return list(dict.fromkeys([*_RTSP_ELEMENTS, *decoding[0], *decoding[1]]))


@dataclass(frozen=True, kw_only=True)
class RtspCamera(Recipe):
    """A camera that speaks RTSP."""

    url: str = field(repr=False)  # Where it is; may hold a login
    # What may carry its packets, as rtspsrc names them: "tcp", "udp", "udp-mcast", "http"
    protocols: tuple[str, ...] = ("tcp",)
    # How long a missing packet is waited for; what arrives in order does not wait
    latency_ms: int = 50
    hint = "Check the camera, and that it is on."
    nvmm_elements = NVMM_DECODER

    def build(self, gst: Any, name: str, path: str = "host") -> Pipeline:
        require_elements(gst, _RTSP_ELEMENTS, name)
        convert = "videoconvert" if path == "host" else "identity"
        built = parse(gst, f"rtspsrc name=camera {convert} name=convert ! appsink", name)
        camera = built.element.get_by_name("camera")
        location, login = split_login(self.url)
        settings: dict[str, Any] = {
            "location": location,
            "latency": self.latency_ms,
            "tcp-timeout": round(ANSWERS_WITHIN * 1e6),
            "timeout": round(ANSWERS_WITHIN * 1e6),
        }
        if login is not None:
            settings |= {"user-id": login[0], "user-pw": login[1]}
        for key, value in settings.items():
            camera.set_property(key, value)
        gst.util_set_object_arg(camera, "protocols", "+".join(self.protocols))
        if set(self.protocols) <= {"tcp", "http"}:
            # The camera's own times, which are not fitted to arrivals: lateness shows by them.
            gst.util_set_object_arg(camera, "buffer-mode", "none")
        return _CameraPipeline(gst, built, name, path)

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

    def __init__(self, gst: Any, built: Pipeline, name: str, path: str) -> None:
        super().__init__(built.element, built.sink)
        self.arrivals: Arrivals = Arrivals()
        self._gst, self._name, self._path = gst, name, path
        self._number: int | None = None
        self._chain: Any = None
        self._probe: tuple[Any, int] | None = None
        self._camera = self.element.get_by_name("camera")
        self._handlers = [
            self._camera.connect("select-stream", self._select),
            self._camera.connect("pad-added", self._link),
        ]

    def _select(self, _camera: Any, number: int, caps: Any) -> bool:
        """Take the first stream of pictures, and no other; asked again if UDP gives way to TCP."""
        is_video = caps.get_structure(0).get_string("media") == "video"
        if is_video and self._number is None:
            self._number = number
        return is_video and number == self._number

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
        (*unpack, software), decoder = _CODECS[encoding], decoder_of(gst, encoding)
        if self._path != "host" and decoder[0] == software:
            raise NotMappedError(f"{decoder[0]} decodes {encoding} on the CPU")
        require_elements(gst, (*unpack, *decoder), self._name)
        named = (f"{decoder[0]} name=decoder", *decoder[1:])
        text = " ! ".join((*unpack, *named))
        if decoder == NVMM_DECODER:
            to_bgrx = "! capsfilter caps=video/x-raw,format=BGRx"
            text += f" {within_nvmm(gst) if self._path == 'nvmm' else to_bgrx}"
        self._remove_probe()
        if self._chain is not None:  # of UDP, before it gave way to TCP
            self._chain.set_state(gst.State.NULL)
            self.element.remove(self._chain)
        self._chain = chain = gst.parse_bin_from_description(text, True)
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
            self.arrivals.note(info.get_buffer().pts)
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
        self._remove_probe()

    def _remove_probe(self) -> None:
        if self._probe is not None:
            pad, number = self._probe
            pad.remove_probe(number)
            self._probe = None
