"""Graphs that take and give half precision: what is exported, stated, refused, and computed."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("onnx")
import onnx
from onnx import TensorProto, helper

from conftest import require_cuda
from support.errors import refused
from support.fakes import edit_manifest
from support.graphs import to_float16, write_graph
from support.half_bundles import FAMILIES, NAMES, half_and_wide
from support.host_backend import host_backend
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import check_connections, get_backend
from zsseg_rt.bundles import specs as bundle_specs
from zsseg_rt.errors import BundleError
from zsseg_rt.ops.reference import upsample_bilinear
from zsseg_rt.runtime.families.registry import create_family
from zsseg_rt.runtime.workspace import Workspace

CPU = {"device": "cpu", "precision": "float32", "use_cache": False}
STORED = Path(__file__).parents[1] / "bundles" / "v1"
# Of scores in [0, 1]. What is multiplied for the queries, CLIP-RC's mean queries and the names of
# dense are float32 numbers that are rounded to float16 now (worst seen: ZegCLIP 2.3e-4, CLIP-RC
# 1.2e-3); dense logits are 100 cosines.
TOLERANCE = {"dense": 1e-2, "zegclip": 1e-3, "clip_rc": 2e-3}


@pytest.fixture(scope="module", params=FAMILIES)
def bundles(request, tmp_path_factory):
    """A family, its bundle in half precision, and the same with float32 edges."""
    return request.param, *half_and_wide(request.param, tmp_path_factory.mktemp(request.param))


FRAME = np.random.default_rng(5).integers(0, 256, (9, 7, 3), np.uint8).repeat(9, 0).repeat(11, 1)


def run(path, name, feeds):
    options = BackendOptions(num_threads=1)
    graph = get_backend("torch").load(
        path / f"{name}.float16.onnx", device="cpu", precision="auto", options=options
    )
    assert {spec.dtype for spec in (*graph.inputs, *graph.outputs)} == {"float32"}
    return graph.session().run(feeds)


def test_a_graph_computes_the_same_bits_with_half_edges(bundles):
    """The first thing a float16 graph does with its inputs is to round them."""
    _, half, wide = bundles
    bundle, feeds = Bundle.load(half), {}
    with np.load(half / "golden.npz") as golden:
        for name, variants in bundle.graphs.items():
            inputs = {spec.name: golden[spec.name] for spec in variants["float16"].inputs}
            expected, outputs = run(wide, name, inputs), run(half, name, inputs)
            for tensor, result in outputs.items():
                is_half = tensor in bundle_specs.FAMILIES[bundle.family].half_tensors
                rounded = expected[tensor].astype(np.float16 if is_half else np.float32)
                np.testing.assert_array_equal(result, rounded, err_msg=tensor)
            feeds |= outputs
    assert feeds


@pytest.mark.needs_cuda
@pytest.mark.parametrize("session_kind", ["own arrays", "foreign arrays", "TensorRT's"])
def test_labels_on_a_gpu_equal_those_of_float32_edges(bundles, monkeypatch, session_kind):
    """The graphs compute the same bits (above), so only the kernels between them differ."""
    require_cuda()
    family, half, wide = bundles
    placed = host_backend(monkeypatch, session_kind, host_name="torch")
    segs = {}
    for path in (half, wide):
        config = EngineConfig(
            precision="float16", use_cache=False, with_scores=True,
            with_class_scores=None if family == "zeroseg" else "low", **placed,
        )  # fmt: skip
        with Engine(path, config) as engine:
            image = engine._lane.sessions["image_encoder"].inputs[0]
            assert image.dtype == ("float16" if path == half else "float32")
            assert engine.self_check().passed
            engine.set_classes(NAMES)
            segs[path] = engine.segment(FRAME)
    ours, theirs = segs[half], segs[wide]
    if family == "zeroseg":
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        return
    maps = ours.class_scores, theirs.class_scores
    np.testing.assert_allclose(*maps, rtol=0, atol=TOLERANCE[family])
    # By how much the best class wins at the frame's size, seen classes having lost their bias.
    head = Bundle.load(wide).head
    lost = head.seen_bias * np.isin(theirs.names, head.seen)[:, None, None]
    ranked = np.sort(upsample_bilinear(maps[1][None], ours.labels.shape)[0] - lost, axis=0)
    clear = ranked[-1] - ranked[-2] > 2 * TOLERANCE[family]
    assert clear.mean() > 0.75
    np.testing.assert_array_equal(ours.labels[clear], theirs.labels[clear])
    same = ours.labels == theirs.labels
    scores = ours.scores[same], theirs.scores[same]
    np.testing.assert_allclose(*scores, rtol=0, atol=TOLERANCE[family])


# --- what is refused ----------------------------------------------------------------------------


def edited(folder, name, tensor, value):
    """A stored bundle whose manifest says another dtype of a tensor."""
    path = shutil.copytree(STORED / f"{name}.zsseg", folder / "copy.zsseg")
    graph, variant, side, tensor = tensor
    specs = getattr(Bundle.load(path).graphs[graph][variant], side)
    index = [spec.name for spec in specs].index(tensor)
    edit_manifest(path, ("graphs", graph, variant, side, index, "dtype"), value)
    return path


IMAGE = ("image_encoder", "float16", "inputs", "image")
CROPS = ("region_encoder", "float16", "inputs", "crops")
PATCHES = ("image_encoder", "float16", "outputs", "patch_embeds")


@pytest.mark.parametrize(
    ("name", "tensor", "value", "message"),
    [
        ("descriptor", IMAGE, "float64", r"image_encoder\.float16: image: .* 'descriptor', got 'f"),
        ("proposals", CROPS, "float16", "crops: .* in family 'proposals', got 'float16'"),
        ("descriptor", PATCHES, "float16", "patch_embeds: .* as in another graph, got float32"),
    ],
)
def test_a_manifest_with_a_wrong_dtype_is_refused(tmp_path, name, tensor, value, message):
    with pytest.raises(BundleError, match=message):
        Bundle.load(edited(tmp_path, name, tensor, value))


def test_a_manifest_that_differs_from_its_graph_is_refused(tmp_path):
    image = ("image_encoder", "float32", "inputs", "image")
    path = edited(tmp_path, "descriptor", image, "float16")
    for backend in ("openvino", "torch"):
        with refused(BundleError, None, "image_encoder.float32.inputs", "'float16'"):
            Engine(path, EngineConfig(**CPU, backend=backend))


def test_graphs_of_different_precisions_must_fit():
    """An encoder in float16 gives what a decoder in float32 does not take, where nothing widens."""
    bundle = Bundle.load(STORED / "descriptor.zsseg")

    def graph(name, precision):
        entry = bundle.graph(name, "float32")
        sides = [[replace(spec, dtype=precision) for spec in side]
                 for side in (entry.inputs, entry.outputs)]  # fmt: skip
        return SimpleNamespace(inputs=sides[0], outputs=sides[1], precision=precision)

    wide, half = graph("decoder", "float32"), graph("image_encoder", "float16")
    with refused(BundleError, None, "patch_embeds", "float32", "float16", "image_encoder"):
        check_connections(bundle, {"image_encoder": half, "decoder": wide})
    family = create_family(bundle, EngineConfig())
    kinds = [("float32", "float16"), ("float16", "float32"), ("bfloat16", "bfloat16")]
    for embeds, taken in kinds:  # and what a kernel reads and writes between them is of one dtype
        encoder, decoder = graph("image_encoder", embeds), graph("decoder", taken)
        graphs = {"image_encoder": encoder, "decoder": decoder}
        with pytest.raises(BundleError, match=f"cls_embed and queries: .* {embeds} and {taken}"):
            family.pipeline(family, graphs, Workspace("cpu"))


def test_an_output_that_is_used_inside_stays_available_in_both_types(tmp_path):
    """A norm's result leaves in float16 and goes on in float32."""
    path = write_graph(
        tmp_path / "norm.onnx",
        [
            helper.make_node("LayerNormalization", ["x", "scale"], ["y"], axis=-1),
            helper.make_node("Softmax", ["y"], ["z"]),
            helper.make_node("Mul", ["y", "two"], ["w"]),
        ],
        {"x": (TensorProto.FLOAT, [4, 64])},
        {name: (TensorProto.FLOAT, [4, 64]) for name in "yzw"},
        {"scale": np.ones(64, np.float32), "two": np.full(64, 2, np.float32)},
    )
    half = to_float16(onnx.load(path), half=("x", "y", "w", "absent"))
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)}
    assert {name for name in "xyzw" if kinds[name] == TensorProto.FLOAT16} == set("xyw")
    softmax = next(node for node in half.graph.node if node.op_type == "Softmax")
    assert softmax.input[0] == "y.float32"
    onnx.save(half, tmp_path / "half.onnx")
    options = BackendOptions(num_threads=1)
    session = get_backend("torch").load(
        tmp_path / "half.onnx", device="cpu", precision="auto", options=options
    ).session()  # fmt: skip
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    outputs = session.run({"x": x})
    np.testing.assert_array_equal(outputs["y"], outputs["y"].astype(np.float16))
    np.testing.assert_allclose(outputs["z"].sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(outputs["w"], 2 * outputs["y"])
