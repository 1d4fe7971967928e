"""Sinks: what they write and over restarts keep; sinks that are slow or fail, full disks."""

import json
import logging
import os
import re
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from support.errors import refused
from support.full_disk import disk_with_room_for
from support.recordings import LONG, finish, frames_of, open_writer, result, write
from support.streams import ReaderNow, wait_until
from zsseg_rt.common.recordings import Rotation, Series
from zsseg_rt.errors import ArgumentError, SourceError
from zsseg_rt.results.visualize import palette
from zsseg_rt.stream import sinks
from zsseg_rt.stream.painting import Painter
from zsseg_rt.stream.sinks import QUEUE, Sink, open_writers
from zsseg_rt.stream.source import GivenName
from zsseg_rt.stream.uris import open_sources
from zsseg_rt.stream.writers import Writer

pytest.importorskip("av")


@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
def test_an_overlay_video_shows_the_labels_at_their_times(tmp_path, channel_order):
    path, captured_at = tmp_path / "out.mp4", [5.0, 5.1, 5.25, 7.0]
    results = [result(n, label=n % 3, captured_at=at) for n, at in enumerate(captured_at)]
    stats = write(path, results, channel_order=channel_order)
    assert (stats.written, stats.dropped, stats.error, stats.files) == (4, 0, None, (str(path),))
    times, images = zip(*frames_of(path), strict=True)
    assert times == pytest.approx([0.0, 0.1, 0.25, 2.0], abs=1e-3)
    colours = palette(("road", "sky", "tree"))[[0, 1, 2, 0]]
    np.testing.assert_allclose(np.mean(images, axis=(1, 2)), colours, atol=6)  # limited range


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


def test_a_full_disk_ends_the_video_with_one_error_and_leaves_it_playable(tmp_path, caplog):
    noise, segs = np.random.default_rng(0), [result(n, (240, 320)) for n in range(60)]
    for seg in segs:
        seg.frame.image[:] = noise.integers(0, 256, seg.frame.image.shape)
    with disk_with_room_for(700_000):
        stats = write(tmp_path / "out.mp4", segs, alpha=0.0)
    assert f"{tmp_path}/out.mp4: cannot be written: File too large" in stats.error
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    assert 0 < stats.written < 60
    (video,) = open_sources(tmp_path / "out.mp4")
    pictures = list(video.pictures(ReaderNow()))  # the last fragment may be torn
    assert len(pictures) >= 10


def test_lines_say_what_is_in_each_frame(tmp_path):
    seg = result(5, label=1, source="rtsp://cam", captured_at=time.monotonic() - 1000)
    seg.labels[:12] = 255
    write(tmp_path / "a.jsonl", [seg, replace(result(6), reused=True)])
    first, second = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert (first["source"], first["index"], second["index"]) == ("rtsp://cam", 5, 6)
    assert first["classes"] == [{"name": "sky", "index": 1, "pixels": 36 * 64, "share": 0.75}]
    assert first["unknown_share"] == 0.25
    assert first["vocabulary_version"] == 3
    assert (first["reused"], second["reused"]) == (False, True)
    assert abs(first["time"] - time.time() + 1000) < 60


def test_functions_are_called_in_order_in_a_thread_of_their_own():
    called = []
    writer = open_writer(lambda seg: called.append((seg.frame.index, threading.current_thread())))
    stats = finish(Sink(writer), *(result(number) for number in range(20)))
    assert [index for index, _ in called] == list(range(20))
    assert {thread for _, thread in called} != {threading.current_thread()}
    assert stats.written == 20


def held_sink():
    """A sink that has begun to write a frame, its writer, and what lets it go on."""
    began, allowed, writer = threading.Event(), threading.Event(), Writer("held")

    def write(seg):
        began.set()
        assert allowed.wait(LONG)

    writer.write, writer.close = write, Mock()
    sink = Sink(writer)
    sink.put(result(), waits=True)
    assert began.wait(LONG)
    return sink, writer, allowed


def test_a_slow_sink_misses_frames_of_cameras_and_delays_nobody():
    sink, writer, allowed = held_sink()
    for number in range(QUEUE + 5):
        sink.put(result(number), waits=False)
    assert sink.stats().dropped == 5
    allowed.set()
    assert finish(sink).written == QUEUE + 1
    writer.close.assert_called_once_with()


