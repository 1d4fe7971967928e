"""Networks written and computed without torch, stage by stage against the torch models."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from support import tiny
from support.graph_runs import run_file
from zsseg_rt.models import create_model
from zsseg_rt.networks.aggregating import RULES_OF_OUTLIERS
from zsseg_rt.networks.clip import ImageTower, TextTower
from zsseg_rt.networks.heads import HEADS, dense_embeds
from zsseg_rt.networks.layers import resize_grid
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.onnx.check import check_graph
from zsseg_rt.onnx.graph import Graph
from zsseg_rt.onnx.half import to_half
from zsseg_rt.onnx.writer import save_onnx, with_exact_halves

SIZES = tiny.TinySizes(text_vocab=49408, text_length=77, num_layers=3)
ROUNDING = 1e-5  # the same sums in another order


def build(tmp_path, head="naclip", activation="quick_gelu", halves=False):
    """A model of random weights, which float16 holds exactly if ``halves``."""
    weights = tiny.clip_state_dict(SIZES, salt=head)
    if halves:
        weights = {key: value.half().float() for key, value in weights.items()}
    torch.save(weights, tmp_path / "clip.pt")
    heads = {"num_heads": SIZES.num_heads, "text_heads": SIZES.text_heads}
    given = {"pretrained": tmp_path / "clip.pt", "head": head, "activation": activation}
    return create_model("dense_clip", image_size=64, **given, **heads)


def tensors_of(module):
    return {key: value.numpy() for key, value in module.state_dict().items()}


def image_tower(model):
    config = model.config.image_encoder
    tensors = tensors_of(model.image_encoder)
    return ImageTower(tensors=tensors, num_heads=config.num_heads, activation=config.activation)


def picture(size_hw, batch=1):
    return np.random.default_rng(size_hw).standard_normal((batch, 3, *size_hw), np.float32)


@torch.no_grad()
def torch_stages(model, image):
    """What torch's unfolded tower computes after each part."""
    encoder, found = model.image_encoder, {}
    tokens = found["ln_pre"] = encoder.embed_patches(torch.from_numpy(image))
    for index, block in enumerate(encoder.transformer.resblocks[:-1]):
        tokens = found[f"blocks.{index}"] = block(tokens)
    found["patch_embeds"] = encoder(torch.from_numpy(image)).patch_embeds
    return {name: value.numpy() for name, value in found.items()}


def assert_near(found, expected):
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= ROUNDING * max(1, np.abs(value).max()), name


@pytest.mark.parametrize("size_hw", [(64, 64), (32, 112), (144, 80)])
@pytest.mark.parametrize("head", [name for name in HEADS if name not in RULES_OF_OUTLIERS])
def test_every_stage_equals_torch(head, size_hw, tmp_path):
    """Computed by NumPy, and as a graph whose outputs are all stages."""
    activation = "gelu" if size_hw == (144, 80) else "quick_gelu"
    model = build(tmp_path, head, activation, halves=size_hw == (32, 112))
    image, tower = picture(size_hw), image_tower(model)
    expected = torch_stages(model, image)
    arrays = Arrays()
    dense_embeds(arrays, tower, image, head)
    assert_near(arrays.marks, expected)
    graph = Graph()
    dense_embeds(graph, tower, graph.input("image", image.shape), head)
    for name in expected:
        graph.output(name, graph.marks[name])
    path = tmp_path / "stages.onnx"
    save_onnx(with_exact_halves(graph.network()), "image_encoder", path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert_near(run_file(path, {"image": image}), expected)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_equals_torch(activation, tmp_path):
    model = build(tmp_path, activation=activation)
    tensors = tensors_of(model.text_encoder)
    tower = TextTower(tensors=tensors, num_heads=SIZES.text_heads, activation=activation)
    ids = np.random.default_rng(5).integers(1, 49407, (6, 77))
    ids[np.arange(6), [3, 9, 20, 41, 76, 5]] = 49407
    with torch.no_grad():
        expected = {"text_embeds": model.text_encoder(torch.from_numpy(ids)).numpy()}
    assert_near({"text_embeds": tower.embed(Arrays(), ids)}, expected)
    graph = Graph()
    token_ids = graph.input("token_ids", ("prompts", 77), "int64")
    graph.output("text_embeds", tower.embed(graph, token_ids))
    path = tmp_path / "text.onnx"
    save_onnx(with_exact_halves(graph.network()), "text_encoder", path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert check_graph(path).token_rows == {"token_ids": 49408}
    assert_near(run_file(path, {"token_ids": ids}), expected)


@pytest.mark.parametrize("half", [(), ("image", "patch_embeds")])
def test_float16(half, tmp_path):
    model, image = build(tmp_path, "sclip"), picture((64, 64))
    graph, path = Graph(), tmp_path / "half.onnx"
    made = dense_embeds(graph, image_tower(model), graph.input("image", image.shape), "sclip")
    graph.output("patch_embeds", made)
    save_onnx(to_half(graph.network(), half=half), "image_encoder", path)
    written = onnx.load(path)
    onnx.checker.check_model(written, full_check=True)
    types = {value.name: value.type.tensor_type.elem_type for value in written.graph.input}
    assert types == {"image": onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT}
    large = [one for one in written.graph.initializer if np.prod(one.dims) > 1024]
    assert {one.data_type for one in large} == {onnx.TensorProto.FLOAT16}
    found = run_file(path, {"image": image})["patch_embeds"]
    assert np.abs(found - torch_stages(model, image)["patch_embeds"]).max() < 2e-3  # 11 bits


def test_weights_of_half_precision_take_half_the_bytes(tmp_path):
    sizes = {}
    for halves in (False, True):
        graph, path = Graph(), tmp_path / "a.onnx"
        tower = image_tower(build(tmp_path, halves=halves))
        made = dense_embeds(graph, tower, graph.input("image", (1, 3, 64, 64)), "naclip")
        graph.output("patch_embeds", made)
        save_onnx(with_exact_halves(graph.network()), "image_encoder", path)
        sizes[halves] = path.stat().st_size
    assert sizes[True] < 0.6 * sizes[False]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size_hw", [(7, 19), (28, 28), (3, 2), (14, 14)])
def test_positions_are_resized_as_torch_does(mode, antialias, size_hw):
    grid = np.random.default_rng(2).standard_normal((14, 14, 5), np.float32)
    planes = torch.from_numpy(grid.transpose(2, 0, 1)[None])
    settings = {"mode": mode, "align_corners": False, "antialias": antialias}
    expected = F.interpolate(planes, size_hw, **settings)[0].permute(1, 2, 0).numpy()
    found = resize_grid(grid, size_hw, mode, antialias=antialias)
    np.testing.assert_allclose(found, expected, atol=3e-6)
