"""docs/serve.md says what is so: its commands work, its tables are complete."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support.live_server import ask, demo_server, request, wait_until
from zsseg_rt.demo import demo_photos
from zsseg_rt.server import Limits

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^curl (?:.*\\\n)*.*$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def server():
    with demo_server() as running:
        wait_until(lambda: ask(running, "GET", "/healthz")[0] == 200, "frames are labelled")
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("client")
    shutil.copy(demo_photos("scenes")[0], folder / "photo.png")
    return folder


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_work(server, folder, command):
    here = command.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    assert here != command
    done = subprocess.run(
        ["bash", "-c", here], cwd=folder, capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    if "-o " in command:
        written = folder / command.rpartition(" ")[2]
        assert written.stat().st_size > 100
    else:
        assert done.stdout


def test_every_path_is_in_the_table(server):
    for path in ask(server, "GET", "/openapi.json")[1]["paths"]:
        assert re.search(rf"^\| `[A-Z`, ]*{re.escape(path)}[`?]", PAGE, re.MULTILINE), path


def test_every_metric_is_in_the_table(server):
    text = request(server, "GET", "/metrics")[2].decode()
    short = re.sub(r"`\.\.\._", "`zsseg_frames_", PAGE)
    told = set(re.findall(r"`(zsseg_\w+)`", short))
    assert told == set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))


def test_the_limits_are_those_of_the_table():
    limits = Limits()
    assert f"| connections | {limits.connections};" in PAGE
    assert f"| {limits.connections_per_address}; the same |" in PAGE
    assert f"| {limits.viewers}; {limits.motion_jpegs} |" in PAGE
    assert f"{limits.json_bytes >> 10} KiB; {limits.picture_bytes >> 20} MiB" in PAGE
    assert f"{limits.picture_pixels / 1e6:.0f} million pixels" in PAGE
    assert f"| {limits.name_length} characters;" in PAGE
    assert f"within {limits.ack_seconds:.0f} s" in PAGE
    assert f"a message over {limits.message_bytes} bytes" in " ".join(PAGE.split())
