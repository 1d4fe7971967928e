"""``zsseg-rt serve`` as people type it: what it prints, how it ends, what it keeps to itself."""

import http.client
import re
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest

from support.command_line import run
from support.live_server import PATIENCE, ask, request, viewer, wait_until
from support.serve_process import serve_process
from support.streams import MjpegServer

TOKEN = "0123456789abcdefghij"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ZSSEG_TOKEN", raising=False)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_while_clients_watch(tmp_path, kind):
    with serve_process(tmp_path) as server, viewer(server) as page:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", server.address)
        second = server.process.stdout.readline().decode()
        assert f"ssh -L {server.port}:127.0.0.1:{server.port} " in second
        page.frame()  # and never acknowledge it
        player = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        player.request("GET", "/stream.mjpg")
        assert player.getresponse().status == 200
        half = socket.create_connection(("127.0.0.1", server.port))
        half.sendall(b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        began = time.monotonic()
        server.process.send_signal(kind)
        assert server.process.wait(PATIENCE) == 0
        assert time.monotonic() - began < 20.0  # 0.8 s on two busy cores
        assert server.log.read_text() == ""
        player.close()
        half.close()


def test_the_token_is_in_the_address_alone(tmp_path):
    """Not in the log, not even in one that tells everything."""
    with serve_process(tmp_path, "--token", "new", before=["--debug"]) as server:
        token = server.address.partition("#token=")[2]
        assert len(token) >= 32
        shown = {"Authorization": f"Bearer {token}"}
        assert ask(server, "GET", "/v1/settings", **shown)[0] == 200
        assert ask(server, "GET", "/v1/settings")[0] == 401
        assert request(server, "GET", f"/v1/settings?token={token}")[0] == 401
        assert request(server, "GET", f"/nothing?token={token}", **shown)[0] == 404
        assert request(server, "PUT", f"/v1/vocabulary?token={token}", "{", **shown)[0] == 422
        with viewer(server, protocols=["zsseg.v1", f"token.{token}"]) as page:
            page.frame()
        player = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        player.request("GET", f"/stream.mjpg?token={token}")
        assert player.getresponse().status == 200
        player.close()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0
        log = server.log.read_text()
        assert "DEBUG" in log
        assert token not in log


def test_the_token_may_come_from_the_environment(tmp_path):
    env = {"ZSSEG_TOKEN": TOKEN}
    with serve_process(tmp_path, "--host", "0.0.0.0", env=env) as server:
        parts = urlsplit(server.address)
        assert parts.hostname == socket.gethostname().lower()
        assert parts.fragment == f"token={TOKEN}"
        shown = {"Authorization": f"Bearer {TOKEN}", "Host": f"{parts.hostname}:{parts.port}"}
        assert ask(server, "GET", "/v1/settings", **shown)[0] == 200
        assert ask(server, "GET", "/v1/settings", **{**shown, "Host": "evil.example"})[0] == 400


def test_a_port_that_is_taken_is_told_in_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run("serve", "--demo", "scenes", "--port", port) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"got {port}: Address already in use. Choose another with --port" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a source: a camera, video"),
        (["--source", "test://"], "name a bundle: --bundle"),
        (["--demo", "scenes", "--source", "ftp://camera"], "ftp://camera"),
        (["--demo", "scenes", "ftp://camera"], "ftp://camera"),
        (["--demo", "scenes", "--source", "test://", "--source", "test://"], "twice"),
        (["--demo", "scenes", "--policy", "newest"], "policy: expected one of latest, all"),
        (["--demo", "scenes", "--port", "65536"], "--port"),
        (["--demo", "scenes", "--host", "0.0.0.0"], "--token new"),
        (["--demo", "scenes", "--host", "0.0.0.0", "--token", "short"], "16 to 128"),
        (["--demo", "scenes", "--allow-host", "http://a"], "allow-host"),
        (["--demo", "scenes", "--stale-after", "0"], "stale-after"),
        (["--demo", "scenes", "--host", "no such host"], "host: expected an address"),
    ],
)
def test_what_cannot_be_served_is_a_usage_error(arguments, message, capsys):
    assert run("serve", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_source_that_cannot_be_opened_ends_it_with_its_error(tmp_path, capsys):
    pytest.importorskip("av")
    (tmp_path / "empty.mp4").touch()
    assert run("serve", "--demo", "scenes", "--port", 0, "--source", tmp_path / "empty.mp4") == 1
    assert "empty.mp4" in capsys.readouterr().err


def test_a_camera_that_is_off_at_the_start_is_waited_for(tmp_path):
    with MjpegServer() as gone:
        pass
    assert (
        run("serve", "--demo", "scenes", "--port", 0, "--device", "cpu", "--source", gone.url) == 1
    )
    with serve_process(tmp_path, "--wait", source=gone.url) as server:
        wait_until(lambda: "lost" in server.log.read_text(), "the camera is missed")
        with MjpegServer(gone.port) as camera, viewer(server) as page:
            camera.pictures.release(40)
            page.frame()


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "websockets"])
def test_a_package_that_is_missing_is_named_with_its_remedy(package):
    code = "import sys; sys.modules[sys.argv[1]] = None; from zsseg_rt.cli import main; "
    call = [
        sys.executable,
        "-c",
        code + "sys.exit(main(['serve', '--demo', '--port', '0']))",
        package,
    ]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 4, done.stderr
    assert re.fullmatch(
        rf"zsseg-rt: {package}\S*: expected to be installed to serve, got nothing\. "
        r"Run: pip install '\.\[serve\]' in a checkout of zsseg_rt\n",
        done.stderr,
    )
