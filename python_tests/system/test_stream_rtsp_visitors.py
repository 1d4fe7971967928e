"""Visitors of an RTSP sink that are many, silent, or send what no viewer sends."""

import base64
import contextlib
import socket
import time

import pytest

from support.gstreamer import WITHIN, OverlayServer, require_gstreamer, watch
from support.streams import wait_until
from zsseg_rt.stream.gstreamer.rtsp_sink import network_of

pytest.importorskip("av")

OPTIONS = b"OPTIONS rtsp://x/seg RTSP/1.0\r\nCSeq: 1\r\n"
LOCKED = "rtsp://me:secret-enough@127.0.0.1:0/seg"


@pytest.fixture(autouse=True)
def _has_gstreamer():
    require_gstreamer()


def connect(server, address="127.0.0.1"):
    return socket.create_connection(("127.0.0.1", server.port), WITHIN, (address, 0))


def is_served(server, address="127.0.0.1"):
    """Whether a new visitor gets an answer."""
    with contextlib.suppress(ConnectionError), connect(server, address) as client:
        client.sendall(OPTIONS + b"\r\n")
        return client.recv(15) == b"RTSP/1.0 200 OK"
    return False


def megabytes(server):
    with open(f"/proc/{server.child.pid}/status") as file:
        return int(next(line for line in file if line.startswith("VmRSS")).split()[1]) / 1024


def flood(server, head, part, most):
    """Send until the server has had enough, or everything is sent."""
    with contextlib.suppress(ConnectionError), connect(server) as client:
        client.sendall(head)
        for _ in range(most // len(part)):
            client.sendall(part)
        return True
    return False


def test_bodies_are_not_kept_before_the_login():
    head = b"DESCRIBE rtsp://x/seg RTSP/1.0\r\nCSeq: 1\r\nContent-Length: 200000000\r\n\r\n"
    with OverlayServer(LOCKED) as server:
        before = megabytes(server)
        for _ in range(3):
            assert not flood(server, head, bytes(1 << 16), 200_000_000)
        assert megabytes(server) - before < 30
        assert is_served(server)


@pytest.mark.parametrize("head", [OPTIONS, b"GET /seg HTTP/1.0\r\nx-sessioncookie: a\r\n"])
def test_heads_without_end_are_not_kept(head):
    with OverlayServer(LOCKED, "--until-setup", "1000") as server:
        before = megabytes(server)
        assert not flood(server, head, b"a:b\r\n" * 2000, 20_000_000)
        assert megabytes(server) - before < 30
        assert is_served(server)


def test_the_half_of_a_tunnel_that_sends_is_watched_too():
    cookie = b"x-sessioncookie: abc\r\nAccept: application/x-rtsp-tunnelled\r\n\r\n"
    with OverlayServer(LOCKED, "--until-setup", "1000") as server, connect(server) as getter:
        getter.sendall(b"GET /seg HTTP/1.0\r\n" + cookie)
        assert getter.recv(12) == b"HTTP/1.0 200"
        before = megabytes(server)
        begun = base64.b64encode(OPTIONS + b" " * (-len(OPTIONS) % 3))
        more = base64.b64encode(b"a:bc\r\n") * 2000
        assert not flood(server, b"POST /seg HTTP/1.0\r\n" + cookie + begun, more, 20_000_000)
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


@pytest.mark.parametrize("transport", ["tcp", "udp", "http"])
def test_the_silent_are_sent_away_and_viewers_stay(transport):
    with (
        OverlayServer("rtsp://@127.0.0.1:0/seg", "--until-setup", "1") as server,
        watch(server.url(), transport) as images,
        connect(server) as silent,
    ):
        end = time.monotonic() + 4
        while time.monotonic() < end:
            assert next(images).any()
        silent.settimeout(WITHIN)
        with pytest.raises(ConnectionResetError):
            silent.recv(1)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_what_counts_as_one_address(address, network):
    assert network_of(address) == network
