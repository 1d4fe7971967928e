"""GStreamer's pipelines, CSI and RTSP cameras that are lost, and overlays served over RTSP."""

import base64
import contextlib
import gc
import itertools
import logging
import os
import re
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from support import streams
from support.errors import refused
from support.gstreamer import (
    WITHIN,
    OverlayServer,
    read,
    reading,
    require_gstreamer,
    shown_time,
    watch,
)
from support.streams import ReaderNow, follow, label, level, numbered, wait_until, write_video
from support.throttle import SlowLink
from zsseg_rt.errors import ArgumentError, BackendUnavailableError
from zsseg_rt.results.visualize import palette
from zsseg_rt.stream.gstreamer.rtsp_sink import Address, network_of
from zsseg_rt.stream.runner import Stream
from zsseg_rt.stream.sinks import open_writers
from zsseg_rt.stream.uris import open_sources
from zsseg_rt.stream.watch import Patience

av = pytest.importorskip("av")

LIVE = "gst:videotestsrc is-live=true"
OTHER = "test://?size=64x48&rate=50"


@pytest.fixture(autouse=True)
def _has_gstreamer():
    require_gstreamer()


def ordered(values):
    """Whether none is missing, repeated or behind a greater one."""
    return None not in values and values == sorted(set(values))


@pytest.mark.parametrize(("order", "colour"), [("rgb", [255, 0, 0]), ("bgr", [0, 0, 255])])
def test_a_live_pipeline_gives_frames_in_the_order_asked_for(order, colour):
    begun = time.monotonic()
    run = read(f"{LIVE} pattern=red ! video/x-raw,width=322,height=241", 5, "--order", order)
    assert len(run.frames) == 5
    for frame in run.frames:
        assert (frame["shape"], frame["clock"]) == ([241, 322, 3], "pipeline")  # rows are padded
        assert frame["left"] == pytest.approx(colour, abs=2)
        assert frame["right"] == pytest.approx(colour, abs=2)
        assert begun < frame["captured_at"] <= frame["taken_at"]
        assert frame["writable"]
    assert ordered([p["captured_at"] for p in run.frames])
    assert ordered([p["pts"] for p in run.frames])
    assert run.frames[0]["pts"] == 0.0


def test_a_recording_gives_every_frame_and_ends(tmp_path):
    path = write_video(tmp_path / "clip.mp4", (numbered(number) for number in range(28)))
    run = read(f"gst-file:filesrc location={path} ! qtdemux ! h264parse ! avdec_h264", 100)
    levels = [p["left"][0] for p in run.frames]
    assert levels == pytest.approx([level(number) for number in range(28)], abs=3)
    assert [p["pts"] for p in run.frames] == pytest.approx([n / 10 for n in range(28)], abs=1e-3)
    assert {p["clock"] for p in run.frames} == {"file"}
    assert run.end["ended"]


FAILURES = {
    "gst:nosuch ! fakesink": ("BackendUnavailableError", "elements nosuch, found none"),
    "gst:videotestsrc ! nvvidconv": ("BackendUnavailableError", "nvidia-l4t-gstreamer"),
    "csi://0": ("BackendUnavailableError", "nvarguscamerasrc, nvvidconv: sudo apt install"),
    "gst:videotestsrc ! ! appsink": ("SourceError", "syntax error"),
    "gst:videotestsrc bogus=1 user-pw=hush": ("SourceError", 'no property "bogus"'),
    "gst:videotestsrc ! audioconvert": ("SourceError", "could not link"),
    "gst:videotestsrc ! video/x-raw,format=I420 ! appsink": ("SourceError", "in videoconvert"),
    "gst:v4l2src device=/dev/video99": ("SourceError", "No such file"),
    f"{LIVE} num-buffers=1": ("SourceError", "write gst-file: for gst:"),
    "gst-file:filesrc location=/etc/hostname ! decodebin": ("SourceError", "cannot be read"),
    "gst:rtspsrc location=rtsp://u:hush@127.0.0.1:1/ user-pw=hush ! decodebin": (
        "SourceError", "rtsp://127.0.0.1"
    ),
    "rtsp://user:hush@127.0.0.1:1/x": ("SourceError", "Connection refused. Check address and port"),
    "rtsp://user:hush@no.invalid/x": ("SourceError", "Check address and port"),
}  # fmt: skip


def test_what_fails_is_told_with_its_remedy():
    run = read(list(FAILURES), 9)
    assert "hush" not in run.log + str(run.ends)
    for end, (error, reason) in zip(run.ends, FAILURES.values(), strict=True):
        assert (end["error"], reason in end["message"]) == (error, True), end


