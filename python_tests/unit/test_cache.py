"""Cache entries: what was written, or nothing and one warning; whatever lies in their place."""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from zsseg_rt.common.files import Cache, Entry, remove_abandoned

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


def refused(cache, path, caplog):
    """Whether the entry is left out with one warning, removed, and made again."""
    caplog.clear()
    assert cache.read("one/file", max_bytes=MOST) is None
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    assert not os.path.lexists(path)
    cache.write("one/file", DATA, ABOUT)
    assert cache.read("one/file", max_bytes=MOST) == Entry(DATA, ABOUT)


def test_any_altered_byte_and_any_other_length_is_noticed(tmp_path, caplog):
    cache, path = filled(tmp_path)
    content = path.read_bytes()
    places = range(len(content))
    altered = [content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] for at in places]
    altered += [*(content[:length] for length in places), content + b"x"]
    for other in altered:
        path.write_bytes(other)
        refused(cache, path, caplog)


@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b'{"a": "\xff"}\n', b"9" * 9999, b"[]\nx", b"null\n", b'{"key": 1}\n'],
    ids=["nested", "not UTF-8", "huge number", "list", "null", "another's"],
)
def test_foreign_content_is_left_out(tmp_path, content, caplog):
    cache, path = filled(tmp_path)
    path.write_bytes(content)
    refused(cache, path, caplog)


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
    if kind == "folder":
        (path / "deeper").mkdir(parents=True)
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        os.mkfifo(path)
    refused(cache, path, caplog)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path, caplog, monkeypatch, code):
    def refuse(number):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    assert not Cache(tmp_path, KEY).keep("file", DATA, else_="It is slower.")
    assert f"file: cannot be written: [Errno {code}]" in caplog.text
    assert "It is slower." in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_several_writers_and_readers_see_whole_entries(tmp_path, caplog):
    cache = Cache(tmp_path, KEY)
    contents = [bytes([number]) * 900 for number in range(8)]

    def write_and_read(content):
        for _ in range(30):
            cache.write("file", content)
            assert cache.read("file", max_bytes=MOST).data in contents

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_and_read, contents))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert caplog.text == ""


def test_temporary_files_without_a_writer_are_removed(tmp_path):
    dead, young, users = ".a.0123456789abcdef.tmp", ".y.0123456789abcdef.tmp", ".notes.tmp"
    for name, age in ((dead, 4000), (young, 60), (users, 4000)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {young, users}
