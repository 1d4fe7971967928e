"""Videos, label pictures and lines that are written; sinks that are slow or fail, full disks."""

import json
import logging
import os
import re
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from support.errors import refused
from support.full_disk import disk_with_room_for
from support.recordings import LONG, finish, frames_of, open_sink, open_writer, result, write
from support.streams import ReaderNow, wait_until
from zsseg_rt.common.recordings import Rotation
from zsseg_rt.errors import ArgumentError, SourceError
from zsseg_rt.results.visualize import palette
from zsseg_rt.stream import sinks
from zsseg_rt.stream.painting import Painter
from zsseg_rt.stream.sinks import QUEUE, Sink, open_writers
from zsseg_rt.stream.uris import open_sources
from zsseg_rt.stream.writers import Writer

pytest.importorskip("av")


@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
def test_an_overlay_video_shows_the_labels_at_their_times(tmp_path, channel_order):
    path = tmp_path / "out.mp4"
    times = [5.0, 5.1, 5.25, 7.0]
    results = [result(n, label=n % 3, captured_at=t) for n, t in enumerate(times)]
    stats = write(path, results, channel_order=channel_order)
    assert (stats.written, stats.dropped, stats.error, stats.files) == (4, 0, None, (str(path),))
    shots = frames_of(path)
    assert [time for time, _ in shots] == pytest.approx([0.0, 0.1, 0.25, 2.0], abs=1e-3)
    for number, (_, image) in enumerate(shots):
        colour = image.reshape(-1, 3).mean(axis=0)
        np.testing.assert_allclose(
            colour, palette(("road", "sky", "tree"))[number % 3], atol=6
        )  # limited range, 4:2:0


def wide(number, split=320, **frame):
    """A frame of two halves, 640 pixels wide."""
    seg = result(number, (360, 640), **frame)
    seg.labels[:, split:] = 2
    return seg


def changed_columns(image, colours):
    """Columns where neither half has its plain colour."""
    off = np.abs(image[:, :, None].astype(int) - colours).max(axis=3).min(axis=2) > 60
    return np.flatnonzero(off.any(axis=0))


@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
def test_overlays_carry_names_and_a_legend_of_one_size_on_request(channel_order):
    colours = palette(("road", "sky", "tree"))[:, :: 1 if channel_order == "rgb" else -1]
    painter = Painter(channel_order=channel_order, alpha=1.0, legend=True)
    seg = wide(0)
    canvas = painter.canvas(seg)
    painter.paint(seg, canvas)
    columns = changed_columns(canvas[:360], colours[[0, 2]])
    assert 100 < columns.min() < 160 < 480 < columns.max() < 540  # in the middle of both halves
    strip = canvas[360:].reshape(-1, 3)
    for colour, is_there in zip(colours, (True, False, True), strict=True):
        assert ((strip == colour).all(axis=1).sum() > 50) == is_there
    assert len(strip) < 640 * 100
    assert {painter.canvas(wide(1, split)).shape for split in (1, 639)} == {canvas.shape}


def test_a_name_stays_while_it_has_room_and_narrow_frames_have_none():
    colours = palette(("road", "sky", "tree"))[[0, 2]]
    painter = Painter(channel_order="rgb", alpha=1.0)
    starts = []
    for number, split in enumerate((320, 350, 320, 120)):
        seg = wide(number, split)
        canvas = painter.canvas(seg)
        assert canvas.shape == (360, 640, 3)
        painter.paint(seg, canvas)
        starts.append(changed_columns(canvas, colours).min())
    assert starts[0] == starts[1] == starts[2] != starts[3]
    narrow = result(0, (180, 240))
    canvas = painter.canvas(narrow)
    painter.paint(narrow, canvas)
    assert (canvas == colours[0]).all()


@pytest.mark.parametrize(
    ("frames", "times"),
    [
        ([{"captured_at": 100.0, "clock": "file", "pts_seconds": n / 10} for n in range(5)],
         [0.0, 0.1, 0.2, 0.3, 0.4]),  # a file's own times
        ([{"captured_at": at} for at in (1.0, 1.0, 0.5, 2.0)], None),  # moved on: they rise
    ],
)  # fmt: skip
def test_times_are_a_file_s_own_and_rise(tmp_path, frames, times):
    write(tmp_path / "out.mp4", [result(n, **frame) for n, frame in enumerate(frames)])
    stamps = [time for time, _ in frames_of(tmp_path / "out.mp4")]
    assert len(stamps) == len(frames)
    assert stamps == sorted(set(stamps))
    assert times is None or stamps == pytest.approx(times, abs=1e-3)


