"""Every system's bundle, and encoders of others': stage by stage against torch, or refused."""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from support import golden_tips, tiny, tiny_zegformer
from support.command_line import python
from support.errors import refused
from support.graphs import FLOAT, node, write_graph
from support.rtx_plans import build_plan, fused_kernels
from support.tiny_zeroseg import zeroseg_model
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import get_backend
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.errors import ArgumentError, BundleError, CheckpointError, ShapeError, VocabularyError
from zsseg_rt.export import bundle_writer, export_bundle, export_dense_bundle, verify_bundle
from zsseg_rt.export.exporters import EXPORTERS
from zsseg_rt.export.options import ENCODER_OPTIONS, MODEL_OPTIONS, ExportOptions
from zsseg_rt.models import from_official
from zsseg_rt.models.registry import find_builder

SIZES = tiny.TinySizes(text_vocab=49408, text_length=77, num_layers=3)
NAMES = [f"name {index}" for index in range(7)]
FLOATS = {"float32", "float16"}
OPTIONS = BackendOptions(num_threads=1)


def zegclip() -> Any:
    return tiny.zegclip_model(SIZES)


def dense_clip() -> Any:
    settings = {"num_heads": 4, "text_heads": 4, "activation": "quick_gelu", "image_size": 64}
    return from_official("dense_clip", tiny.clip_state_dict(SIZES), head="naclip", **settings)


def tips() -> Any:
    return from_official("tips", {"vision": golden_tips.vision(width=32)}, num_heads=4)


class System(NamedTuple):
    """A model, how it is exported, and what the bundle must hold then."""

    build: Callable[[], Any]
    options: dict[str, Any]
    family: str
    graphs: set[str]
    stages: set[str]


ENCODER, EMBEDS = {"image_encoder"}, {"patch_embeds", "cls_embed"}
DESCRIPTOR = ENCODER | {"decoder"}
NAMED, WIDE, TEXTLESS = {"class_names": NAMES}, {"size_hw": (64, 96)}, {"text_encoder": None}
WORDS = {"templates": ["a {}.", "the {}", "see {}"], "text_encoder": "auto"}
TOKENS = {"segment_embeds", "image_embed", "group_map"}
REGIONS = {"segment_embeds", "region_masks", "no_object"}
SYSTEMS = {
    "zegclip": System(zegclip, NAMED, "descriptor", DESCRIPTOR | {"text_encoder"}, EMBEDS),
    "clip_rc": System(tiny.clip_rc_model, NAMED, "descriptor", DESCRIPTOR, EMBEDS),
    "zegformer": System(
        *(tiny_zegformer.model, WIDE | NAMED | TEXTLESS, "proposals"),
        *(ENCODER | {"region_encoder"}, REGIONS),
    ),
    "zeroseg": System(zeroseg_model, WIDE, "segment_tokens", ENCODER, TOKENS),
    "tips": System(tips, {"size_hw": (84, 126)} | TEXTLESS, "dense", ENCODER, {"patch_embeds"}),
    "dense_clip": System(
        dense_clip, WIDE | WORDS, "dense", ENCODER | {"text_encoder"}, {"patch_embeds"}
    ),
}


@pytest.fixture(scope="module", params=SYSTEMS)
def exported(request, tmp_path_factory):
    """A system, its model and its bundle."""
    system = SYSTEMS[request.param]
    model, path = system.build(), tmp_path_factory.mktemp("bundles") / "a.zsseg"
    return system, model, Bundle.load(export_bundle(model, path, verify=False, **system.options))


def graph_files(bundle):
    for name, variants in bundle.graphs.items():
        for precision, entry in variants.items():
            yield f"{name} {precision}", onnx.load(bundle.path / entry.file)


