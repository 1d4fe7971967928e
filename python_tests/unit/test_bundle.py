"""Bundles are read strictly, of every version that was ever written, and say what is wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.errors import refused
from support.fakes import edit_manifest, write_fake_bundle
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.bundles.bundle import FORMAT_VERSION
from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.errors import BundleError, BundleVersionError, PrecisionNotApplied
from zsseg_rt.runtime.families.base import bucket_of
from zsseg_rt.runtime.families.registry import create_family

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


WILD = {
    "empty": b"",
    "a list": b"[]",
    "a version of text": b'{"format_version": "1"}',
    "no version": b"{}",
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested below the limit of Python": b'{"provenance":' + b"[" * 200 + b"]" * 200 + b"}",
    "a long number": b'{"format_version": ' + b"9" * 10_000 + b"}",
    "a large number": b'{"format_version": 1, "licence": 1e999}',
    "NaN": b'{"format_version": NaN}',
    "a key twice": b'{"format_version": 1, "format_version": 1}',
    "UTF-16": '{"format_version": 1}'.encode("utf-16"),
    "UTF-8 with a mark": b'\xef\xbb\xbf{"format_version": 1}',
    "not UTF-8": b'{"format_version": "\xff"}',
    "half a surrogate pair as key": b'{"format_version": 1, "\\ud800": 1}',
    "NUL": b"\0",
}


@pytest.mark.parametrize("name", WILD)
def test_wild_json_is_refused_by_name(root, name):
    (root / "bundle.json").write_bytes(WILD[name])
    with refused(BundleError, None, "bundle.json"):
        Bundle.load(root)


def test_what_is_no_bundle_or_a_newer_one_is_refused(root):
    for name in ("gone.zsseg", "", "x" * 300, "a\0b"):
        with pytest.raises(BundleError):
            Bundle.load(root.parent / name)
    edit_manifest(root, ("format_version",), 2)
    with refused(BundleVersionError, None, "1", "2", "zsseg_rt"):
        Bundle.load(root)
    with (root / "bundle.json").open("r+b") as stream:
        stream.truncate(1 << 40)
    with refused(BundleError, None, "bundle.json", "16777216", "1099511627776"):
        Bundle.load(root)


BANK = {"file": "weights.bin", "sha256": "", "bytes": 0, "names": ["road", "\x1b]0;x\x07"]}
FILE = (*GRAPH, "file")
EDITED = [
    (("colour",), 1, "unknown key 'colour'"),
    (("path",), "/elsewhere", "unknown key 'path'"),
    (("head", "logit_skale"), 1.0, "head: unknown key 'logit_skale'"),
    (("head", "logit_scale"), ..., "head: missing key 'logit_scale'"),
    (("head", "logit_scale"), "big", r"head\.logit_scale: expected a number, got 'big'"),
    (("head", "logit_scale"), 10**400, r"head\.logit_scale: expected a finite number, got 1000"),
    (("head", "activation"), "tanh", "activation: expected one of"),
    (("head", "unknown_below"), 2.0, "unknown_below"),
    (("head", "max_classes"), 10**9, "max_classes: expected from 1 to 65534"),
    (("head", "grid_hw"), [1, 2**40], "grid_hw: expected from 1 to 65536"),
    (("head", "seen"), ["road", "a\0b"], r"bundle\.json\.head: seen\[1\]"),
    (("text_bank",), BANK, r"bundle\.json\.text_bank.* names\[1\]"),
    (("preprocess", "std"), [1.0, 0.0, 1.0], "std: expected values > 0"),
    (("preprocess", "size_hw"), [0, 8], "size_hw: expected from 1"),
    (("preprocess", "size_hw"), [2**40, 1], "size_hw: expected from 1 to 65536"),
    (("text", "templates"), ["no braces"], "expected one '{}' in each"),
    (("text", "words"), ["red ball"], "words: expected single lower-case words"),
    (("text", "context_length"), 2**62, "context_length: expected from 2 to 65536"),
    (("text", "embed_dim"), 0, "embed_dim: expected from 1 to 65536, got 0"),
    (("family",), "mystery", "family: expected one of .*, got 'mystery'"),
    (("family",), "descriptor", "graphs: missing key 'decoder'"),
    (("graphs",), {}, "graphs: missing key 'image_encoder'"),
    ((*GRAPH, "bytes"), True, "expected an integer, got True"),
    ((*GRAPH, "bytes"), 2**63, "expected a 64-bit integer, got 9223372036854775808"),
    (FILE, "x" * 5000, "cannot be read: .*File name too long"),
    (FILE, "a\0b", "is missing|embedded null byte"),
    (FILE, "../outside.onnx", "bundle.json: file: expected a path inside"),
    (FILE, "a/../../outside.onnx", "bundle.json: file: expected a path inside"),
    (FILE, "..\\outside.onnx", "bundle.json: file: expected a path inside"),
    (("provenance",), {"x": "\ud800"}, "surrogates not allowed"),
    (("name",), float("nan"), "expected JSON, got the number nan"),
]


@pytest.mark.parametrize(("keys", "value", "message"), EDITED)
def test_edited_manifest(root, keys, value, message):
    (root.parent / "outside.onnx").write_bytes(b"not a graph")
    edit_manifest(root, keys, value)
    with pytest.raises(BundleError, match=message):
        Bundle.load(root)


def test_files_that_are_not_what_the_manifest_says(root):
    graph, outside = root / "image_encoder.float32.onnx", root.parent / "outside.onnx"
    graph.write_bytes(b"not a grapH")
    bundle = Bundle.load(root)
    for look in (lambda: bundle.open_path(bundle.graph("image_encoder", "float32")), bundle.verify):
        with refused(BundleError, None, graph.name, "sha256"):
            look()
    graph.write_bytes(b"not a")
    with refused(BundleError, None, graph.name, "11", "5"):
        Bundle.load(root)
    graph.unlink()
    with refused(BundleError, None, graph.name):
        Bundle.load(root)
    outside.write_bytes(b"not a graph")
    graph.symlink_to(outside)
    with refused(BundleError, None, graph.name):
        Bundle.load(root)


def test_absent_precision_names_what_is_there(root):
    bundle = Bundle.load(root)
    assert bundle.variants("image_encoder") == ("float32",)
    with refused(PrecisionNotApplied, "precision"):
        bundle.graph("image_encoder", "int8")
    with refused(BundleError, None, "'text_encoder'"):
        bundle.graph("text_encoder", "float32")


FOLDER = Path(__file__).parents[1] / "bundles"
BUNDLES = sorted(FOLDER.glob("v*/*.zsseg"))
CPU = EngineConfig(device="cpu", precision="float32", use_cache=False)


def test_every_version_is_kept():
    versions = {path.parent.name for path in BUNDLES}
    assert versions == {f"v{number}" for number in range(1, FORMAT_VERSION + 1)}
    assert {path.stem for path in BUNDLES if path.parent.name == "v1"} == set(FAMILIES)


def labels_of(path):
    """Label maps of a stored bundle as of now, by their key in ``labels.npz``."""
    with np.load(path / "golden.npz") as golden:
        frame = golden["frame"]
    blocks = np.random.RandomState(0).randint(0, 256, (5, 6, 3)).astype(np.uint8)
    frames = frame, blocks.repeat(24, 0).repeat(30, 1)
    with Engine(path, CPU) as engine:
        report = engine.self_check()
        assert report.passed, report.first_failure
        engine.set_classes(list(engine.bundle.text_bank.names))
        return {
            f"{path.stem}.{index}.{threshold}": engine.segment(one, unknown_below=threshold).labels
            for index, one in enumerate(frames)
            for threshold in (0.0, 0.3)
        }


@pytest.mark.parametrize("path", BUNDLES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_an_old_bundle_s_labels_are_those_of_its_version(path):
    """Equal bit for bit: no pixel here is so near a tie that another backend labels it otherwise.

    ``labels.npz`` was written by version 0.1 with OpenVINO; ONNX Runtime in the place of OpenVINO,
    and backend torch where it runs the graphs, gave the same. :func:`labels_of` makes those of a
    new family, which are added to the file.
    """
    Bundle.load(path).verify()
    with np.load(path.parent / "labels.npz") as stored:
        for key, labels in labels_of(path).items():
            np.testing.assert_array_equal(labels, stored[key])


def stored(path, **changes):
    """A copy of the stored bundle of a descriptor, with changes to its head."""
    shutil.copytree(FOLDER / "v1" / "descriptor.zsseg", path)
    for key, value in changes.items():
        edit_manifest(path, ("head", key), value)
    return path


def test_what_is_retired_is_refused_and_nothing_of_it_is_read(tmp_path):
    """Earlier versions could blend masks with cosines, and wrote null where they did not."""
    rule = {"seen_weight": 0.0, "unseen_weight": 0.4, "scale": 5.0}
    for name, value in (("cosine", rule), ("window_batch", 4)):
        with pytest.raises(BundleError, match=rf"json.head: {name}: .* Export the bundle again"):
            Bundle.load(stored(tmp_path / name, **{name: value}))
    Bundle.load(stored(tmp_path / "one", window_batch=1))
    plain = Bundle.load(stored(tmp_path / "plain", cosine=None))
    assert plain.head == Bundle.load(FOLDER / "v1" / "descriptor.zsseg").head
    with refused(BundleError, None, "grid_hw"):  # not that of its graphs
        Engine(stored(tmp_path / "grid", grid_hw=[4, 9]), CPU)


@pytest.mark.parametrize(
    ("architecture", "stated", "rows"),
    [("zegclip", {}, 8), ("clip_rc", {}, 3), ("next", {"independent_queries": True}, 8),
     ("zegclip", {"independent_queries": False}, 3)],
)  # fmt: skip
def test_captures_share_rows_where_queries_are_independent(tmp_path, architecture, stated, rows):
    bundle = Bundle.load(stored(tmp_path / "stated", **stated))
    family = create_family(replace(bundle, architecture=architecture), CPU)
    assert family.rows_for(3) == rows
    assert ("independent_queries" in bundle.to_manifest()["head"]) == bool(stated)


def test_buckets():
    """254 are the most classes whose labels are bytes; there are no more rows than classes."""
    for phrases, most, rows in ((8, 1024, 8), (9, 1024, 16), (254, 1024, 254),
                                (255, 1024, 512), (600, 1000, 1000)):  # fmt: skip
        assert bucket_of(phrases, most) == rows
