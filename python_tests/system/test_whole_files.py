"""Files and folders: whole or not at all, whoever writes, and whenever the writer is ended."""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from support.errors import refused
from zsseg_rt.bundles.bundle import MANIFEST
from zsseg_rt.common import files
from zsseg_rt.common.files import remove_entry, whole_file, write_whole
from zsseg_rt.errors import BundleError
from zsseg_rt.export.bundle_writer import new_bundle_folder

NAMES = (MANIFEST, "a.onnx", "c/d.npy")

# Writes for ever at sys.argv[2]: a file, or a bundle whose files hold one word.
WRITER = f"""
import sys
from contextlib import nullcontext
from pathlib import Path
from zsseg_rt.common.files import write_whole
from zsseg_rt.export.bundle_writer import new_bundle_folder

kind, path, word, count = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
print("ready", flush=True)
for _ in range(count):
    if kind == "file":
        write_whole(path, word.encode() * 50_000)
        continue
    with new_bundle_folder(path, overwrite=True, verify=False) as folder:
        (folder / "c").mkdir()
        for name in {NAMES}:
            (folder / name).write_text(word * 1000)
"""


def write_bundle(path, word, *, overwrite=True):
    with new_bundle_folder(path, overwrite=overwrite, verify=False) as folder:
        (folder / "c").mkdir()
        for name in NAMES:
            (folder / name).write_text(word * 1000)


def write(path, word):
    write_whole(path, word.encode() * 50_000) if path.suffix == ".png" else write_bundle(path, word)


def word_of(path):
    """The word that fills a whole file, or all files of a whole bundle."""
    kept = [path] if path.is_file() else [path / name for name in NAMES]
    texts = {file.read_text() for file in kept}
    (text,) = texts
    assert text == text[:3] * (len(text) // 3)
    assert len(text) == (150_000 if path.is_file() else 3000)
    return text[:3]


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["f.png", "c.zsseg"])
def path(request, tmp_path):
    return tmp_path / request.param


@pytest.mark.parametrize("failing", ["fsync", "replace", "rename"])
def test_failed_steps_keep_what_was_there(path, monkeypatch, failing):
    write(path, "old")

    def fail(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if failing == "fsync" else Path, failing, fail)
    is_used = failing == "fsync" or (failing == "replace") == (path.suffix == ".png")
    if is_used:
        with pytest.raises((OSError, BundleError), match="No space left on device"):
            write(path, "new")
    monkeypatch.undo()
    assert word_of(path) == "old"
    assert entries(path.parent) == [path.name]


def test_ctrl_c_keeps_what_was_there(path):
    write(path, "old")
    whole = (
        whole_file(path)
        if path.suffix == ".png"
        else new_bundle_folder(path, overwrite=True, verify=False)
    )
    with pytest.raises(KeyboardInterrupt), whole:
        raise KeyboardInterrupt
    assert word_of(path) == "old"
    assert entries(path.parent) == [path.name]


def start_writer(path, word, count=10**6):
    kind = "file" if path.suffix == ".png" else "bundle"
    call = [sys.executable, "-c", WRITER, kind, str(path), word, str(count)]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_killed_writers_leave_the_old_or_the_new(path):
    write(path, "old")
    for _ in range(3):
        process, before = start_writer(path, "new"), set(entries(path.parent))
        while set(entries(path.parent)) <= before:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        files.remove_leftovers(path)
        assert word_of(path) in ("old", "new")
        assert all(
            name.startswith(f".{path.name}.") for name in {*entries(path.parent)} - {path.name}
        )
    write(path, "end")
    assert word_of(path) == "end"
    for name in entries(path.parent):
        os.utime(path.parent / name, (time.time() - 4000,) * 2)
    files.remove_abandoned(path.parent)
    files.remove_leftovers(path)
    assert entries(path.parent) == [path.name]


def test_writers_at_the_same_time_leave_something_whole(path):
    count = 100 if path.suffix == ".png" else 1
    writers = [start_writer(path, word, count) for word in ("abc", "def")]
    assert [writer.wait() for writer in writers] in ([0, 0], [0, 1], [1, 0])
    assert word_of(path) in ("abc", "def")
    assert entries(path.parent) == [path.name]


def test_a_file_is_like_any_other(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / ("x" * 255), b"x")  # no longer name beside it
        with whole_file(tmp_path / "streamed") as stream:
            stream.write(b"x")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {0o640}
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "absent" / "file", b"x")


def test_a_bundle_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "c.zsseg"
    with (
        pytest.raises(BundleError, match="File exists"),
        new_bundle_folder(path, overwrite=False, verify=False),
    ):
        write_bundle(path, "new")
    assert word_of(path) == "new"
    assert entries(tmp_path) == ["c.zsseg"]


def test_an_old_bundle_set_aside_by_a_killed_writer_comes_back(tmp_path):
    path = tmp_path / "c.zsseg"
    write_bundle(path, "old")
    others = [".c.zsseg.20261122", ".c.zsseg.writing-", ".d.zsseg.writing-abcdefg1"]
    others += [".c.zsseg.writing-x.zsseg.writing-abcdefg1"]
    for name in others:
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9, 1e9))
    hidden = tmp_path / ".c.zsseg.writing-abcdefg1"
    (hidden / "c.zsseg").mkdir(parents=True)
    path.rename(hidden / "old")
    os.utime(hidden, (1e9, 1e9))
    with refused(BundleError, None, "c.zsseg"):
        write_bundle(path, "new", overwrite=False)
    assert word_of(path) == "old"
    assert entries(tmp_path) == sorted([*others, "c.zsseg"])


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])  # the first syncs files only
def test_everything_is_on_the_disk_before_it_is_moved(tmp_path, monkeypatch, code):
    synced, fsync, rename = [], os.fsync, Path.rename

    def remember(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    def put(new, path):
        assert set(synced) == {*(Path(name).name for name in NAMES), "c", "c.zsseg"}
        return rename(new, path)

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(Path, "rename", put)
    with nullcontext() if code == errno.EINVAL else pytest.raises((OSError, BundleError)):
        write_bundle(tmp_path / "c.zsseg", "new")
        assert synced[-1] == tmp_path.name


@pytest.mark.parametrize("kind", ["file", "folder", "loop", "link to a folder", "nothing"])
def test_remove_entry_takes_away_what_is_there_and_follows_no_link(tmp_path, kind):
    entry, other = tmp_path / "entry", tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("kept")
    if kind == "file":
        entry.write_text("x")
    elif kind == "folder":
        (entry / "deeper").mkdir(parents=True)
    elif kind != "nothing":
        entry.symlink_to(entry if kind == "loop" else other)
    remove_entry(entry)
    assert not os.path.lexists(entry)
    assert (other / "kept").read_text() == "kept"
