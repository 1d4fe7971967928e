"""Files, folders and caches: whole or not at all, whoever writes, and damage is told."""

import errno
import io
import multiprocessing
import os
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt.bundles.bundle import MANIFEST
from zsseg_rt.common.files import (
    Cache,
    Entry,
    read_npy,
    remove_abandoned,
    remove_entry,
    remove_leftovers,
    whole_file,
    write_whole,
)
from zsseg_rt.errors import BundleError
from zsseg_rt.export.bundle_writer import new_bundle_folder

NAMES = (MANIFEST, "a.onnx", "c/d.npy")


def new_bundle(path, *, overwrite=True):
    return new_bundle_folder(path, overwrite=overwrite, verify=False)


def write(path, word, *, overwrite=True):
    """Write a file, or a bundle whose files hold one word."""
    if path.suffix == ".png":
        write_whole(path, word.encode() * 50_000)
        return
    with new_bundle(path, overwrite=overwrite) as folder:
        (folder / "c").mkdir()
        for name in NAMES:
            (folder / name).write_text(word * 1000)


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
    if failing == "fsync" or (failing == "replace") == (path.suffix == ".png"):
        with pytest.raises((OSError, BundleError), match="No space left on device"):
            write(path, "new")
    monkeypatch.undo()
    assert word_of(path) == "old"
    assert entries(path.parent) == [path.name]


def test_ctrl_c_keeps_what_was_there(path):
    write(path, "old")
    whole = whole_file(path) if path.suffix == ".png" else new_bundle(path)
    with pytest.raises(KeyboardInterrupt), whole:
        raise KeyboardInterrupt
    assert word_of(path) == "old"
    assert entries(path.parent) == [path.name]


def start_writer(path, word, count=10**6):
    def write_often():
        for _ in range(count):
            write(path, word)

    process = multiprocessing.get_context("fork").Process(target=write_often)
    process.start()
    return process


def test_killed_writers_leave_the_old_or_the_new(path):
    write(path, "old")
    for _ in range(3):
        before = set(entries(path.parent))
        process = start_writer(path, "new")
        while set(entries(path.parent)) <= before:
            assert process.is_alive()
        process.kill()
        process.join()
        remove_leftovers(path)
        assert word_of(path) in ("old", "new")
        others = {*entries(path.parent)} - {path.name}
        assert all(name.startswith(f".{path.name}.") for name in others)
    write(path, "end")
    assert word_of(path) == "end"
    for name in entries(path.parent):
        os.utime(path.parent / name, (time.time() - 4000,) * 2)
    remove_abandoned(path.parent)
    remove_leftovers(path)
    assert entries(path.parent) == [path.name]


def test_writers_at_the_same_time_leave_something_whole(path):
    count = 100 if path.suffix == ".png" else 1
    writers = [start_writer(path, word, count) for word in ("abc", "def")]
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] in ([0, 0], [0, 1], [1, 0])
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
    with pytest.raises(BundleError, match="File exists"), new_bundle(path, overwrite=False):
        write(path, "new")
    assert word_of(path) == "new"
    assert entries(tmp_path) == ["c.zsseg"]


def test_an_old_bundle_set_aside_by_a_killed_writer_comes_back(tmp_path):
    path = tmp_path / "c.zsseg"
    write(path, "old")
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
        write(path, "new", overwrite=False)
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
        write(tmp_path / "c.zsseg", "new")
        assert synced[-1] == tmp_path.name


ENTRIES = {
    "file": Path.touch,
    "folder": lambda path: (path / "deeper").mkdir(parents=True),
    "loop": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
    "link to a folder": lambda path: path.symlink_to("other"),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_remove_entry_takes_away_what_is_there_and_follows_no_link(tmp_path, kind):
    entry, other = tmp_path / "entry", tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("kept")
    ENTRIES[kind](entry)
    remove_entry(entry)
    assert not os.path.lexists(entry)
    assert (other / "kept").read_text() == "kept"


KEY = {"model": "a" * 8, "shapes": (1, 2)}
DATA, ABOUT = bytes(range(256)), {"layers": ["x"], "ms": 1.5}
MOST = 1000


def filled(folder, data=DATA):
    cache = Cache(folder, KEY)
    cache.write("one/file", data, ABOUT)
    return cache, folder / "one" / "file"


@pytest.mark.parametrize("data", [b"", b"\n", DATA, b"{}\n" * 300])
def test_what_was_written_is_read(tmp_path, data, caplog):
    filled(tmp_path, b"before")
    cache, _ = filled(tmp_path, data)
    assert cache.read("one/file", max_bytes=MOST) == Entry(data, ABOUT)
    assert cache.read("absent", max_bytes=MOST) is None
    assert caplog.text == ""


def left_out(cache, path, caplog):
    """Whether the entry is left out with one warning, removed, and made again."""
    caplog.clear()
    assert cache.read("one/file", max_bytes=MOST) is None
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    assert not os.path.lexists(path)
    cache.write("one/file", DATA, ABOUT)
    assert cache.read("one/file", max_bytes=MOST) == Entry(DATA, ABOUT)


def test_any_altered_byte_any_other_length_and_foreign_content_is_left_out(tmp_path, caplog):
    cache, path = filled(tmp_path, DATA[:32])
    content = path.read_bytes()
    places = range(len(content))
    altered = [content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] for at in places]
    altered += [*(content[:length] for length in places), content + b"x"]
    foreign = [b"[" * 200_000, b'{"a": "\xff"}\n', b"9" * 9999, b"[]\nx", b"null\n"]
    for other in (*altered, *foreign, b'{"key": 1}\n'):
        path.write_bytes(other)
        left_out(cache, path, caplog)


