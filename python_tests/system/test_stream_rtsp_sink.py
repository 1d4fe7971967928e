"""Overlays served over RTSP, seen by viewers of FFmpeg's and GStreamer's."""

import base64
import contextlib
import re
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from support.errors import refused
from support.gstreamer import WITHIN, OverlayServer, read, require_gstreamer, watch
from support.streams import wait_until
from zsseg_rt.errors import ArgumentError, BackendUnavailableError
from zsseg_rt.results.visualize import palette
from zsseg_rt.stream.gstreamer.rtsp_sink import Address, network_of
from zsseg_rt.stream.sinks import open_writers

av = pytest.importorskip("av")

RED = np.array([250, 0, 0])
BLEND = (RED + palette(("thing",))[0]) / 2
ABS = 8  # H.264 at low rates


@pytest.fixture(autouse=True)
def _has_gstreamer():
    require_gstreamer()


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