def noise(count):
    draw = np.random.default_rng(0)
    for number in range(count):
        seg = result(number, (240, 320))
        seg.frame.image[:] = draw.integers(0, 256, seg.frame.image.shape)
        yield seg


def test_a_full_disk_ends_the_video_with_one_error_and_leaves_it_playable(tmp_path, caplog):
    with disk_with_room_for(700_000):
        stats = write(tmp_path / "out.mp4", noise(60), alpha=0.0)
    assert f"{tmp_path}/out.mp4: cannot be written: File too large" in stats.error
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    assert 0 < stats.written < 60
    (video,) = open_sources(tmp_path / "out.mp4")
    pictures = list(video.pictures(ReaderNow()))  # the last fragment may be torn
    assert len(pictures) >= 10


def test_lines_say_what_is_in_each_frame(tmp_path):
    seg = result(5, label=1, source="rtsp://cam", captured_at=time.monotonic())
    seg.labels[:12] = 255
    before = time.time()
    write(tmp_path / "a.jsonl", [seg, replace(result(6), reused=True)])
    first, second = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert (first["source"], first["index"], second["index"]) == ("rtsp://cam", 5, 6)
    assert first["classes"] == [{"name": "sky", "index": 1, "pixels": 36 * 64, "share": 0.75}]
    assert first["unknown_share"] == 0.25
    assert first["vocabulary_version"] == 3
    assert (first["reused"], second["reused"]) == (False, True)
    assert abs(first["time"] - before) < 60


def test_functions_are_called_in_order_in_a_thread_of_their_own():
    called = []
    writer = open_writer(lambda seg: called.append((seg.frame.index, threading.current_thread())))
    stats = finish(Sink(writer), *(result(number) for number in range(20)))
    assert [index for index, _ in called] == list(range(20))
    assert {thread for _, thread in called} != {threading.current_thread()}
    assert stats.written == 20


class Held(Writer):
    """A writer that writes when the test allows it."""

    def __init__(self, error=None):
        super().__init__("held")
        self.error = error
        self.allowed, self.began, self.closed = threading.Event(), threading.Event(), 0

    def write(self, seg):
        self.began.set()
        assert self.allowed.wait(LONG)
        if self.error is not None:
            raise self.error

    def close(self):
        self.closed += 1


def test_a_slow_sink_misses_frames_of_cameras_and_delays_nobody():
    writer = Held()
    sink = Sink(writer)
    sink.put(result(), waits=False)
    assert writer.began.wait(LONG)
    for number in range(QUEUE + 5):
        sink.put(result(number), waits=False)
    assert sink.stats().dropped == 5
    writer.allowed.set()
    assert (finish(sink).written, writer.closed) == (QUEUE + 1, 1)


def test_a_stream_that_is_stopped_does_not_wait_for_a_sink(caplog):
    writer = Held()
    sink = Sink(writer)
    sink.put(result(), waits=True)
    assert writer.began.wait(LONG)
    for number in range(QUEUE):
        sink.put(result(number), waits=True)
    sink.hurry()
    sink.put(result(), waits=True)
    sink.finish()
    sink.join(0.01)
    assert "held: not finished in time" in caplog.text
    writer.allowed.set()


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    ("cause", "resumes"), [(None, False), (ValueError("codec"), True), (OSError(28, "full"), True)]
)
def test_a_sink_that_fails_ends_once_and_takes_nothing_more(
    caplog, tmp_path, waits, cause, resumes
):
    error = SourceError("disk: gone")
    error.__cause__ = cause
    writer = Held(error)
    writer.folder = tmp_path
    writer.allowed.set()
    sink = Sink(writer, resumes=resumes)
    finish(sink, *(result(number) for number in range(3 * QUEUE)), waits=waits)
    sink.put(result(), waits=waits)
    stats = sink.stats()
    assert (stats.error, stats.written, sink.has_failed) == ("disk: gone", 0, True)
    assert writer.closed >= 1
    assert caplog.text.count("disk: gone") == 1


def test_an_error_of_a_caller_s_function_ends_its_sink_and_is_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda details: shown.append(details.exc_type))

    def function(seg):
        raise ZeroDivisionError

    assert "function: writing failed" in finish(Sink(open_writer(function)), result()).error
    assert shown == [ZeroDivisionError]


@pytest.mark.parametrize(
    "target", ["out.avi", "out", "", "  ", "rtsp://u:secret@cam", "a://b/c.mp4"]
)
def test_what_is_no_sink_is_refused(target):
    with refused(ArgumentError, "sink") as raised:
        open_sink(target)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("name", ["absent/out.mp4", "absent/out.jsonl", "file/masks/"])
