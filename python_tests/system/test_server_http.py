"""The server's answers to programs: every request over a real connection."""

import contextlib
import http.client
import json
import logging
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest

from support.live_server import (
    PATIENCE,
    SOURCE,
    WORDS,
    ask,
    demo_server,
    metric,
    request,
    wait_until,
)
from support.picture_files import png
from tools.scenes import CLASS_NAMES
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.demo import demo_bundle, demo_photos
from zsseg_rt.photos import read_photo
from zsseg_rt.results.visualize import encode_label_png, palette
from zsseg_rt.server import Limits
from zsseg_rt.server.api import load_page

PHOTO = Path(demo_photos("scenes")[0]).read_bytes()
COLOURS = ["red", "blue", "green", "white", "grey", "yellow", "orange", "purple", "dotted"]
MANY = [" ".join(words) for words in product(COLOURS, COLOURS, COLOURS, ("ball", "box"))]


@pytest.fixture(scope="module")
def server():
    with demo_server() as running:
        wait_until(lambda: ask(running, "GET", "/healthz")[0] == 200, "frames are labelled")
        yield running


def test_every_answer_protects_browsers_and_others_are_refused(server):
    html, policy = load_page()
    assert policy.startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in policy
    assert not re.search("unsafe|http", policy)
    protects = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    protects |= {"Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store"}
    for path in ("/", "/healthz", "/metrics", "/v1/vocabulary", "/nothing"):
        headers = request(server, "GET", path)[1]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert {name: headers[name] for name in protects} == protects
        assert headers["Server"] is None
    status, headers, body = request(server, "GET", "/")
    assert (status, body.decode()) == (200, html)
    assert headers.get_all("Content-Security-Policy") == [policy]
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert request(server, "HEAD", "/")[0] == 200
    assert ask(server, "GET", "/../../etc/passwd")[1]["error"] == "NotFoundError"
    assert ask(server, "DELETE", "/v1/vocabulary")[1]["error"] == "MethodError"
    assert ask(server, "GET", "/v1/segment")[0] == 405
    assert ask(server, "GET", "/healthz", Host="evil.example")[1]["error"] == "HostError"
    origin = "http://evil.example"
    for method, path in (("PUT", "/v1/settings"), ("POST", "/v1/segment"), ("OPTIONS", "/")):
        assert ask(server, method, path, Origin=origin)[1]["error"] == "OriginError"
    own = f"http://127.0.0.1:{server.port}"
    assert ask(server, "PUT", "/v1/settings", {"unknown_below": 0.0}, Origin=own)[0] == 200


THRESHOLDS = ("-0.1", "1.1", "NaN", "Infinity", '"0.3"', "null", "true", "[]")
BODIES = [
    *(("vocabulary", body, None) for body in (
        {"classes": ["ball"], "background": ["ball"]}, {"classes": ["ball\n"]},
        {"classes": ["ball"], "background": "auto"},
    )),
    *(("vocabulary", body, "VocabularyError") for body in (
        {"classes": []}, {"classes": [""]}, {"classes": [[]]}, {"classes": ["ball", "ball"]},
        {"classes": ["ball"], "background": "sky, wall"}, {"classes": ["a zebra"]},
        {"classes": ["@/etc/passwd"]}, {"classes": ["ba\nll"]}, {"classes": ["red " * 100]},
        {"classes": ["ball"], "background": ["red " * 100]}, {"classes": MANY},
        '{"classes": ["\\ud800"]}',
    )),
    *(("vocabulary", body, "RequestError") for body in (
        {"classes": "ball"}, {"classes": [1]}, {"classes": [None]}, {"classes": {"ball": 1}},
        {"classes": [["ball", ["red"]]]}, {"classes": ["ball"], "background": None},
        {"classes": ["ball"], "template": "a {}"}, {}, [], "", "{", b'{"classes": ["\xff"]}',
        "[" * 60_000,
    )),
    *(("settings", f'{{"unknown_below": {value}}}', None if value == "0" else "Error")
      for value in ("0", *THRESHOLDS)),
]  # fmt: skip


