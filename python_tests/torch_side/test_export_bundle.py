"""Bundles are written whole, right and checked, or not at all."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from support import tiny
from support.colour_words import colour_embeds, write_encoder
from support.errors import refused
from support.graphs import write_graph
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.errors import BundleError, CheckpointError, VocabularyError
from zsseg_rt.export import bundle_writer as writer
from zsseg_rt.export import export_bundle, export_dense_bundle, verify_bundle

STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
NAMES = [f"name {index}" for index in range(7)]


@pytest.fixture(scope="module")
def model():
    return tiny.zegclip_model()


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir())


def test_without_text_tower(model, tmp_path):
    path = export_bundle(model, tmp_path / "a.zsseg", precisions=("float32",), class_names=NAMES)
    bundle = Bundle.load(path)
    assert bundle.text.tokenizer is None
    assert "text_encoder" not in bundle.graphs
    with refused(BundleError, None, "a.zsseg"):
        export_bundle(model, path)
    assert leftovers(tmp_path) == ["a.zsseg"]


def test_bfloat16_graphs_keep_wide_edges(model, tmp_path):
    kinds = ("float32", "bfloat16")
    path = export_bundle(model, tmp_path / "a.zsseg", precisions=kinds, class_names=NAMES)
    bundle = Bundle.load(path)
    stages = [stage for stage in verify_bundle(path).stages if "bfloat16" in stage.where]
    assert {stage.where.split()[0] for stage in stages} == {"image_encoder", "decoder"}
    assert all(1e-4 < stage.error < 5e-2 for stage in stages)
    for name in ("image_encoder", "decoder"):
        entry = bundle.graph(name, "bfloat16")
        assert {spec.dtype for spec in (*entry.inputs, *entry.outputs)} == {"float32"}
        graph = onnx.load(path / entry.file).graph
        large = {one.data_type for one in graph.initializer if np.prod(one.dims) > 64}
        assert large <= {TensorProto.BFLOAT16, TensorProto.FLOAT}
        assert TensorProto.BFLOAT16 in large
        assert entry.bytes < 0.7 * bundle.graph(name, "float32").bytes


def test_seen_classes_without_names_are_reported(model, tmp_path, caplog):
    path = export_bundle(model, tmp_path / "a.zsseg", precisions=("float32",), verify=False)
    assert "bundle lowers none" in caplog.text
    assert Bundle.load(path).head.seen == ()


def test_disagreement_is_refused(model, tmp_path, monkeypatch):
    """A golden sample that differs in one stage stops the export and leaves nothing."""
    write_golden = writer.write_golden

    def shifted(folder, arrays):
        return write_golden(folder, {**arrays, "patch_keys": arrays["patch_keys"] * 1.01})

    monkeypatch.setattr("zsseg_rt.export.bundle_writer.write_golden", shifted)
    with refused(BundleError, "a.zsseg"):
        export_bundle(model, tmp_path / "a.zsseg", precisions=("float32",), class_names=NAMES)
    assert leftovers(tmp_path) == []


def test_text_encoder_of_another_vocabulary(model, tmp_path):
    with refused(CheckpointError, "text_encoder"):
        export_bundle(model, tmp_path / "a.zsseg", text_encoder=model.text_encoder)


# --- dense bundles ------------------------------------------------------------------------------


def write_dense_encoder(path, *, layout="nchw", size=8, image="image"):
    """Patch means; ``nchw`` gives [1, 3, 4, 4], ``tokens`` [1, 16, 3]; plus an unused output."""
    nodes = [
        helper.make_node("AveragePool", [image], ["pool"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Relu", [image], ["other"]),
    ]
    outputs = {"pool": (TensorProto.FLOAT, [1, 3, size // 2, size // 2])}
    weights = {}
    if layout == "tokens":
        weights["flat"] = np.array([1, 3, -1], np.int64)
        nodes += [
            helper.make_node("Reshape", ["pool", "flat"], ["columns"]),
            helper.make_node("Transpose", ["columns"], ["embeds"], perm=[0, 2, 1]),
        ]
        outputs = {"embeds": (TensorProto.FLOAT, [1, (size // 2) ** 2, 3])}
    outputs["other"] = (TensorProto.FLOAT, [1, 3, size, size])
    inputs = {image: (TensorProto.FLOAT, ["batch", 3, "height", "width"])}
    return write_graph(path, nodes, inputs, outputs, weights)


def dense(encoder, out, **changes):
    arguments = {"image_size": 8, "activation": "none", "logit_scale": 1.0, **STATISTICS, **changes}
    return export_dense_bundle(encoder, out, **arguments)


@pytest.mark.parametrize("image", ["image", "pixel_values"])
def test_channels_first_becomes_patches(tmp_path, image):
    encoder = write_dense_encoder(tmp_path / "e.onnx", image=image)
    path = dense(encoder, tmp_path / "d.zsseg", precisions=("float32", "float16"))
    bundle = Bundle.load(path)
    entry = bundle.graphs["image_encoder"]["float32"]
    assert [(s.name, s.shape) for s in entry.inputs] == [("image", (1, 3, 8, 8))]
    assert [(s.name, s.shape) for s in entry.outputs] == [("patch_embeds", (1, 16, 3))]
    operators = {node.op_type for node in onnx.load(path / entry.file).graph.node}
    assert operators == {"AveragePool", "Reshape", "Transpose"}  # the unused output is cut off
    assert bundle.head.grid_hw == (4, 4)
    golden = np.load(path / "golden.npz")
    means = golden["image"].reshape(3, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(3, 16).T
    np.testing.assert_allclose(golden["patch_embeds"][0], means, atol=1e-6)


def test_tokens_lie_on_the_grid_of_square_patches(tmp_path):
    encoder = write_dense_encoder(tmp_path / "e.onnx", layout="tokens")
    for name, options in {"a": {}, "b": {"grid_hw": (4, 4)}, "c": {"grid_hw": (2, 8)}}.items():
        path = dense(encoder, tmp_path / f"{name}.zsseg", **options)
        assert Bundle.load(path).head.grid_hw == options.get("grid_hw", (4, 4))
    oblong = dense(encoder, tmp_path / "d.zsseg", image_size=(4, 16), grid_hw=None)
    assert Bundle.load(oblong).head.grid_hw == (2, 8)
    with refused(BundleError, None, "grid_hw"):
        dense(encoder, tmp_path / "e.zsseg", grid_hw=(3, 5))


def test_tokens_that_are_no_patches_are_named(tmp_path):
    model = onnx.load(write_dense_encoder(tmp_path / "e.onnx", layout="tokens"))
    extra = numpy_helper.from_array(np.zeros((1, 1, 3), np.float32), "class_token")
    model.graph.initializer.append(extra)
    model.graph.node.append(helper.make_node("Concat", ["class_token", "embeds"], ["all"], axis=1))
    model.graph.output[0].name = "all"
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, tmp_path / "e.onnx")
    with pytest.raises(BundleError, match=r"got shape \(1, 17, 3\).*--grid-hw GH GW"):
        dense(tmp_path / "e.onnx", tmp_path / "d.zsseg")


def test_sizes_that_the_encoder_computes_become_constants(tmp_path):
    """As torch writes ``x.shape[2] // 2``; the check at load computes nothing."""
    node = helper.make_node
    path = write_graph(
        tmp_path / "e.onnx",
        [
            node("AveragePool", ["image"], ["pool"], kernel_shape=[2, 2], strides=[2, 2]),
            node("Shape", ["image"], ["shape"]),
            node("Gather", ["shape", "three"], ["width"]),
            node("Div", ["width", "two"], ["cells"]),
            node("Mul", ["cells", "cells"], ["patches"]),
            node("Concat", ["one_three", "patches"], ["sizes"], axis=0),
            node("Reshape", ["pool", "sizes"], ["columns"]),
            node("Squeeze", ["patches"], ["count"]),
            node("Range", ["zero", "count", "one"], ["order"]),
            node("Gather", ["columns", "order"], ["ordered"], axis=2),
            node("Transpose", ["ordered"], ["embeds"], perm=[0, 2, 1]),
        ],
        {"image": (TensorProto.FLOAT, ["n", 3, "h", "w"])},
        {"embeds": (TensorProto.FLOAT, ["n", "p", 3])},
        {"three": np.array([3]), "two": np.array([2]), "one_three": np.array([1, 3]),
         "zero": np.array(0), "one": np.array(1)},
    )  # fmt: skip
    written = dense(path, tmp_path / "d.zsseg")
    assert verify_bundle(written).passed
    graph = onnx.load(next(written.glob("*.onnx"))).graph
    kinds = [each.op_type for each in graph.node]
    assert kinds == ["AveragePool", "Reshape", "Gather", "Transpose"]