def test_a_stream_that_is_stopped_does_not_wait_for_a_sink(caplog):
    sink, _, allowed = held_sink()
    for number in range(QUEUE):
        sink.put(result(number), waits=True)
    sink.hurry()
    sink.put(result(), waits=True)
    sink.finish()
    sink.join(0.6)
    assert "held: not finished in time" in caplog.text
    allowed.set()
    sink.join(LONG)
    assert (sink.stats().written, sink.stats().dropped) == (1, QUEUE + 1)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    ("cause", "resumes"), [(None, False), (ValueError("codec"), True), (OSError(28, "full"), True)]
)
def test_a_sink_that_fails_ends_once_and_takes_nothing_more(
    caplog, tmp_path, waits, cause, resumes
):
    error, writer = SourceError("disk: gone"), Writer("disk", folder=tmp_path)
    error.__cause__ = cause
    writer.write, writer.close = Mock(side_effect=error), Mock()
    sink = Sink(writer, resumes=resumes)
    finish(sink, *(result(number) for number in range(3 * QUEUE)), waits=waits)
    sink.put(result(), waits=waits)
    stats = sink.stats()
    assert (stats.error, stats.written, sink.has_failed) == ("disk: gone", 0, True)
    writer.close.assert_called()
    assert caplog.text.count("disk: gone") == 1


def test_an_error_of_a_caller_s_function_ends_its_sink_and_is_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda details: shown.append(details.exc_type))
    sink = Sink(open_writer(Mock(side_effect=ZeroDivisionError, __qualname__="function")))
    assert "function: writing failed" in finish(sink, result()).error
    assert shown == [ZeroDivisionError]


@pytest.mark.parametrize(
    "target", ["out.avi", "out", "", "  ", "rtsp://u:secret@cam", "a://b/c.mp4"]
)
def test_what_is_no_sink_is_refused(target):
    with refused(ArgumentError, "sink") as raised:
        open_writer(target)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("name", ["absent/out.mp4", "absent/out.jsonl", "file/masks/"])
def test_a_folder_that_is_absent_or_cannot_be_made_is_told_before_the_first_frame(tmp_path, name):
    (tmp_path / "file").write_text("")
    with refused(SourceError, None, name.rstrip("/")):
        open_writer(f"{tmp_path}/{name}")


@pytest.mark.parametrize("name", ["out.mp4", "new.jsonl", "old.jsonl", "masks/"])
def test_what_is_read_only_is_told_before_the_first_frame(tmp_path, name, monkeypatch):
    """The tests may run as root."""
    refusal = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(tempfile, "TemporaryFile", refusal)
    (tmp_path / "old.jsonl").write_text("")
    if name == "old.jsonl":  # a folder that takes no new files takes lines
        assert write(tmp_path / name, [result()]).written == 1
    monkeypatch.setattr(os, "access", lambda *_: False)
    with refused(SourceError, None):
        open_writer(f"{tmp_path}/{name}")


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


@pytest.mark.parametrize("name", ["out.mp4", "out.jsonl", "masks/"])
def test_what_is_not_kept_makes_room_on_a_full_disk(name, tmp_path, monkeypatch):
    writer = open_writer(f"{tmp_path}/{name}", rotation=Rotation.parse("1h", "1s"))
    writer.write(result())
    writer.close()
    (old,) = [p for p in tmp_path.rglob("*") if re.search(r"\dT\d{6}Z", p.name)]
    os.utime(old, (1e9, 1e9))
    monkeypatch.setattr(sinks, "RETRY", 0.01)
    monkeypatch.setattr(sinks, "has_room", lambda folder: not old.exists())
    write, full = writer.write, OSError(28, "No space left on device")

    def write_if_there_is_room(seg):
        if old.exists():
            raise SourceError("full") from full
        write(seg)

    writer.write = write_if_there_is_room
    sink = Sink(writer, resumes=True)
    sink.put(result(1), waits=True)
    wait_until(lambda: not old.exists() and not sink.is_paused)
    stats = finish(sink, result(2))
    assert (stats.error, stats.written) == (None, 1)


@pytest.mark.parametrize("name", ["out.mp4", "out.jsonl"])
def test_files_of_a_camera_go_on_when_there_is_space_again(name, tmp_path, caplog, monkeypatch):
    has_room, sink = threading.Event(), Sink(open_writer(tmp_path / name), resumes=True)
    monkeypatch.setattr(sinks, "RETRY", 0.01)
    monkeypatch.setattr(sinks, "has_room", lambda folder: has_room.is_set())
    with disk_with_room_for(400):
        for number in range(60):  # more than wait: nobody is held up
            sink.put(result(number), waits=True)
        wait_until(lambda: sink.stats().error)
    assert not sink.has_failed
    has_room.set()
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


