"""Files: whole or not at all, whoever writes at the same moment and whatever is in the way."""

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

from zsseg_rt.common.files import read_limited, remove_entry, write_atomically

CONTENTS = [bytes([65 + number]) * 50_000 for number in range(8)]


def test_readers_see_whole_files_while_threads_write(tmp_path):
    path, failures, done = tmp_path / "file", [], threading.Event()
    write_atomically(path, CONTENTS[0])

    def write(content):
        try:
            for _ in range(40):
                write_atomically(path, content)
        except OSError as exc:
            failures.append(exc)

    def read():
        while not done.is_set():
            found = path.read_bytes()
            if found not in CONTENTS:
                failures.append(f"torn: {len(found)} bytes of {sorted(set(found))}")

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(content,)) for content in CONTENTS]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert failures == []
    assert list(tmp_path.iterdir()) == [path]


def test_the_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_an_interrupt_leaves_no_temporary(tmp_path, monkeypatch, call):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"x")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("nameless", [True, False])
def test_writers_at_the_same_time_leave_each_others_temporaries(tmp_path, monkeypatch, nameless):
    path, replace, seen = tmp_path / "file", os.replace, []
    path.write_bytes(b"old")
    if not nameless:
        monkeypatch.setattr(os, "link", refuse)

    def write_another_first(source, target):
        seen.append(source.name)
        if len(seen) < 3:
            write_atomically(path, b"another")
        replace(source, target)

    monkeypatch.setattr(os, "replace", write_another_first)
    write_atomically(path, b"last")
    assert path.read_bytes() == b"last"
    assert seen == [".file.0.tmp", ".file.1.tmp", ".file.2.tmp"]
    assert list(tmp_path.iterdir()) == [path]


def refuse(*arguments, **settings):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from zsseg_rt.common.files import write_atomically
setattr(os, sys.argv[1], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
if "nameless" not in sys.argv[3:]:
    os.O_TMPFILE = os.O_DIRECTORY  # a folder cannot be opened for writing
write_atomically(Path(sys.argv[2]), b"x" * 5000)
"""


def can_write_nameless(folder):
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
    except OSError:
        return False
    return True


def write_and_die(path, call, *words):
    """Write in a process that is killed at its call of the system; returns the exit code."""
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, call, path, *words]
    return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode


def test_a_killed_process_leaves_no_temporary(tmp_path):
    if not can_write_nameless(tmp_path):
        pytest.skip("this file system has no files without a name")
    assert write_and_die(tmp_path / "file", "fsync", "nameless") == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_file_under_a_free_name_is_never_renamed(tmp_path):
    if not can_write_nameless(tmp_path):
        pytest.skip("this file system has no files without a name")
    assert write_and_die(tmp_path / "file", "replace", "nameless") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("words", [["replace", "nameless"], ["replace"], ["fsync"]])
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path, words):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    if "nameless" in words and not can_write_nameless(tmp_path):
        pytest.skip("this file system has no files without a name")
    assert write_and_die(path, words[0], *words[1:]) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2  # otherwise this tests nothing
    (tmp_path / ".file.1.tmp").write_bytes(b"of another that was killed")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["open", "link"])
def test_it_writes_where_no_file_can_be_nameless(tmp_path, monkeypatch, call):
    monkeypatch.setattr(os, call, refuse)
    write_atomically(tmp_path / "file", b"old")
    write_atomically(tmp_path / "file", b"new")
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "absent" / "file", b"x")


@pytest.mark.parametrize("kind", ["file", "folder", "loop", "link to a folder", "nothing"])
def test_remove_entry_takes_away_what_is_there_and_follows_no_link(tmp_path, kind):
    entry, other = tmp_path / "entry", tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("kept")
    if kind == "file":
        entry.write_text("x")
    elif kind == "folder":
        (entry / "deeper").mkdir(parents=True)
    elif kind == "loop":
        entry.symlink_to(entry)
    elif kind == "link to a folder":
        entry.symlink_to(other)
    remove_entry(entry)
    assert not os.path.lexists(entry)
    assert (other / "kept").read_text() == "kept"


def test_read_limited_reads_regular_files_up_to_the_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_limited(path, max_bytes=5) == b"12345"
    with pytest.raises(OSError, match="expected at most 4 bytes"):
        read_limited(path, max_bytes=4)
    with pytest.raises(FileNotFoundError):
        read_limited(tmp_path / "absent", max_bytes=4)
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
            read_limited(odd, max_bytes=4)
