"""A bundle says where its cells lie, and its engine keeps to it."""

import json

import numpy as np
import pytest
from onnx import TensorProto, helper

from support.command_line import run
from support.errors import refused
from support.fakes import edit_manifest, write_fake_bundle
from support.graphs import write_graph
from zsseg_rt import Bundle, BundleError, Engine, EngineConfig
from zsseg_rt.export import export_dense_bundle
from zsseg_rt.export.dense_onnx import guess_align
from zsseg_rt.ops import reference

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
NAMES = ["red", "green", "blue"]


def corner_encoder(path, step=4, cells=5):
    """Every ``step``-th pixel's colour, from the first to the last."""
    side = step * (cells - 1) + 1
    node = helper.make_node(
        "AveragePool", ["image"], ["embeds"], kernel_shape=[1, 1], strides=[step, step]
    )
    return write_graph(
        path,
        [node],
        {"image": (TensorProto.FLOAT, [1, 3, side, side])},
        {"embeds": (TensorProto.FLOAT, [1, 3, cells, cells])},
    )


def export(tmp_path, **changes):
    arguments = {
        "image_size": 17,
        "mean": MEAN,
        "std": STD,
        "normalize": False,
        "activation": "none",
        "text_bank": (NAMES, np.eye(3, dtype=np.float32)),
        **changes,
    }
    encoder = corner_encoder(tmp_path / "encoder.onnx")
    return export_dense_bundle(encoder, tmp_path / "corners.zsseg", **arguments)


@pytest.mark.parametrize(
    ("size_hw", "grid_hw", "align"),
    [
        ((513, 513), (33, 33), "corners"),
        ((17, 33), (5, 9), "corners"),
        ((448, 448), (28, 28), "half_pixel"),
        ((9, 9), (3, 3), "half_pixel"),  # both would do
        ((513, 512), (33, 32), "half_pixel"),
        ((1, 5), (1, 2), "half_pixel"),
    ],
)
def test_sizes_tell_where_cells_lie(size_hw, grid_hw, align):
    assert guess_align(size_hw, grid_hw) == align


def test_the_engine_keeps_to_it(tmp_path):
    path = export(tmp_path)
    assert json.loads((path / "bundle.json").read_text())["head"]["align"] == "corners"
    frame = np.random.default_rng(8).integers(0, 256, (37, 52, 3), np.uint8)
    with Engine(path, EngineConfig(device="cpu")) as engine:
        engine.set_classes(NAMES)
        labels = engine.segment(frame).labels
        assert engine.self_check().passed
    settings = {"mean": MEAN, "std": STD, "align": "corners"}
    cells = reference.preprocess(frame, size_hw=(17, 17), **settings)[None, :, ::4, ::4]
    expected = reference.upsample_argmax(cells, frame.shape[:2], align="corners")[0][0]
    assert np.mean(labels == expected) > 0.999  # the scale of 100 rounds near ties
    other = reference.upsample_argmax(cells, frame.shape[:2])[0][0]
    assert np.mean(other == expected) < 0.95


def test_half_pixel_is_not_written(tmp_path):
    path = export(tmp_path, align="half_pixel")
    assert "align" not in json.loads((path / "bundle.json").read_text())["head"]
    assert Bundle.load(path).head.align == "half_pixel"


def test_unknown_words_and_other_families_are_refused(tmp_path):
    with refused(BundleError, "align"):
        export(tmp_path, align="edges")
    root = write_fake_bundle(tmp_path / "fake.zsseg")
    edit_manifest(root, ("head", "align"), "corners")
    assert Bundle.load(root).head.align == "corners"
    edit_manifest(root, ("family",), "segment_tokens")
    edit_manifest(root, ("segments",), {"num_segments": 2})
    with refused(BundleError, None, "head.align"):
        Bundle.load(root)


def test_the_command_says_what_it_took(tmp_path, capsys):
    encoder = corner_encoder(tmp_path / "encoder.onnx")
    names, rows = tmp_path / "names.txt", tmp_path / "rows.npy"
    names.write_text("\n".join(NAMES))
    np.save(rows, np.eye(3, dtype=np.float32))
    options = ["export", "dense", encoder, "--size", "17", "--mean", "none", "--bank", names, rows]
    assert run(*options, "--out", tmp_path / "a.zsseg") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "taken to lie by corners" in said
    assert "--align" in said
    assert run(*options, "--out", tmp_path / "b.zsseg", "--align", "half_pixel") == 0
    assert "taken" not in capsys.readouterr().out
    assert Bundle.load(tmp_path / "b.zsseg").head.align == "half_pixel"