def test_a_csi_camera_s_own_pipeline_runs():
    uris = ["csi://0?size=320x240&rate=29.97", "csi://0?size=320x240&flip=2", "csi://1"]
    run = read(uris, 3, "--jetson", "nvarguscamerasrc", "nvvidconv")
    assert [end["name"] for end in run.ends] == uris
    assert {p["clock"] for p in run.frames} == {"pipeline"}
    assert [p["shape"] for p in run.frames] == [[240, 320, 3]] * 6
    for frame in run.frames[:3]:
        assert frame["left"] == pytest.approx([255, 0, 0], abs=6)
        assert frame["right"] == pytest.approx([0, 0, 255], abs=6)
    for turned in run.frames[3:]:
        assert turned["left"] == pytest.approx([0, 0, 255], abs=6)
    assert run.end["error"] == "SourceError"
    assert "No cameras available" in run.end["message"]
    assert "nvargus-daemon" in run.end["message"]


def test_frames_that_the_appsink_drops_are_counted():
    run = read(f"{LIVE} ! video/x-raw,framerate=50/1", 8, "--slow", "0.15")
    numbers = [round(p["pts"] * 50) for p in run.frames]
    gaps = [newer - older - 1 for older, newer in itertools.pairwise(numbers)]
    assert sum(gaps) > 10
    # The count comes with the next frame taken, after those that waited in the appsink's queue.
    assert sum(gaps) <= sum(p["dropped"] for p in run.frames) <= sum(gaps) + 50
    pipeline = "gst-file:videotestsrc num-buffers=20 ! videoconvert ! appsink"
    file = read(pipeline, 40, "--slow", "0.02")
    assert {p["dropped"] for p in file.frames} == {0}
    assert len(file.frames) == 20


@pytest.fixture(params=["gstreamer", "pyav"])
def library(request):
    return {"ZSSEG_RTSP_LIBRARY": request.param}


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_every_picture_is_one_that_the_camera_made(rtsp_cameras, codec, library):
    started = time.monotonic()
    frames = read(rtsp_cameras(codec=codec).url, 20, **library).frames
    times = [frame["shown"] for frame in frames]
    assert len(times) == 20
    assert ordered(times)
    assert started < times[0]
    for frame in frames:
        assert frame["shown"] < frame["captured_at"] < frame["taken_at"]
        assert (frame["shape"], frame["clock"]) == ([240, 320, 3], "arrival")
    assert min(frame["captured_at"] - frame["shown"] for frame in frames) < 5.0
    stamps = [p["pts"] for p in frames[1:]]  # the first one's comes with the sender's report
    assert stamps == sorted(set(stamps))


def test_the_first_picture_is_the_first_that_the_camera_made(rtsp_cameras):
    camera = rtsp_cameras(rate=5)  # whoever waits for the next key frame waits for three seconds
    pictures = open_sources(camera.url)[0].pictures(ReaderNow())
    assert shown_time(next(pictures).image) == camera.first_time()
    pictures.close()


def test_a_camera_may_change_its_size_and_its_loss_is_an_error(rtsp_cameras, library):
    camera = rtsp_cameras(sizes=("320x240", "480x384"))
    with reading(camera.url, **library) as lines:
        shown = [next(lines) for _ in range(5)]
        camera.send(signal.SIGUSR1)
        shown.append(next(line for line in lines if line.get("shape") != [240, 320, 3]))
        shown += [next(lines) for _ in range(5)]
        camera.kill()
        end = next(line for line in lines if "shape" not in line)
    assert [line["shape"] for line in shown] == [[240, 320, 3]] * 5 + [[384, 480, 3]] * 6
    assert ordered([line["shown"] for line in shown])
    assert end["error"] == "SourceError"


def test_a_login_is_needed_and_never_shown(rtsp_cameras, library):
    camera = rtsp_cameras(login="us er:p@s#s/w")
    good = camera.url.replace("//", "//us%20er:p%40s%23s%2Fw@")
    cases = {
        camera.url: r"401 Unauthorized.*\. It asks for a login",
        camera.url.replace("//", "//us%20er:hush@"): r"401 Un.*\. Check user and password",
        camera.url.replace("//", "//nobody:hush@"): r"401 Un.*\. Check user and password",
        good.replace("camera", "none"): r"404 Not Found\. Check the path",
    }
    run = read([good, *cases], 3, **library)
    assert len(run.frames) == 3
    for end, reason in zip(run.ends[1:], cases.values(), strict=True):
        assert end["error"] == "SourceError"
        assert re.search(reason, end["message"]), end
    assert not re.search("hush|p%40s|p@s", run.log + str(run.ends))