def test_classes_can_be_replaced_and_what_cannot_be_used_changes_nothing(server):
    status, names = ask(server, "GET", "/v1/names")
    assert (status, names["names"]) == (200, list(CLASS_NAMES))
    assert {"red", "striped", "ball"} < set(names["words"])
    new = {"classes": ["red ball", ["blue sky", "sky"]], "background": ["wall"]}
    before = ask(server, "GET", "/v1/vocabulary")[1]["version"]
    status, answer = ask(server, "PUT", "/v1/vocabulary", new)
    assert (status, answer) == (200, ask(server, "GET", "/v1/vocabulary")[1])
    assert answer["version"] > before
    assert (answer["background"], answer["unknown_label"]) == (["wall"], 255)
    one, other = answer["classes"]
    assert (one["name"], one["synonyms"]) == ("red ball", [])
    assert (other["name"], other["synonyms"]) == ("blue sky", ["sky"])
    assert one["colour"] != other["colour"]
    for what, body, kind in BODIES:
        path = f"/v1/{what}"
        before = ask(server, "GET", path)[1]
        status, answer = ask(server, "PUT", path, body, **{"Content-Type": "application/json"})
        if kind is None:
            assert status == 200, body
            continue
        assert (status in (400, 422), answer["error"].endswith(kind)) == (True, True), body
        unknown = [name for name in ("a zebra", "@/etc/passwd") if name in str(body)]
        assert answer.pop("unknown", []) == unknown
        assert set(answer) == {"error", "message"}
        assert ask(server, "GET", path)[1] == before, body
    assert ask(server, "PUT", "/v1/vocabulary", {"classes": WORDS})[0] == 200


def test_the_threshold_can_be_set(server):
    assert ask(server, "PUT", "/v1/settings", {"unknown_below": 1.0})[1] == {"unknown_below": 1.0}
    try:
        assert ask(server, "GET", "/v1/settings")[1] == {"unknown_below": 1.0}
        assert ask(server, "POST", "/v1/segment", PHOTO)[1]["unknown_share"] == 1.0
    finally:
        assert ask(server, "PUT", "/v1/settings", {"unknown_below": 0})[0] == 200
    assert ask(server, "POST", "/v1/segment", PHOTO)[1]["unknown_share"] == 0.0
    status, answer = ask(server, "PUT", "/v1/settings", '{"unknown_below": 0.5}')
    assert (status, "Content-Type: application/json" in answer["message"]) == (422, True)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_a_picture_is_labelled(server, order):
    with Engine(demo_bundle("scenes"), EngineConfig(device="cpu")) as engine:
        engine.set_classes(WORDS)
        expected = engine.segment(read_photo(demo_photos("scenes")[0]))
    with contextlib.ExitStack() as stack:
        if order == "bgr":
            config = EngineConfig(device="cpu", channel_order="bgr")
            server = stack.enter_context(demo_server(config=config))
        version = ask(server, "GET", "/v1/vocabulary")[1]["version"]
        status, answer = ask(server, "POST", "/v1/segment", PHOTO)
        assert (status, answer["vocabulary_version"]) == (200, version)
        assert (answer["height"], answer["width"]) == expected.labels.shape
        classes = [(one["name"], one["label"], one["pixels"]) for one in answer["classes"]]
        assert classes == [(one.name, one.index, one.pixels) for one in expected.present()]
        assert answer["times_ms"]["total"] > 0.0
        images = {}
        for accept in ("image/png", "image/jpeg;q=0.9, */*"):
            _, headers, image = request(server, "POST", "/v1/segment", PHOTO, Accept=accept)
            assert headers["Content-Type"] == accept.partition(";")[0]
            assert headers["X-Vocabulary-Version"] == str(version)
            images[headers["Content-Type"]] = image
    assert images["image/png"] == encode_label_png(expected.labels, palette(expected.names))
    overlay = cv2.imdecode(np.frombuffer(images["image/jpeg"], np.uint8), cv2.IMREAD_COLOR)
    drawn = expected.overlay(read_photo(demo_photos("scenes")[0]))
    assert np.abs(overlay[..., ::-1].astype(int) - drawn).mean() < 6.0  # JPEG at quality 80


def form(boundary, *fields):
    """A body as browsers and ``curl -F`` send it, of pairs of a part's headers and content."""
    parts = (b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary, *field) for field in fields)
    return b"".join(parts) + b"--%s--\r\n" % boundary


