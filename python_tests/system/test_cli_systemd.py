"""What systemd's watchdog hears of a stream."""

import os
import socket
import subprocess
import sys

import pytest

from zsseg_rt.cli.service import Notifier


@pytest.fixture
def systemd(tmp_path):
    """A socket as systemd's, and its name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        path = str(tmp_path / "notify")
        receiver.bind(path)
        receiver.settimeout(60)
        yield receiver, path


def test_a_stream_is_ready_with_its_first_frame_and_alive_with_later_ones(systemd):
    receiver, path = systemd
    call = [sys.executable, "-m", "zsseg_rt", "stream", "--demo", "scenes", "--seconds", "20"]
    with subprocess.Popen(
        call,
        env={**os.environ, "NOTIFY_SOCKET": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as child:
        try:
            assert receiver.recv(100) == b"READY=1"
            assert receiver.recv(100) == b"WATCHDOG=1"
        finally:
            child.kill()


def test_abstract_names_are_understood():
    name = f"\0zsseg-test-{id(object())}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name)
        receiver.settimeout(60)
        Notifier({"NOTIFY_SOCKET": "@" + name[1:]}).frame()
        assert receiver.recv(100) == b"READY=1"


def test_a_socket_that_is_gone_is_told_once(tmp_path, caplog):
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    for _ in range(3):
        notifier.frame()
    assert caplog.text.count("NOTIFY_SOCKET: cannot report frames") == 1


def test_without_systemd_nothing_is_sent(caplog):
    Notifier({}).frame()
    assert not caplog.text
