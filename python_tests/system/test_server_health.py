"""What the server says of its own health, and of each source's."""

import json
import os
import re

import pytest

from support.live_server import SOURCE, ask, demo_server, request, viewer, wait_until
from support.streams import MjpegServer, numbered, write_video

TOKEN = "0123456789abcdefghij"


def test_a_camera_that_stalls_and_is_lost_makes_the_server_unhealthy_until_it_is_back():
    pytest.importorskip("av")
    with (
        MjpegServer() as camera,
        demo_server(camera.url, settings={"stale_seconds": 0.5}) as server,
        viewer(server) as page,
    ):
        assert ask(server, "GET", "/healthz")[0] == 503  # no frame yet
        camera.pictures.release(12)  # FFmpeg looks at a few before it gives the first
        wait_until(lambda: ask(server, "GET", "/healthz")[0] == 200, "frames are labelled")
        wait_until(lambda: ask(server, "GET", "/healthz")[0] == 503, "it stalls")
        assert {"stalled"} <= states(page, "stalled")
        camera.pictures.release(3)
        assert {"running"} <= states(page, "running")
        camera.stop()
        assert {"lost"} <= states(page, "lost")
        assert "secret" not in json.dumps(page.texts)
        with MjpegServer(camera.port) as again:
            again.pictures.release(1000)
            wait_until(lambda: ask(server, "GET", "/healthz")[0] == 200, "it is back")


def test_one_dead_camera_of_two_is_told_of_each():
    pytest.importorskip("av")
    with (
        MjpegServer() as camera,
        demo_server(
            [SOURCE, camera.url], settings={"stale_seconds": 1.0, "token": TOKEN}
        ) as server,
    ):
        camera.pictures.release(12)
        wait_until(lambda: ask(server, "GET", "/healthz?strict=1")[0] == 200, "both run")
        camera.stop()
        wait_until(lambda: ask(server, "GET", "/healthz?strict=1")[0] == 503, "one is dead")
        status, health = ask(server, "GET", "/healthz")
        assert (status, health["status"]) == (200, "degraded")
        assert health["reason"] == "1 of 2 sources give no frames"
        assert [(one["source"], one["dead"]) for one in health["sources"]] == [
            (1, False), (2, True),
        ]  # fmt: skip
        shown = {"Authorization": f"Bearer {TOKEN}"}
        health = ask(server, "GET", "/healthz", **shown)[1]
        assert health["sources"][0]["source"] == SOURCE
        assert "secret" not in json.dumps(health)
        text = request(server, "GET", "/metrics", **shown)[2].decode()
        since = re.findall(r"^zsseg_seconds_since_frame\{source=.*\} (\S+)$", text, re.M)
        assert float(since[0]) < 1.0 < float(since[1])


def states(page, last):
    """The states of the source until one of them comes."""
    seen = set()
    while last not in seen:
        seen.add(page.text("state")["sources"][0]["state"])
    return seen


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
        assert {"running"} <= states(page, "running")
        body = request(server, "PUT", "/v1/vocabulary", {"classes": ["a\u202e\u2028"]})[2].decode()
        assert not re.search("[\u2028\u202e]", body)
