"""Clients that are slow, silent, greedy or many: the server goes on, and does not grow."""

import contextlib
import http.client
import socket
import threading
import time

import numpy as np

from support.live_server import PATIENCE, ask, demo_server, metric, viewer, wait_until
from support.throttle import SlowLink

LARGE = "test://?demo=scenes&size=720x720&rate=30"


@contextlib.contextmanager
def raw(server, request=b"", receive_buffer=None, address="127.0.0.1"):
    """A connection that sends a few bytes, and reads only what the test reads."""
    client = socket.socket()
    client.settimeout(PATIENCE)
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    with client:
        client.bind((address, 0))
        client.connect(("127.0.0.1", server.port))
        client.sendall(request)
        yield client


def read_all(client):
    """Everything until the server closes or cuts the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_on_a_slow_link_a_viewer_sees_what_is_new():
    """Its buffer holds six seconds; one message takes a quarter of a second."""
    with (
        demo_server(LARGE) as server,
        SlowLink(server.port, bytes_per_second=100_000, buffer_bytes=600_000) as link,
        viewer(server, link.port) as page,
    ):
        ages, end = [], time.monotonic() + 2.5
        while time.monotonic() < end:
            frame = page.frame()
            ages.append(time.monotonic() * 1000.0 - frame.header["captured_ms"])
            page.acknowledge(frame)
        assert len(ages) >= 3
        assert np.median(ages[len(ages) // 2 :]) < 3000.0


def test_constant_changes_of_classes_do_not_starve_viewers():
    """Each picture comes with its own classes, and most pictures come."""
    over, counts = threading.Event(), {"changes": 0, "frames": 0}
    with demo_server() as server, viewer(server) as page:

        def change():
            while not over.is_set():
                words = ["red ball", "blue sky"][: 1 + counts["changes"] % 2]
                counts["changes"] += (
                    ask(server, "PUT", "/v1/vocabulary", {"classes": words})[0] == 200
                )

        page.acknowledge(page.frame())
        threads = [threading.Thread(target=change) for _ in range(3)]
        for thread in threads:
            thread.start()
        before, end = metric(server, "zsseg_frames_labelled_total"), time.monotonic() + 2.0
        while time.monotonic() < end:
            frame = page.frame()
            assert frame.header["vocabulary_version"] == page.told("vocabulary")["version"]
            page.acknowledge(frame)
            counts["frames"] += 1
        labelled = metric(server, "zsseg_frames_labelled_total") - before
        over.set()
        for thread in threads:
            thread.join()
    assert counts["changes"] >= 5
    assert counts["frames"] >= 0.4 * labelled, counts


def test_a_connection_that_asks_for_nothing_is_closed_and_one_that_asks_again_is_kept():
    with demo_server(request_seconds=0.5) as server, contextlib.ExitStack() as stack:
        begun = (b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"GET / HT", b"\x16\x03\x01")
        silent = [stack.enter_context(raw(server, request)) for request in begun]
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        connection.connect()
        mine, end = connection.sock, time.monotonic() + 1.5
        while time.monotonic() < end:
            connection.request("GET", "/v1/settings")
            assert connection.getresponse().read() == b'{"unknown_below":0.0}'
            time.sleep(0.1)
        assert connection.sock is mine
        connection.close()
        for client in silent:
            answer = read_all(client)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400")


def test_whoever_takes_no_bytes_is_cut_off():
    """A player that hangs: what waits for it is given up."""
    asked = b"GET /stream.mjpg HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with (
        demo_server(LARGE, stuck_seconds=0.5) as server,
        raw(server, asked, receive_buffer=4096) as client,
    ):
        wait_until(lambda: metric(server, "zsseg_connections_dropped_total") == 1, "it is cut")
        wait_until(lambda: metric(server, "zsseg_motion_jpeg_clients") == 0, "it is forgotten")
        assert read_all(client).startswith(b"HTTP/1.1 200")


def test_a_viewer_that_reads_too_slowly_is_dropped():
    """Bytes go through all the time, so that the connection is not stuck; but no frame arrives."""
    with (
        demo_server(LARGE, ack_seconds=1.0) as server,
        SlowLink(server.port, bytes_per_second=2000, buffer_bytes=4096) as link,
        viewer(server, link.port),
    ):
        wait_until(lambda: metric(server, "zsseg_viewers_dropped_total") == 1, "it is dropped")
        wait_until(lambda: metric(server, "zsseg_viewers") == 0, "it is forgotten")


def test_of_a_burst_of_players_no_more_than_may_are_let_in():
    request = b"GET /stream.mjpg HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with demo_server(motion_jpegs=2) as server, contextlib.ExitStack() as stack:
        players = [stack.enter_context(raw(server)) for _ in range(20)]
        for player in players:
            player.sendall(request)
        codes = [player.recv(12)[-3:] for player in players]
    assert sorted(codes) == [b"200"] * 2 + [b"503"] * 18


def test_connections_beyond_the_limit_are_refused_in_words():
    with demo_server(connections=5) as server, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(raw(server)) for _ in range(5)]
        wait_until(lambda: refused(server), "it is full")
        with raw(server, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n") as client:
            answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"\r\nretry-after: 1\r\n" in answer
        assert b'"BusyError"' in answer
        for client in silent:
            client.close()
        wait_until(lambda: not refused(server), "there is room again")
        assert metric(server, "zsseg_connections_refused_total") >= 2


def test_slow_heads_do_not_keep_the_health_from_being_asked():
    """A liveness probe that fails would have a healthy server killed."""
    health = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with demo_server(connections=20) as server, contextlib.ExitStack() as stack:
        wait_until(lambda: ask(server, "GET", "/healthz")[0] == 200, "frames are labelled")
        for _ in range(200):
            stack.enter_context(raw(server, b"GET / HTTP/1.1\r\nX-Slow: "))
        assert refused(server)
        for _ in range(3):
            with raw(server, health) as client:
                assert read_all(client).startswith(b"HTTP/1.1 200"), "it is closed after one answer"
            for _ in range(30):
                stack.enter_context(raw(server, b"GET /healthz HTTP/1.1\r\nX-Slow: "))


def test_one_address_does_not_take_the_connections_of_others():
    with demo_server(connections_per_address=5) as server, contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(raw(server))
        wait_until(lambda: refused(server), "this address is full")
        assert not refused(server, "127.0.0.2")
    with (
        demo_server(connections_per_address=5, settings={"proxies": ("127.0.0.0/30",)}) as server,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(8):
            stack.enter_context(raw(server))
        assert not refused(server)


def refused(server, address="127.0.0.1"):
    asked = b"GET /v1/settings HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with raw(server, asked, address=address) as client:
        try:
            return client.recv(12) != b"HTTP/1.1 200"
        except ConnectionError:
            return True
