"""What cannot be quantised is refused in one line, and what is interrupted leaves nothing."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from support.cpus import needs_vnni
from support.errors import refused
from support.quantizing import FAST, write_photos
from zsseg_rt import ArgumentError, BackendError, Bundle, PrecisionNotApplied, SourceError
from zsseg_rt.backends import _tensorrt
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.cli import main
from zsseg_rt.demo import demo_classes
from zsseg_rt.export.quantized.bundle import quantize_bundle
from zsseg_rt.export.quantized.layers import read_plain
from zsseg_rt.onnx.writer import save_onnx

LIMIT = 120.0  # seconds, on a busy machine


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory):
    """So many that a signal comes before the last was measured."""
    return write_photos(tmp_path_factory.mktemp("many"), 48)


def small_graph(path, opset, op_type="Relu"):
    """MatMul with a stored weight, then a node."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 2], [0.5] * 8)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="linear"),
        helper.make_node(op_type, ["y"], ["z"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
              for n, s in (("x", [3, 4]), ("z", [3, 2]))]  # fmt: skip
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path
    )
    return path


def test_old_operator_sets_are_converted_or_refused(tmp_path):
    made = read_plain(small_graph(tmp_path / "old.onnx", 17))
    assert made.opset == 20
    assert [node.kind for node in made.nodes] == ["MatMul", "Relu"]
    kept = read_plain(small_graph(tmp_path / "new.onnx", 21))
    assert kept.opset == 21
    with refused(BackendError, None, "17", "unknown.onnx", "NoSuchOperator"):
        read_plain(small_graph(tmp_path / "unknown.onnx", 17, "NoSuchOperator"))


def test_an_old_operator_set_computes_the_same(tmp_path):
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("Unsqueeze", ["mean"], ["wide"], axes=[1]),
        helper.make_node("Sub", ["x", "wide"], ["low"]),
        helper.make_node("Softmax", ["low"], ["soft"], axis=1),
        helper.make_node("Split", ["soft"], ["a", "b"], axis=1),
        helper.make_node("Split", ["low"], ["c", "d"], axis=1, split=[1, 3]),
        helper.make_node("Concat", ["a", "b", "c", "d"], ["z"], axis=1),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
              for n, s in (("x", [3, 4]), ("z", [3, 8]))]  # fmt: skip
    old, new = tmp_path / "old.onnx", tmp_path / "new.onnx"
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)]), old)
    save_onnx(read_plain(old), "g", new)
    onnx.checker.check_model(onnx.load(new), full_check=True)
    x = np.random.default_rng(0).standard_normal((3, 4), np.float32)
    expected, found = (ReferenceEvaluator(str(path)).run(None, {"x": x}) for path in (old, new))
    np.testing.assert_array_equal(found, expected)
    nodes[3].attribute[0].i = 0
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)]), old)
    with refused(ArgumentError, "bundle", "12", "old.onnx", "Softmax"):
        read_plain(old)


@needs_vnni
def test_graphs_of_an_old_operator_set_become_valid(photos, tmp_path):
    demo, out = Bundle.demo("photos"), tmp_path / "small.zsseg"
    old = onnx.load(demo.open_path(demo.graph("image_encoder", "float32")))
    assert old.opset_import[0].version < 19
    quantize_bundle(demo, out, photos, ["person", "cat", "sofa"], replace(FAST, min_agreement=0.1))
    onnx.checker.check_model(onnx.load(out / "image_encoder.int8.onnx"), full_check=True)


def test_all_unreadable_pictures_are_named(photos, tmp_path):
    for index in range(9):
        data = (photos / "0.png").read_bytes()
        (tmp_path / f"{index}.png").write_bytes(data[:40] if index in (2, 5) else data)
    with refused(SourceError, None, "2.png", "5.png"):
        quantize_bundle(
            Bundle.demo("scenes"), tmp_path / "x.zsseg", tmp_path, ["sky", "ball"],
            replace(FAST, precision="fp8"),
        )  # fmt: skip


def test_the_place_is_checked_first(tmp_path, capsys):
    (tmp_path / "taken.zsseg").mkdir()
    (tmp_path / "file").touch()
    for out in ("taken.zsseg", "no_ending", "file/x.zsseg"):
        given = ["quantize", "demo-scenes", "--precision", "fp8", "--out", str(tmp_path / out)]
        assert main([*given, "--photos", str(tmp_path / "gone")]) == 1
        assert "gone" not in capsys.readouterr().err


def test_masks_need_a_data_set(tmp_path, capsys):
    given = ["quantize", "demo-scenes", "--out", str(tmp_path / "x.zsseg")]
    assert main([*given, "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("zsseg-rt: --dataset: expected one of ade20k, ")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_nothing(kind, many_photos, tmp_path):
    scratch, place = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    place.mkdir()
    given = ["quantize", "demo-scenes", "--photos", many_photos, "--out", place / "x.zsseg",
             "--precision", "fp8", "--json", place / "report.json"]  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-m", "zsseg_rt", *given],
        env=os.environ | {"TMPDIR": str(scratch)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + LIMIT
    # Ranges are chosen: nothing is imported any more, which a signal could look like.
    while not any(scratch.glob(".quantize-*/1/*")):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    child.send_signal(kind)
    _, error = child.communicate(timeout=LIMIT)
    assert child.returncode == 1
    assert error.splitlines()[-1] == "zsseg-rt: interrupted; nothing half-written was left"
    assert not list(place.iterdir())
    assert not list(scratch.glob(".quantize-*"))


def test_a_gpu_without_fp8_is_refused(tmp_path, monkeypatch, capsys):
    gpu = SimpleNamespace(compute_capability="8.6", index=0)
    monkeypatch.setattr(_tensorrt, "open_gpu", lambda device: gpu)
    with refused(PrecisionNotApplied, "precision", "8.9", "8.6"):
        _tensorrt.BACKEND.load(
            tmp_path / "x.onnx", device="cuda:0", precision="fp8", options=BackendOptions()
        )
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install '.[rtx]'")
    monkeypatch.setenv("ZSSEG_TENSORRT", "tensorrt_rtx")
    monkeypatch.setenv("ZSSEG_HOME", str(tmp_path / "home"))
    folder, out = tmp_path / "photos", tmp_path / "small.zsseg"
    folder.mkdir()
    settings = replace(FAST, precision="fp8")
    names = demo_classes("scenes")
    quantize_bundle(Bundle.demo("scenes"), out, write_photos(folder), names, settings)
    capsys.readouterr()
    given = ["build", str(out), "--precision", "fp8", "--compute-capability", "8.6"]
    assert main(given) == 4
    error = capsys.readouterr().err
    assert "expected a GPU of compute capability 8.9 or newer for 'fp8', got 8.6" in error
    assert error.count("\n") == 1
