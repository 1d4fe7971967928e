"""Graphs of whole systems in OpenVINO against the same functions in NumPy, and their operations."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from support import golden_cat_seg, tiny_zegformer
from support.graph_runs import run_file
from zsseg_rt.export.architectures import cat_seg as cat_seg_export
from zsseg_rt.export.architectures import zegformer as zegformer_export
from zsseg_rt.networks import cat_seg, zegformer
from zsseg_rt.networks.layers import group_norm
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.onnx.graph import Graph
from zsseg_rt.onnx.operations import Linear, Norm
from zsseg_rt.onnx.writer import save_onnx

ROUNDING = 5e-6  # the same sums in another order


def assert_graph_is(path, network, expected, feeds):
    """Within rounding of every value, relative to the largest; and a graph that ONNX accepts."""
    save_onnx(network, "graph", path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    found = run_file(path, feeds)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert np.abs(found[name] - value).max() <= ROUNDING * np.abs(value).max(), name


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


@pytest.fixture(scope="module", params=[96, 144])
def network(request):
    model = golden_cat_seg.tiny_model(padding=256, view=request.param)
    return cat_seg_export.network_of(model)


@pytest.mark.parametrize("name", list(cat_seg.GRAPHS))
def test_cat_seg(network, name, tmp_path):
    compute, inputs = cat_seg.GRAPHS[name]
    graph = cat_seg.write_graph(network, name)
    for count in (1, 33) if name != "image_encoder" else (1,):
        shapes = {one: network.shapes()[one] for one in inputs.split()}
        sized = {
            one: [count if size == "classes" else size for size in s] for one, s in shapes.items()
        }
        feeds = {one: random(*shape) for one, shape in sized.items()}
        feeds |= {one: np.abs(feeds[one]) + 1 for one in feeds if "totals" in one}
        feeds |= {"padding": np.array([256.0 - count], np.float32)} if "padding" in feeds else {}
        assert_graph_is(tmp_path / "a.onnx", graph, compute(Arrays(), network, feeds), feeds)


@pytest.mark.parametrize("size_hw", [(64, 96), (160, 32)])
def test_zegformer_segments(size_hw, tmp_path):
    network = zegformer_export.network_of(tiny_zegformer.model())
    graph = zegformer.write_image_encoder(network, size_hw)
    image = random(1, 3, *size_hw)
    expected = zegformer.propose(Arrays(), network, image)
    assert_graph_is(tmp_path / "a.onnx", graph, expected, {"image": image})


@pytest.mark.parametrize("count", [1, 5])
def test_zegformer_regions(count, tmp_path):
    network = zegformer_export.network_of(tiny_zegformer.model())
    crops = random(count, 3, network.region_side, network.region_side)
    expected = {"region_embeds": zegformer.embed_regions(Arrays(), network, crops)}
    graph = zegformer.write_region_encoder(network)
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
    "gather": (
        lambda ops, x: ops.gather(x, np.array([2, 0, 2]), 1),
        lambda x: x[:, [2, 0, 2]],
    ),
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
