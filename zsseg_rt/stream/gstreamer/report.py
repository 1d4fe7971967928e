"""Report which elements of GStreamer this machine has, and which it lacks."""

from __future__ import annotations

from zsseg_rt.errors import BackendUnavailableError
from zsseg_rt.stream.gstreamer.gpu_frames import how_frames_reach_gpus
from zsseg_rt.stream.gstreamer.library import load, load_server, missing_elements, packages_of
from zsseg_rt.stream.gstreamer.pipelines import CSI_ELEMENTS, decoder_of, rtsp_elements
from zsseg_rt.stream.gstreamer.rtsp_sink import NVENC, OUTPUT_ELEMENTS, encoder_of

_JETSON_CODECS = ("nvv4l2decoder", "nvv4l2h264enc")


def report(*, is_jetson: bool) -> tuple[str, str]:
    """The elements that are there or not, and how to install those; opens no camera or port."""
    try:
        library = load()
    except BackendUnavailableError as exc:
        text, _, remedy = str(exc).partition(" Run: ")
        need = "Only csi://, gst:, RTSP output and RTSP with less delay need it."
        return f"{text} {need}", f"Run: {remedy}"
    import gi

    gst, facts = library.Gst, [f"{library.version}, PyGObject {gi.__version__}"]
    remedies: list[str] = []
    wanted = [*rtsp_elements(gst), *OUTPUT_ELEMENTS]
    if is_jetson:
        wanted += [*CSI_ELEMENTS, *_JETSON_CODECS]
    missing = missing_elements(gst, dict.fromkeys(wanted))
    if missing:
        facts.append(f"missing: {', '.join(missing)}")
        remedies.append(packages_of(missing))
    facts.append(f"H.264 is decoded by {decoder_of(gst, 'H264')[0]}")
    facts.append(f"encoded by {encoder_of(gst)}")
    if is_jetson and not NVENC.exists():
        facts.append(f"no {NVENC}: this Jetson has no encoder, or a container does not pass it on")
    path, reason = how_frames_reach_gpus(gst)
    facts.append(f"frames for a GPU come through {path}" + (f" ({reason})" if reason else ""))
    try:
        load_server()
    except BackendUnavailableError as exc:
        facts.append("RTSP cannot be served")
        remedies.append(str(exc))
    return "; ".join(facts), " ".join(dict.fromkeys(remedies))