def test_a_folder_that_is_absent_or_cannot_be_made_is_told_before_the_first_frame(tmp_path, name):
    (tmp_path / "file").write_text("")
    with refused(SourceError, None, name.rstrip("/")):
        open_sink(f"{tmp_path}/{name}")


@pytest.fixture
def no_new_files(monkeypatch):
    """Folders take none; the tests may run as root."""

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


@pytest.mark.usefixtures("no_new_files")
@pytest.mark.parametrize("name", ["out.mp4", "new.jsonl", "old.jsonl", "masks/"])
def test_what_is_read_only_is_told_before_the_first_frame(tmp_path, name, monkeypatch):
    (tmp_path / "old.jsonl").write_text("")
    if name == "old.jsonl":  # a folder that takes no new files takes lines
        assert write(tmp_path / name, [result()]).written == 1
    monkeypatch.setattr(os, "access", lambda *_: False)
    with refused(SourceError, None):
        open_sink(f"{tmp_path}/{name}")


def test_videos_take_sides_that_h264_does_not(tmp_path):
    """Every shape that the engine labels is recorded; what is too long is made smaller."""
    sizes = [(1, 1), (2, 32_767), (32_767, 3), (16_384, 1)]
    frames = [result(n, size, source=str(n)) for n, size in enumerate(sizes)]
    sources = [frame.frame.source for frame in frames]
    stats = write(tmp_path / "out.mp4", frames, sources=sources)
    assert (stats.error, stats.written, len(stats.files)) == (None, 4, 4)
    for name, size_hw in zip(stats.files, sizes, strict=True):
        ((_, image),) = frames_of(name)
        step = 1 + (max(size_hw) > 16_384)
        sides = [-(-side // step) for side in size_hw]
        assert image.shape[:2] == tuple(side + side % 2 for side in sides)
        assert max(image.shape) <= 16_384


@pytest.fixture
def disk(monkeypatch):
    """Whether files can be written, as the test says."""
    disk = SimpleNamespace(is_full=False)
    monkeypatch.setattr(sinks, "RETRY", 0.01)
    monkeypatch.setattr(sinks, "has_room", lambda folder: not disk.is_full)
    return disk


@pytest.mark.parametrize("name", ["out.mp4", "out.jsonl", "masks/"])
def test_what_is_not_kept_makes_room_on_a_full_disk(disk, name, tmp_path, monkeypatch):
    rotation = Rotation.parse("1h", "1s")
    (writer,) = open_writers(
        [f"{tmp_path}/{name}"], channel_order="rgb", alpha=0.5, rotation=rotation
    )
    writer.write(result())
    writer.close()
    (old,) = [p for p in tmp_path.rglob("*") if re.search(r"\dT\d{6}Z", p.name)]
    os.utime(old, (1e9, 1e9))
    monkeypatch.setattr(sinks, "has_room", lambda folder: not old.exists())
    write_of_the_class, full = type(writer).write, OSError(28, "No space left on device")

    def write_if_there_is_room(self, seg):
        if old.exists():
            raise SourceError("full") from full
        write_of_the_class(self, seg)

    monkeypatch.setattr(type(writer), "write", write_if_there_is_room)
    sink = Sink(writer, resumes=True)
    sink.put(result(1), waits=True)
    wait_until(lambda: not old.exists() and not sink.is_paused)
    stats = finish(sink, result(2))
    assert (stats.error, stats.written) == (None, 1)


@pytest.mark.parametrize("name", ["out.mp4", "out.jsonl"])
def test_files_of_a_camera_go_on_when_there_is_space_again(disk, name, tmp_path, caplog):
    (writer,) = open_writers([tmp_path / name], channel_order="rgb", alpha=0.5)
    sink = Sink(writer, resumes=True)
    disk.is_full = True
    with disk_with_room_for(400):
        for number in range(60):  # more than wait: nobody is held up
            sink.put(result(number), waits=True)
        wait_until(lambda: sink.stats().error)
    assert not sink.has_failed
    disk.is_full = False
    wait_until(lambda: not sink.is_paused)
    stats = finish(sink, *(result(number) for number in range(100, 110)))
    assert (stats.error, stats.written + stats.dropped) == (None, 70)
    assert [r.levelno for r in caplog.records] == [logging.ERROR, logging.WARNING]
    assert f"written again, {stats.dropped} frames are missing" in caplog.text
    if name == "out.mp4":
        assert len(frames_of(stats.files[-1])) == 10
        assert all(Path(file).stat().st_size for file in stats.files)
    else:
        lines = (tmp_path / name).read_text().splitlines()
        assert [json.loads(line)["index"] for line in lines[-10:]] == list(range(100, 110))