DAY = 86_400


def plain(text):
    """A path whose time stamp of today is named."""
    return re.sub(r"(?!2020)\d{8}T\d{6}Z(_\d+)?", "STAMP", str(text))


def names_in(folder):
    return sorted(plain(path.name) for path in Path(folder).iterdir())


def test_a_restart_continues_lines_and_keeps_videos_and_pictures(tmp_path):
    for run in range(3):  # within a second or two
        for target in ("out.mp4", "out.jsonl", "masks/"):
            stats = write(f"{tmp_path}/{target}", [result(n, label=run) for n in range(2)])
            assert (stats.error, stats.written) == (None, 2)
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1] * 3
    videos = ["out-STAMP.mp4", "out-STAMP.mp4", "out.jsonl", "out.mp4"]
    assert names_in(tmp_path) == ["masks", *videos]
    assert [len(frames_of(path)) for path in tmp_path.glob("*.mp4")] == [2, 2, 2]
    images = ["00000000.png", "00000001.png"]
    assert names_in(tmp_path / "masks") == [*images, "STAMP", "STAMP"]
    for folder in (tmp_path / "masks").glob("*Z*"):
        assert names_in(folder) == images


def test_a_size_change_replaces_no_file_that_nobody_named(tmp_path):
    for name in ("out-2.mp4", "out-3.mp4"):
        (tmp_path / name).write_bytes(b"somebody's")
    sizes = [(48, 64), (64, 48), (48, 64)]
    stats = write(tmp_path / "out.mp4", [result(n, size) for n, size in enumerate(sizes)])
    assert stats.error is None
    names = ["out-2.mp4", "out-3.mp4", "out-STAMP.mp4", "out-STAMP.mp4", "out.mp4"]
    assert names_in(tmp_path) == names
    assert {(tmp_path / f"out-{n}.mp4").read_bytes() for n in (2, 3)} == {b"somebody's"}
    assert [len(frames_of(name)) for name in stats.files] == [1, 1, 1]


def test_what_a_power_cut_left_does_not_break_the_next_start(tmp_path):
    for number, left in enumerate([b"", b"\0\0\0\x1cftypisom\0\0"]):
        video = tmp_path / f"{number}.mp4"
        video.write_bytes(left)
        stats = write(video, [result()])
        assert stats.error is None
        assert video.read_bytes() == left
        assert len(frames_of(stats.files[0])) == 1
    (tmp_path / "out.jsonl").write_bytes(b'{"source": "a", "pts_seconds": 7}\n{"ind')
    write(tmp_path / "out.jsonl", [result(8)])
    first, torn, last = (tmp_path / "out.jsonl").read_text().splitlines()
    assert (json.loads(first)["pts_seconds"], torn, json.loads(last)["index"]) == (7, '{"ind', 8)


SOURCES = ["rtsp://cam/1", GivenName("Yard"), "rtsp://cam/3"]


def test_files_are_numbered_in_the_order_of_the_list_and_carry_names(tmp_path):
    late_first = [result(5, source=source) for source in reversed(SOURCES)]
    video = write(tmp_path / "out.mp4", late_first, sources=SOURCES)
    files = [f"{tmp_path}/out{tag}.mp4" for tag in ("", "-Yard", "-3")]
    assert video.whose == dict(zip(files, SOURCES, strict=True))
    assert sorted(video.files) == sorted(files)
    masks = write(f"{tmp_path}/m/", late_first, sources=SOURCES)
    assert names_in(tmp_path / "m") == ["00000005.png", "3-00000005.png", "Yard-00000005.png"]
    assert masks.whose[f"{tmp_path}/m/Yard-*.png"] == "Yard"
    again = write(f"{tmp_path}/m/", late_first, sources=SOURCES)
    assert plain(next(iter(again.whose))) == f"{tmp_path}/m/3-STAMP/*.png"
    assert len(names_in(tmp_path / "m")) == 6


