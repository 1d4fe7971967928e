"""Graphs of whole systems in OpenVINO against the same functions in NumPy, and their operations."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from support import golden_cat_seg, tiny, tiny_zegformer
from support.descriptor_models import run_parts
from support.graph_runs import run_file
from support.tiny_zeroseg import zeroseg_model
from zsseg_rt.export.architectures import cat_seg as cat_seg_export
from zsseg_rt.export.architectures import zegformer as zegformer_export
from zsseg_rt.export.architectures.descriptor import export_descriptor, parts_of
from zsseg_rt.export.architectures.zeroseg import export_zeroseg, student_of
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.export.words import written_text
from zsseg_rt.networks import cat_seg, zegformer, zeroseg
from zsseg_rt.networks.layers import group_norm
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.onnx.graph import Graph
from zsseg_rt.onnx.operations import Linear, Norm
from zsseg_rt.onnx.writer import save_onnx

ROUNDING = 5e-6  # the same sums in another order


def assert_graph_is(path, network, expected, feeds, rounding=ROUNDING):
    """Within rounding of every value, relative to the largest; and a graph that ONNX accepts."""
    save_onnx(network, "graph", path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    found = run_file(path, feeds)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert np.abs(found[name] - value).max() <= rounding * np.abs(value).max(), name


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


@pytest.fixture(scope="module", params=[96, 144])
def network(request):
    model = golden_cat_seg.tiny_model(padding=256, view=request.param)
    return cat_seg_export.network_of(model)


@pytest.mark.parametrize("name", list(cat_seg.GRAPHS))
def test_cat_seg(network, name, tmp_path):
    compute, inputs = cat_seg.GRAPHS[name]
    graph = cat_seg_export.graphs_of(network)[name]()
    for count in (1, 33) if name != "image_encoder" else (1,):
        shapes = {one: network.shapes()[one] for one in inputs.split()}
        sized = {
            one: [count if size == "classes" else size for size in s] for one, s in shapes.items()
        }
        feeds = {one: random(*shape) for one, shape in sized.items()}
        feeds |= {one: np.abs(feeds[one]) + 1 for one in feeds if "totals" in one}
        feeds |= {"padding": np.array([256.0 - count], np.float32)} if "padding" in feeds else {}
        assert_graph_is(tmp_path / "a.onnx", graph, compute(Arrays(), network, feeds), feeds)


Sizes = tiny.TinySizes
DESCRIPTORS = {
    "zegclip": (tiny.zegclip_model, Sizes(), (64, 64), 1),
    "zegclip windows": (tiny.zegclip_model, Sizes(), (48, 96), 2),
    "zegclip no prompts": (tiny.zegclip_model, Sizes(num_prompts=0), (80, 16), 1),
    "zegclip one layer": (tiny.zegclip_model, Sizes(decoder_layers=1), (130, 70), 1),
    "clip_rc": (tiny.clip_rc_model, Sizes(), (64, 64), 1),
    "clip_rc other grid": (tiny.clip_rc_model, Sizes(num_cells=9), (96, 112), 1),
    "zegclip odd sizes": (
        tiny.zegclip_model,
        Sizes(width=96, num_heads=6, num_prompts=7, patch_size=8, grid_side=5),
        (40, 40),
        1,
    ),
    "zegclip narrow": (
        tiny.zegclip_model,
        Sizes(embed_dim=48, decoder_heads=2, decoder_layers=2, num_classes=5, seen=(4,)),
        (16, 16),
        1,
    ),
    "clip_rc one cell": (
        tiny.clip_rc_model,
        Sizes(num_cells=1, num_prompts=1, num_layers=2, grid_side=3),
        (48, 48),
        1,
    ),
    "clip_rc odd sizes": (
        tiny.clip_rc_model,
        Sizes(num_cells=9, width=96, num_heads=6, num_prompts=7, patch_size=8, grid_side=6),
        (80, 48),
        1,
    ),
    "clip_rc narrow": (
        tiny.clip_rc_model,
        Sizes(num_cells=9, embed_dim=48, decoder_heads=2, decoder_layers=2, grid_side=5),
        (130, 70),
        1,
    ),
}


@pytest.mark.parametrize("case", DESCRIPTORS)
def test_descriptors(case, tmp_path):
    build, sizes, size_hw, windows = DESCRIPTORS[case]
    model = build(sizes)
    fits = not any(side % sizes.patch_size for side in size_hw)
    options = ExportOptions(size_hw=size_hw if fits else None, window_batch=windows)
    exported, parts = export_descriptor(model, options), parts_of(model)
    image = random(windows, 3, *exported.preprocess.size_hw)
    encoded = parts.encode(Arrays(), image)
    expected = dict(zip(("patch_embeds", "cls_embed"), encoded, strict=True))
    graphs = {name: graph() for name, graph in exported.graphs.items()}
    assert_graph_is(tmp_path / "e.onnx", graphs["image_encoder"], expected, {"image": image})
    for classes in (1, 33):
        queries = random(len(encoded[1]), classes, len(parts.projection()[0].weight))
        feeds = {"queries": queries, "patch_embeds": encoded[0]}
        decoded = parts.decode(Arrays(), **feeds)
        expected = dict(zip(("class_embeds", "patch_keys"), decoded, strict=True))
        assert_graph_is(tmp_path / "d.onnx", graphs["decoder"], expected, feeds)


@torch.no_grad()
@pytest.mark.parametrize("case", DESCRIPTORS)
def test_descriptors_equal_the_models(case):
    """Folded parts, computed in the runtime's order, at sizes that patches need not fill."""
    build, sizes, size_hw, _ = DESCRIPTORS[case]
    model, image = build(sizes, "a"), tiny.image(2, 3, *size_hw, salt="a")
    text = tiny.text_embeds(sizes.num_classes, sizes.embed_dim, "a")
    output = model(image, text)
    grid_hw = tuple(side // sizes.patch_size for side in size_hw)
    assert output.mask_logits.shape == (2, sizes.num_classes, *grid_hw)
    assert output.mask_logits.std() > 0.05  # lively enough for the comparison to mean something
    logits = run_parts(model, image, text)
    torch.testing.assert_close(logits, output.mask_logits, rtol=0, atol=5e-5)


@pytest.mark.parametrize("size_hw", [(64, 64), (48, 96)])
def test_zeroseg(size_hw, tmp_path):
    model = zeroseg_model()
    graph = export_zeroseg(model, ExportOptions(size_hw=size_hw)).graphs["image_encoder"]
    image = random(1, 3, *size_hw)
    found = zeroseg.segments(Arrays(), student_of(model), image)
    names = ("segment_embeds", "image_embed", "group_map")
    expected = dict(zip(names, found, strict=True))
    # Shares are a steep softmax of similarities, twice; worst seen 8.7e-6 (Xeon with AMX)
    assert_graph_is(tmp_path / "a.onnx", graph(), expected, {"image": image}, rounding=2e-5)
    with torch.no_grad():
        in_torch = model(torch.from_numpy(image))
    for value, other in zip(found, in_torch, strict=True):
        torch.testing.assert_close(torch.from_numpy(value), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_text_tower(count, tmp_path):
    tower = written_text(tiny.zegclip_model().text_encoder)
    token_ids = np.random.default_rng(0).integers(1, 60, (count, tower.context_length))
    token_ids[:, -3:] = 0
    token_ids[:, -4] = 63  # the end of the text
    expected = {"text_embeds": tower.embed(token_ids)}
    assert_graph_is(tmp_path / "a.onnx", tower.network(), expected, {"token_ids": token_ids})


@pytest.mark.parametrize("size_hw", [(64, 96), (160, 32)])
def test_zegformer_segments(size_hw, tmp_path):
    network = zegformer_export.network_of(tiny_zegformer.model())
    graph = zegformer_export.graphs_of(network, size_hw)["image_encoder"]()
    image = random(1, 3, *size_hw)
    expected = zegformer.propose(Arrays(), network, image)
    assert_graph_is(tmp_path / "a.onnx", graph, expected, {"image": image})


@pytest.mark.parametrize("count", [1, 5])
def test_zegformer_regions(count, tmp_path):
    network = zegformer_export.network_of(tiny_zegformer.model())
    crops = random(count, 3, network.region_side, network.region_side)
    expected = {"region_embeds": zegformer.embed_regions(Arrays(), network, crops)}
    graph = zegformer_export.graphs_of(network, (32, 32))["region_encoder"]()
    assert_graph_is(tmp_path / "a.onnx", graph, expected, {"crops": crops})


KERNEL, BIAS = random(8, 4, 4, 4), random(4)
OPERATIONS = {
    "elu": (lambda ops, x: ops.elu(x), F.elu),
    "conv_transpose": (
        lambda ops, x: ops.conv_transpose(x, Linear(KERNEL, BIAS), stride=2, pad=1),
        lambda x: F.conv_transpose2d(
            x, torch.from_numpy(KERNEL), torch.from_numpy(BIAS), stride=2, padding=1
        ),
    ),
    "max_pool": (
        lambda ops, x: ops.max_pool(x, 3, stride=2, pad=1),
        lambda x: F.max_pool2d(x, 3, 2, 1),
    ),
    "double": (lambda ops, x: ops.double(x), lambda x: F.interpolate(x, scale_factor=2)),
    "gather": (lambda ops, x: ops.gather(x, np.array([2, 0, 2]), 1), lambda x: x[:, [2, 0, 2]]),
    "norm": (lambda ops, x: ops.norm(x, 2, 3), lambda x: x.norm(dim=(2, 3), keepdim=True)),
    "group_norm": (
        lambda ops, x: group_norm(ops, x, Norm(np.arange(8.0, dtype="f4"), BIAS.repeat(2)), 2),
        lambda x: F.group_norm(
            x.double(), 2, torch.arange(8.0).double(), torch.from_numpy(BIAS.repeat(2)).double()
        ),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_operations_are_torchs(name, scale, tmp_path):
    run, torchs = OPERATIONS[name]
    x = np.float32(scale) * (random(3, 8, 7, 6) + 5 * random(3, 8, 1, 1))
    x[0] = 7.0  # a group norm has nothing to scale
    expected = run(Arrays(), x)
    official = torchs(torch.from_numpy(x)).numpy()
    assert np.abs(expected - official).max() <= 2e-5 * max(1, np.abs(official).max())
    graph = Graph()
    graph.output("y", run(graph, graph.input("x", x.shape)))
    assert_graph_is(tmp_path / "a.onnx", graph.network(), {"y": expected}, {"x": x})