def test_tensor_called_like_the_new_names_steps_aside(tmp_path):
    encoder = write_graph(
        tmp_path / "e.onnx",
        [
            helper.make_node("Relu", ["x"], ["image"]),
            helper.make_node("AveragePool", ["image"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
        ],
        {"x": (TensorProto.FLOAT, [1, 3, 8, 8])},
        {"y": (TensorProto.FLOAT, [1, 3, 4, 4])},
    )
    assert verify_bundle(dense(encoder, tmp_path / "d.zsseg")).passed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_output": "absent"}, "an output 'absent', got inputs image and outputs pool"),
        ({"image_size": (8, 0)}, "size_hw: expected from 1"),
        ({"grid_hw": (2, 8)}, r"got shape \(1, 3, 4, 4\) and grid_hw=\(2, 8\)"),
        ({"mean": (0.5,)}, "mean: expected three values"),
        ({"activation": "relu"}, "activation: expected one of"),
        ({"text_bank": (["a", "b"], np.ones((1, 3)))}, "text_bank: expected one row of 3"),
        ({"text_bank": (["a", "a"], np.ones((2, 3)))}, "text_bank: expected distinct names"),
        ({"text_bank": (["a"], np.full((1, 3), np.nan))}, "text_bank: expected finite"),
        ({"precisions": ("fp8",)}, "precisions: expected some of"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_dense_refusals_write_nothing(tmp_path, changes, message):
    encoder = write_dense_encoder(tmp_path / "e.onnx")
    with pytest.raises((BundleError, VocabularyError), match=message):
        dense(encoder, tmp_path / "d.zsseg", **changes)
    assert leftovers(tmp_path) == ["e.onnx"]


@pytest.mark.parametrize("kind", ["in a file", "listed"])
def test_weights_beside_the_encoder_or_listed_as_inputs_are_read_in(tmp_path, kind):
    """As torch's exporter writes them by default, and older ones."""
    path, options = tmp_path / "e.onnx", {}
    model = onnx.load(write_dense_encoder(path, layout="tokens"))
    if kind == "listed":
        model.graph.input.append(helper.make_tensor_value_info("flat", TensorProto.INT64, [3]))
    else:
        options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0}
    onnx.save(model, path, **options)
    assert (tmp_path / "w.bin").exists() == bool(options)
    assert verify_bundle(dense(path, tmp_path / "d.zsseg", grid_hw=(4, 4))).passed


def odd_encoder(kind, path):
    if isinstance(kind, bytes):
        path.write_bytes(kind)
    elif kind == "another size":
        write_encoder(path)
    else:
        model = onnx.load(write_dense_encoder(path))
        model.graph.node[0].op_type = kind
        onnx.save(model, path)


UNKNOWN = "e.onnx: .* operator that encoders use.*"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (b"", "e.onnx"),
        (b"\x00garbage", "e.onnx"),
        ("another size", "float32.*1, 3, 8, 8"),
        ("RandomNormalLike", UNKNOWN + "RandomNormalLike"),
        ("AveragePoop", UNKNOWN + "AveragePoop"),
    ],
)
def test_encoders_that_are_refused(tmp_path, kind, message):
    odd_encoder(kind, tmp_path / "e.onnx")
    with pytest.raises(BundleError, match=message):
        dense(tmp_path / "e.onnx", tmp_path / "d.zsseg")
    assert leftovers(tmp_path) == ["e.onnx"]