def test_a_camera_that_freezes_comes_back_and_others_go_on_meanwhile(rtsp_cameras, caplog):
    caplog.set_level(logging.INFO)
    camera = rtsp_cameras(login="user:secret")
    lose, cure = partial(camera.send, signal.SIGSTOP), partial(camera.send, signal.SIGCONT)
    uris = [camera.url.replace("//", "//user:secret@"), OTHER]
    frames, *stats = streams.lose_and_find(uris, lose, cure, stalled_after=0.7, lost_after=2.0)
    assert "secret" not in f"{stats} {caplog.text} {frames}"
    assert "none came for" in stats[0].error
    states = streams.events(caplog.messages, camera.url)
    assert states == ["running", "stalled", "lost", "running again"]
    assert ordered([shown_time(frame.image) for frame in frames])


def test_threads_and_descriptors_stay_as_many_over_reconnections(rtsp_cameras):
    def use():
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    camera, patience = rtsp_cameras(), Patience(first_retry=0.1, longest_retry=0.4)
    gc.collect()
    gc.disable()  # nothing may wait for it: it may come after hours
    try:
        with Stream(open_sources([camera.url, OTHER]), label, patience=patience) as stream:
            follow(stream, lambda: stream.stats()[OTHER].labelled > 0)
            for count in range(4):
                follow(stream, lambda: stream.stats()[camera.url].state == "running")
                if count == 1:
                    threads, descriptors = use()
                camera.kill()
                follow(stream, lambda: stream.stats()[camera.url].state == "lost")
                camera.start()
            follow(stream, lambda: stream.stats()[camera.url].reconnects == 4)
            # An old thread may be about to end.
            follow(stream, lambda: use()[0] <= threads and use()[1] <= descriptors)
    finally:
        gc.enable()


def test_what_waits_on_a_slow_link_counts_as_age(rtsp_cameras, library):
    camera = rtsp_cameras()
    with SlowLink(camera.port, bytes_per_second=4000, buffer_bytes=1 << 24) as link:
        run = read(camera.url.replace(str(camera.port), str(link.port)), 40, **library)
    last = run.frames[-1]
    assert last["late"] > 0.5
    assert last["captured_at"] - last["shown"] < last["taken_at"] - last["shown"] - 0.5
    assert "CRITICAL" not in run.log


def test_frames_that_are_too_large_never_reach_the_decoder(rtsp_cameras):
    end = read(rtsp_cameras().url, 1, "--most-pixels", "76799").end
    assert end["error"] == "SourceError"
    assert "expected frames of at most 76799 pixels, got 320x240 = 76800" in end["message"]
    camera = rtsp_cameras(sizes=("320x240", "480x360"))
    with reading(camera.url, "--most-pixels", "76800") as lines:
        assert next(lines)["shape"] == [240, 320, 3]
        camera.send(signal.SIGUSR1)
        end = next(line for line in lines if line.get("shape") != [240, 320, 3])
    assert "got 480x360" in end["message"]


RED = np.array([250, 0, 0])
BLEND = (RED + palette(("thing",))[0]) / 2
ABS = 8  # H.264 at low rates


@pytest.fixture
def serve():
    with contextlib.ExitStack() as running:
        yield lambda *arguments: running.enter_context(OverlayServer(*arguments))


def is_overlay(image):
    half = image.shape[1] // 2
    left, right = image[:, : half - 8].mean(axis=(0, 1)), image[:, half + 8 :].mean(axis=(0, 1))
    return np.allclose(left, RED, atol=ABS) and np.allclose(right, BLEND, atol=ABS)


def test_nothing_is_painted_without_viewers_and_one_encoder_serves_all(serve):
    server = serve("rtsp://@127.0.0.1:0/seg", "--order", "bgr")
    assert server.begun["name"] == f"rtsp://@127.0.0.1:{server.port}/seg"
    facts = server.wait_until(lambda facts: facts["written"] >= 10)
    assert facts["paint"] == facts["configure"] == 0
    with watch(server.url()) as first, watch(server.url()) as second:
        next(first)
        next(second)
        begun = server.facts()
        assert begun["configure"] == 1
        later = server.wait_until(lambda facts: facts["paint"] >= begun["paint"] + 10)
        assert later["paint"] - begun["paint"] <= later["written"] - begun["written"] + 1
        next(first)
    later = server.facts()
    idle_at = later["written"] - later["paint"] + 5
    server.wait_until(lambda facts: facts["written"] - facts["paint"] >= idle_at)
    with watch(server.url()) as third:
        assert is_overlay(next(third))
    assert server.facts()["configure"] == 2