def test_the_bundle_is_complete(exported):
    system, model, bundle = exported
    bundle.verify()
    assert bundle.family == system.family
    assert bundle.architecture.split()[0] == model.architecture
    assert set(bundle.graphs) == system.graphs
    for name, variants in bundle.graphs.items():
        assert set(variants) == (FLOATS if name != "text_encoder" else {"float32"})
    if system.family != "proposals":  # whose statistics are the architecture's
        assert bundle.preprocess.mean == pytest.approx(model.image_mean)
    size_hw = system.options.get("size_hw", (64, 64))
    assert bundle.preprocess.size_hw == size_hw
    assert (bundle.text.tokenizer is not None) == ("text_encoder" in system.graphs)
    if "text_encoder" in system.graphs:
        text = bundle.graphs["text_encoder"]["float32"]
        assert bundle.text.encoder_sha256 == text.sha256
        assert text.inputs[0].shape == ("prompts", 77)
    if "templates" in system.options:
        assert bundle.text.templates == tuple(system.options["templates"])
    if system.family == "descriptor":
        assert bundle.head.seen == tuple(NAMES[i] for i in model.config.seen_classes)
        assert bundle.head.seen_bias == pytest.approx(0.1)
    else:
        assert bundle.head.logit_scale == pytest.approx(getattr(model.config, "logit_scale", 100))


def test_every_stage_agrees_with_torch(exported):
    system, _, bundle = exported
    report = verify_bundle(bundle.path)
    assert report.passed, report
    compared = {(stage.where, stage.stage) for stage in report.stages}
    for precision in FLOATS:
        assert {(f"image_encoder {precision}", stage) for stage in system.stages} <= compared
    assert ("runtime", "labels") in compared
    assert system.graphs <= {stage.where.split()[0] for stage in report.stages}
    worst = max(stage.error for stage in report.stages if "float16" not in stage.where)
    assert worst < 2e-5  # float32 sums in another order


def test_graphs_are_plain_and_name_no_machine(exported):
    bundle = exported[2]
    here = os.fspath(bundle_writer.__file__).split("/zsseg_rt/")[0].encode()
    for name, model in graph_files(bundle):
        operators = {node.op_type for node in model.graph.node}
        strange = {"If", "Loop", "Scan", "Pow", "Where", "ScatterElements", "OneHot"}
        assert not operators & strange, name
        assert {(o.domain, o.version) for o in model.opset_import} == {("", 20)}
        assert not model.functions
        assert all(not tensor.external_data for tensor in model.graph.initializer)
    for path in bundle.path.iterdir():
        content = path.read_bytes()
        assert here not in content, path.name
        assert b"site-packages" not in content, path.name


def test_float16_keeps_norms_and_softmax_in_float32(exported):
    system, _, bundle = exported
    compared = set()
    for name, model in graph_files(bundle):
        if not name.endswith("float16"):
            continue
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        kinds = {value.name: value.type.tensor_type.elem_type for value in values}
        kinds |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        for each in model.graph.node:
            types = {kinds[i] for i in each.input if i and kinds[i] != TensorProto.INT64}
            if each.op_type in ("LayerNormalization", "Softmax", "ReduceL2"):
                assert types == {TensorProto.FLOAT}, (name, each.name)
            elif each.op_type in ("MatMul", "Conv"):
                assert types == {TensorProto.FLOAT16}, (name, each.name)
            compared.add((name.split()[0], each.op_type))
        for value in (*model.graph.input, *model.graph.output):
            half = value.name in FAMILIES[system.family].half_tensors
            expected = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            assert value.type.tensor_type.elem_type == expected, value.name
        full, half = (bundle.graphs[name.split()[0]][kind].bytes for kind in ("float32", "float16"))
        assert half < 0.65 * full
    for operator in ("LayerNormalization", "Softmax", "MatMul"):
        graphs = {name for name, kind in compared if kind == operator}
        assert graphs == system.graphs - {"text_encoder"}


