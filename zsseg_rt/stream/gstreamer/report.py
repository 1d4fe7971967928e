"""What GStreamer can do on this machine, and what it lacks."""

from __future__ import annotations

from dataclasses import dataclass

from zsseg_rt.errors import BackendUnavailableError
from zsseg_rt.stream.gstreamer.gpu_frames import how_frames_reach_gpus
from zsseg_rt.stream.gstreamer.library import load, load_server, missing_elements, packages_of
from zsseg_rt.stream.gstreamer.pipelines import CSI_ELEMENTS, decoder_of, rtsp_elements
from zsseg_rt.stream.gstreamer.rtsp_sink import NVENC, OUTPUT_ELEMENTS, encoder_of

_JETSON_CODECS = ("nvv4l2decoder", "nvv4l2h264enc")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found."""

    is_complete: bool  # Whether nothing is missing
    detail: str  # What is there and what is not
    remedy: str  # What installs the rest; empty if nothing does


def report(*, is_jetson: bool) -> Report:
    """Look which elements are there; opens no camera and no port."""
    try:
        library = load()
    except BackendUnavailableError as exc:
        text, _, remedy = str(exc).partition(" Run: ")
        return Report(
            is_complete=False,
            detail=f"{text} Only csi://, gst:, RTSP output and RTSP with less delay need it.",
            remedy=f"Run: {remedy}",
        )
    gst, told, remedies = library.Gst, [f"{library.version}, PyGObject {_pygobject()}"], []
    wanted = [*rtsp_elements(gst), *OUTPUT_ELEMENTS]
    if is_jetson:
        wanted += [*CSI_ELEMENTS, *_JETSON_CODECS]
    missing = missing_elements(gst, dict.fromkeys(wanted))
    if missing:
        told.append(f"missing: {', '.join(missing)}")
        remedies.append(packages_of(missing))
    told.append(f"H.264 is decoded by {decoder_of(gst, 'H264')[0]}")
    told.append(f"encoded by {encoder_of(gst)}")
    if is_jetson and not NVENC.exists():
        told.append(f"no {NVENC}: this Jetson has no encoder, or a container does not pass it on")
    path, reason = how_frames_reach_gpus(gst)
    told.append(f"frames for a GPU come through {path}" + (f" ({reason})" if reason else ""))
    problem = _why_it_cannot_serve()
    if problem is not None:
        told.append("RTSP cannot be served")
        remedies.append(problem)
    return Report(
        is_complete=not remedies, detail="; ".join(told), remedy=" ".join(dict.fromkeys(remedies))
    )


def _pygobject() -> str:
    import gi

    return str(gi.__version__)


def _why_it_cannot_serve() -> str | None:
    try:
        load_server()
    except BackendUnavailableError as exc:
        return str(exc)
    return None