def test_a_new_size_goes_on_with_even_sides(serve):
    server = serve()
    with watch(server.url()) as images:
        assert next(images).shape == (240, 320, 3)
        server.tell("size 95x161")
        changed = next(image for image in images if image.shape != (240, 320, 3))
        assert changed.shape == (96, 162, 3)
        assert is_overlay(next(images))
    run = read(server.url(), 1)
    assert run.frames[0]["shape"] == [96, 162, 3]
    assert run.frames[0]["left"] == pytest.approx(RED, abs=ABS)


def test_paths_follow_the_list_and_carry_names(serve):
    server = serve("rtsp://@127.0.0.1:0/seg", "--sources", "late", "first", "=Yard")
    server.tell("source Yard")
    begun = server.facts()["written"]
    server.wait_until(lambda facts: facts["written"] >= begun + 2)
    with watch(server.url("seg-2")) as first, watch(server.url("seg-Yard")) as named:
        assert is_overlay(next(first))
        assert is_overlay(next(named))


def test_viewers_that_stop_reading_do_not_slow_the_others(serve):
    server = serve("rtsp://@127.0.0.1:0/seg", "--noise", "--bits-per-pixel", "6", "--rate", "90")
    with watch(server.url()), watch(server.url()) as images:
        for _ in range(120):  # some 7 MB: more than the sockets' buffers hold
            next(images)
    assert server.facts()["configure"] == 1


def test_a_login_is_asked_for_and_never_shown(serve):
    server = serve("rtsp://us er:p%40ss@127.0.0.1:0/seg")
    assert server.begun["name"] == f"rtsp://***@127.0.0.1:{server.port}/seg"
    for login in ("", "us%20er:hush@"):
        with pytest.raises(av.HTTPUnauthorizedError), watch(server.url("seg", login)):
            pass
    with watch(server.url("seg", "us%20er:p%40ss@")) as images:
        assert is_overlay(next(images))
    log = server.close()
    assert "p%40ss" not in log
    assert "p@ss" not in log


def test_closing_parts_with_viewers_and_frees_the_port(serve):
    server = serve()
    with watch(server.url()) as images:
        next(images)
        log = server.close()
        with contextlib.suppress(av.FFmpegError):  # or it ends without one
            for _ in images:
                pass
    again = serve(f"rtsp://@:{server.port}/seg")
    assert again.port == server.port
    assert "this port can watch" in again.close()  # an open door is told
    assert "this port can watch" not in log


def test_a_port_that_is_taken_is_told_with_its_remedy(serve):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = serve(f"rtsp://u:hush@127.0.0.1:{taken.getsockname()[1]}/seg")
    assert server.begun["error"] == "SourceError"
    assert "already in use. Choose another port" in server.begun["message"]
    assert "hush" not in server.begun["message"]


JETSON = "--jetson nvvidconv nvv4l2h264enc --nvenc"
NVENC = "stand-in for nvh264enc"


@pytest.mark.parametrize(
    ("options", "fails", "says"),
    [
        (f"{JETSON} /dev/null", "", []),
        (f"{JETSON} /dev/absent", "", ["no encoder"]),
        (f"{JETSON} /dev/null", "error-after=1", ["cannot be used"]),
        (f"{JETSON} /dev/null", "drop-probability=1", ["cannot be used"]),
        ("--jetson nvh264enc", "", [NVENC, NVENC]),  # a trial, and what is watched
        ("--jetson nvh264enc --size 96x128", "", []),  # too small for it
    ],
)
def test_nvidia_s_encoders_are_used_where_they_work(serve, monkeypatch, options, fails, says):
    monkeypatch.setenv("NVENC_FAILS", fails)
    server = serve("rtsp://@127.0.0.1:0/seg", *options.split())
    with watch(server.url()) as viewer:
        assert all(is_overlay(next(viewer)) for _ in range(3))
    assert re.findall(f"cannot be used|no encoder|{NVENC}", server.close()) == says


@pytest.mark.parametrize(
    ("text", "host", "port", "login", "is_open"),
    [
        ("rtsp://@:8554/seg", "0.0.0.0", 8554, None, True),
        ("rtsp://@/seg", "0.0.0.0", 8554, None, True),
        ("rtsp://@127.0.0.1:1/a/b", "127.0.0.1", 1, None, False),
        ("rtsp://@[::1]:0/seg", "::1", 0, None, False),
        ("rtsp://me:a%40b:c@cam.lan:9/seg", "cam.lan", 9, ("me", "a@b:c"), False),
    ],
)
def test_addresses(text, host, port, login, is_open):
    address = Address.parse(text)
    assert (address.host, address.port, address.login) == (host, port, login)
    assert address.is_open == is_open
    assert "a@b" not in repr(address) + address.shown()


