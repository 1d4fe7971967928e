"""Every system's bundle: what it holds, stage by stage against torch, and what is refused."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from support import golden_tips, tiny, tiny_zegformer
from support.errors import refused
from support.graphs import to_float16
from support.rtx_plans import build_plan, fused_kernels
from support.tiny_zeroseg import zeroseg_model
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import get_backend
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.specs import FAMILIES
from zsseg_rt.errors import (
    ArgumentError,
    BundleError,
    CheckpointError,
    ShapeError,
    VocabularyError,
)
from zsseg_rt.export import (
    bundle_writer,
    export_bundle,
    export_dense_bundle,
    export_graphs,
    verify_bundle,
)
from zsseg_rt.export.exporters import EXPORTERS
from zsseg_rt.export.options import ENCODER_OPTIONS, MODEL_OPTIONS, ExportOptions
from zsseg_rt.models import from_official
from zsseg_rt.models.registry import find_builder

SIZES = tiny.TinySizes(text_vocab=49408, text_length=77, num_layers=3)
NAMES = [f"name {index}" for index in range(7)]
FLOATS = {"float32", "float16"}
OPTIONS = BackendOptions(num_threads=1)


def dense_clip(head: str) -> Any:
    weights = tiny.clip_state_dict(SIZES)
    settings = {"num_heads": 4, "text_heads": 4, "activation": "quick_gelu", "image_size": 64}
    return from_official("dense_clip", weights, head=head, **settings)


def tips() -> Any:
    return from_official("tips", {"vision": golden_tips.vision(width=32)}, num_heads=4)


class System(NamedTuple):
    """A model, how it is exported, and what the bundle must hold then."""

    build: Callable[[], Any]
    options: dict[str, Any]
    family: str
    graphs: set[str]
    stages: set[str]


DENSE = {"size_hw": (64, 96), "templates": ["a {}.", "the {}", "see {}"], "text_encoder": None}
DESCRIPTOR = {"image_encoder", "decoder"}
EMBEDS = {"patch_embeds", "cls_embed"}
SYSTEMS = {
    "zegclip": System(
        lambda: tiny.zegclip_model(SIZES),
        {"class_names": NAMES},
        "descriptor",
        DESCRIPTOR | {"text_encoder"},
        EMBEDS,
    ),
    "clip_rc": System(tiny.clip_rc_model, {"class_names": NAMES}, "descriptor", DESCRIPTOR, EMBEDS),
    "zegformer": System(
        tiny_zegformer.model,
        {"size_hw": (64, 96), "text_encoder": None, "class_names": NAMES},
        "proposals",
        {"image_encoder", "region_encoder"},
        {"segment_embeds", "region_masks", "no_object"},
    ),
    "zeroseg": System(
        zeroseg_model,
        {"size_hw": (64, 96)},
        "segment_tokens",
        {"image_encoder"},
        {"segment_embeds", "image_embed", "group_map"},
    ),
    "tips": System(
        tips,
        {"size_hw": (84, 126), "text_encoder": None},
        "dense",
        {"image_encoder"},
        {"patch_embeds"},
    ),
    "dense_clip words": System(
        lambda: dense_clip("naclip"),
        DENSE | {"text_encoder": "auto"},
        "dense",
        {"image_encoder", "text_encoder"},
        {"patch_embeds"},
    ),
    **{
        f"dense_clip {head}": System(
            lambda head=head: dense_clip(head), DENSE, "dense", {"image_encoder"}, {"patch_embeds"}
        )
        for head in ("vanilla", "maskclip", "sclip", "clearclip")
    },
}


@pytest.fixture(scope="module", params=SYSTEMS)
def exported(request, tmp_path_factory):
    """A system, its model and its bundle."""
    system = SYSTEMS[request.param]
    model, path = system.build(), tmp_path_factory.mktemp("bundles") / "a.zsseg"
    return system, model, Bundle.load(export_bundle(model, path, **system.options))


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
    for name, model in graph_files(bundle):
        if not name.endswith("float16"):
            continue
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        kinds = {value.name: value.type.tensor_type.elem_type for value in values}
        kinds |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        for node in model.graph.node:
            types = {kinds[i] for i in node.input if i and kinds[i] != TensorProto.INT64}
            if node.op_type in ("LayerNormalization", "Softmax", "ReduceL2"):
                assert types == {TensorProto.FLOAT}, (name, node.name)
            elif node.op_type in ("MatMul", "Conv"):
                assert types == {TensorProto.FLOAT16}, (name, node.name)
        for value in (*model.graph.input, *model.graph.output):
            half = value.name in FAMILIES[system.family].half_tensors
            expected = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            assert value.type.tensor_type.elem_type == expected, value.name
        full, half = (bundle.graphs[name.split()[0]][kind].bytes for kind in ("float32", "float16"))
        assert half < 0.65 * full


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
                found = graph.session().run(feeds)
                results[backend] = {key: np.array(value) for key, value in found.items()}
            for name, value in results["openvino"].items():
                error = np.abs(value - results["torch"][name]).max() / np.abs(value).max()
                assert error < (1e-5 if precision == "float32" else 2e-2), name
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize("precision", sorted(FLOATS))
def test_tensorrt_rtx_builds_every_graph(exported, precision, monkeypatch):
    """In the precision asked for, without a GPU."""
    system, _, bundle = exported
    for name in sorted(system.graphs - {"text_encoder"}):
        axes = {"regions": (1, 10, 10)} if name == "region_encoder" else {}
        plan = build_plan(bundle.path, precision, monkeypatch, name, dynamic_axes=axes)
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
        if name == "zegformer" and argument == "image_size":
            continue  # takes images of any size
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


# --- graphs of ZegCLIP, and of single operators ---------------------------------------------------


def test_image_encoder_keeps_one_attention_a_block(zegclip_bundle, zegclip_model):
    model = dict(graph_files(Bundle.load(zegclip_bundle)))["image_encoder float32"]
    counts = [node.op_type for node in model.graph.node]
    layers = zegclip_model.config.image_encoder.num_layers
    assert counts.count("Softmax") == layers
    assert counts.count("LayerNormalization") == 2 * layers + 3  # ln_pre, prompt_norm, ln_post


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_torch_lowers_a_float32_graph(zegclip_bundle, precision):
    bundle = Bundle.load(zegclip_bundle)
    golden = dict(np.load(bundle.path / "golden.npz"))
    entry = bundle.graphs["image_encoder"]["float32"]
    session = (
        get_backend("torch")
        .load(bundle.path / entry.file, device="cpu", precision=precision, options=OPTIONS)
        .session()
    )
    assert session.precision == precision
    found = session.run({"image": golden["image"]})["patch_embeds"]
    assert found.dtype == np.float32
    error = np.abs(found - golden["patch_embeds"]).max() / np.abs(golden["patch_embeds"]).max()
    assert 0 < error < 8e-2  # 8 significant bits through four blocks; worst seen 1.5e-2


def test_onnxruntime_agrees(zegclip_bundle):
    onnxruntime = pytest.importorskip("onnxruntime")
    bundle = Bundle.load(zegclip_bundle)
    golden = dict(np.load(bundle.path / "golden.npz"))
    for name, variants in bundle.graphs.items():
        entry = variants["float32"]
        session = onnxruntime.InferenceSession(
            bundle.path / entry.file, providers=["CPUExecutionProvider"]
        )
        found = session.run(None, {spec.name: golden[spec.name] for spec in entry.inputs})
        for spec, value in zip(entry.outputs, found, strict=True):
            stage = "prompt_embeds" if spec.name == "text_embeds" else spec.name
            np.testing.assert_allclose(value, golden[stage], atol=2e-5, err_msg=f"{name} {stage}")


def test_weight_beyond_float16_is_named():
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "huge"], ["y"])],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor("huge", TensorProto.FLOAT, [1, 1], [1e6])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with refused(CheckpointError, "huge", "65504"):
        to_float16(model)


# --- options: each exists, is documented and read, or is refused ----------------------------------


FIELDS = [field.name for field in dataclasses.fields(ExportOptions)]


def foreign(path, **options):
    size = {"image_size": 8, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    return export_dense_bundle("absent.onnx", path, **size, **options)


@pytest.mark.parametrize("export", [export_bundle, export_graphs])
def test_an_unknown_option_names_the_nearest(export, tmp_path):
    message = r"clas_names: expected an option of export.* Did you mean 'class_names'\?"
    with pytest.raises(ArgumentError, match=message):
        export(tiny.zegclip_model(), tmp_path / "a.zsseg", clas_names=["a"])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_of_a_foreign_encoder_names_the_nearest(tmp_path):
    with refused(ArgumentError, "logit_scal", "'logit_scale'"):
        foreign(tmp_path / "a.zsseg", logit_scal=1.0)


@pytest.mark.parametrize(
    ("build", "option"),
    [
        (tiny.zegclip_model, {"region_templates": ("{}",)}),
        (tiny.clip_rc_model, {"logit_scale": 100.0}),
        (tiny_zegformer.model, {"tokenizer": None}),
        (zeroseg_model, {"unknown_below": 0.5}),
    ],
    ids=["zegclip", "clip_rc", "zegformer", "zeroseg"],
)
def test_an_option_of_other_architectures_is_refused_by_name(build, option, tmp_path):
    model, name = build(), next(iter(option))
    with refused(ArgumentError, name, model.architecture):
        export_bundle(model, tmp_path / "a.zsseg", **option)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [{"class_names": ["a"]}, {"text_encoder": None}])
def test_an_option_of_models_is_refused_for_foreign_encoders(option, tmp_path):
    with refused(ArgumentError, next(iter(option))):
        foreign(tmp_path / "a.zsseg", **option)


def test_every_option_is_read_and_documented_once():
    read = ENCODER_OPTIONS.union(*(exporter.reads for exporter in EXPORTERS.values()))
    assert set(FIELDS) == read
    assert all(exporter.reads >= MODEL_OPTIONS for exporter in EXPORTERS.values())
    attributes = ExportOptions.__doc__.split("Attributes:")[1].split("Raises:")[0]
    assert re.findall(r"^        (\w+):", attributes, re.M) == FIELDS


def test_every_exporter_is_of_an_architecture():
    for architecture in EXPORTERS:
        assert find_builder(architecture, official=False)


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
    call = [sys.executable, "-c", code, path]
    subprocess.run(call, env=os.environ | paths, check=True, timeout=120)
    assert (path / "bundle.json").is_file()
