"""Every system's bundle: what it holds, stage by stage against torch, and what is refused."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from support import golden_tips, tiny, tiny_zegformer
from support.errors import refused
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
    "dense_clip sclip": System(
        lambda: dense_clip("sclip"), DENSE, "dense", {"image_encoder"}, {"patch_embeds"}
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
        for node in model.graph.node:
            types = {kinds[i] for i in node.input if i and kinds[i] != TensorProto.INT64}
            if node.op_type in ("LayerNormalization", "Softmax", "ReduceL2"):
                assert types == {TensorProto.FLOAT}, (name, node.name)
            elif node.op_type in ("MatMul", "Conv"):
                assert types == {TensorProto.FLOAT16}, (name, node.name)
            compared.add((name.split()[0], node.op_type))
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


FIELDS = [field.name for field in dataclasses.fields(ExportOptions)]


foreign = partial(export_dense_bundle, image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.mark.parametrize(
    ("build", "option", "words"),
    [
        (tiny.zegclip_model, "clas_names", ("'class_names'",)),
        (tiny.zegclip_model, "region_templates", ("zegclip",)),
        (tiny.clip_rc_model, "logit_scale", ("clip_rc",)),
        (tiny_zegformer.model, "tokenizer", ("zegformer",)),
        (zeroseg_model, "unknown_below", ("zeroseg",)),
        (None, "logit_scal", ("'logit_scale'",)),
        (None, "class_names", ()),
        (None, "text_encoder", ()),
    ],
)
def test_options_of_nobody_or_of_others_are_refused_by_name(build, option, words, tmp_path):
    path, options = tmp_path / "a.zsseg", {option: None}
    with refused(ArgumentError, option, *words):
        if build is None:
            foreign("absent.onnx", path, **options)
        else:
            export_bundle(build(), path, **options)
    assert list(tmp_path.iterdir()) == []


def test_every_option_is_read_and_documented_once():
    read = ENCODER_OPTIONS.union(*(exporter.reads for exporter in EXPORTERS.values()))
    assert set(FIELDS) == read
    assert all(find_builder(architecture, official=False) for architecture in EXPORTERS)
    assert all(exporter.reads >= MODEL_OPTIONS for exporter in EXPORTERS.values())
    attributes = ExportOptions.__doc__.split("Attributes:")[1].split("Raises:")[0]
    assert re.findall(r"^        (\w+):", attributes, re.M) == FIELDS


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
