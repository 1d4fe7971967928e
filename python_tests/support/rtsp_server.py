"""A network camera: H.264 or H.265 over RTSP, from GStreamer's own server.

Run in a process of its own:

    python rtsp_server.py [--port 0] [--codec h264] [--sizes 320x240] [--rate 30]
                          [--login user:password]

It prints ``ready PORT`` and serves ``rtsp://127.0.0.1:PORT/camera`` until it is killed. Each of its
pictures shows, as black and white blocks, the milliseconds of CLOCK_MONOTONIC at which it was made;
see ``rtsp_camera.shown_time``. The first one's are printed too. SIGUSR1 goes on with the next of
the sizes. It dies with its parent.
"""

import argparse
import ctypes
import signal
import time

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtsp, GstRtspServer  # noqa: E402

COLUMNS, ROWS = 8, 6  # 40 bits of time, 8 bits of their sum
BLACK, WHITE = b"\x10", b"\xeb"
ENCODERS = {
    # With more threads, or slices, FFmpeg shows green pictures and does not call them corrupt.
    "h264": "x264enc tune=zerolatency speed-preset=ultrafast threads=1 key-int-max=15 bitrate=1000 "
    "! rtph264pay name=pay0 pt=96 config-interval=-1",
    "h265": "x265enc tune=zerolatency speed-preset=ultrafast key-int-max=15 bitrate=1000 "
    "option-string=pools=1:frame-threads=1:log-level=none "
    "! h265parse ! rtph265pay name=pay0 pt=96 config-interval=-1",
}
ROLE = "viewer"


def i420_image(milliseconds, width, height):
    stamp = milliseconds % 2**40
    bits = stamp << 8 | sum(stamp.to_bytes(5, "big")) % 256
    rows = []
    for row in range(ROWS):
        line = b"".join(
            (WHITE if bits >> (row * COLUMNS + column) & 1 else BLACK) * (width // COLUMNS)
            for column in range(COLUMNS)
        )
        rows.append(line * (height // ROWS))
    return b"".join(rows) + b"\x80" * (width * height // 2)


class Camera:
    def __init__(self, sizes, rate):
        self.sizes, self.rate = sizes, rate
        self.due = 0.0
        self.has_begun = False

    @property
    def caps(self):
        width, height = self.sizes[0]
        return Gst.Caps.from_string(
            f"video/x-raw,format=I420,width={width},height={height},framerate={self.rate}/1"
        )

    def change_size(self):
        self.sizes = [*self.sizes[1:], self.sizes[0]]
        return True

    def configure(self, _factory, media):
        source = media.get_element().get_child_by_name("camera")
        source.set_property("caps", self.caps)
        source.connect("need-data", self.give)

    def give(self, source, _length):
        now = time.monotonic()
        self.due = max(self.due + 1 / self.rate, now)
        time.sleep(self.due - now)
        caps, (width, height) = self.caps, self.sizes[0]
        if not source.get_property("caps").is_equal(caps):
            source.set_property("caps", caps)
        now_ms = time.monotonic_ns() // 1_000_000
        if not self.has_begun:
            print(f"first {now_ms}", flush=True)
        self.has_begun = True
        data = i420_image(now_ms, width, height)
        buffer = Gst.Buffer.new_allocate(None, len(data), None)  # wrapped bytes may be freed early
        buffer.fill(0, data)
        source.emit("push-buffer", buffer)


def factory_of(camera, codec):
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(
        f"( appsrc name=camera is-live=true format=time do-timestamp=true ! {ENCODERS[codec]} )"
    )
    factory.set_shared(True)
    factory.connect("media-configure", camera.configure)
    return factory


def require_login(server, factory, login):
    """Let in whoever knows the password; it never crosses the wire (digest)."""
    user, _, password = login.partition(":")
    token = GstRtspServer.RTSPToken()
    token.set_string("media.factory.role", ROLE)
    auth = GstRtspServer.RTSPAuth()
    auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
    auth.add_digest(user, password, token)
    server.set_auth(auth)
    permissions = GstRtspServer.RTSPPermissions()
    for right in ("media.factory.access", "media.factory.construct"):
        permissions.add_permission_for_role(ROLE, right, True)
    factory.set_permissions(permissions)


def size(text):
    width, height = (int(side) for side in text.split("x"))
    if width % COLUMNS or height % (2 * ROWS):
        raise ValueError(f"expected sides divisible by {COLUMNS} and {2 * ROWS}, got {text}")
    return width, height


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--codec", choices=sorted(ENCODERS), default="h264")
    parser.add_argument("--sizes", type=size, nargs="+", default=[(320, 240)])
    parser.add_argument("--rate", type=int, default=30)
    parser.add_argument("--login", help="user:password")
    options = parser.parse_args()

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; it reaches a stopped one too
    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(str(options.port))
    camera = Camera(options.sizes, options.rate)
    factory = factory_of(camera, options.codec)
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
