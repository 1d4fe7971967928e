"""The TensorRT backend's orchestration, against a strict stand-in for TensorRT and the GPU."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from support.errors import refused
from support.fake_tensorrt import (
    GRAPH,
    CudaEngine,
    FakeNative,
    FakeTensorRT,
    GpuArray,
    install,
    write_graph,
)
from zsseg_rt.backends import _tensorrt, _tensorrt_api
from zsseg_rt.backends._tensorrt import BACKEND
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.errors import (
    BackendError,
    BackendUnavailableError,
    DeviceError,
    DTypeError,
    PrecisionNotApplied,
    ShapeError,
)


@pytest.fixture
def native():
    return FakeNative()


@pytest.fixture
def trt(monkeypatch, native):
    return install(monkeypatch, FakeTensorRT(), native)


@pytest.fixture
def graph_path(tmp_path):
    return write_graph(tmp_path)


def load(path, **settings):
    return load_graph(path, **settings).session()


def load_graph(path, *, device="cuda:0", precision="auto", **options):
    return BACKEND.load(path, device=device, precision=precision, options=BackendOptions(**options))


def queries(classes, *, address=1024, dtype=np.float32, **interface):
    return GpuArray(np.zeros((1, classes, 8), dtype), address, **interface)


# --- before TensorRT is touched


def test_other_devices_are_refused_and_nothing_of_tensorrt_constructed(
    trt, native, graph_path, monkeypatch
):
    for device in ("cpu", "cuda", "cuda:x", "gpu:0", "cuda:1"):
        with refused(DeviceError, "device"):
            load(graph_path, device=device)
    native.count = 0
    with refused(DeviceError, "device"):
        load(graph_path)
    with refused(DeviceError, "device"):
        BACKEND.build_plan(graph_path)
    native.count = 1
    with refused(BackendError, "compute_capability"):  # full TensorRT builds for this GPU alone
        BACKEND.build_plan(graph_path, options=BackendOptions(compute_capability="8.6"))

    def refuse(path):
        raise BackendError(f"{path}: external data")

    monkeypatch.setattr(_tensorrt, "check_graph", refuse)
    with refused(BackendError, None, "decoder.onnx"):
        load(graph_path)
    assert trt.journal == []


def test_the_session_runs_on_the_gpu_asked_for(trt, native, graph_path):
    native.count = 2
    session = load(graph_path, device="cuda:1")
    session.run({"x": queries(3)}, stream=7)
    assert session.device == "cuda:1"
    assert native.allocated[0][2] == 1
    assert native.device == 0  # as it was before
    session.close()
    session.close()
    with refused(BackendError, "session"):
        session.run({"x": queries(2)})


# --- which TensorRT


def test_full_tensorrt_goes_first_and_the_environment_chooses(trt, monkeypatch):
    rtx = FakeTensorRT("1.7.1.116")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
    monkeypatch.setattr(_tensorrt_api.importlib.util, "find_spec", lambda name: name)
    assert _tensorrt_api.load_tensorrt().label == "tensorrt-10.3.0"
    monkeypatch.setenv("ZSSEG_TENSORRT", "tensorrt_rtx")
    api = _tensorrt_api.load_tensorrt()
    assert api.module is rtx
    assert api.is_rtx
    monkeypatch.setenv("ZSSEG_TENSORRT", "trt")
    with refused(ValueError, "ZSSEG_TENSORRT"):
        _tensorrt_api.load_tensorrt()


@pytest.mark.parametrize("broken", ["absent", "without libraries", "8.6.1", "10.2.0", "0"])
def test_a_tensorrt_that_cannot_be_used_is_unavailable(trt, monkeypatch, broken):
    if broken == "absent":
        monkeypatch.setattr(_tensorrt_api.importlib.util, "find_spec", lambda name: None)
    elif broken == "without libraries":
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    else:
        trt.__version__ = broken
    with refused(BackendUnavailableError, "backend"):
        _tensorrt_api.load_tensorrt()


# --- building


def test_a_graph_says_what_was_built_without_tf32(trt, native, graph_path):
    graph = load_graph(graph_path)
    assert {"type": "MATRIX_MULTIPLY", "dtype": "float16", "count": 2} in graph.report["layers"]
    assert f"limit WORKSPACE {native.size['total_memory'] // 4}" in trt.journal
    assert "flags []" in trt.journal  # TensorRT sets TF32's until it is cleared
    session = graph.session()
    assert session.inputs == (TensorSpec(name="x", dtype="float32", shape=(1, "classes", 8)),)
    assert session.outputs == (TensorSpec(name="y", dtype="float32", shape=(1, "classes", 4)),)
    assert session.precision == "float16"
    inputs = [{"name": "tokens", "dtype": "INT64", "shape": [-1, 77], "axes": {"0": "prompts"}}]
    path = write_graph(graph_path.parent, inputs=inputs)
    with refused(BackendError, "dynamic_axes"):
        load(path)
    load(path, dynamic_axes={"prompts": (1, 8, 64)})


FLOAT, HALF = ["MATRIX_MULTIPLY", "FLOAT"], ["MATRIX_MULTIPLY", "HALF"]


@pytest.mark.parametrize(
    ("layers", "given", "not_given"),
    [
        (GRAPH["layers"], "float16", "float32 int8 fp8 fp16"),
        ([FLOAT], "float32", "float16"),
        ([HALF, FLOAT], "", "float16"),
        ([["DEQUANTIZE", "INT8"], HALF], "int8", "float16"),
    ],
)
def test_the_precision_asked_for_is_given_or_refused(trt, tmp_path, layers, given, not_given):
    path = write_graph(tmp_path, layers=layers)
    for precision in not_given.split():
        with refused(PrecisionNotApplied, "precision"):
            load(path, precision=precision)
    assert "build" not in trt.journal
    for precision in given.split():
        assert load(path, precision=precision).precision == precision


@pytest.mark.parametrize(
    ("fault", "argument"), [("parse", "graph"), ("build", "tensorrt"), ("context", "tensorrt")]
)
def test_what_tensorrt_refuses_is_an_error(trt, graph_path, tmp_path, fault, argument, caplog):
    load(graph_path)
    load(graph_path)
    assert len(trt.loggers) == 4  # two builders, two runtimes: a second logger would not be heard
    assert "logger differs" not in caplog.text
    trt.faults = [fault]
    with refused(BackendError, argument):
        load(graph_path, cache_dir=tmp_path / "cache")
    warned = ("zsseg_rt.tensorrt", logging.WARNING) in {r[:2] for r in caplog.record_tuples}
    assert warned == (fault == "build")
    assert len(list((tmp_path / "cache").rglob("*.plan"))) == (fault == "context")
    with refused(BackendError, "graph"):
        load(tmp_path / "absent.onnx")


def test_progress_never_falls_ends_at_one_and_may_cancel(trt, graph_path):
    fractions = []
    load(graph_path, progress=lambda step, fraction: fractions.append(fraction))
    assert fractions == sorted(fractions)
    assert fractions[0] == 0.0
    assert fractions[-1] == 1.0
    assert {0.25, 0.5} <= set(fractions)  # half of the first of two steps, and all of it

    def cancel(step, fraction):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(graph_path, progress=cancel)


# --- caches


def test_whatever_a_plan_depends_on_builds_again(trt, native, graph_path, tmp_path):
    def builds(**options):
        before = trt.journal.count("build")
        load(graph_path, cache_dir=tmp_path, **options)
        return trt.journal.count("build") - before

    assert (builds(), builds()) == (1, 0)
    trt.__version__ = "10.3.1"
    assert builds() == 1
    native.capability = "11.0"
    assert builds() == 1
    native.cuda = "13.2"
    assert builds() == 1
    for size in ("multiprocessors", "total_memory", "driver"):
        native.size[size] //= 2
        assert builds() == 1
    write_graph(graph_path.parent, layers=[HALF])
    assert builds() == 1
    assert builds(precision="float16") == 1
    assert builds(dynamic_axes={"classes": (1, 2, 3)}) == 1
    assert builds() == 0


def test_a_golden_verdict_lies_beside_the_plan_until_it_is_built_anew(
    trt, graph_path, tmp_path, caplog
):
    graph = load_graph(graph_path, cache_dir=tmp_path)
    assert graph.plan_name.endswith(".plan")
    assert graph.golden_verdict("a") is None
    graph.keep_golden_verdict("a", "wrong")
    again = load_graph(graph_path, cache_dir=tmp_path)
    assert again.golden_verdict("a") == "wrong"
    assert again.golden_verdict("b") is None
    trt.faults = ["deserialize"]
    rebuilt = load_graph(graph_path, cache_dir=tmp_path)
    assert rebuilt.golden_verdict("a") is None
    Path(rebuilt.plan_name).with_suffix(".golden").mkdir()
    rebuilt.keep_golden_verdict("a", "")
    assert ".golden: cannot be written" in caplog.text  # a warning, no error
    load_graph(graph_path).keep_golden_verdict("a", "")  # which lies nowhere


@pytest.mark.parametrize(
    ("names", "fused"),
    [
        (["_gemm_mha_v2_0x1f", "fmha_v2_flash_attention_fp16", "__myl_Fmha_myl0_3"], 3),
        (["/blocks.0/mha/MatMul", "gamma", "mlp"], 0),
        (None, None),  # TensorRT tells nothing
    ],
)
def test_fused_attention_is_counted_in_every_flavour(
    trt, graph_path, monkeypatch, names, fused, caplog
):
    text = "none"
    if names is not None:
        text = json.dumps({"Layers": [{"Name": "n", "TacticName": names[0]}, *names[1:]]})
    inspector = SimpleNamespace(get_engine_information=lambda layout: text)
    monkeypatch.setattr(CudaEngine, "create_engine_inspector", lambda self: inspector)
    assert load_graph(graph_path).report["fused_layers"] == fused
    assert ("fused none" in caplog.text) == (fused == 0)


def test_a_plan_the_runtime_refuses_is_built_again_once(trt, graph_path, tmp_path, caplog):
    load(graph_path, cache_dir=tmp_path)
    trt.faults = ["deserialize"]
    session = load(graph_path, cache_dir=tmp_path)
    assert trt.journal.count("build") == 2
    assert "built for another compute capability" in caplog.text
    assert session.run({"x": queries(2)})["y"].shape == (1, 2, 4)
    for folder, builds in ((tmp_path, 3), (None, 4)):  # without a cache, not again
        trt.faults = ["deserialize", "deserialize"]
        with refused(BackendError, "plan"):
            load(graph_path, cache_dir=folder)
        assert trt.journal.count("build") == builds
        trt.faults.clear()


# --- running


def test_shapes_come_before_addresses_and_only_what_changed_is_set(trt, native, graph_path):
    session = load(graph_path)

    def journal(feed, stream=99):
        trt.journal.clear()
        session.run({"x": feed}, stream=stream)
        return list(trt.journal)

    first = journal(queries(5))
    assert first == ["shape x (1, 5, 8)", "address x", "address y", "execute on 99"]
    state = session.capture_state()
    assert journal(queries(5)) == ["execute on 99"]
    assert session.capture_state() == state
    assert journal(queries(5, address=8192)) == ["address x", "execute on 99"]
    moved = session.capture_state()
    small = journal(queries(4, address=8192))
    assert small == ["shape x (1, 4, 8)", "execute on 99"]  # the buffer is large enough
    assert len({state, moved, session.capture_state()}) == 3  # of shapes and addresses
    journal(queries(5, address=8192))
    assert session.capture_state() == moved
    journal(queries(9), stream=3)
    journal(queries(9), stream=3)
    assert native.allocated == [((20,), "float32", 0, 99), ((36,), "float32", 0, 3)]
    for feed_stream, stream in ((55, 3), (3, 3), (1, 0)):
        journal(queries(2, stream=feed_stream), stream=stream)
    assert native.waits == [(55, 3)]  # what another stream writes is waited for


@pytest.mark.parametrize(
    ("feeds", "error", "argument"),
    [
        ({}, ShapeError, "feeds"),
        ({"x": queries(2), "z": queries(2)}, ShapeError, "feeds"),
        ({"x": queries(2, dtype=np.float16)}, DTypeError, "x"),
        ({"x": queries(2, dtype=np.complex64)}, DTypeError, "x"),
        ({"x": queries(0)}, ShapeError, "x"),
        ({"x": queries(1025)}, ShapeError, "x"),
        ({"x": GpuArray(np.zeros((1, 8), "f4"), 0)}, ShapeError, "x"),
        ({"x": queries(2, address=1028)}, ShapeError, "x"),
        ({"x": queries(2, strides=(4, 8, 16))}, ShapeError, "x"),
        ({"x": np.zeros((1, 2, 8), np.float32)}, DeviceError, "x"),
    ],
)
def test_bad_feeds_are_refused_before_running(trt, graph_path, feeds, error, argument):
    session = load(graph_path)
    with refused(error, argument):
        session.run(feeds)
    assert not any(entry.startswith("execute") for entry in trt.journal)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("set_input_shape", ShapeError),
        ("set_tensor_address", BackendError),
        ("execute", BackendError),
    ],
)
def test_false_from_tensorrt_is_an_error_and_forgotten(trt, graph_path, fault, error):
    session = load(graph_path)
    session.run({"x": queries(5)})
    trt.faults = [fault]
    with pytest.raises(error):
        session.run({"x": queries(4, address=8192)})
    trt.journal.clear()
    session.run({"x": queries(5)})
    assert trt.journal[0] == "shape x (1, 5, 8)"


# --- TensorRT-RTX keeps the kernels it compiled, and records its own CUDA graphs ---


@pytest.fixture
def rtx(monkeypatch):
    fake = install(monkeypatch, FakeTensorRT("1.7.1.116"), FakeNative(), "tensorrt_rtx")
    monkeypatch.setenv("ZSSEG_TENSORRT", "tensorrt_rtx")
    monkeypatch.delenv("ZSSEG_CUDA_GRAPHS", raising=False)
    return fake


def compiled(rtx):
    """Kernels compiled since the last question."""
    entries = [entry for entry in rtx.journal if entry.startswith("compile")]
    rtx.journal.clear()
    return entries


def test_kernels_are_compiled_once_for_a_driver(rtx, graph_path, tmp_path, caplog):
    graph = load_graph(graph_path, cache_dir=tmp_path)
    session = graph.session()
    assert compiled(rtx) == ["compile context"]
    (file,) = (tmp_path / "engines").glob("*.kernels")  # at once: a process may just end
    session.run({"x": queries(3)}, stream=7)
    graph.session().run({"x": queries(3)}, stream=7)  # of one graph: they share what was compiled
    session.close()
    graph.close()
    assert compiled(rtx) == ["compile for [(1, 3, 8)]"]
    later = load(graph_path, cache_dir=tmp_path)
    later.run({"x": queries(3)}, stream=7)
    assert compiled(rtx) == []
    later.run({"x": queries(9)}, stream=7)
    assert compiled(rtx) == ["compile for [(1, 9, 8)]"]
    for damaged in (False, True):
        if damaged:
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        else:
            rtx.environment = "Orin, driver 590"
        load(graph_path, cache_dir=tmp_path)
        assert compiled(rtx) == ["compile context"]
        assert (file.name in caplog.text) == damaged  # a new driver is no fault
        load(graph_path, cache_dir=tmp_path)
        assert compiled(rtx) == []


@pytest.mark.parametrize("setting", [None, "1", "0"])
def test_it_records_its_own_graphs_and_times_layers_one_by_one(
    rtx, graph_path, monkeypatch, setting
):
    if setting is not None:
        monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", setting)
    graph = load_graph(graph_path)
    session = graph.session()
    assert graph.captures_itself == (setting != "0")
    session.run({"x": queries(3)}, stream=7)
    assert session.capture_state() is None  # nobody may record a capture around it
    assert session.profile({"x": queries(3)}, stream=7)
    strategies = [context.runtime_config.cuda_graph_strategy.name for context in rtx.contexts]
    assert strategies == ["DISABLED" if setting == "0" else "WHOLE_GRAPH_CAPTURE", "DISABLED"]
    for fault in ("runtime_config", "set_runtime_cache"):
        rtx.faults = [fault]
        with refused(BackendError, "tensorrt"):
            load(graph_path)
