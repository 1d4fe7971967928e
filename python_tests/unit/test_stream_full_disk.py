"""Sinks whose disk is full: cameras' go on when there is space, what is not kept makes room."""

import json
import logging
import os
import re
import resource
from pathlib import Path

import pytest

from support.recordings import finish, frames_of, result
from support.streams import wait_until
from zsseg_rt.common.recordings import Rotation
from zsseg_rt.errors import SourceError
from zsseg_rt.stream import sinks
from zsseg_rt.stream.sinks import Sink, open_writers
from zsseg_rt.stream.writers import Writer

pytest.importorskip("av")


class Disk:
    """Whether files can be written, as the test says."""

    def __init__(self, monkeypatch):
        self.is_full = False
        monkeypatch.setattr(sinks, "RETRY", 0.01)
        monkeypatch.setattr(sinks, "has_room", lambda folder: not self.is_full)


class OnDisk(Writer):
    """A writer of numbers onto a disk that fills up."""

    def __init__(self, disk, folder):
        super().__init__("on disk", folder=folder)
        self.disk, self.written, self.error = disk, [], OSError(28, "No space left on device")

    def write(self, seg):
        if self.disk.is_full:
            raise SourceError("on disk: full.") from self.error
        self.written.append(seg.frame.index)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def test_a_sink_of_a_camera_goes_on_when_there_is_space_again(disk, tmp_path, caplog):
    writer = OnDisk(disk, tmp_path)
    sink = Sink(writer, resumes=True)
    sink.put(result(0), waits=True)
    wait_until(lambda: sink.stats().written == 1)
    disk.is_full = True
    for number in range(1, 40):  # more than wait: nobody is held up
        sink.put(result(number), waits=True)
    wait_until(lambda: sink.stats().error == "on disk: full.")
    assert not sink.has_failed
    disk.is_full = False
    wait_until(lambda: not sink.is_paused)
    stats = finish(sink, result(40))
    assert (stats.written, stats.dropped, stats.error) == (2, 39, None)
    assert writer.written == [0, 40]
    assert [r.levelno for r in caplog.records] == [logging.ERROR, logging.WARNING]
    assert "written again, 39 frames are missing" in caplog.text


def test_a_sink_whose_disk_stays_full_ends_with_its_error(disk, tmp_path, caplog):
    disk.is_full = True
    sink = Sink(OnDisk(disk, tmp_path), resumes=True)
    sink.put(result(), waits=True)
    wait_until(lambda: sink.stats().error)
    stats = finish(sink)
    assert (stats.error, stats.dropped, sink.has_failed) == ("on disk: full.", 1, True)
    assert len(caplog.records) == 1


def test_errors_that_no_space_mends_end_a_sink(disk, tmp_path):
    writer = OnDisk(disk, tmp_path)
    disk.is_full, writer.error = True, ValueError("no such codec")
    sink = Sink(writer, resumes=True)
    sink.put(result(), waits=True)
    wait_until(lambda: sink.has_failed)


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
def test_real_files_go_on_when_there_is_space_again(disk, name, tmp_path, monkeypatch):
    (writer,) = open_writers([tmp_path / name], channel_order="rgb", alpha=0.5)
    sink = Sink(writer, resumes=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    disk.is_full = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, before[1]))
    try:
        for number in range(60):
            sink.put(result(number), waits=True)
        wait_until(lambda: sink.stats().error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    disk.is_full = False
    wait_until(lambda: not sink.is_paused)
    stats = finish(sink, *(result(number) for number in range(100, 110)))
    assert stats.error is None
    if name == "out.mp4":
        assert len(frames_of(stats.files[-1])) == 10
        assert all(Path(file).stat().st_size for file in stats.files)
    else:
        lines = (tmp_path / name).read_text().splitlines()
        assert [json.loads(line)["index"] for line in lines[-10:]] == list(range(100, 110))