def test_backends_agree(exported):
    """float16: OpenVINO computes in float32 with float16 weights, torch in float16."""
    bundle = exported[2]
    golden, compared = dict(np.load(bundle.path / "golden.npz")), 0
    for variants in bundle.graphs.values():
        for precision, entry in variants.items():
            if any(spec.name not in golden for spec in entry.inputs):
                continue
            feeds = {spec.name: np.ascontiguousarray(golden[spec.name]) for spec in entry.inputs}
            results = {}
            for backend, asked in (("openvino", "float32"), ("torch", precision)):
                graph = get_backend(backend).load(
                    bundle.path / entry.file, device="cpu", precision=asked, options=OPTIONS
                )
                outputs = graph.session().run(feeds)
                results[backend] = {key: np.array(value) for key, value in outputs.items()}
            for name, value in results["openvino"].items():
                error = np.abs(value - results["torch"][name]).max() / np.abs(value).max()
                assert error < (1e-5 if precision == "float32" else 2e-2), name
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize(
    "precision", ["float16", pytest.param("float32", marks=pytest.mark.nightly)]
)
def test_tensorrt_rtx_builds_every_graph(exported, precision, rtx):
    """In the precision asked for, without a GPU."""
    system, _, bundle = exported
    for name in sorted(system.graphs - {"text_encoder"}):
        axes = {"regions": (1, 10, 10)} if name == "region_encoder" else {}
        entry = bundle.graphs[name][precision]
        plan = build_plan(bundle.path / entry.file, precision, dynamic_axes=axes)
        rows = plan.report["inputs"] + plan.report["outputs"]
        stated = [(spec.name, spec.dtype) for spec in (*entry.inputs, *entry.outputs)]
        assert [(row["name"], row["dtype"]) for row in rows] == stated
        assert not axes or plan.report["axes"] == {"regions": [1, 10, 10]}
        if precision == "float16" and plan.report["runtime"].startswith("tensorrt_rtx-1.7."):
            heads = {"segment_tokens": 2 + 5 + 2}  # encoder, head, groupings
            assert fused_kernels(plan)[0] >= heads.get(system.family, 0)


@pytest.mark.parametrize("name", SYSTEMS)
def test_bad_arguments_write_nothing(name, tmp_path):
    system, path = SYSTEMS[name], tmp_path / "a.zsseg"
    model = system.build()
    for error, argument, changes in (
        (BundleError, "precisions", {"precisions": ("int4",)}),
        (BundleError, "precisions", {"precisions": ()}),
        (BundleError, "precisions", {"precisions": "float32"}),
        (VocabularyError, "templates", {"templates": ("no slot",)}),
        (VocabularyError, "templates", {"templates": ()}),
        (ShapeError, "image_size", {"size_hw": (60, 65)}),
    ):
        with refused(error, argument):
            export_bundle(model, path, **(system.options | changes))
    if "class_names" in system.options:
        with refused(VocabularyError, "class_names"):
            export_bundle(model, path, class_names=["only one"])
    with refused(CheckpointError, "model"):
        export_bundle(model.half(), path, **system.options)
    with refused(CheckpointError, "model"):
        export_bundle(torch.nn.Linear(2, 2), path)
    assert list(tmp_path.iterdir()) == []


# --- options: each exists, is documented and read, or is refused ----------------------------------


def test_options_of_nobody_or_of_others_are_refused_by_name(tmp_path):
    path = tmp_path / "a.zsseg"
    foreign = partial(
        export_dense_bundle, "e.onnx", path, image_size=8, mean=(0,) * 3, std=(1,) * 3
    )
    for build, option, words in (
        (zegclip, "clas_names", ("'class_names'",)),
        (zegclip, "region_templates", ("zegclip",)),
        (tiny.clip_rc_model, "logit_scale", ("clip_rc",)),
        (tiny_zegformer.model, "tokenizer", ("zegformer",)),
        (zeroseg_model, "unknown_below", ("zeroseg",)),
        (None, "logit_scal", ("'logit_scale'",)),
        (None, "class_names", ()),
        (None, "text_encoder", ()),
    ):
        with refused(ArgumentError, option, *words):
            (partial(export_bundle, build(), path) if build else foreign)(**{option: None})
    assert list(tmp_path.iterdir()) == []


def test_every_option_is_read_and_documented_once():
    fields = [field.name for field in dataclasses.fields(ExportOptions)]
    read = ENCODER_OPTIONS.union(*(exporter.reads for exporter in EXPORTERS.values()))
    assert set(fields) == read
    assert all(find_builder(architecture, official=False) for architecture in EXPORTERS)
    assert all(exporter.reads >= MODEL_OPTIONS for exporter in EXPORTERS.values())
    attributes = ExportOptions.__doc__.split("Attributes:")[1].split("Raises:")[0]
    assert re.findall(r"^        (\w+):", attributes, re.M) == fields


# --- written whole, right and checked, or not at all ----------------------------------------------


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir())


def test_without_text_tower(tmp_path):
    model, path = zegclip(), tmp_path / "a.zsseg"
    with refused(CheckpointError, "text_encoder"):  # of another vocabulary
        export_bundle(tiny.zegclip_model(), path, text_encoder=tiny.zegclip_model().text_encoder)
    export_bundle(model, path, precisions=("float32",), class_names=NAMES, text_encoder=None)
    bundle = Bundle.load(path)
    assert bundle.text.tokenizer is None
    assert "text_encoder" not in bundle.graphs
    with refused(BundleError, None, "a.zsseg"):
        export_bundle(model, path)
    assert leftovers(tmp_path) == ["a.zsseg"]


