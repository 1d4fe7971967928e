"""A network camera: H.264 or H.265 over RTSP, from GStreamer's own server.

Run in a process of its own:

    python rtsp_server.py [--port 0] [--codec h264] [--sizes 320x240] [--rate 30]
                          [--login user:password]

It prints ``ready PORT`` and serves ``rtsp://127.0.0.1:PORT/camera`` until it is killed. Each of its
pictures shows, as black and white blocks, the milliseconds of CLOCK_MONOTONIC at which it was made;
see ``gstreamer.shown_time``. The first one's are printed too. SIGUSR1 goes on with the next of
the sizes. It dies with its parent.
"""

import argparse
import ctypes
import signal
import time

import gi
import numpy as np

gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtsp, GstRtspServer  # noqa: E402

ENCODERS = {
    # With more threads, or slices, FFmpeg shows green pictures and does not call them corrupt.
    "h264": "x264enc tune=zerolatency speed-preset=ultrafast threads=1 key-int-max=15 bitrate=1000 "
    "! rtph264pay name=pay0 pt=96 config-interval=-1",
    "h265": "x265enc tune=zerolatency speed-preset=ultrafast key-int-max=15 bitrate=1000 "
    "option-string=pools=1:frame-threads=1:log-level=none "
    "! h265parse ! rtph265pay name=pay0 pt=96 config-interval=-1",
}


class Camera:
    def __init__(self, sizes, rate):
        self.sizes, self.rate = [tuple(map(int, text.split("x"))) for text in sizes], rate
        self.due = 0.0

    def change_size(self):
        self.sizes = [*self.sizes[1:], self.sizes[0]]
        return True

    def configure(self, _factory, media):
        media.get_element().get_child_by_name("camera").connect("need-data", self.give)

    def give(self, source, _length):
        now, is_first = time.monotonic(), not self.due
        self.due = max(self.due + 1 / self.rate, now)
        time.sleep(self.due - now)
        width, height = self.sizes[0]
        text = f"video/x-raw,format=I420,width={width},height={height},framerate={self.rate}/1"
        source.set_property("caps", Gst.Caps.from_string(text))
        now_ms = time.monotonic_ns() // 1_000_000
        if is_first:
            print(f"first {now_ms}", flush=True)
        stamp = now_ms % 2**40  # 40 bits of time, 8 bits of their sum
        bits = stamp << 8 | sum(stamp.to_bytes(5, "big")) % 256
        blocks = np.where(bits >> np.arange(48).reshape(6, 8) & 1, 235, 16).astype(np.uint8)
        luma = blocks.repeat(height // 6, axis=0).repeat(width // 8, axis=1)
        data = luma.tobytes() + b"\x80" * (width * height // 2)
        buffer = Gst.Buffer.new_allocate(None, len(data), None)  # wrapped bytes may be freed early
        buffer.fill(0, data)
        source.emit("push-buffer", buffer)


def require_login(server, factory, login):
    """Let in whoever knows the password; it never crosses the wire (digest)."""
    token, auth = GstRtspServer.RTSPToken(), GstRtspServer.RTSPAuth()
    token.set_string("media.factory.role", "viewer")
    auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
    auth.add_digest(*login.split(":", 1), token)
    server.set_auth(auth)
    permissions = GstRtspServer.RTSPPermissions()
    for right in ("media.factory.access", "media.factory.construct"):
        permissions.add_permission_for_role("viewer", right, True)
    factory.set_permissions(permissions)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", default="0")
    parser.add_argument("--codec", choices=sorted(ENCODERS), default="h264")
    parser.add_argument("--sizes", nargs="+", default=["320x240"])
    parser.add_argument("--rate", type=int, default=30)
    parser.add_argument("--login", help="user:password")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; it reaches a stopped one too
    Gst.init(None)
    server, factory = GstRtspServer.RTSPServer(), GstRtspServer.RTSPMediaFactory()
    server.set_address("127.0.0.1")
    server.set_service(options.port)
    camera, encoder = Camera(options.sizes, options.rate), ENCODERS[options.codec]
    factory.set_launch(
        f"( appsrc name=camera is-live=true format=time do-timestamp=true ! {encoder} )"
    )
    factory.set_shared(True)
    factory.connect("media-configure", camera.configure)
    if options.login:
        require_login(server, factory, options.login)
    server.get_mount_points().add_factory("/camera", factory)
    if not server.attach(None):
        raise SystemExit(f"port {options.port} cannot be bound")
    GLib.unix_signal_add(GLib.PRIORITY_DEFAULT, signal.SIGUSR1, camera.change_size)
    print(f"ready {server.get_bound_port()}", flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
