"""TensorRT-RTX keeps the kernels it compiled, and records its own CUDA graphs; with a stand-in."""

import numpy as np
import pytest

from support.errors import refused
from support.fake_tensorrt import FakeNative, GpuArray, install, write_graph
from support.fake_tensorrt_rtx import CudaGraphStrategy, FakeTensorRTX
from zsseg_rt.backends._tensorrt import BACKEND
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.errors import BackendError


@pytest.fixture
def rtx(monkeypatch):
    fake = install(monkeypatch, FakeTensorRTX(), FakeNative(), "tensorrt_rtx")
    monkeypatch.setenv("ZSSEG_TENSORRT", "tensorrt_rtx")
    monkeypatch.delenv("ZSSEG_CUDA_GRAPHS", raising=False)
    return fake


@pytest.fixture
def graph_path(tmp_path):
    return write_graph(tmp_path)


def load(path, **options):
    options = BackendOptions(**options)
    return BACKEND.load(path, device="cuda:0", precision="auto", options=options)


def run(session, classes=3):
    session.run({"x": GpuArray(np.zeros((1, classes, 8), np.float32), 1024)}, stream=7)


def compiled(rtx):
    """What was compiled since the last question."""
    found = [entry for entry in rtx.journal if entry.startswith("compile")]
    rtx.journal.clear()
    return found


def kept(cache_dir):
    return list((cache_dir / "engines").glob("*.kernels"))


def test_kernels_are_compiled_once(rtx, graph_path, tmp_path):
    graph = load(graph_path, cache_dir=tmp_path)
    session = graph.session()
    assert compiled(rtx) == ["compile context"]
    assert len(kept(tmp_path)) == 1  # at once: a process may end without a word
    run(session)
    session.close()
    graph.close()
    assert compiled(rtx) == ["compile for [(1, 3, 8)]"]
    later = load(graph_path, cache_dir=tmp_path).session()
    run(later)
    assert compiled(rtx) == []
    run(later, classes=9)
    assert compiled(rtx) == ["compile for [(1, 9, 8)]"]


def test_sessions_of_a_graph_share_their_kernels(rtx, graph_path):
    graph = load(graph_path)
    graph.session(), graph.session()
    assert compiled(rtx) == ["compile context"]


def test_what_is_known_is_not_written_again(rtx, graph_path, tmp_path):
    load(graph_path, cache_dir=tmp_path).session()
    (file,) = kept(tmp_path)
    before = file.stat().st_mtime_ns, file.stat().st_ino
    load(graph_path, cache_dir=tmp_path).session().close()
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before


@pytest.mark.parametrize("change", ["driver", "altered"])
def test_what_does_not_fit_is_compiled_anew(rtx, graph_path, tmp_path, change, caplog):
    load(graph_path, cache_dir=tmp_path).session()
    compiled(rtx)
    (file,) = kept(tmp_path)
    if change == "driver":
        rtx.environment = "Orin, driver 590"
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    load(graph_path, cache_dir=tmp_path).session()
    assert compiled(rtx) == ["compile context"]
    assert (file.name in caplog.text) == (change != "driver")  # a new driver is no fault
    load(graph_path, cache_dir=tmp_path).session()
    assert compiled(rtx) == []


@pytest.mark.parametrize(
    ("setting", "strategy"),
    [
        (None, CudaGraphStrategy.WHOLE_GRAPH_CAPTURE),
        ("1", CudaGraphStrategy.WHOLE_GRAPH_CAPTURE),
        ("0", CudaGraphStrategy.DISABLED),
    ],
)
def test_it_records_its_own_graphs(rtx, graph_path, monkeypatch, setting, strategy):
    if setting is not None:
        monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", setting)
    graph = load(graph_path)
    session = graph.session()
    assert rtx.contexts[0].runtime_config.cuda_graph_strategy is strategy
    assert graph.captures_itself == (setting != "0")
    run(session)
    assert session.capture_state() is None  # nobody may record a capture around it


def test_layers_are_timed_one_by_one(rtx, graph_path):
    session = load(graph_path).session()
    feed = GpuArray(np.zeros((1, 3, 8), np.float32), 1024)
    assert session.profile({"x": feed}, stream=7)
    strategies = [context.runtime_config.cuda_graph_strategy.name for context in rtx.contexts]
    assert strategies == ["WHOLE_GRAPH_CAPTURE", "DISABLED"]


@pytest.mark.parametrize("fault", ["runtime_config", "set_runtime_cache"])
def test_a_refusal_is_an_error(rtx, graph_path, fault):
    rtx.faults = [fault]
    with refused(BackendError, "tensorrt"):
        load(graph_path).session()