PLAIN = (b'Content-Disposition: form-data; name="confidence"', b"0.4")
DESCRIBED = (
    b'Content-Disposition: form-data; name="file"; filename="a.png"\r\nContent-Type: image/png',
    b'content-disposition: form-data; filename="\xc3\xa4;.png"; name=image',
    b'Content-Disposition: form-data; name="blob"\r\nContent-Type: image/png',
)


def test_the_first_file_of_a_form_is_labelled_whatever_its_field(server):
    plain = ask(server, "POST", "/v1/segment", PHOTO)[1]["classes"]
    for described, boundary in product(DESCRIBED, (b"----WebKitFormBoundary7", b"a'b(c)")):
        body = form(boundary, PLAIN, (described, PHOTO), (described, b"another"))
        kind = f'multipart/form-data; boundary="{boundary.decode()}"'
        status, answer = ask(server, "POST", "/v1/segment", body, Content_Type=kind)
        assert (status, answer["classes"]) == (200, plain)


def png_of(height, width):
    return cv2.imencode(".png", np.zeros((height, width, 3), np.uint8))[1].tobytes()


def test_what_has_no_picture_or_one_too_large_is_refused(server):
    for kind in ("multipart/form-data; boundary=x", "multipart/form-data"):
        for body in (form(b"x", PLAIN), b"--x\r\n", b"", PHOTO):
            status, answer = ask(server, "POST", "/v1/segment", body, Content_Type=kind)
            assert (status, answer["error"]) == (422, "SourceError")
            assert "curl -F" in answer["message"]
    for body, status, message in (
        (b"hello", 422, "expected an image file, got 5 bytes"),
        (PHOTO[:40], 422, "image: "),
        (png(30_000, 30_000), 413, "expected at most 32000000 pixels"),
        (png(4000, 4000)[:-9], 422, "expected at least"),
        (png_of(1, 32_768), 422, "frame: expected sides from 1 to 32767"),
        (png_of(40_000, 2), 422, "frame: expected sides from 1 to 32767"),
        (b"rtsp://camera/1", 422, "expected an image file"),
    ):
        code, answer = ask(server, "POST", "/v1/segment", body)
        assert (code, message in answer["message"]) == (status, True), answer


def test_frames_are_labelled_while_an_image_of_many_windows_is():
    config = EngineConfig(device="cpu", windows="auto", max_windows=1000)
    with demo_server(config=config) as server, ThreadPoolExecutor(1) as pool:
        wait_until(lambda: metric(server, "zsseg_frames_labelled_total"), "frames are labelled")
        before = metric(server, "zsseg_frames_labelled_total")
        answer = pool.submit(ask, server, "POST", "/v1/segment", png_of(20, 500))
        while not answer.done():
            assert ask(server, "GET", "/healthz")[0] == 200
        assert answer.result()[0] == 200
        assert metric(server, "zsseg_frames_labelled_total") > before + 3


