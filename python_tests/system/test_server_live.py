"""Frames at viewers and how viewers are let go; clients that are slow, silent, greedy or many."""

import contextlib
import http.client
import itertools
import json
import os
import re
import socket
import threading
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from support.live_server import (
    PATIENCE,
    SOURCE,
    WORDS,
    ask,
    demo_server,
    metric,
    read_frame,
    request,
    viewer,
    wait_until,
)
from support.recordings import result
from support.streams import MjpegServer, ReaderNow, numbered, write_video
from support.throttle import SlowLink
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.demo import demo_bundle, demo_photos
from zsseg_rt.photos import read_photo
from zsseg_rt.server.hub import encode_message
from zsseg_rt.server.labeller import Labeller
from zsseg_rt.stream.runner import StreamParts

TOKEN = "0123456789abcdefghij"


@pytest.fixture(scope="module")
def server():
    with demo_server() as running:
        yield running


def closed_with(page):
    last = time.monotonic() + PATIENCE
    while time.monotonic() < last:
        try:
            page.receive()
        except ConnectionClosed as closed:
            return closed.rcvd.code
    raise AssertionError("waited in vain until the server closes")


def states(page, last):
    while page.text("state")["sources"][-1]["state"] != last:
        pass


def test_a_photo_is_shown_and_labelled_anew_after_its_end_until_the_server_stops():
    """Image and labels are as the engine had them, the labels at half the size."""
    photo = read_photo(demo_photos("scenes")[0])
    with Engine(demo_bundle("scenes"), EngineConfig(device="cpu")) as engine:
        engine.set_classes(WORDS)
        expected = engine.segment(photo)
    with (
        demo_server(demo_photos("scenes")[0], settings={"stale_seconds": 0.2}) as server,
        viewer(server) as page,
    ):
        frame = page.frame()
        image = cv2.imdecode(np.frombuffer(frame.image, np.uint8), 1).astype(int)
        error = np.abs(image[..., ::-1] - photo).mean()  # JPEG at quality 80 keeps no noise
        assert error < min(10.0, np.abs(image - photo).mean() / 2)
        np.testing.assert_array_equal(frame.labels, expected.labels[::2, ::2])
        shares = [[one.index, pytest.approx(one.share, abs=1e-6)] for one in expected.present()]
        assert frame.header["shares"] == shares
        page.acknowledge(frame)
        states(page, "ended")
        wait_until(lambda: ask(server, "GET", "/healthz")[0] == 503, "it is not healthy")
        health = ask(server, "GET", "/healthz")[1]
        assert health["status"] == "failing"
        assert health["reason"].startswith("no frame was labelled for ")
        with viewer(server) as late:
            late.frame()  # the last one is still shown
        labelled = metric(server, "zsseg_frames_labelled_total")
        answer = ask(server, "PUT", "/v1/vocabulary", {"classes": ["yellow box"]})[1]
        version = "vocabulary_version"
        page.acknowledge(page.frame(lambda one: one.header[version] == answer["version"]))
        ask(server, "PUT", "/v1/settings", {"unknown_below": 1.0})
        page.frame(lambda one: one.header["unknown_share"] == 1.0)
        assert metric(server, "zsseg_frames_labelled_total") == labelled
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 20.0
        assert closed_with(page) == 1001


def test_a_threshold_set_while_the_last_frame_is_labelled_holds_for_it(monkeypatch):
    segment = Labeller.segment_frame

    def segment_slowly(labeller, image, **options):
        seg = segment(labeller, image, **options)
        labeller.set_unknown_below(1.0)
        return seg

    monkeypatch.setattr(Labeller, "segment_frame", segment_slowly)
    with demo_server(demo_photos("scenes")[0]) as server, viewer(server) as page:
        page.frame(lambda one: one.header["unknown_share"] == 1.0)


