"""A bundle that was cut, edited, made by a newer format or by a stranger is refused by name."""

import json
import os

import pytest
from fakes import edit_manifest, write_fake_bundle

from zsseg_rt import Bundle, BundleError, BundleVersionError, PrecisionNotApplied
from zsseg_rt.backends.base import TensorSpec

GRAPH = ("graphs", "image_encoder", "float32")


@pytest.fixture
def root(tmp_path):
    return write_fake_bundle(tmp_path / "fake.zsseg")


def test_a_good_bundle_reads_back_as_written(root):
    bundle = Bundle.load(root)
    bundle.verify()
    graph = bundle.graph("image_encoder", "float32")
    assert graph.inputs == (TensorSpec(name="image", dtype="float32", shape=(1, 3, 8, 8)),)
    assert bundle.to_manifest() == json.loads((root / "bundle.json").read_text())


def test_named_axes_survive(root):
    shape = [1, "classes", 4]
    edit_manifest(root, (*GRAPH, "inputs", 0, "shape"), shape)
    assert Bundle.load(root).graph("image_encoder", "float32").inputs[0].shape == (1, "classes", 4)


def test_missing_folder(tmp_path):
    with pytest.raises(BundleError, match=r"gone\.zsseg: expected a bundle folder, found nothing"):
        Bundle.load(tmp_path / "gone.zsseg")


def test_foreign_folder(tmp_path):
    with pytest.raises(BundleError, match=r"expected a bundle folder with bundle\.json"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff", '{"format_version": "1"}', "{}"])
def test_damaged_manifest(root, text):
    (root / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match=r"bundle\.json"):
        Bundle.load(root)


def test_newer_format(root):
    edit_manifest(root, ("format_version",), 2)
    with pytest.raises(BundleVersionError, match="expected <= 1, got 2. Update zsseg_rt"):
        Bundle.load(root)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("colour",), 1, "unknown key 'colour'"),
        (("head", "logit_skale"), 1.0, "head: unknown key 'logit_skale'"),
        (("head", "logit_scale"), ..., "head: missing key 'logit_scale'"),
        (("head", "logit_scale"), "big", r"head\.logit_scale: expected a number, got 'big'"),
        (("head", "activation"), "tanh", "activation: expected one of"),
        (("preprocess", "std"), [1.0, 0.0, 1.0], "std: expected values > 0"),
        (("preprocess", "std"), [1.0, 1.0], "std: expected 3 items, got 2"),
        (("preprocess", "size_hw"), [0, 8], "size_hw: expected sizes >= 1"),
        (("text", "templates"), ["no braces"], "expected one '{}' in each"),
        (("family",), "mystery", "family: expected one of .*, got 'mystery'"),
        (("family",), "descriptor", "graphs: missing key 'decoder'"),
        (("graphs",), {}, "graphs: missing key 'image_encoder'"),
        ((*GRAPH, "bytes"), True, "expected an integer, got True"),
    ],
)
def test_edited_manifest(root, keys, value, message):
    edit_manifest(root, keys, value)
    with pytest.raises(BundleError, match=message):
        Bundle.load(root)


@pytest.mark.parametrize(
    "name", ["../outside.onnx", "/etc/passwd", "a/../../outside.onnx", "..\\outside.onnx"]
)
def test_path_that_leaves_the_bundle(root, name):
    (root.parent / "outside.onnx").write_bytes(b"not a graph")
    edit_manifest(root, (*GRAPH, "file"), name)
    with pytest.raises(BundleError, match="expected a path inside the bundle"):
        Bundle.load(root)


def test_link_that_leaves_the_bundle(root):
    outside = root.parent / "outside.onnx"
    outside.write_bytes(b"not a graph")
    graph = root / "image_encoder.float32.onnx"
    graph.unlink()
    os.symlink(outside, graph)
    with pytest.raises(BundleError, match="got a link out of it"):
        Bundle.load(root)


def test_missing_file(root):
    (root / "image_encoder.float32.onnx").unlink()
    with pytest.raises(BundleError, match=r"image_encoder\.float32\.onnx: .* is missing"):
        Bundle.load(root)


def test_truncated_file(root):
    (root / "image_encoder.float32.onnx").write_bytes(b"not a")
    with pytest.raises(BundleError, match="expected 11 bytes, got 5"):
        Bundle.load(root)


def test_altered_file_is_found_when_opened(root):
    (root / "image_encoder.float32.onnx").write_bytes(b"not a grapH")
    bundle = Bundle.load(root)
    with pytest.raises(BundleError, match="expected sha256 .* The file was altered"):
        bundle.open_path(bundle.graph("image_encoder", "auto"))
    with pytest.raises(BundleError, match="sha256"):
        bundle.verify()


def test_absent_precision_names_what_is_there(root):
    bundle = Bundle.load(root)
    assert bundle.graph("image_encoder", "bfloat16") == bundle.graph("image_encoder", "float32")
    with pytest.raises(PrecisionNotApplied, match=r"\(float32\), got 'int8'"):
        bundle.graph("image_encoder", "int8")
    with pytest.raises(BundleError, match="missing key 'text_encoder'"):
        bundle.graph("text_encoder", "float32")