def started(server, length, first):
    """A request for a picture of which the first bytes have come."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.putrequest("POST", "/v1/segment")
    connection.putheader("Content-Length", str(length))
    connection.endheaders(first)
    return connection


def test_bodies_that_are_too_long_or_late_are_refused():
    with demo_server(request_seconds=0.5) as server:
        late = started(server, 1000, b"x").getresponse()
        assert (late.status, json.loads(late.read())["error"]) == (408, "TimeoutError")
    with demo_server(picture_bytes=200_000, json_bytes=1000) as server:
        for method, path, size in (("POST", "segment", 200_001), ("PUT", "vocabulary", 1001)):
            for body in (b"x" * size, iter([b"x" * size])):
                status, answer = ask(server, method, f"/v1/{path}", body, Content_Type="text/json")
                assert (status, answer["error"]) == (413, "SizeError")
        # The answer would be lost in a reset if the server closed while the client still sends.
        status, answer = ask(server, "POST", "/v1/segment", b"x" * 33_000_000, Connection="close")
        assert (status, answer["error"]) == (413, "SizeError")


def test_more_pictures_than_may_wait_are_told_to_come_again(server):
    first = [started(server, len(PHOTO), PHOTO[:100]) for _ in range(Limits().pictures)]
    wait_until(lambda: ask(server, "POST", "/v1/segment", PHOTO)[0] == 503, "it is busy")
    status, headers, _ = request(server, "POST", "/v1/segment", PHOTO)
    assert (status, headers["Retry-After"]) == (503, "1")
    for connection in first:
        connection.send(PHOTO[100:])
        assert connection.getresponse().status == 200  # those that were first are served
    assert ask(server, "POST", "/v1/segment", PHOTO)[0] == 200


def test_defects_are_logged_and_told_to_nobody(server, monkeypatch, caplog):
    def fail(hub):
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr("zsseg_rt.server.api.write_metrics", fail)
    with caplog.at_level(logging.ERROR):
        status, answer = ask(server, "GET", "/metrics")
        wait_until(lambda: "a secret of the inside" in caplog.text, "it is logged")
    assert (status, answer["error"]) == (500, "InternalError")
    assert "secret" not in answer["message"]


SAMPLE = re.compile(r'([a-z_]+)(\{([a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*\})? (-?[0-9.e+-]+|\+Inf)')


def test_metrics_are_what_prometheus_reads(server):
    assert ask(server, "POST", "/v1/segment", PHOTO)[0] == 200
    status, headers, body = request(server, "GET", "/metrics")
    assert (status, headers["Content-Type"][:26]) == (200, "text/plain; version=0.0.4;")
    text = body.decode()
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    assert len(kinds) == text.count("# TYPE ")
    assert all(name.endswith("_total") == (kind == "counter") for name, kind in kinds.items())
    for line in text.removesuffix("\n").split("\n"):
        sample = line.startswith(("# TYPE ", "# HELP ")) or SAMPLE.fullmatch(line)
        assert sample, line
        name = line.split(" ")[2] if sample is True else sample[1]
        assert name in kinds or kinds[re.sub(r"_(bucket|sum|count)$", "", name)] == "histogram"
    buckets = re.findall(r"^zsseg_frame_age_seconds_bucket.* (\d+)$", text, re.M)
    (count,) = re.findall(r"^zsseg_frame_age_seconds_count\S* (\d+)$", text, re.M)
    assert sorted(map(int, buckets)) == [*map(int, buckets)]
    assert buckets[-1] == count != "0"
    assert f'zsseg_source_state{{source="{SOURCE}",state="running"}} 1.0' in text
    assert metric(server, "zsseg_pictures_total") >= 1


PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^curl (?:.*\\\n)*.*$", PAGE, re.MULTILINE)
assert len(COMMANDS) >= 8


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_commands_work(server, tmp_path):
    shutil.copy(demo_photos("scenes")[0], tmp_path / "photo.png")
    for command in COMMANDS:
        here = command.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        assert here != command
        call = {"cwd": tmp_path, "capture_output": True, "timeout": 60}
        done = subprocess.run(["bash", "-c", here], check=False, **call)
        assert done.returncode == 0, done.stderr
        if "-o " in command:
            assert (tmp_path / command.rpartition(" ")[2]).stat().st_size > 100
        else:
            assert done.stdout, command


def test_paths_metrics_and_limits_are_those_of_the_tables(server):
    paths = ask(server, "GET", "/openapi.json")[1]["paths"]
    methods = sorted(method for path in paths.values() for method in path)
    assert methods == ["get"] * 6 + ["post"] + ["put"] * 2
    for path in paths:
        assert re.search(rf"^\| `[A-Z`, ]*{re.escape(path)}[`?]", PAGE, re.MULTILINE), path
    text = request(server, "GET", "/metrics")[2].decode()
    metrics = set(re.findall(r"`(zsseg_\w+)`", re.sub(r"`\.\.\._", "`zsseg_frames_", PAGE)))
    assert metrics == set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    limits = Limits()
    for part in (
        f"| connections | {limits.connections};",
        f"| {limits.connections_per_address}; the same |",
        f"| {limits.viewers}; {limits.motion_jpegs} |",
        f"{limits.json_bytes >> 10} KiB; {limits.picture_bytes >> 20} MiB",
        f"{limits.picture_pixels / 1e6:.0f} million pixels",
        f"| {limits.name_length} characters;",
        f"within {limits.ack_seconds:.0f} s",
        f"a message over {limits.message_bytes} bytes",
    ):
        assert part in " ".join(PAGE.split())