def test_a_frame_of_any_size_can_be_sent():
    for dtype, size_hw, sent_hw, labels_hw in (
        (np.uint8, (1, 1), (1, 1), (1, 1)),
        (np.uint16, (3, 5), (3, 5), (2, 3)),
        (np.uint8, (1440, 2560), (720, 1280), (360, 640)),
        (np.uint16, (2000, 3), (1280, 2), (640, 1)),
    ):
        labels = np.full(size_hw, np.iinfo(dtype).max, dtype)
        labels[: size_hw[0] // 2] = 1
        seg = replace(result(size_hw=size_hw), labels=labels)
        shown = read_frame(encode_message(7, seg, "rgb").pack(1.5))
        assert cv2.imdecode(np.frombuffer(shown.image, np.uint8), 1).shape[:2] == sent_hw
        assert (shown.header["height"], shown.header["width"]) == sent_hw
        assert (shown.labels.shape, shown.labels.dtype) == (labels_hw, dtype)
        assert shown.labels[-1, -1] == seg.unknown
        unknown = np.mean(labels == seg.unknown)
        assert shown.header["unknown_share"] == pytest.approx(unknown, abs=1e-6)


def test_no_second_frame_is_sent_before_the_first_is_acknowledged(server):
    with viewer(server) as page:
        first = page.frame()
        labelled = metric(server, "zsseg_frames_labelled_total")
        wait_until(lambda: metric(server, "zsseg_frames_labelled_total") > labelled + 10, "10 more")
        for wrong in (0, first.header["id"] + 1, "1", None):
            page.say("ack", id=wrong)
        page.say("ping", t=2.5)
        log = [page.receive()]
        while log[-1] != {"type": "pong", "t": 2.5, "server_ms": log[-1].get("server_ms")}:
            log.append(page.receive())
            assert isinstance(log[-1], dict)
        page.acknowledge(first)
        second = page.frame()
        # The newest one, not the one after: about ten were labelled meanwhile.
        assert second.header["id"] > first.header["id"] + 5
        assert second.header["index"] > first.header["index"] + 5


def test_viewers_that_go_beyond_a_limit_are_sent_away():
    with demo_server(ack_seconds=2.0, viewers=2, message_bytes=1000) as server:
        with viewer(server) as silent, viewer(server) as talker:
            silent.frame()
            talker.frame()
            with viewer(server) as third:
                assert closed_with(third) == 4429
            talker.socket.send("x" * 1001)
            assert closed_with(talker) == 1009
            wait_until(lambda: metric(server, "zsseg_viewers") == 1, "one has gone")
            with viewer(server) as fourth:
                fourth.frame()
            assert closed_with(silent) == 1008
        assert metric(server, "zsseg_viewers_dropped_total") == 1
        wait_until(lambda: metric(server, "zsseg_viewers") == 0, "they are forgotten")


def test_what_a_viewer_should_not_say_gets_an_error_and_no_harm(server):
    with viewer(server) as page:
        for message in (
            "", "{", "[]", "null", "1", '{"type": "drop"}', "{}", '{"type": ["ack"]}', "[" * 4000,
            '{"type": "watch", "source": "rtsp://other"}', '{"type": "watch", "source": 1}',
            b"\x00\xff",
        ):  # fmt: skip
            page.socket.send(message)
            assert "expected" in page.text("error")["message"], message
        page.acknowledge(page.frame())
        page.frame()


def test_new_words_are_seen(server):
    with viewer(server) as page:
        page.acknowledge(page.frame())
        new = {"classes": ["yellow box"], "background": ["grass"]}
        answer = ask(server, "PUT", "/v1/vocabulary", new)[1]
        vocabulary = page.text("vocabulary")
        assert vocabulary == {"type": "vocabulary", **answer}
        frame = page.frame()  # none of the classes before comes after the new ones were told
        assert frame.header["vocabulary_version"] == answer["version"]
        assert set(np.unique(frame.labels)) <= {0, 255}
        page.acknowledge(frame)
        assert ask(server, "PUT", "/v1/settings", {"unknown_below": 1.0})[0] == 200
        assert page.text("vocabulary")["unknown_below"] == 1.0
        page.frame(lambda frame: frame.header["unknown_share"] == 1.0)
    ask(server, "PUT", "/v1/settings", {"unknown_below": 0.0})
    ask(server, "PUT", "/v1/vocabulary", {"classes": WORDS})


def test_one_source_of_several_can_be_watched():
    sources = [f"{SOURCE}&seed={seed}" for seed in (1, 2)]
    with demo_server(sources) as server, viewer(server) as page:
        for name in (*sources, sources[0]):
            page.acknowledge(page.frame(lambda one, name=name: one.header["source"] == name))
        page.say("watch", source=sources[1])
        page.say("ping", t=1)
        page.text("pong")
        page.acknowledge(page.frame())
        for _ in range(3):
            frame = page.frame()
            page.acknowledge(frame)
            assert frame.header["source"] == sources[1]
        page.say("watch", source=None)
        page.frame(lambda frame: frame.header["source"] == sources[0])


def test_each_frame_is_encoded_once_for_all_and_only_if_somebody_watches(monkeypatch):
    from zsseg_rt.server import hub

    encoded = []
    encode = hub.encode_message

    def count(number, *rest):
        encoded.append(number)
        return encode(number, *rest)

    monkeypatch.setattr(hub, "encode_message", count)
    with demo_server() as server, contextlib.ExitStack() as stack:
        wait_until(lambda: metric(server, "zsseg_frames_labelled_total") > 5, "frames")
        assert encoded == []
        pages = [stack.enter_context(viewer(server)) for _ in range(3)]
        for _ in range(5):
            for page in pages:
                page.acknowledge(page.frame())
        assert len(encoded) == len(set(encoded)) > 0


def test_motion_jpeg_shows_the_newest_overlay(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request("GET", f"/stream.mjpg?source={SOURCE.replace('&', '%26')}")
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "multipart/x-mixed-replace; boundary=frame"
    for _ in range(3):
        assert answer.readline() == b"--frame\r\n"
        assert answer.readline() == b"Content-Type: image/jpeg\r\n"
        length = int(answer.readline().removeprefix(b"Content-Length: "))
        assert re.fullmatch(rb"X-Vocabulary-Version: [1-9]\d*\r\n", answer.readline())
        assert answer.readline() == b"\r\n"
        image = cv2.imdecode(np.frombuffer(answer.read(length), np.uint8), cv2.IMREAD_COLOR)
        assert image.shape == (120, 160, 3)
        assert answer.readline() == b"\r\n"
    connection.close()
    wait_until(lambda: metric(server, "zsseg_motion_jpeg_clients") == 0, "it is forgotten")
    assert ask(server, "GET", "/stream.mjpg?source=rtsp://other")[0] == 422


def test_without_the_token_nothing_but_page_and_health_is_told(server):
    with demo_server(settings={"token": TOKEN}) as locked:
        wait_until(lambda: ask(locked, "GET", "/healthz")[0] == 200, "frames")
        assert request(locked, "GET", "/")[0] == 200
        for method, path in (
            *(("GET", path) for path in ("/metrics", "/v1/vocabulary", "/stream.mjpg", "/x")),
            *(("GET", path) for path in ("/openapi.json", f"/v1/settings?token={TOKEN}")),
            *(("PUT", f"/v1/{path}") for path in ("vocabulary", "settings")),
            ("POST", "/v1/segment"),
        ):
            status, headers, body = request(locked, method, path, {"classes": ["ball"]})
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer"), path
            assert json.loads(body)["error"] == "TokenError"
        shown = {"Authorization": f"Bearer {TOKEN}"}
        assert ask(locked, "PUT", "/v1/settings", {"unknown_below": 0.0}, **shown)[0] == 200
        with viewer(locked, protocols=["zsseg.v1", f"token.{TOKEN}"]) as page:
            assert page.socket.subprotocol == "zsseg.v1"  # and not the token
            page.frame()
        for protocols in (["zsseg.v1"], ["zsseg.v1", f"token.{TOKEN}x"]):
            with viewer(locked, protocols=protocols) as page:
                assert closed_with(page) == 4401
    with viewer(server, origin=f"http://127.0.0.1:{server.port}") as page:
        page.frame()
    with viewer(server, origin="http://evil.example") as page:
        assert closed_with(page) == 4403
    headers = {"Host": "evil.example"}
    with contextlib.suppress(InvalidStatus), viewer(server, additional_headers=headers) as page:
        assert closed_with(page) in (4403, 1002)


def test_still_pictures_get_the_last_labels_again(monkeypatch):
    grey = np.full((48, 64, 3), 90, np.uint8)
    monkeypatch.setattr("support.streams.numbered", lambda number: grey)
    with MjpegServer() as camera:

        def is_reused(frame):
            camera.images.release(5)
            return frame.header["reused"]

        camera.images.release(30)  # FFmpeg looks at some before it gives the first
        options = {"steady": True, "skip_still": True}
        with demo_server(camera.url, stream=options) as server, viewer(server) as page:
            assert page.frame(is_reused).labels.shape == (24, 32)


def test_a_video_begins_again_and_its_time_goes_on(tmp_path):
    path = write_video(tmp_path / "v.mp4", [numbered(n) for n in range(4)], rate=20)
    with demo_server(path, settings={"loop": True}) as server, viewer(server) as page:
        captured = "zsseg_frames_captured_total"
        wait_until(lambda: metric(server, captured) > 12, "the fourth round")
        assert ask(server, "GET", "/healthz")[1]["sources"][0]["state"] == "running"
        page.frame()
    (looped,) = StreamParts.open(path, "rgb", loop=True).sources
    stamps = [one.pts_seconds for one in itertools.islice(looped.pictures(ReaderNow()), 10)]
    assert stamps == pytest.approx([n / 20 for n in range(10)])
    for still in (demo_photos("scenes")[0], write_video(tmp_path / "one.mp4", [numbered(0)])):
        (once,) = StreamParts.open(still, "rgb", loop=True).sources
        assert len(list(once.pictures(ReaderNow()))) == 1


def test_a_camera_that_stalls_and_is_lost_is_told_of_until_it_is_back():
    pytest.importorskip("av")
    shown = {"Authorization": f"Bearer {TOKEN}"}
    with (
        MjpegServer() as camera,
        demo_server(
            [SOURCE, camera.url], settings={"stale_seconds": 1.0, "token": TOKEN}
        ) as server,
        viewer(server, protocols=["zsseg.v1", f"token.{TOKEN}"]) as page,
    ):
        assert ask(server, "GET", "/healthz?strict=1")[0] == 503  # no frame yet
        camera.images.release(12)  # FFmpeg looks at a few before it gives the first
        wait_until(lambda: ask(server, "GET", "/healthz?strict=1")[0] == 200, "both run")
        wait_until(lambda: ask(server, "GET", "/healthz?strict=1")[0] == 503, "one stalls")
        states(page, "stalled")
        camera.images.release(3)
        states(page, "running")
        camera.stop()
        states(page, "lost")
        wait_until(lambda: ask(server, "GET", "/healthz?strict=1")[0] == 503, "one is dead")
        status, health = ask(server, "GET", "/healthz")
        assert (status, health["status"]) == (200, "degraded")
        assert health["reason"] == "1 of 2 sources give no frames"
        assert [(one["source"], one["dead"]) for one in health["sources"]] == [
            (1, False), (2, True),
        ]  # fmt: skip
        health = ask(server, "GET", "/healthz", **shown)[1]
        assert health["sources"][0]["source"] == SOURCE
        assert "secret" not in json.dumps([health, page.texts])
        text = request(server, "GET", "/metrics", **shown)[2].decode()
        since = re.findall(r"^zsseg_seconds_since_frame\{source=.*\} (\S+)$", text, re.M)
        assert float(since[0]) < 1.0 < float(since[1])
        with MjpegServer(camera.port) as again:
            again.images.release(1000)
            wait_until(lambda: ask(server, "GET", "/healthz?strict=1")[0] == 200, "it is back")


def test_a_source_of_any_name_leaves_the_server_able_to_tell(tmp_path):
    pytest.importorskip("av")
    odd = tmp_path / (os.fsdecode(b'caf\xe9\x1b[31m\n"') + "\u202e\u2028.mp4")
    write_video(tmp_path / "plain.mp4", map(numbered, range(9))).rename(odd)
    with demo_server(str(odd)) as server, viewer(server) as page:
        wait_until(lambda: ask(server, "GET", "/healthz")[0] == 200, "frames are labelled")
        name = ask(server, "GET", "/healthz")[1]["sources"][0]["source"]
        assert name.endswith(r'caf\udce9\x1b[31m\n"\u202e\u2028.mp4')
        metrics = request(server, "GET", "/metrics")[2].decode()
        labels = re.findall(r'zsseg_frames_captured_total\{source="(.*)"\}', metrics)
        assert labels == [name.replace("\\", r"\\").replace('"', r"\"")]
        states(page, "running")
        body = request(server, "PUT", "/v1/vocabulary", {"classes": ["a\u202e\u2028"]})[2].decode()
        assert not re.search("[\u2028\u202e]", body)


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
            told = [text for text in page.texts if text["type"] == "vocabulary"][-1]
            assert frame.header["vocabulary_version"] == told["version"]
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


def test_beyond_the_limit_of_connections_the_health_alone_is_told():
    """A liveness probe that fails would have a healthy server killed."""
    head = b"GET %s HTTP/1.1\r\nHost: localhost\r\n"
    with demo_server(connections=20) as server:
        wait_until(lambda: ask(server, "GET", "/healthz")[0] == 200, "frames are labelled")
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(raw(server, b"GET / HTTP/1.1\r\nX-Slow: "))
            with raw(server, head % b"/metrics" + b"\r\n") as client:
                answer = read_all(client)
            assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"\r\nretry-after: 1\r\n" in answer
            assert b'"BusyError"' in answer
            with viewer(server) as page:
                assert closed_with(page) == 4429
            for _ in range(3):
                with raw(server, head % b"/healthz" + b"\r\n") as client:
                    assert read_all(client).startswith(b"HTTP/1.1 200"), "closed after one answer"
                for _ in range(30):
                    stack.enter_context(raw(server, head % b"/healthz" + b"X-Slow: "))
        wait_until(lambda: not refused(server), "there is room again")
        assert metric(server, "zsseg_connections_refused_total") > 180


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