def test_sinks_that_would_share_a_file_are_refused():
    settings = {"channel_order": "rgb", "alpha": 0.5, "sources": SOURCES}
    for targets in ("out.mp4 out-3.mp4", "out-Yard.mp4 out.mp4", "a.jsonl ./a.jsonl"):
        with refused(ArgumentError, "sink"):
            open_writers(targets.split(), **settings)
    open_writers(["a.jsonl", "a-3.jsonl"], **settings)  # lines are not one file per source
    with refused(ArgumentError, "alpha"):
        open_writers(["out.mp4"], **settings | {"alpha": 1.5})
    with refused(ArgumentError, "rotate"):
        open_writers([print], rotation=Rotation.parse("1h"), **settings)


def test_rotation_by_time_begins_new_videos_at_key_frames(tmp_path):
    frames = [result(n, captured_at=n / 10) for n in range(45)]
    stats = write(tmp_path / "out.mp4", frames, rotation=Rotation.parse("2s"))
    assert names_in(tmp_path) == ["out-STAMP.mp4"] * 3
    assert [len(frames_of(name)) for name in stats.files] == [20, 20, 5]


def test_rotation_by_size_begins_new_lines_and_folders(tmp_path):
    rotation, segs = Rotation.parse("10min,1kB"), [result(n) for n in range(40)]
    (tmp_path / "lines").mkdir()
    lines = write(tmp_path / "lines/out.jsonl", segs, rotation=rotation)
    masks = write(f"{tmp_path}/new/masks/", segs, rotation=rotation)
    assert lines.error is masks.error is None
    for folder, name in (("lines", "out-STAMP.jsonl"), ("new/masks", "STAMP")):
        names = names_in(tmp_path / folder)
        assert len(names) > 2
        assert set(names) == {name}
    assert len(list(tmp_path.rglob("*.png"))) == 40
    rows = [row for file in lines.files for row in Path(file).read_text().splitlines()]
    assert [json.loads(row)["index"] for row in rows] == list(range(40))
    assert max(Path(file).stat().st_size for file in lines.files) < 2000


def test_a_video_that_somebody_removes_is_followed_by_another(tmp_path):
    rotation = Rotation.parse("1h")
    writer = open_writer(tmp_path / "out.mp4", rotation=rotation)
    writer.write(result(0))
    Path(writer.files[0]).unlink()
    for number in range(1, 15):
        writer.write(result(number))
    writer.close()
    assert len(frames_of(writer.files[1])) == 5  # from the next key frame on


def test_lines_continue_the_newest_file_until_it_is_due(tmp_path):
    rotation = Rotation.parse("1min")
    for _ in range(3):
        write(tmp_path / "out.jsonl", [result()] * 2, rotation=rotation)
    (only,) = tmp_path.iterdir()
    assert len(only.read_text().splitlines()) == 6
    old = only.rename(tmp_path / "out-20200101T000000Z.jsonl")
    write(tmp_path / "out.jsonl", [result()], rotation=rotation)
    assert len(old.read_text().splitlines()) == 6
    assert len(names_in(tmp_path)) == 2


def aged(path, days, size=10):
    """A recording of this sink's, written some days ago."""
    path.write_bytes(b"x" * size)
    written = time.time() - days * DAY
    os.utime(path, (written, written))
    return path


def test_retention_removes_what_this_series_made_and_nothing_else(tmp_path):
    foreign = [
        "out.mp4", "out-2.mp4", "out-2-20200101T000000Z.mp4", "out-20200101T000000Z.txt",
        "out-20200101T000000.mp4", "Out-20200101T000000Z.mp4", "out-20200101T000000Z-copy.mp4",
        "an-out-20200101T000000Z.mp4",
    ]  # fmt: skip
    for name in foreign:
        aged(tmp_path / name, 30)
    (tmp_path / "out-20200102T000000Z.mp4").symlink_to(tmp_path / "out.mp4")
    (tmp_path / "out-20200103T000000Z.mp4").mkdir()
    foreign += ["out-20200102T000000Z.mp4", "out-20200103T000000Z.mp4"]
    aged(tmp_path / "out-20200101T000000Z.mp4", 8)
    aged(tmp_path / "out-20200101T000000Z_2.mp4", 8)
    kept = aged(tmp_path / "out-20200105T000000Z.mp4", 6).name
    write(tmp_path / "out.mp4", [result()], rotation=Rotation.parse("1h", "7d"))
    assert names_in(tmp_path) == sorted([*foreign, kept, "out-STAMP.mp4"])


