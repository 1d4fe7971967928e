"""Shared by tests of streams: readers without a clock, videos made on the spot."""

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np

from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.stream.runner import SourceStats, Stream
from zsseg_rt.stream.source import Picture
from zsseg_rt.stream.uris import open_sources
from zsseg_rt.stream.watch import Patience

LONG = 60  # seconds until a test gives up


class ReaderNow:
    """Reads a source without waiting; notes what it would have waited for."""

    def __init__(self, stop: bool = False) -> None:
        self.stop, self.waits, self.damaged = stop, [], 0

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return self.stop

    def count_damaged(self) -> None:
        self.damaged += 1


class Script:
    """A source that does, each time it is opened, what the next list says.

    Numbers and pictures are given, also those that functions return; events are waited for.
    """

    def __init__(self, name, *attempts, live=True):
        self.name, self.live, self.attempts = name, live, list(attempts)
        self.opened, self.closed = 0, threading.Semaphore(0)

    def pictures(self, reader):
        steps = self.attempts[min(self.opened, len(self.attempts) - 1)]
        self.opened += 1
        try:
            for step in steps:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, threading.Event):
                    step.wait(LONG)
                elif isinstance(step, int):
                    yield Picture(image=numbered(step), captured_at=0.0, clock="arrival",
                                  pts_seconds=step / 1000)  # fmt: skip
                elif isinstance(image := step() if callable(step) else step, Picture):
                    yield image
        finally:
            self.closed.release()


def label(image: np.ndarray) -> Segmentation:
    """A result whose labels are the image's first channel."""
    return Segmentation(labels=image[..., 0].copy(), names=("a",), vocabulary_version=1)


def wait_until(is_true: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + LONG
    while not is_true():
        assert time.monotonic() < ends_at
        time.sleep(0.01)


def follow(stream: Stream, is_enough: Callable[[], bool]) -> list[Frame]:
    """The frames of a stream until something has happened."""
    frames, ends_at = [], time.monotonic() + LONG
    for seg in stream:
        frames.append(seg.frame)
        if is_enough():
            return frames
        assert time.monotonic() < ends_at, f"{stream.stats()}"
    raise AssertionError(f"the stream ended: {stream.stats()}")


def lose_and_find(uris, lose, cure, **patience) -> tuple[list[Frame], SourceStats, SourceStats]:
    """The frames of a camera that is lost and comes back while another source goes on.

    Also how it was doing when it was lost, and in the end.
    """
    sources = open_sources(uris)
    name, other = (source.name for source in sources)
    patience = Patience(first_retry=0.1, longest_retry=0.4, **patience)
    with Stream(sources, label, patience=patience) as stream:
        frames = follow(stream, lambda: stream.stats()[name].labelled >= 4)
        lose()
        frames += follow(stream, lambda: stream.stats()[name].state == "lost")
        lost, others = stream.stats()[name], stream.stats()[other].labelled
        frames += follow(stream, lambda: stream.stats()[other].labelled >= others + 20)
        cure()
        frames += follow(stream, lambda: stream.stats()[name].reconnects == 1)
        back_at = stream.stats()[name].labelled
        frames += follow(stream, lambda: stream.stats()[name].labelled >= back_at + 3)
        stats = stream.stats()[name]
    mine = [frame for frame in frames if frame.source == name]
    for older, newer in itertools.pairwise(mine):  # every index is there or counted as dropped
        assert newer.index == older.index + 1 + newer.dropped_before
    assert (stats.state, stats.error) == ("running", None)
    return mine, lost, stats


def events(lines: list[str], name: str) -> list[str]:
    """A source's events in the log: the first words of each line."""
    return [line.removeprefix(f"{name}: ").split(":")[0] for line in lines if name in line]


def level(number: int) -> int:
    """The grey level of a numbered picture; neighbours survive lossy coding."""
    return 16 + number * 8 % 224


def numbered(number: int, size_hw: tuple[int, int] = (48, 64)) -> np.ndarray:
    """A grey picture that tells its number by its level."""
    return np.full((*size_hw, 3), level(number), np.uint8)


def number_of(image: np.ndarray) -> int:
    return round((float(image.mean()) - 16) / 8)


def write_video(
    path: Path, images, *, rate: int = 10, gop: int = 4, codec="libx264", pix_fmt="yuv420p",
    **options: str,
) -> Path:  # fmt: skip
    """Write a video, in H.264 unless another codec is named; options are the codec's."""
    import av

    frames = [av.VideoFrame.from_ndarray(image, format="rgb24") for image in images]
    with av.open(str(path), "w") as container:
        if codec == "libx264":
            options = {"preset": "ultrafast", **options}
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].height, frames[0].width
        stream.pix_fmt, stream.gop_size = pix_fmt, gop
        for frame in [*frames, None]:
            container.mux(stream.encode(frame))
    return path


class MjpegServer:
    """A network camera: one JPEG after the other over HTTP, as many as are ``ready``.

    Each release of the semaphore ``images`` lets one more through. :meth:`stop` is a camera that
    loses its power: connections are cut and refused. Settings stand for what is said below.
    """

    kind = "multipart/x-mixed-replace; boundary=frame"
    first = part = "--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\n\r\n"
    end = "\r\n"
    most = 1_000_000  # images of a connection
    status, leads_to = 200, ""

    def __init__(self, port=0, *, ready=0, **settings) -> None:
        vars(self).update(settings)
        self.images = threading.Semaphore(ready)
        self.connections, self.is_gone = [], False
        methods = {"do_GET": lambda request: self.serve(request), "log_message": lambda *_: None}
        handler = type("Handler", (BaseHTTPRequestHandler,), methods)
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://user:secret@127.0.0.1:{self.port}/video?x=1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def requests(self) -> int:
        return len(self.connections)

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        self.connections.append(request.connection)
        request.send_response(self.status)
        if self.leads_to:
            request.send_header("Location", self.leads_to)
        request.send_header("Content-Type", self.kind)
        request.end_headers()
        for number in range(self.most if self.status == 200 else 0):
            self.images.acquire()
            if self.is_gone:
                return
            jpeg = self.encode(number)
            head = (self.part if number else self.first).format(len(jpeg))
            try:
                request.wfile.write(head.encode() + jpeg.tobytes() + self.end.encode())
            except OSError:
                return

    @staticmethod
    def encode(number: int) -> np.ndarray:
        return cv2.imencode(".jpg", numbered(number % 28))[1]

    def stop(self) -> None:
        if self.is_gone:
            return
        self.is_gone = True
        self.images.release(100)
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(2)

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
