"""Starts, stops and kills the network camera of ``rtsp_server.py``, and reads its pictures."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from support.gstreamer import require_gstreamer

SCRIPT = Path(__file__).with_name("rtsp_server.py")
COLUMNS, ROWS = 8, 6


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
        call = [sys.executable, str(SCRIPT), "--port", str(self.port), *self._options]
        self._process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
        self.port = int(self._value_of("ready"))

    def first_time(self) -> float:
        """When it made its first picture, in seconds; it makes none before somebody asks."""
        return int(self._value_of("first")) / 1000

    def kill(self) -> None:
        with self._process:
            self._process.kill()

    def freeze(self) -> None:
        """A camera that hangs: its connections stay open, and nothing comes."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def change_size(self) -> None:
        self._process.send_signal(signal.SIGUSR1)

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
    height, width = image.shape[0] // ROWS, image.shape[1] // COLUMNS
    grey = image.reshape(*image.shape[:2], -1).mean(axis=2)[: height * ROWS, : width * COLUMNS]
    blocks = grey.reshape(ROWS, height, COLUMNS, width)
    middle = blocks[:, height // 4 : height - height // 4, :, width // 4 : width - width // 4]
    levels = middle.mean(axis=(1, 3)).ravel()
    if ((levels > 80) & (levels < 176)).any():
        return None
    bits = sum(1 << place for place, level in enumerate(levels) if level > 128)
    stamp, check = bits >> 8, bits & 255
    return stamp / 1000 if sum(stamp.to_bytes(5, "big")) % 256 == check else None