def test_retention_by_size_keeps_the_newest(tmp_path):
    for day in range(1, 6):
        aged(tmp_path / f"out-2020010{day}T000000Z.mp4", 10 - day, size=400)
    write(tmp_path / "out.mp4", [result()], rotation=Rotation.parse("1MB", "1kB"))
    kept = [f"out-2020010{day}T000000Z.mp4" for day in (4, 5)]
    assert names_in(tmp_path) == [*kept, "out-STAMP.mp4"]


def test_retention_of_pictures_leaves_folders_with_anything_else(tmp_path):
    for day, other in ((1, "notes.txt"), (2, "00000002.png")):
        folder = tmp_path / f"masks/2020010{day}T000000Z"
        folder.mkdir(parents=True)
        for name in ("00000001.png", other):
            (folder / name).write_bytes(b"x")
        os.utime(folder, (1e9, 1e9))
    write(f"{tmp_path}/masks/", [result()], rotation=Rotation.parse("1h", "7d"))
    assert names_in(tmp_path / "masks") == ["20200101T000000Z", "STAMP"]
    assert names_in(tmp_path / "masks/20200101T000000Z") == ["notes.txt"]


def test_what_cannot_be_removed_is_logged_once_and_recorded_on(tmp_path, monkeypatch, caplog):
    for day in (1, 2):
        aged(tmp_path / f"out-2020010{day}T000000Z.mp4", 30)
    refusal = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(Path, "unlink", refusal)
    frames = [result(n, captured_at=n) for n in range(4)]
    stats = write(tmp_path / "out.mp4", frames, rotation=Rotation.parse("1s", "1d"))
    assert (stats.error, stats.written) == (None, 4)
    assert caplog.text.count("old files cannot be removed: Permission denied") == 1


def test_a_clock_that_is_set_back_replaces_and_removes_nothing(tmp_path):
    clock = [1.6e9]
    series = Series(tmp_path, "a", ".jsonl", Rotation.parse("1h", "1d"), now=lambda: clock[0])
    first, _ = series.resume()
    assert series.resume()[0] == first
    clock[0] -= 7 * DAY
    second, age = series.resume()
    assert (second != first, age) == (True, 0.0)
    assert series.resume()[0] == second
    clock[0] += 7 * DAY
    assert series.resume()[0] == first
    assert len(names_in(tmp_path)) == 2


@pytest.mark.parametrize("keep", ["1kB", "1d", "1d,1kB"])
@pytest.mark.parametrize("suffix", [".mp4", ""])
def test_a_clock_that_was_ahead_costs_no_new_recording(tmp_path, keep, suffix):
    """The recording begun first goes first."""
    clock, paths = [time.time() + 900 * DAY], []
    series = Series(tmp_path, "a", suffix, Rotation.parse("1h", keep), now=lambda: clock[0])
    for number in range(6):
        paths.append(series.begin())
        (paths[-1] / "00000000.png" if not suffix else paths[-1]).write_bytes(b"x" * 600)
        os.utime(paths[-1], (clock[0], clock[0]))
        clock[0] += (-899.5 if number == 2 else 0.6) * DAY
    there = [path.exists() for path in paths]
    assert there[-2:] == [True, True]
    assert not any(there[:2])


@pytest.mark.parametrize(
    ("target", "rotation"), [("a.jsonl", None), ("m/", None), ("a.jsonl", Rotation.parse("1h"))]
)
def test_two_do_not_write_one_output(tmp_path, target, rotation):
    first = open_writer(f"{tmp_path}/{target}", rotation=rotation)
    first.write(result())
    with pytest.raises(SourceError, match="to write here alone"):
        open_writer(f"{tmp_path}/{target}", rotation=rotation).write(result())
    first.close()
    open_writer(f"{tmp_path}/{target}", rotation=rotation).write(result())


def test_times_and_sizes_are_read():
    assert Rotation.parse(None, None) == Rotation()
    assert Rotation.parse("10min", "7d") == Rotation(seconds=600, keep_seconds=7 * DAY)
    assert Rotation.parse("1.5h, 2 GB", "1d,20gb") == Rotation(5400, 2e9, DAY, 2e10)


@pytest.mark.parametrize(
    ("rotate", "keep", "argument"),
    [(text, None, "rotate")
     for text in ("", "10", "10m", "0min", "-1h", "1h,2h", "1h,", "1e3s")]
    + [("1h", "forever", "keep"), (None, "7d", "keep")],
)  # fmt: skip
def test_what_is_no_time_or_size_is_refused(rotate, keep, argument):
    with refused(ArgumentError, argument):
        Rotation.parse(rotate, keep)