def test_an_entry_belongs_to_its_key_and_its_name(tmp_path, caplog):
    cache, path = filled(tmp_path)
    assert Cache(tmp_path, {**KEY, "model": "b"}).read("one/file", max_bytes=MOST) is None
    assert "was made from something else" in caplog.text
    cache, path = filled(tmp_path)
    path.rename(path.with_name("other"))
    assert cache.read("one/other", max_bytes=MOST) is None


@pytest.mark.parametrize("kind", ["folder", "loop", "pipe"])
def test_what_is_no_file_makes_way(tmp_path, kind, caplog):
    cache, path = filled(tmp_path)
    path.unlink()
    ENTRIES[kind](path)
    left_out(cache, path, caplog)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path, caplog, monkeypatch, code):
    def refuse(number):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    assert not Cache(tmp_path, KEY).keep("file", DATA, else_="It is slower.")
    assert f"file: cannot be written: [Errno {code}]" in caplog.text
    assert "It is slower." in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_without_a_writer_are_removed(tmp_path):
    dead, young, users = ".a.0123456789abcdef.tmp", ".y.0123456789abcdef.tmp", ".notes.tmp"
    for name, age in ((dead, 4000), (young, 60), (users, 4000)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {young, users}


HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': %s}\n"


def npy(array, **kwargs):
    content = io.BytesIO()
    np.lib.format.write_array(content, np.asanyarray(array), **kwargs)
    return content.getvalue()


def with_header(header, values=b""):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + values


def read(data, max_bytes=1 << 20):
    return read_npy(data, what="rows.npy", max_bytes=max_bytes)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 5), (1,) * 32])
def test_reads_what_numpy_writes(shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    types = ("?", "i1", "u1", "<i2", "<u4", "<i8", "<f2", "<f4", ">f4", "<f8", "<U5")
    arrays = [array.astype(dtype) for dtype in types]
    for stored in (*arrays, *map(np.asfortranarray, arrays)):
        data = npy(stored)
        rows, expected = read(data), np.load(io.BytesIO(data))
        np.testing.assert_array_equal(rows, expected)
        assert rows.dtype == expected.dtype
        assert rows.flags.writeable
        assert rows.flags.c_contiguous == expected.flags.c_contiguous
    data = with_header(HEADER % b"(2,)", bytes(8))  # without padding and the last comma
    np.testing.assert_array_equal(read(data), np.zeros(2, np.float32))


SMALL = npy(np.arange(6, dtype=np.float32).reshape(2, 3))
TEXT = npy(np.array(["ab"]))[:-4]
HOSTILE = {
    "empty": (b"", "expected a .npy file"),
    "text": (b"0.1 0.2 0.3 0.4", "expected a .npy file"),
    "magic alone": (SMALL[:7], "expected a .npy file"),
    "format 4.0": (SMALL[:6] + b"\x04" + SMALL[7:], "4.0 instead of 1.0"),
    "length of 4 GB": (SMALL[:6] + b"\x02\x00" + b"\xff" * 4, "expected a .npy file"),
    "cut in the header": (SMALL[:40], "expected a .npy file"),
    "cut in the values": (SMALL[:-1], r"expected 24 bytes of float32 \[2, 3\], got 23"),
    "more behind": (SMALL + b"\0", "expected 24 bytes of float32 .* got 25"),
    "open string": (SMALL.replace(b"'shape':", b"'shape :"), "expected a .npy file"),
    "open bracket": (SMALL.replace(b"(2, 3)", b"((2, 3"), "expected a .npy file"),
    "brackets": (with_header(HEADER % (b"(" * 900)), "expected a .npy file"),
    "code": (SMALL.replace(b"False", b"1//0 "), "expected a .npy file"),
    "objects": (SMALL.replace(b"<f4", b"|O8"), "expected a .npy file"),
    "long double": (SMALL.replace(b"<f4", b"<f16"), "expected a .npy file"),
    "records": (SMALL.replace(b"'<f4'", b"'i4,f'"), "expected a .npy file"),
    "negative": (SMALL.replace(b"(2, 3)", b"(-2,3)"), "sizes"),
    "overflow": (with_header(HEADER % (b"(%d, %d, 0)" % (2**53, 2**53))), "got float32 .*, 0"),
    "huge": (SMALL.replace(b"(2, 3), }    ", b"(9999999, 3)}"), "at most 1048576 bytes"),
} | {
    hex(code): (TEXT + code.to_bytes(4, "little"), "a character that Unicode does not have")
    for code in (0xD800, 0xDFFF, 0x110000, 0xFFFFFFFF)
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_odd_content_is_a_value_error_with_its_reason(name):
    data, reason = HOSTILE[name]
    with pytest.raises(ValueError, match=f"rows.npy: .*{reason}"):
        read(data)
