"""OpenVINO: precisions are real, and no state of the cache folder can hurt."""

import json
import os
import shutil

import numpy as np
import pytest

from support.command_line import python
from support.cpus import stand_in
from support.errors import refused
from support.graphs import FLOAT, node, write_graph
from zsseg_rt.backends import _openvino
from zsseg_rt.backends._openvino import BACKEND, RAISED, problem, process_core
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.doctor import examine
from zsseg_rt.errors import PrecisionNotApplied

pytest.importorskip("openvino")


def write_scale(path, factor=3.0):
    """``x`` to ``y`` = factor * x, the factor a weight that fills a cache file."""
    row = (FLOAT, [1, 64])
    weights = {"w": (factor * np.eye(64)).astype(np.float32)}
    return write_graph(path, [node("MatMul", "x w", "y")], {"x": row}, {"y": row}, weights)


@pytest.fixture
def graph(tmp_path):
    return write_scale(tmp_path / "scale.onnx")


def load(path, *, precision="float32", cache_dir=None, num_threads=1):
    options = BackendOptions(num_threads=num_threads, cache_dir=cache_dir)
    return BACKEND.load(path, device="cpu", precision=precision, options=options).session()


def check(session, factor=3.0):
    x = np.arange(64, dtype=np.float32)[None]
    np.testing.assert_allclose(session.run({"x": x})["y"], factor * x, rtol=1e-2)


def cache_files(cache_dir, pattern="*.blob"):
    return sorted((cache_dir / "openvino").glob(f"*/{pattern}"))


RESHAPED = """
import os, sys
from pathlib import Path
import numpy as np
from zsseg_rt.backends._openvino import BACKEND
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.errors import BackendError

os.sched_setaffinity(0, [min(os.sched_getaffinity(0))] if sys.argv[2] == "one CPU" else [0, 1, 2])
options = BackendOptions(num_threads=int(sys.argv[3]))
for _ in range(3):
    graph = BACKEND.load(Path(sys.argv[1]), device="cpu", precision="float32", options=options)
    session = graph.session()
    for rows in (5, 7, 5):
        try:
            print(session.run({"x": np.ones((rows, 4), np.float32)})["y"].sum())
        except BackendError as error:
            print("failed" if "OpenVINO failed while running" in str(error) else "refused")
"""


@pytest.mark.parametrize(("cpus", "num_threads"), [("one CPU", "1"), ("several", "0")])
def test_what_a_node_throws_is_an_error_with_any_number_of_threads(tmp_path, cpus, num_threads):
    """infer() of OpenVINO 2026.4 drops it if one thread runs the graph; the labels are noise.

    Whatever runs next in a graph of open sizes takes some of them from the run that failed.
    """
    path = write_graph(
        tmp_path / "five_rows.onnx",
        [
            node("Mul", "x x", "squares"),
            node("Reshape", "squares shape", "twenty"),
            node("Relu", "twenty", "y"),
        ],
        {"x": (FLOAT, ["rows", 4])},
        {"y": (FLOAT, [20])},
        {"shape": np.array([20])},
    )
    done = python("-c", RESHAPED, path, cpus, num_threads)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["20.0", "failed", "refused"] * 3


OVERLAPPING = """
import gc, signal, sys
from pathlib import Path
from zsseg_rt.backends._openvino import BACKEND
from zsseg_rt.backends.base import BackendOptions

where = {"device": "cpu", "precision": "float32", "options": BackendOptions(num_threads=1)}
first, second = (BACKEND.load(Path(sys.argv[1]), **where).session() for _ in range(2))
for session in (first, second):  # not in reverse order
    session.close()
del first, second, session
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
signal.raise_signal(signal.SIGUSR1)
"""


def test_message_that_quotes_bytes_is_readable():
    """OpenVINO quotes texts of a graph in its messages, which its binding cannot decode."""
    with pytest.raises(UnicodeDecodeError) as caught:
        b"Exception from x.cpp:7:\nMaxPool: \xff".decode()
    assert isinstance(caught.value, RAISED)
    assert problem(caught.value) == "MaxPool: \\xff"


def test_signals_are_handled_after_overlapping_sessions(graph):
    """OpenVINO's cores leave an unmapped signal stack when several end in order of making."""
    done = python("-c", OVERLAPPING, graph)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_threads_are_what_was_asked(graph):
    session = load(graph, num_threads=2)
    assert session._graph._compiled.get_property("INFERENCE_NUM_THREADS") == 2


