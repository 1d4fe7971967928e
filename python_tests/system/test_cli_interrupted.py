"""Places for results are checked before any work, Ctrl-C keeps what is done, systemd is told."""

import json
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

from support.command_line import python, run
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.cli.stream import Notifier
from zsseg_rt.common.extras import import_opencv
from zsseg_rt.demo import demo_bundle, demo_photos

LIMIT = 60.0  # seconds, on a busy machine


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "in").mkdir()
    return shutil.copy(demo_photos("scenes")[0], tmp_path / "in" / "a.png")


@pytest.mark.parametrize(
    ("option", "place", "reason"),
    [
        ("--json", "gone/r.json", "gone: it does not exist"),
        ("--json", "in", "got a folder, "),
        ("--out", "in/a.png", "a.png is not a folder"),
        ("--out", "in/a.png/out", "Not a directory"),
        ("--out", "/proc/out", "/proc is not writable"),  # also for root, whom permissions let
        ("--json", "/proc/r.json", "/proc is not writable"),
    ],
)
def test_places_are_checked_first(option, place, reason, photo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Engine, "__init__", None)  # a model is loaded later
    assert run("segment", photo, "--demo", "scenes", option, tmp_path / place) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"zsseg-rt: {option}: expected a f")
    assert reason in error
    assert error.count("\n") == 1


def test_a_useless_cache_is_told_once(tmp_path, caplog):
    (tmp_path / "file").touch()
    config = EngineConfig(cache_dir=tmp_path / "file")
    with caplog.at_level(logging.WARNING), Engine(demo_bundle("scenes"), config) as engine:
        engine.set_classes([f"red {word}" for word in ("ball", "box", "cone", "star", "ring")])
        engine.set_classes(["blue sky"])
    (record,) = caplog.records
    assert "file: cannot be used as the cache" in record.getMessage()
    assert "Set ZSSEG_HOME" in record.getMessage()


@pytest.fixture
def long_run(tmp_path, photo):
    """``segment`` at work on more photos than it will ever do."""
    for index in range(500):
        (tmp_path / "in" / f"b{index:03}.png").symlink_to(photo)
    call = [sys.executable, "-m", "zsseg_rt", "segment", tmp_path / "in", "--demo", "scenes",
            "-o", tmp_path / "out", "--json", tmp_path / "r.json", "--threads", "1"]  # fmt: skip
    place = os.environ | {"ZSSEG_HOME": str(tmp_path / "home")}
    with subprocess.Popen(
        call,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=place,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # else some ignore it
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_an_interrupted_run_keeps_a_report_and_says_how_to_go_on(long_run, tmp_path):
    journal, deadline = tmp_path / "out" / "zsseg_journal.jsonl", time.monotonic() + LIMIT
    while not journal.is_file() and long_run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    long_run.send_signal(signal.SIGINT)
    _, error = long_run.communicate(timeout=LIMIT)
    assert long_run.returncode == 1, error
    assert "Traceback" not in error
    assert "of 501 photos are done. Add --resume to go on from there." in error.splitlines()[-1]
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["interrupted"] is True
    assert len(report["photos"]) < 501


INTERRUPTED_IMPORT = """
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "zsseg_rt.cli.segment":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from zsseg_rt.__main__ import run
sys.exit(run())
"""


def test_an_interrupt_while_modules_are_loaded_is_one_line():
    done = python("-c", INTERRUPTED_IMPORT)
    assert (done.returncode, done.stderr) == (1, "zsseg-rt: interrupted\n")


def test_an_interrupt_while_opencv_is_loaded_is_none_of_its_absence(tmp_path, monkeypatch):
    """NumPy's C interface raises an ImportError in place of whatever came up in its import."""
    (tmp_path / "cv2.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    imread = len(range(9))\n"
        "except KeyboardInterrupt:\n    raise ImportError('numpy.core.multiarray failed')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        import_opencv("to read photos")
    assert signal.getsignal(signal.SIGINT) is before
    sys.modules.pop("cv2", None)


def test_a_device_is_written_into_and_stays_one(tmp_path, photo, capsys):
    """To root, a rename over /dev/null is as good as any other."""
    pipe, texts = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: texts.append(pipe.read_bytes()))
    reader.start()
    call = ["segment", photo, "--demo", "scenes", "-o", tmp_path / "out", "--json"]
    assert run(*call, pipe) == 0
    reader.join(LIMIT)
    assert len(json.loads(texts[0])["photos"]) == 1
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    full = tmp_path / "full"
    full.symlink_to("/dev/full")  # so that a failure of this test does not take it away
    assert run(*call, full) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert full.is_symlink()


def test_a_stream_is_ready_with_its_first_frame_and_alive_with_later_ones(tmp_path):
    call = [sys.executable, "-m", "zsseg_rt", "stream", "--demo", "scenes", "--seconds", "20"]
    environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(LIMIT)
        with subprocess.Popen(call, env=environment, **quiet) as child:
            try:
                assert systemd.recv(100) == b"READY=1"
                assert systemd.recv(100) == b"WATCHDOG=1"
            finally:
                child.kill()


def test_abstract_names_are_understood_and_lost_sockets_reported_once(tmp_path, caplog):
    name = f"\0zsseg-test-{id(object())}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name)
        receiver.settimeout(60)
        Notifier({"NOTIFY_SOCKET": "@" + name[1:]}).frame()
        assert receiver.recv(100) == b"READY=1"
    Notifier({}).frame()
    assert not caplog.text
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    for _ in range(3):
        notifier.frame()
    assert caplog.text.count("NOTIFY_SOCKET: cannot report frames") == 1