def test_bfloat16_graphs_keep_wide_edges(tmp_path):
    kinds = ("float32", "bfloat16")
    path = export_bundle(zegclip(), tmp_path / "a.zsseg", precisions=kinds, class_names=NAMES)
    bundle = Bundle.load(path)
    stages = [stage for stage in verify_bundle(path).stages if "bfloat16" in stage.where]
    assert {stage.where.split()[0] for stage in stages} == {"image_encoder", "decoder"}
    assert all(1e-4 < stage.error < 5e-2 for stage in stages)
    for name in ("image_encoder", "decoder"):
        entry = bundle.graph(name, "bfloat16")
        assert {spec.dtype for spec in (*entry.inputs, *entry.outputs)} == {"float32"}
        graph = onnx.load(path / entry.file).graph
        large = {one.data_type for one in graph.initializer if np.prod(one.dims) > 64}
        assert TensorProto.BFLOAT16 in large <= {TensorProto.BFLOAT16, TensorProto.FLOAT}
        assert entry.bytes < 0.7 * bundle.graph(name, "float32").bytes


def test_seen_classes_without_names_are_reported(tmp_path, caplog):
    path = export_bundle(zegclip(), tmp_path / "a.zsseg", precisions=("float32",), verify=False)
    assert "bundle lowers none" in caplog.text
    assert Bundle.load(path).head.seen == ()


def test_disagreement_is_refused(tmp_path, monkeypatch):
    """A golden sample that differs in one stage stops the export and leaves nothing."""
    write_golden = bundle_writer.write_golden

    def shifted(folder, arrays):
        return write_golden(folder, {**arrays, "patch_keys": arrays["patch_keys"] * 1.01})

    monkeypatch.setattr(bundle_writer, "write_golden", shifted)
    with refused(BundleError, "a.zsseg"):
        export_bundle(zegclip(), tmp_path / "a.zsseg", precisions=("float32",), class_names=NAMES)
    assert leftovers(tmp_path) == []


# --- dense bundles of others' encoders ------------------------------------------------------------


def write_dense_encoder(path, *, layout="nchw"):
    """Patch means of ``image``, as "nchw", "tokens" or tokens behind one more; an unused output."""
    nodes = [
        node("AveragePool", "image", "pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Relu", "image", "other"),
    ]
    outputs, weights = {"pool": (FLOAT, [1, 3, 4, 4])}, {}
    if layout != "nchw":
        weights = {"flat": np.array([1, 3, -1]), "class": np.zeros((1, 1, 3), np.float32)}
        nodes += [
            node("Reshape", "pool flat", "columns"),
            node("Transpose", "columns", "embeds", perm=[0, 2, 1]),
            node("Concat", "class embeds", "all", axis=1),
        ]
        name, count = ("embeds", 16) if layout == "tokens" else ("all", 17)
        outputs = {name: (FLOAT, [1, count, 3])}
    outputs["other"] = (FLOAT, [1, 3, 8, 8])
    inputs = {"image": (FLOAT, ["batch", 3, "height", "width"])}
    return write_graph(path, nodes, inputs, outputs, weights)


STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def dense(encoder, out, **changes):
    arguments = {"image_size": 8, "activation": "none", "logit_scale": 1.0, **STATISTICS, **changes}
    return export_dense_bundle(encoder, out, **arguments)


def test_channels_first_becomes_patches(tmp_path):
    encoder = write_dense_encoder(tmp_path / "e.onnx")
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
    for name, grid, options in (
        ("a", (4, 4), {}),
        ("b", (4, 4), {"grid_hw": (4, 4)}),
        ("c", (2, 8), {"grid_hw": (2, 8)}),
        ("d", (2, 8), {"image_size": (4, 16), "grid_hw": None}),
    ):
        path = dense(encoder, tmp_path / f"{name}.zsseg", **options)
        assert Bundle.load(path).head.grid_hw == grid
    with refused(BundleError, None, "grid_hw"):
        dense(encoder, tmp_path / "e.zsseg", grid_hw=(3, 5))
    encoder = write_dense_encoder(tmp_path / "e.onnx", layout="class token")
    with pytest.raises(BundleError, match=r"got shape \(1, 17, 3\).*--grid-hw GH GW"):
        dense(encoder, tmp_path / "e.zsseg")