@pytest.mark.parametrize(("precision", "flag"), [("bfloat16", "BF16"), ("float16", "FP16")])
def test_low_precision_or_an_error(graph, precision, flag):
    if flag in process_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        session = load(graph, precision=precision)
        assert session.precision == precision
        check(session)
    else:
        with refused(PrecisionNotApplied, "precision"):
            load(graph, precision=precision)


def test_auto_is_what_doctor_says(graph, monkeypatch):
    for _ in range(2):
        session = load(graph, precision="auto")
        allowed = ("float16", "bfloat16", "float32")
        chosen = BACKEND.choose(("float32",), "auto", device="cpu", allowed=allowed)
        assert chosen.precision == session.precision
        line = next(finding.detail for finding in examine() if finding.topic == "OpenVINO")
        assert line.endswith(f"precision auto is {session.precision}")
        stand_in(monkeypatch, "avx2", computes=True)
    assert "CPU supports: FP32, INT8; precision auto is float32" in line


def test_precision_is_read_back(graph, monkeypatch):
    """A plugin that compiles for something else than it was told is caught."""
    monkeypatch.setattr(_openvino, "applied_precision", lambda compiled: "bfloat16")
    with refused(PrecisionNotApplied, "precision"):
        load(graph, precision="float32")


def test_cache_is_used_and_built_again_where_it_does_not_fit(graph, tmp_path):
    cache_dir = tmp_path / "cache"
    load(graph)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scale.onnx"]
    for _ in range(2):
        session = load(graph, cache_dir=cache_dir)
        check(session)
        assert session._graph._compiled.get_property("LOADED_FROM_CACHE"), "see page_out"
        (blob,) = cache_files(cache_dir)
        written = blob.stat().st_mtime_ns
    load(graph, cache_dir=cache_dir)
    assert blob.stat().st_mtime_ns == written
    (checksums,) = cache_files(cache_dir, "checksums.json")
    checksums.unlink()
    check(load(graph, cache_dir=cache_dir))
    assert list(json.loads(checksums.read_text())["key"]) == [cache_files(cache_dir)[0].name]
    check(load(write_scale(graph, 5.0), cache_dir=cache_dir), 5.0)


BLOB, ENTRY = "*/*.blob", "[0-9a-f]" * 32


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        (BLOB, lambda entry, content: entry.write_bytes(b"\x93NUMPY\x01\0v\0{'descr':\n" * 9)),
        (BLOB, lambda entry, content: entry.write_bytes(content[:-2])),
        (BLOB, lambda entry, content: os.mkfifo(entry)),
        (BLOB, lambda entry, content: entry.symlink_to("/proc/self/mem")),  # cannot be read
        ("*/checksums.json", lambda entry, content: entry.write_bytes(b"[" * 200_000)),
        (ENTRY, lambda entry, content: entry.write_bytes(b"")),
    ],
)
def test_damaged_entries_are_made_again_with_one_warning(graph, tmp_path, caplog, pattern, damage):
    cache_dir = tmp_path / "cache"
    check(load(graph, cache_dir=cache_dir))
    (entry,) = (cache_dir / "openvino").glob(pattern)
    content = None if entry.is_dir() else entry.read_bytes()
    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    damage(entry, content)
    check(load(graph, cache_dir=cache_dir))
    assert len(caplog.records) == 1, caplog.text
    assert str(entry) in caplog.text or str(entry.parent) in caplog.text
    caplog.clear()
    (blob,) = cache_files(cache_dir)
    written = blob.lstat().st_mtime_ns
    check(load(graph, cache_dir=cache_dir))
    assert (blob.is_file(), blob.lstat().st_mtime_ns) == (True, written), "not made again"
    assert not caplog.records


@pytest.mark.parametrize("place", ["cache", "cache/openvino"])
def test_a_file_where_a_folder_belongs_only_costs_the_cache(graph, tmp_path, caplog, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("in the way")
    check(load(graph, cache_dir=tmp_path / "cache"))
    assert caplog.records
    assert (tmp_path / place).read_text() == "in the way"


def test_full_disk_is_not_filled_further(graph, tmp_path, caplog, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    check(load(graph, cache_dir=tmp_path / "cache"))
    assert "too little for a compiled model" in caplog.text
    assert not cache_files(tmp_path / "cache")
