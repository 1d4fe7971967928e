"""Recordings over restarts: nothing is replaced, files follow each other, old ones are removed."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.errors import refused
from support.recordings import frames_of, open_writer, result, write
from zsseg_rt.common.recordings import Rotation, Series
from zsseg_rt.errors import ArgumentError, SourceError
from zsseg_rt.stream.sinks import open_writers
from zsseg_rt.stream.source import GivenName

pytest.importorskip("av")

STAMP = r"\d{8}T\d{6}Z(_\d+)?"
DAY = 86_400


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def are(names, *patterns):
    left = list(names)
    for pattern in patterns:
        left.remove(next(name for name in left if re.fullmatch(pattern, name)))
    return not left


def test_a_restart_continues_lines_and_keeps_videos_and_pictures(tmp_path):
    for run in range(3):  # within a second or two
        for target in ("out.mp4", "out.jsonl", "masks/"):
            stats = write(f"{tmp_path}/{target}", [result(n, label=run) for n in range(2)])
            assert (stats.error, stats.written) == (None, 2)
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1] * 3
    videos = [name for name in names_in(tmp_path) if name.endswith(".mp4")]
    assert are(videos, r"out\.mp4", rf"out-{STAMP}\.mp4", rf"out-{STAMP}\.mp4")
    assert [len(frames_of(tmp_path / name)) for name in videos] == [2, 2, 2]
    images = ["00000000.png", "00000001.png"]
    assert are(names_in(tmp_path / "masks"), *map(re.escape, images), STAMP, STAMP)
    for folder in (tmp_path / "masks").glob("*Z*"):
        assert names_in(folder) == images


def test_a_size_change_replaces_no_file_that_nobody_named(tmp_path):
    for name in ("out-2.mp4", "out-3.mp4"):
        (tmp_path / name).write_bytes(b"somebody's")
    sizes = [(48, 64), (64, 48), (48, 64)]
    stats = write(tmp_path / "out.mp4", [result(n, size) for n, size in enumerate(sizes)])
    assert stats.error is None
    names = names_in(tmp_path)
    stamped = rf"out-{STAMP}\.mp4"
    assert are(names, r"out\.mp4", r"out-2\.mp4", r"out-3\.mp4", stamped, stamped)
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
    expected = {
        f"{tmp_path}/out{tag}.mp4": s for tag, s in zip(["", "-Yard", "-3"], SOURCES, strict=True)
    }
    assert video.whose == expected
    assert set(video.files) == set(expected)
    masks = write(f"{tmp_path}/m/", late_first, sources=SOURCES)
    assert names_in(tmp_path / "m") == ["00000005.png", "3-00000005.png", "Yard-00000005.png"]
    assert masks.whose[f"{tmp_path}/m/Yard-*.png"] == "Yard"
    again = write(f"{tmp_path}/m/", late_first, sources=SOURCES)
    assert re.fullmatch(rf"{tmp_path}/m/3-{STAMP}/\*\.png", next(iter(again.whose)))
    assert len(names_in(tmp_path / "m")) == 6


@pytest.mark.parametrize(
    "targets", [["out.mp4", "out-3.mp4"], ["out-Yard.mp4", "out.mp4"], ["a.jsonl", "./a.jsonl"]]
)
def test_sinks_that_would_share_a_file_are_refused(targets):
    settings = {"channel_order": "rgb", "alpha": 0.5, "sources": SOURCES}
    with refused(ArgumentError, "sink"):
        open_writers(targets, **settings)
    with refused(ArgumentError, "alpha"):
        open_writers(targets, **settings | {"alpha": 1.5})
    with refused(ArgumentError, "rotate"):
        open_writers([print], rotation=Rotation.parse("1h"), **settings)


def test_rotation_by_time_begins_new_videos_at_key_frames(tmp_path):
    frames = [result(n, captured_at=n / 10) for n in range(45)]
    stats = write(tmp_path / "out.mp4", frames, rotation=Rotation.parse("2s"))
    assert are(names_in(tmp_path), *[rf"out-{STAMP}\.mp4"] * 3)
    assert [len(frames_of(name)) for name in stats.files] == [20, 20, 5]


@pytest.mark.parametrize(
    ("target", "suffix", "kind"), [("out.jsonl", r"out-{}\.jsonl", ""), ("masks/", "{}", "masks")]
)
def test_rotation_by_size_begins_new_lines_and_folders(tmp_path, target, suffix, kind):
    rotation = Rotation.parse("10min,1kB")
    stats = write(f"{tmp_path}/{target}", [result(n) for n in range(40)], rotation=rotation)
    assert stats.error is None
    names = names_in(tmp_path / kind)
    assert len(names) > 2
    assert are(names, *[suffix.replace("{}", STAMP)] * len(names))
    if kind:
        assert len(list((tmp_path / kind).rglob("*.png"))) == 40
        return
    lines = [line for f in stats.files for line in Path(f).read_text().splitlines()]
    assert [json.loads(line)["index"] for line in lines] == list(range(40))
    assert max(Path(f).stat().st_size for f in stats.files) < 2000


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
    rotation = Rotation.parse("1h")
    for number in range(3):
        write(tmp_path / "out.jsonl", [result(number)], rotation=rotation)
    (only,) = tmp_path.iterdir()
    assert len(only.read_text().splitlines()) == 3
    old = only.rename(tmp_path / "out-20200101T000000Z.jsonl")
    write(tmp_path / "out.jsonl", [result()], rotation=rotation)
    assert len(old.read_text().splitlines()) == 3
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
    stats = write(tmp_path / "out.mp4", [result()], rotation=Rotation.parse("1h", "7d"))
    newest = Path(stats.files[0]).name
    assert names_in(tmp_path) == sorted([*foreign, kept, newest])


def test_retention_by_size_keeps_the_newest(tmp_path):
    for day in range(1, 6):
        aged(tmp_path / f"out-2020010{day}T000000Z.mp4", 10 - day, size=400)
    write(tmp_path / "out.mp4", [result()], rotation=Rotation.parse("1MB", "1kB"))
    names = names_in(tmp_path)
    assert names[:2] == ["out-20200104T000000Z.mp4", "out-20200105T000000Z.mp4"]
    assert len(names) == 3


def test_retention_of_pictures_leaves_folders_with_anything_else(tmp_path):
    for day, other in ((1, "notes.txt"), (2, "00000002.png")):
        folder = tmp_path / f"masks/2020010{day}T000000Z"
        folder.mkdir(parents=True)
        for name in ("00000001.png", other):
            (folder / name).write_bytes(b"x")
        os.utime(folder, (1e9, 1e9))
    write(f"{tmp_path}/masks/", [result()], rotation=Rotation.parse("1h", "7d"))
    assert are(names_in(tmp_path / "masks"), "20200101T000000Z", STAMP)
    assert names_in(tmp_path / "masks/20200101T000000Z") == ["notes.txt"]


def test_what_cannot_be_removed_is_logged_once_and_recorded_on(tmp_path, monkeypatch, caplog):
    for day in (1, 2):
        aged(tmp_path / f"out-2020010{day}T000000Z.mp4", 30)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
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


WRITE = """
import sys, time
from support.recordings import open_writer, result
from zsseg_rt.common.recordings import Rotation
rotation = Rotation.parse(*sys.argv[2:]) if sys.argv[2:] else None
writer = open_writer(sys.argv[1], rotation=rotation)
writer.write(result())
print("written", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("target", "rotation"), [("a.jsonl", []), ("m/", []), ("a.jsonl", ["1h", "7d"])]
)
def test_two_processes_do_not_write_one_output(tmp_path, target, rotation):
    target = f"{tmp_path}/{target}"
    settings = {"rotation": Rotation.parse(*rotation) if rotation else None}
    command = [sys.executable, "-c", WRITE, target, *rotation]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout.readline() == b"written\n"
        with pytest.raises(SourceError, match="to write here alone"):
            open_writer(target, **settings).write(result())
        other.kill()
    open_writer(target, **settings).write(result())


@pytest.mark.parametrize(
    ("rotate", "keep", "expected"),
    [
        ("10min", "7d", Rotation(seconds=600, keep_seconds=7 * DAY)),
        ("1.5h, 2 GB", "1d,20gb",
         Rotation(seconds=5400, num_bytes=2e9, keep_seconds=DAY, keep_bytes=2e10)),
        (None, None, Rotation()),
    ],
)  # fmt: skip
def test_times_and_sizes_are_read(rotate, keep, expected):
    assert Rotation.parse(rotate, keep) == expected


@pytest.mark.parametrize(
    ("rotate", "keep", "argument"),
    [(text, None, "rotate")
     for text in ("", "10", "10m", "0min", "-1h", "1h,2h", "1h,", "1e3s")]
    + [("1h", "forever", "keep"), (None, "7d", "keep")],
)  # fmt: skip
def test_what_is_no_time_or_size_is_refused(rotate, keep, argument):
    with refused(ArgumentError, argument):
        Rotation.parse(rotate, keep)