def test_sizes_that_the_encoder_computes_become_constants_and_names_step_aside(tmp_path):
    """As torch writes ``x.shape[2] // 2``; the check at load computes nothing."""
    path = write_graph(
        tmp_path / "e.onnx",
        [
            node("Relu", "x", "image"),
            node("AveragePool", "image", "pool", kernel_shape=[2, 2], strides=[2, 2]),
            node("Shape", "image", "shape"),
            node("Gather", "shape three", "width"),
            node("Div", "width two", "cells"),
            node("Mul", "cells cells", "patches"),
            node("Concat", "one_three patches", "sizes", axis=0),
            node("Reshape", "pool sizes", "columns"),
            node("Squeeze", "patches", "count"),
            node("Range", "zero count one", "order"),
            node("Gather", "columns order", "ordered", axis=2),
            node("Transpose", "ordered", "embeds", perm=[0, 2, 1]),
        ],
        {"x": (FLOAT, ["n", 3, "h", "w"])},
        {"embeds": (FLOAT, ["n", "p", 3])},
        {"three": np.array([3]), "two": np.array([2]), "one_three": np.array([1, 3]),
         "zero": np.array(0), "one": np.array(1)},
    )  # fmt: skip
    written = dense(path, tmp_path / "d.zsseg")
    assert verify_bundle(written).passed
    graph = onnx.load(next(written.glob("*.onnx"))).graph
    kinds = [each.op_type for each in graph.node]
    assert kinds == ["Relu", "AveragePool", "Reshape", "Gather", "Transpose"]


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
        (b"", "e.onnx"),
        (b"\x00garbage", "e.onnx"),
        (9, "float32.*1, 3, 8, 8"),
        ("RandomNormalLike", "e.onnx: .* operator that encoders use.*RandomNormalLike"),
        ("AveragePoop", "e.onnx: .* operator that encoders use.*AveragePoop"),
    ],
)
def test_dense_refusals_write_nothing(tmp_path, changes, message):
    """Of arguments, and of encoders: other bytes, another width or another operator."""
    encoder = write_dense_encoder(tmp_path / "e.onnx")
    model = onnx.load(encoder)
    if isinstance(changes, str):
        model.graph.node[0].op_type = changes
    elif isinstance(changes, int):
        model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = changes
    encoder.write_bytes(changes if isinstance(changes, bytes) else model.SerializeToString())
    with pytest.raises((BundleError, VocabularyError), match=message):
        dense(encoder, tmp_path / "d.zsseg", **(changes if isinstance(changes, dict) else {}))
    assert leftovers(tmp_path) == ["e.onnx"]


def test_bundles_alone_are_overwritten_and_wholly(tmp_path):
    encoder, path = write_dense_encoder(tmp_path / "e.onnx"), tmp_path / "c.zsseg"
    dense(encoder, path, licence="old", verify=False)
    (path / "extra").write_text("stale")
    dense(encoder, path, licence="new", overwrite=True, verify=False)
    assert Bundle.load(path).licence == "new"
    assert not (path / "extra").exists()
    thesis = tmp_path / "d.zsseg" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("precious")
    with refused(BundleError, None, "d.zsseg"):
        dense(encoder, thesis.parent, overwrite=True)
    assert thesis.read_text() == "precious"
    for name in ("bundle", "bundle.zip", ".zsseg", "e.onnx/c.zsseg"):
        with pytest.raises(BundleError, match="path: expected NAME.zsseg|cannot be written"):
            dense(encoder, tmp_path / name)
    assert leftovers(tmp_path) == ["c.zsseg", "d.zsseg", "e.onnx"]


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


def test_foreign_encoders_are_exported_without_torch(tmp_path):
    code = """
import sys
sys.modules["torch"] = None
from pathlib import Path
from support.colour_words import export_colour_bundle
export_colour_bundle(Path(sys.argv[1]))
"""
    path = tmp_path / "colours.zsseg"
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}  # support
    assert python("-c", code, path, more_env=paths).returncode == 0
    assert (path / "bundle.json").is_file()
