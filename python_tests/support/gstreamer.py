"""Runs GStreamer, cameras and viewers in child processes, and skips tests where it is absent."""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from support.command_line import python
from support.required import without_streams

READER = Path(__file__).with_name("gstreamer_child.py")
SERVER = Path(__file__).with_name("overlay_server.py")
CAMERA = Path(__file__).with_name("rtsp_server.py")
WITHIN = 120  # seconds, on a busy machine
ELEMENTS = (
    "videotestsrc videoconvert appsink rtspsrc h264parse avdec_h264 h265parse avdec_h265 x264enc "
    "rtph264pay rtph264depay x265enc rtph265pay qtdemux"
)


@functools.cache
def _what_is_missing() -> str:
    code = (
        "from zsseg_rt.stream.gstreamer.library import load, load_server, require_elements\n"
        f"require_elements(load().Gst, {ELEMENTS.split()!r}, 'tests')\n"
        "load_server()\n"
    )
    done = python("-c", code, timeout=WITHIN)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def require_gstreamer() -> None:
    if missing := _what_is_missing():
        without_streams(f"GStreamer cannot be used here (tools/test.sh installs it): {missing}")


class Report:
    def __init__(self, lines: list[dict], log: str) -> None:
        self.frames = [line for line in lines if "shape" in line]
        self.ends = [line for line in lines if "shape" not in line]
        self.end, self.log = self.ends[-1], log


def environment(**variables: str) -> dict[str, str]:
    """The variables of a child: ours, but for those that choose how RTSP is read."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("ZSSEG_RTSP")}
    return {**ours, "ZSSEG_RTSP_LIBRARY": "gstreamer", **variables}


def read(uris: str | Sequence[str], count: int = 1, *options: str, **variables: str) -> Report:
    """Read pictures of sources in a child; see ``gstreamer_child.py`` for options."""
    call = [READER, *([uris] if isinstance(uris, str) else uris), "--count", count, *options]
    done = python(*call, timeout=WITHIN, env=environment(**variables))
    assert done.returncode == 0, done.stderr
    return Report([json.loads(line) for line in done.stdout.splitlines()], done.stderr)


@contextmanager
def reading(uri: str, *options: str, **variables: str):
    """A child that reads in the background; gives its facts line by line."""
    call = [sys.executable, str(READER), uri, "--count", "1000000", *options]
    popen = {"stderr": subprocess.DEVNULL, "text": True, "env": environment(**variables)}
    with subprocess.Popen(call, stdout=subprocess.PIPE, **popen) as child:
        try:
            yield map(json.loads, child.stdout)
        finally:
            child.kill()


@contextmanager
def watch(url: str, transport: str = "tcp"):
    """The images, uint8 RGB, that a viewer of FFmpeg's sees."""
    import av

    options = {"rtsp_transport": transport, "analyzeduration": "100000"}
    with av.open(url, options=options, timeout=WITHIN) as container:
        stream = container.streams.video[0]
        stream.thread_type = "SLICE"
        yield (frame.to_ndarray(format="rgb24") for frame in container.decode(stream))


class OverlayServer:
    """A child that serves overlays (``overlay_server.py``); ended with the ``with`` block."""

    def __init__(self, address: str = "rtsp://@127.0.0.1:0/seg", *options: str) -> None:
        call, pipe = [sys.executable, str(SERVER), address, *options], subprocess.PIPE
        popen = {"stdin": pipe, "stdout": pipe, "stderr": pipe, "text": True}
        self.child = subprocess.Popen(call, **popen, env=environment())
        self.begun = self._answer()
        self.port = self.begun.get("port")
        if self.port is not None:
            self.wait_until(lambda facts: facts["written"] >= 1)  # before, there is no such path

    def url(self, path: str = "seg", login: str = "") -> str:
        return f"rtsp://{login}127.0.0.1:{self.port}/{path}"

    def tell(self, command: str) -> None:
        self.child.stdin.write(command + "\n")
        self.child.stdin.flush()

    def facts(self) -> dict:
        self.tell("facts")
        return self._answer()

    def wait_until(self, is_so) -> dict:
        last = time.monotonic() + WITHIN
        while not is_so(facts := self.facts()):
            assert time.monotonic() < last, facts
            time.sleep(0.05)
        return facts

    def close(self) -> str:
        """Close its sink, and the process; returns its log."""
        self.tell("close")
        assert "closed" in self._answer()
        _, log = self.child.communicate(timeout=WITHIN)
        assert self.child.returncode == 0, log
        return log

    def _answer(self) -> dict:
        line = self.child.stdout.readline()
        assert line, self.child.stderr.read()
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self.child.kill()
        self.child.communicate()


class RtspCamera:
    """A camera in a process of its own. It keeps its port when it is started again.

    It ends with the thread that started it: the system kills it, even while it is frozen.
    """

    def __init__(self, *, codec="h264", sizes=("320x240",), rate=30, login="") -> None:
        require_gstreamer()
        self._options = ["--codec", codec, "--sizes", *sizes, "--rate", str(rate), "--login", login]
        self.port = 0
        self.start()
        self.url = f"rtsp://127.0.0.1:{self.port}/camera"

    def start(self) -> None:
        call = [sys.executable, str(CAMERA), "--port", str(self.port), *self._options]
        self._process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
        self.port = int(self._value_of("ready"))

    def first_time(self) -> float:
        """When it made its first picture, in seconds; it makes none before somebody asks."""
        return int(self._value_of("first")) / 1000

    def kill(self) -> None:
        with self._process:
            self._process.kill()

    def send(self, number: int) -> None:
        """Of signals, SIGUSR1 changes its size; stopped, it hangs with its connections open."""
        self._process.send_signal(number)

    def _value_of(self, what: str) -> str:
        """The value behind a word in its next line."""
        word, _, value = self._process.stdout.readline().partition(" ")
        assert word == what
        return value

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()


def shown_time(image: np.ndarray) -> float | None:
    """When a picture of the camera was made, in seconds of ``time.monotonic()``."""
    columns, rows = 8, 6
    height, width = image.shape[0] // rows, image.shape[1] // columns
    grey = image.reshape(*image.shape[:2], -1).mean(axis=2)[: height * rows, : width * columns]
    blocks = grey.reshape(rows, height, columns, width)
    middle = blocks[:, height // 4 : height - height // 4, :, width // 4 : width - width // 4]
    levels = middle.mean(axis=(1, 3)).ravel()
    if ((levels > 80) & (levels < 176)).any():
        return None
    bits = sum(1 << place for place, level in enumerate(levels) if level > 128)
    stamp, check = bits >> 8, bits & 255
    return stamp / 1000 if sum(stamp.to_bytes(5, "big")) % 256 == check else None
