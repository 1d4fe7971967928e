"""Files of caches and ``.npy`` content: what was written comes back, what is damaged is told."""

import errno
import io
import os
import time

import numpy as np
import pytest

from zsseg_rt.common.files import Cache, Entry, read_npy, remove_abandoned

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
    cache, path = filled(tmp_path, DATA[:32])
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


@pytest.mark.parametrize(
    "dtype", ["?", "i1", "u1", "<i2", "<u4", "<i8", "<f2", "<f4", ">f4", "<f8", "<U5"]
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 5), (1,) * 32], ids=str)
def test_reads_what_numpy_writes(shape, dtype):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    for stored in (array, np.asfortranarray(array)):
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
