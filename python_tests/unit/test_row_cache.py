"""Text embeddings on disk stay bounded: what was unused for longest goes."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from zsseg_rt.text.row_cache import KEPT_ROWS, RowCache

DIM = 4
ROW = np.array([0.6, 0.0, 0.8, 0.0], np.float32)


def cache_in(folder, max_rows=16):
    return RowCache(folder, "encoder", DIM, max_rows=max_rows)


def write(cache, phrase, age):
    """Store an embedding that was last used so many seconds before now."""
    cache.write("templates", {phrase: ROW})
    path = cache.path("templates", phrase)
    moment = path.stat().st_mtime - age
    os.utime(path, (moment, moment))
    return path


def stored(folder):
    return list(folder.glob("text/*/*"))


def test_the_least_recently_used_go(tmp_path):
    filled = cache_in(tmp_path)
    paths = [write(filled, f"class {i}", age=1000 - i) for i in range(16)]
    assert all(path.exists() for path in paths)
    assert filled.read("templates", "class 0") is not None  # so it is the newest
    cache_in(tmp_path).write("templates", {"new": ROW})
    kept = [path.exists() for path in paths]
    assert kept == [True, False, False, False] + [True] * 12
    assert filled.read("templates", "new") is not None
    assert filled.read("templates", "class 1") is None


def test_names_without_end_do_not_fill_the_disk(tmp_path):
    cache = cache_in(tmp_path)
    for index in range(200):
        cache.write("templates", {f"class {index}": ROW})
        assert len(stored(tmp_path)) <= 16 + 2
    assert cache.read("templates", "class 199") is not None


def test_all_encoders_share_the_bound(tmp_path):
    for index in range(40):
        RowCache(tmp_path, f"encoder {index}", DIM, max_rows=16).write("templates", {"cat": ROW})
    assert len(stored(tmp_path)) <= 16


def test_several_writers_remove_at_the_same_time(tmp_path, caplog):
    def fill(number):
        cache = cache_in(tmp_path)
        for index in range(60):
            cache.write("templates", {f"{number} {index}": ROW})

    writers = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert not caplog.records
    assert len(stored(tmp_path)) <= 16 + 4 * 2
    for path in stored(tmp_path):
        assert len(path.read_bytes().partition(b"\n")[2]) == 4 * DIM  # whole


def test_what_cannot_be_removed_is_told(tmp_path, caplog, monkeypatch):
    cache = cache_in(tmp_path)
    for index in range(16):
        write(cache, f"class {index}", age=1000 - index)

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        cache_in(tmp_path).write("templates", {"new": ROW})
    assert "old text embeddings cannot be removed" in caplog.text
    assert cache.read("templates", "new") is not None


@pytest.mark.parametrize("times", [1, 3])
def test_a_row_is_read_as_it_was_written(tmp_path, times):
    cache = RowCache(tmp_path, "encoder", DIM)
    for _ in range(times):
        cache.write("templates", {"cat": ROW})
    row = cache.read("templates", "cat")
    np.testing.assert_array_equal(row, ROW)
    assert KEPT_ROWS == 65_536  # as docs/settings.md says
