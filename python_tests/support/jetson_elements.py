"""Stand-ins for a Jetson's GStreamer elements, with its memory, properties and pixel formats.

:func:`register` makes them known to the GStreamer of this process. They show that our pipelines
parse, negotiate and run with such elements; not that a Jetson's own behave the same.
"""

import logging
import os
import time

import cv2
import gi
import numpy as np

gi.require_version("Gst", "1.0")
gi.require_version("GstBase", "1.0")
from gi.repository import GLib, GObject, Gst, GstBase  # noqa: E402

Gst.init(None)

SIDES = "width=[1,8192],height=[1,8192],framerate=[0/1,1000/1]"
NVMM = f"video/x-raw(memory:NVMM),format=NV12,{SIDES}"
BGRX = f"video/x-raw,format=BGRx,{SIDES}"
RED, BLUE = (255, 0, 0), (0, 0, 255)
SINK = Gst.PadDirection.SINK


def element(kind, **pads):
    """A decorator: the class becomes a type of elements with these pads."""

    def declare(element):
        element.set_metadata(element.__name__, kind, "stand-in", "tests")
        for name, caps in pads.items():
            direction = SINK if name == "sink" else Gst.PadDirection.SRC
            wanted = Gst.Caps.from_string(caps)
            pad = Gst.PadTemplate.new(name, direction, Gst.PadPresence.ALWAYS, wanted)
            element.add_pad_template(pad)
        return element

    return declare


def buffer_of(data):
    buffer = Gst.Buffer.new_allocate(None, len(data), None)
    buffer.fill(0, data)
    return buffer


def nv12_of(rgb):
    height, width = rgb.shape[:2]
    planes = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2YUV_I420)
    chroma = planes[height:].reshape(2, height // 2, width // 2)
    return planes[:height].tobytes() + np.ascontiguousarray(chroma.transpose(1, 2, 0)).tobytes()


def numbers_of(caps):
    structure = caps.get_structure(0)
    _, top, bottom = structure.get_fraction("framerate")
    return structure.get_int("height")[1], structure.get_int("width")[1], f"{top}/{bottom}"


@element("Source/Video", src=NVMM)
class Camera(GstBase.BaseSrc):
    """Its left half is red, its right half blue. There is one camera, number 0."""

    sensor_id = GObject.Property(type=int, default=0)

    def __init__(self):
        super().__init__()
        self.set_live(True)
        self.set_format(Gst.Format.TIME)
        self.set_do_timestamp(True)

    def do_set_caps(self, caps):
        self.height, self.width, _ = numbers_of(caps)
        return True

    def do_create(self, _offset, _size, _given):
        if self.sensor_id > 0:
            code = Gst.ResourceError.NOT_FOUND
            error = GLib.Error.new_literal(Gst.ResourceError.quark(), "No cameras available", code)
            self.post_message(Gst.Message.new_error(self, error, "stand-in"))
            return Gst.FlowReturn.ERROR, None
        time.sleep(0.03)
        image = np.empty((self.height, self.width, 3), np.uint8)
        image[:, : self.width // 2], image[:, self.width // 2 :] = RED, BLUE
        return Gst.FlowReturn.OK, buffer_of(nv12_of(image))


@element("Filter/Video", sink=f"{NVMM};{BGRX}", src=f"{BGRX};{NVMM}")
class Converter(Gst.Element):
    """NVMM NV12 to BGRx, turned by 180 degrees if it is told so, or back."""

    flip_method = GObject.Property(type=int, default=0)

    def __init__(self):
        super().__init__()
        for template in self.get_pad_template_list():
            pad = Gst.Pad.new_from_template(template, template.name_template)
            if pad.direction == SINK:
                pad.set_chain_function_full(self.chain)
                pad.set_event_function_full(self.event)
            self.add_pad(pad)

    def event(self, pad, _parent, event):
        if event.type != Gst.EventType.CAPS:
            return pad.event_default(self, event)
        caps = event.parse_caps()
        self.height, self.width, rate = numbers_of(caps)
        self.from_nvmm = caps.get_features(0).contains("memory:NVMM")
        gives = "video/x-raw,format=BGRx" if self.from_nvmm else NVMM.partition(",width")[0]
        caps = Gst.Caps.from_string(
            f"{gives},width={self.width},height={self.height},framerate={rate}"
        )
        return self.get_static_pad("src").push_event(Gst.Event.new_caps(caps))

    def chain(self, _pad, _parent, buffer):
        data = np.frombuffer(buffer.extract_dup(0, buffer.get_size()), np.uint8)
        output = buffer_of(self.pixels_for(data))
        output.pts, output.dts, output.duration = buffer.pts, buffer.dts, buffer.duration
        return self.get_static_pad("src").push(output)

    def pixels_for(self, data):
        if not self.from_nvmm:
            return nv12_of(data.reshape(self.height, self.width, 4)[..., 2::-1])
        planes = data.reshape(self.height * 3 // 2, self.width)
        image = cv2.cvtColor(cv2.cvtColor(planes, cv2.COLOR_YUV2BGR_NV12), cv2.COLOR_BGR2BGRA)
        return (image[::-1, ::-1] if self.flip_method == 2 else image).tobytes()


class Chain:
    x264 = "x264enc tune=zerolatency speed-preset=ultrafast threads=1"

    def __init__(self):
        super().__init__()
        fails = os.environ.get("NVENC_FAILS")
        text = self.text.format(fails=f"identity {fails} ! " if fails else "", x264=self.x264)
        inner = Gst.parse_bin_from_description(text, True)
        self.add(inner)
        for name in ("sink", "src"):
            template = self.get_pad_template(name)
            self.add_pad(Gst.GhostPad.new_from_template(name, inner.get_static_pad(name), template))


@element("Codec/Decoder/Video", sink="video/x-h264", src=NVMM)
class Decoder(Chain, Gst.Bin):
    text = "avdec_h264 ! videoconvert ! video/x-raw,format=BGRx ! nvvidconv"


@element("Codec/Encoder/Video", sink=NVMM, src="video/x-h264")
class Encoder(Chain, Gst.Bin):
    bitrate = GObject.Property(type=int, default=4_000_000)
    idrinterval = GObject.Property(type=int, default=256)
    iframeinterval = GObject.Property(type=int, default=30)
    insert_sps_pps = GObject.Property(type=bool, default=False)
    text = (
        "nvvidconv ! video/x-raw,format=BGRx ! {fails}videoconvert ! video/x-raw,format=I420 "
        "! {x264}"
    )


@element("Codec/Encoder/Video", sink="video/x-raw", src="video/x-h264")
class Nvenc(Chain, Gst.Bin):
    """No Jetson's: the encoder of other machines."""

    bitrate = GObject.Property(type=int, default=0)
    gop_size = GObject.Property(type=int, default=75)
    zerolatency = GObject.Property(type=bool, default=False)
    text = "videoconvert ! video/x-raw,format=I420 ! {x264}"

    def __init__(self):
        super().__init__()
        logging.warning("stand-in for nvh264enc")


TYPES = {
    "nvarguscamerasrc": Camera, "nvvidconv": Converter, "nvv4l2decoder": Decoder,
    "nvv4l2h264enc": Encoder, "nvh264enc": Nvenc,
}  # fmt: skip


def register(*names):
    """Make the stand-ins of these names known; what is not named stays absent."""
    for name in names:
        Gst.Element.register(None, name, 0, TYPES[name])
