"""``zsseg-rt serve`` as people type it, and who is let in: names, origins, tokens."""

import http.client
import re
import signal
import socket
import time
from urllib.parse import urlsplit

import pytest

from support.command_line import python, run
from support.errors import refused
from support.live_server import PATIENCE, ask, request, serve_process, viewer, wait_until
from support.streams import MjpegServer
from zsseg_rt.errors import ArgumentError
from zsseg_rt.server.access import Gate, Refused
from zsseg_rt.server.settings import ServerSettings, listen

TOKEN = "0123456789abcdefghij"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ZSSEG_TOKEN", raising=False)


def test_a_signal_ends_it_while_clients_watch_and_no_log_has_the_token(tmp_path):
    with serve_process(tmp_path, "--token", "new", before=["--debug"]) as server:
        address, token = server.address.split("#token=")
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        assert len(token) >= 32
        second = server.process.stdout.readline().decode()
        assert f"ssh -L {server.port}:127.0.0.1:{server.port} " in second
        shown = {"Authorization": f"Bearer {token}"}
        assert ask(server, "GET", "/v1/settings", **shown)[0] == 200
        assert ask(server, "GET", "/v1/settings")[0] == 401
        assert request(server, "GET", f"/v1/settings?token={token}")[0] == 401
        assert request(server, "GET", f"/nothing?token={token}", **shown)[0] == 404
        assert request(server, "PUT", f"/v1/vocabulary?token={token}", "{", **shown)[0] == 422
        player = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        player.request("GET", f"/stream.mjpg?token={token}")
        assert player.getresponse().status == 200
        half = socket.create_connection(("127.0.0.1", server.port))
        half.sendall(b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        with viewer(server, protocols=["zsseg.v1", f"token.{token}"]) as page:
            page.frame()  # and never acknowledge it
            ends(server, signal.SIGINT)
        log = server.log.read_text()
        assert "DEBUG" in log
        assert token not in log
        player.close()
        half.close()


def ends(server, kind):
    began = time.monotonic()
    server.process.send_signal(kind)
    assert server.process.wait(PATIENCE) == 0
    assert time.monotonic() - began < 20.0  # 0.8 s on two busy cores


def test_it_waits_for_a_camera_and_takes_its_token_from_the_environment(tmp_path):
    with MjpegServer() as gone:
        pass
    options = {"env": {"ZSSEG_TOKEN": TOKEN}, "source": gone.url}
    with serve_process(tmp_path, "--host", "0.0.0.0", "--wait", **options) as server:
        parts = urlsplit(server.address)
        assert parts.hostname == socket.gethostname().lower()
        assert parts.fragment == f"token={TOKEN}"
        shown = {"Authorization": f"Bearer {TOKEN}", "Host": f"{parts.hostname}:{parts.port}"}
        assert ask(server, "GET", "/v1/settings", **shown)[0] == 200
        assert ask(server, "GET", "/v1/settings", **{**shown, "Host": "evil.example"})[0] == 400
        wait_until(lambda: "lost" in server.log.read_text(), "the camera is missed")
        with MjpegServer(gone.port) as camera:
            camera.images.release(40)
            with viewer(server, protocols=["zsseg.v1", f"token.{TOKEN}"]) as page:
                page.frame()
        ends(server, signal.SIGTERM)


USAGE = {
    "": "name a source: a camera, video",
    "--source test://": "name a bundle: --bundle",
    "--demo scenes --source ftp://camera": "ftp://camera",
    "--demo scenes ftp://camera": "ftp://camera",
    "--demo scenes --source test:// --source test://": "twice",
    "--demo scenes --policy newest": "policy: expected one of latest, all",
    "--demo scenes --port 65536": "--port",
    "--demo scenes --host 0.0.0.0": "--token new",
    "--demo scenes --stale-after 0": "stale-after",
}


def test_what_cannot_be_served_is_told_in_one_line(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = f"got {port}: Address already in use. Choose another with --port"
        for arguments, message in (USAGE | {f"--demo scenes --port {port}": told}).items():
            assert run("serve", *arguments.split()) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert message in line
    pytest.importorskip("av")
    (tmp_path / "empty.mp4").touch()
    assert run("serve", "--demo", "scenes", "--port", 0, "--source", tmp_path / "empty.mp4") == 1
    assert "empty.mp4" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_with_its_remedy():
    code = "import sys; sys.modules['uvicorn'] = None; from zsseg_rt.cli import main; "
    done = python("-c", f"{code}sys.exit(main(['serve', '--demo', '--port', '0']))")
    assert done.returncode == 4, done.stderr
    assert re.fullmatch(
        r"zsseg-rt: uvicorn\S*: expected to be installed to serve, got nothing\. "
        r"Run: pip install '\.\[serve\]' in a checkout of zsseg_rt\n",
        done.stderr,
    )


OWN, ALLOWED = "localhost:8000", {"allowed_hosts": ("Cam.example", "[fe80::1]")}
EVERYWHERE = {"host": "0.0.0.0", "token": TOKEN}
HOST, ORIGIN = (400, 4403, "HostError"), (403, 4403, "OriginError")
WRONG = (401, 4401, "TokenError")
CHECKS = [
    *(({}, "host", {"host": host}, None) for host in (
        "localhost", "localhost:8000", "LocalHost:9", "127.0.0.1:8000", "[::1]:8000", "[::1]",
    )),
    *(({}, "host", {"host": host}, HOST) for host in (
        None, "", "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil",
        "127.0.0.2", "10.0.0.7:8000", "localhost:8000:9", "localhost:port", "a@localhost",
        "localhost/", "[::2]", "::1", "127.0.0.1:8000, evil.example",
    )),
    *((ALLOWED, "host", {"host": host}, None) for host in ("cam.example:443", "[fe80::1]:8000")),
    (ALLOWED, "host", {"host": "other.example"}, HOST),
    *((EVERYWHERE, "host", {"host": host}, None) for host in ("192.168.1.7:8000", "[fe80::7]:80")),
    (EVERYWHERE, "host", {"host": "evil.example:8000"}, HOST),
    *((ALLOWED, "origin", {"origin": origin, "host": host}, None) for origin, host in (
        (None, OWN), ("http://localhost:8000", OWN), ("http://LOCALHOST:9000", "localhost:9000"),
        ("http://localhost", "localhost:80"), ("https://localhost:443", "localhost"),
        ("https://cam.example", "127.0.0.1:80"), ("https://cam.example:8443", "127.0.0.1:8000"),
    )),
    *((ALLOWED, "origin", {"origin": origin, "host": OWN}, ORIGIN) for origin in (
        "http://evil.example", "http://localhost:3000", "http://localhost", "null", "", "*",
        "file://", "http://localhost:8000.evil.example", "http://localhost:8000@evil.example",
        "http://localhost:8000/", "ftp://localhost:8000",
    )),
    *((EVERYWHERE, "token", {"authorization": None} | shown, None) for shown in (
        {"authorization": f"Bearer {TOKEN}"}, {"authorization": f"bearer {TOKEN}"},
        {"protocols": ["zsseg.v1", f"token.{TOKEN}"]}, {"query": f"token={TOKEN}".encode()},
    )),
    *((EVERYWHERE, "token", {"authorization": text}, WRONG) for text in (
        None, "", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer ",
        "Bearer \xff\u20ac",
    )),
    *((EVERYWHERE, "token", {"authorization": None} | shown, WRONG) for shown in (
        {"protocols": [TOKEN]}, {"protocols": ["token."]}, {"query": b"token="},
        {"query": b"other=1&token=%ff"},
    )),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "what", "shown", "refusal"), CHECKS)
def test_own_names_pages_and_tokens_are_let_in_and_no_others(settings, what, shown, refusal):
    check = getattr(Gate(None, ServerSettings(**settings)), f"check_{what}")
    if refusal is None:
        check(**shown)
        return
    with pytest.raises(Refused) as refused:
        check(**shown)
    error = refused.value
    assert (error.status, error.close_code, error.kind) == refusal
    assert TOKEN not in str(error)


OUTSIDE = [
    *(({"host": host}, "token") for host in ("0.0.0.0", "::", "192.0.2.1")),
    *(({"token": text}, "token") for text in ("short", "spaces are no part of it", "x" * 129)),
    *(({"allowed_hosts": (name,)}, "allow-host")
      for name in ("http://cam.example", "cam.example:80")),
    *(({"proxies": (network,)}, "proxy")
      for network in ("", "proxy.example", "10.0.0.7/24", "10.0.0.0/33", "fd00::1/8")),
    *(({"stale_seconds": seconds}, "stale-after") for seconds in (0.0, float("nan"))),
    *(({"host": host}, "host") for host in ("", "no such host")),
]  # fmt: skip


def test_settings_outside_their_range_are_refused_and_this_machine_needs_no_token():
    for settings, message in OUTSIDE:
        with refused(ArgumentError, message):
            ServerSettings(**settings)
    for host in ("127.0.0.1", "127.0.0.3", "localhost", "::1"):
        assert ServerSettings(host=host).token is None
    assert TOKEN not in repr(ServerSettings(host="192.0.2.1", token=TOKEN))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_the_wildcard_of_ipv6_takes_ipv4_too():
    with listen("::", 0) as listener:
        port = listener.getsockname()[1]
        for address in ("127.0.0.1", "::1"):
            with socket.create_connection((address, port), timeout=30):
                listener.accept()[0].close()