# --- the writer ---------------------------------------------------------------------------------


def colours(out, **changes):
    write_encoder(out.parent / "colours.onnx")
    arguments = {
        "image_size": 256,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "text_bank": colour_embeds(),
        "verify": False,
        **changes,
    }
    return export_dense_bundle(out.parent / "colours.onnx", out, **arguments)


def test_overwrite_replaces_everything(tmp_path):
    path = colours(tmp_path / "c.zsseg", licence="old")
    (path / "extra").write_text("stale")
    colours(path, licence="new", overwrite=True)
    assert Bundle.load(path).licence == "new"
    assert not (path / "extra").exists()
    assert leftovers(tmp_path) == ["c.zsseg", "colours.onnx"]


def test_only_bundles_are_overwritten(tmp_path):
    (tmp_path / "c.zsseg").mkdir()
    (tmp_path / "c.zsseg" / "thesis.txt").write_text("precious")
    with refused(BundleError, None, "c.zsseg"):
        colours(tmp_path / "c.zsseg", overwrite=True)
    assert (tmp_path / "c.zsseg" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["bundle", "bundle.zip", ".zsseg", "file/c.zsseg"])
def test_places_that_no_bundle_can_have_are_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    write_encoder(tmp_path / "colours.onnx")
    with pytest.raises(BundleError, match="path: expected NAME.zsseg|cannot be written"):
        dense(tmp_path / "colours.onnx", tmp_path / name, image_size=256)


@pytest.mark.nightly
def test_real_encoder(shared_dir, tmp_path):
    folder = shared_dir / "data/encoders"
    names = json.loads((folder / "deeplabv3_mnv2_voc_clipspace_classes.json").read_text())
    path = export_dense_bundle(
        folder / "deeplabv3_mnv2_voc_clipspace.onnx",
        tmp_path / "d.zsseg",
        image_size=513,
        embed_output="dense_embedding",
        text_bank=(names, np.load(folder / "deeplabv3_mnv2_voc_clipspace_train_text_rows.npy")),
        **STATISTICS,
    )
    bundle = Bundle.load(path)
    assert bundle.head.grid_hw == (33, 33)
    assert bundle.graphs["image_encoder"]["float32"].outputs[0].shape == (1, 33 * 33, 512)