@pytest.mark.parametrize(
    "text",
    ["rtsp://cam/seg", "rtsp://@:8554", "rtsp://@:8554/", "rtsp://@:99999/a", "rtsp://@:x/a",
     "rtsp://hush@:1/a", "rtsp://:hush@:1/a", "rtsp://u:@:1/a", "rtsp://@:1/a b", "rtsp://@:1/a?b",
     'rtsp://@:1/a" ! x', "rtsp://@:1//a"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text):
    with refused(ArgumentError, "sink", "rtsp://@:PORT/NAME") as raised:
        open_writers([text], channel_order="rgb", alpha=0.5)
    assert "hush" not in str(raised.value)


def test_without_gstreamer_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "gi", None)
    with refused(BackendUnavailableError, "gi"):
        open_writers(["rtsp://@127.0.0.1:0/seg"], channel_order="rgb", alpha=0.5)


OPTIONS = b"OPTIONS rtsp://x/seg RTSP/1.0\r\nCSeq: 1\r\n"
LOCKED = "rtsp://me:secret-enough@127.0.0.1:0/seg"


def connect(server, address="127.0.0.1"):
    return socket.create_connection(("127.0.0.1", server.port), WITHIN, (address, 0))


def is_served(server, address="127.0.0.1"):
    with contextlib.suppress(ConnectionError), connect(server, address) as client:
        client.sendall(OPTIONS + b"\r\n")
        return client.recv(15) == b"RTSP/1.0 200 OK"
    return False


def megabytes(server):
    status = Path(f"/proc/{server.child.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


COOKIE = b"x-sessioncookie: abc\r\nAccept: application/x-rtsp-tunnelled\r\n\r\n"
HEAD = b"a:b\r\n" * 2000
FLOODS = {
    "body": (b"DESCRIBE rtsp://x/seg RTSP/1.0\r\nCSeq: 1\r\nContent-Length: 200000000\r\n\r\n",
             bytes(1 << 16)),
    "head": (OPTIONS, HEAD),
    "head of a tunnel": (b"GET /seg HTTP/1.0\r\nx-sessioncookie: a\r\n", HEAD),
    "half of a tunnel": (b"POST /seg HTTP/1.0\r\n" + COOKIE + base64.b64encode(OPTIONS + b"  "),
                         base64.b64encode(b"a:bc\r\n") * 2000),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLOODS)
def test_what_comes_without_end_is_not_kept_before_the_login(kind):
    head, part = FLOODS[kind]
    with OverlayServer(LOCKED, "--until-setup", "1000") as server, connect(server) as getter:
        getter.sendall(b"GET /seg HTTP/1.0\r\n" + COOKIE)
        assert getter.recv(12) == b"HTTP/1.0 200"
        before = megabytes(server)
        with connect(server) as client, pytest.raises(ConnectionError):  # it has had enough
            client.sendall(head + part * (60_000_000 // len(part)))
        assert megabytes(server) - before < 30
        assert is_served(server)


def test_one_address_takes_half_of_the_connections_at_most():
    with OverlayServer(LOCKED) as server, contextlib.ExitStack() as stack:

        def is_full(address, other):
            with contextlib.suppress(ConnectionError):
                stack.enter_context(connect(server, address))
            return not is_served(server, other)

        wait_until(lambda: is_full("127.0.0.1", "127.0.0.1"))
        assert is_served(server, "127.0.0.2")
        wait_until(lambda: is_full("127.0.0.2", "127.0.0.3"))
        stack.close()
        wait_until(lambda: is_served(server) and is_served(server, "127.0.0.3"))


def test_the_silent_are_sent_away_and_viewers_stay():
    with (
        OverlayServer("rtsp://@127.0.0.1:0/seg", "--until-setup", "1") as server,
        watch(server.url(), "tcp") as tcp,
        watch(server.url(), "udp") as udp,
        watch(server.url(), "http") as tunnel,
        connect(server) as silent,
    ):
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            assert all(next(images).any() for images in (tcp, udp, tunnel))
        silent.settimeout(WITHIN)
        with pytest.raises(ConnectionResetError):
            silent.recv(1)


@pytest.mark.parametrize(
    ("address", "network"),
    [("10.0.0.7", "10.0.0.7"), ("::ffff:10.0.0.7", "10.0.0.7"), ("fe80::1%eth0", "fe80::/64"),
     ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), ("", "")],
)  # fmt: skip
def test_what_counts_as_one_address(address, network):
    assert network_of(address) == network
