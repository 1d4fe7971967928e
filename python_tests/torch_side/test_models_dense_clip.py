"""Dense CLIP heads against a transcription of their formulas, and TIPSv2 against its vectors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support import golden_tips, tiny
from support.errors import refused
from support.golden import case_of, load
from support.golden_tips import model_of
from zsseg_rt import models
from zsseg_rt.errors import ArgumentError, CheckpointError, DTypeError, ShapeError
from zsseg_rt.models import create_model, slide_predict
from zsseg_rt.models.base import slide_scores
from zsseg_rt.models.dense.dense_clip import Tips, TipsConfig, resized_rgb
from zsseg_rt.networks import heads
from zsseg_rt.networks.aggregating import RULES_OF_OUTLIERS
from zsseg_rt.torch_files.clip_arrays import CLIP_MEAN

HEADS = [name for name in heads.HEADS if name not in RULES_OF_OUTLIERS]  # one block, any depth

open_clip = pytest.importorskip("open_clip", reason="needs pip install '.[train]'")

WIDTH, HEADS_PER_BLOCK, LAYERS, PATCH, GRID, DIM = 48, 4, 3, 16, 4, 24
PATCHES_ONLY = {"clearclip", "naclip"}


@pytest.fixture(scope="module", params=[True, False], ids=["quick_gelu", "gelu"])
def clip(request):
    model = open_clip.model.CLIP(
        embed_dim=DIM,
        vision_cfg={
            "layers": LAYERS,
            "width": WIDTH,
            "head_width": WIDTH // HEADS_PER_BLOCK,
            "patch_size": PATCH,
            "image_size": GRID * PATCH,
            "output_tokens": True,
        },
        text_cfg={"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
        quick_gelu=request.param,
    ).eval()
    state_dict = model.state_dict()
    visual = {key: value.shape for key, value in state_dict.items() if key.startswith("visual.")}
    gains = [("in_proj_weight", 2.0)]  # attention far from uniform
    model.load_state_dict({**state_dict, **tiny.rule_state_dict(visual, gains=gains)})
    return model


@pytest.fixture(scope="module")
def build(clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(clip.state_dict(), path)
    quick = any(type(module).__name__ == "QuickGELU" for module in clip.modules())

    def make(**config):
        defaults = {
            "pretrained": path,
            "activation": "quick_gelu" if quick else "gelu",
            "num_heads": HEADS_PER_BLOCK,
            "text_heads": 2,
        }
        return create_model("dense_clip", **{**defaults, **config})

    return make


def tokens_before_last(visual, image):
    """X: what open_clip's own blocks give before the last, with bicubic positions."""
    grid_hw = image.shape[2] // PATCH, image.shape[3] // PATCH
    positions = visual.positional_embedding
    square = positions[1:].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
    if grid_hw != (GRID, GRID):
        square = F.interpolate(square, size=grid_hw, mode="bicubic", align_corners=False)
    patches = visual.conv1(image).flatten(2).transpose(1, 2)
    patches = patches + square.permute(0, 2, 3, 1).reshape(1, -1, WIDTH)
    cls_token = (visual.class_embedding + positions[0]).expand(len(image), 1, WIDTH)
    x = visual.ln_pre(torch.cat([cls_token, patches], dim=1))
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    return x, grid_hw


def literal_prior(grid_hw, std):
    """Omega entry by entry."""
    height, width = grid_hw
    omega = torch.zeros(1 + height * width, 1 + height * width)
    for i in range(height * width):
        for j in range(height * width):
            down, right = i // width - j // width, i % width - j % width
            omega[1 + i, 1 + j] = math.exp(-(down**2 + right**2) / (2 * std**2))
    return omega


def literal_embeds(visual, image, head, std=5.0):
    """F of one head, every formula written out with matmul and softmax; ``[B, N, D]``."""
    x, grid_hw = tokens_before_last(visual, image)
    block = visual.transformer.resblocks[-1]
    weights = block.attn.in_proj_weight.reshape(3, WIDTH, WIDTH)
    biases = block.attn.in_proj_bias.reshape(3, WIDTH)
    normed, width = block.ln_1(x), WIDTH // HEADS_PER_BLOCK
    outputs = []
    for h in range(HEADS_PER_BLOCK):
        rows = slice(h * width, (h + 1) * width)
        q, k, v = (normed @ w[rows].T + b[rows] for w, b in zip(weights, biases, strict=True))
        s = width**-0.5
        if head == "vanilla":
            a = (q @ k.mT * s).softmax(-1)
        elif head == "maskclip":
            a = torch.eye(x.shape[1])
        elif head == "sclip":
            a = (q @ q.mT * s).softmax(-1) + (k @ k.mT * s).softmax(-1)
        elif head == "clearclip":
            a = (q @ q.mT * s).softmax(-1)
        else:
            a = (k @ k.mT * s + literal_prior(grid_hw, std)).softmax(-1)
        outputs.append(a @ v)
    z = torch.cat(outputs, dim=-1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    if head not in PATCHES_ONLY:
        z = x + z
        z = z + block.mlp(block.ln_2(z))
    features = (visual.ln_post(z) @ visual.proj)[:, 1:]
    return features / features.norm(dim=-1, keepdim=True)


def assert_same(actual, expected):
    # float32, the same sums in another order through three blocks; worst seen below 2e-6
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size_hw", [(64, 64), (48, 80), (112, 16)], ids=str)
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_head_is_its_formula(clip, build, head, size_hw):
    image, text = tiny.image(2, 3, *size_hw), tiny.text_embeds(5, DIM)
    model = build(head=head)
    output = model(image, text)
    expected = literal_embeds(clip.visual, image, head)
    grid_hw = size_hw[0] // PATCH, size_hw[1] // PATCH
    assert output.patch_embeds.shape == (2, DIM, *grid_hw)
    assert_same(output.patch_embeds.flatten(2).transpose(1, 2), expected)
    logits = model.config.logit_scale * torch.einsum("bnd,cd->bcn", expected, F.normalize(text))
    assert output.mask_logits.shape == (2, 5, *grid_hw)
    torch.testing.assert_close(output.mask_logits.flatten(2), logits, rtol=0, atol=1e-3)


@torch.no_grad()
def test_predict_upsamples_and_slides(build):
    """Whole picture: plain bilinear; windows: their average, then the softmax."""
    model, text = build(), tiny.text_embeds(5, DIM)
    rgb = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    mean, std = np.array(model.image_mean), np.array(model.image_std)
    image = torch.from_numpy(((rgb / 255 - mean) / std).transpose(2, 0, 1)[None]).float()
    whole = F.interpolate(model(image, text).mask_logits, size=(64, 96), mode="bilinear")
    torch.testing.assert_close(model.predict(image, text), whole)
    scores = slide_predict(model, rgb, text, short_side=64, crop_size=4096, stride=4096)
    torch.testing.assert_close(scores, whole[0].softmax(0), rtol=0, atol=1e-4)
    left, right = model.predict(image[..., :64], text), model.predict(image[..., 32:], text)
    total = F.pad(left, (0, 32)) + F.pad(right, (32, 0))
    total[..., 32:64] /= 2
    scores = slide_predict(model, rgb, text, short_side=64, crop_size=64, stride=32)
    torch.testing.assert_close(scores, total[0].softmax(0), rtol=0, atol=1e-4)


def test_defaults_are_the_authors(build):
    scales = {head: build(head=head).config.logit_scale for head in HEADS}
    expected = {"naclip": 40, "sclip": 40, "clearclip": 50, "maskclip": 100, "vanilla": 100}
    assert scales == expected
    model = build()
    assert model.config.head == "naclip"
    assert model.config.size_hw == (GRID * PATCH,) * 2
    assert build(image_size=(48, 80), logit_scale=7.0).config.size_hw == (48, 80)
    np.testing.assert_allclose(
        np.multiply(model.image_mean, 255), [122.771, 116.746, 104.094], 1e-5
    )
    np.testing.assert_allclose(np.multiply(model.image_std, 255), [68.501, 66.632, 70.323], 1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("config", "error", "argument"),
    [
        ({"head": "proxyclip"}, ArgumentError, "head"),
        ({"logit_scale": 0.0}, ArgumentError, "logit_scale"),
        ({"unknown_below": 1.5}, ArgumentError, "unknown_below"),
        ({"image_size": 100}, ShapeError, "image_size"),
        ({"image_size": 0}, ShapeError, "image_size"),
        ({"pretrained": "absent.pt"}, CheckpointError, "source"),
        ({"pretrained": "no-such-tag"}, CheckpointError, "source"),
        ({"activation": None}, CheckpointError, "activation"),
        ({"pretrained": None, "clip": "RN50"}, CheckpointError, "clip"),
        ({"pretrained": None, "clip": "x"}, CheckpointError, "clip"),
        ({"pretrained": None, "clip": "ViT-B-16-SigLIP"}, CheckpointError, "clip"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(build, config, error, argument):
    with refused(error, argument):
        build(**config)


@pytest.mark.parametrize(
    ("clip_name", "tag", "mean"),
    [("ViT-B-16", "openai", CLIP_MEAN), ("ViT-L-14", "laion2b_s32b_b82k", (0.5, 0.5, 0.5))],
    ids=["openai", "inception"],
)
def test_normalisation_is_the_weights(monkeypatch, clip, clip_name, tag, mean):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: clip)
    model = create_model("dense_clip", pretrained=tag, clip=clip_name)
    assert model.image_mean == mean


# --- TIPSv2 in torch against the official code's vectors ---


@torch.no_grad()
def test_windows_give_the_official_probabilities_and_labels(shared_dir):
    vectors = load(shared_dir, "tips_small_public.npz")
    model = model_of(case_of(vectors, str(vectors["slide/weights_of"]))[1])
    side, stride = map(int, vectors["slide/side_stride"])
    assert (model.windows.crop_size, model.windows.stride) == (side, stride)
    image, text = (torch.from_numpy(vectors[f"slide/{name}"]) for name in ("image", "text"))
    scores = slide_scores(
        lambda window: model.predict(window, text), image[None], crop_size=side, stride=stride
    )
    sampled = scores[0, :, ::4, ::4].numpy()
    np.testing.assert_allclose(sampled, vectors["slide/probabilities_sub4"], atol=1e-6)
    large = torch.nn.functional.interpolate(scores, size=(90, 130), mode="bilinear")[0]
    best = large.topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-6).numpy()
    assert clear.mean() > 0.99
    labels = vectors["slide/labels_90x130"]
    np.testing.assert_array_equal(large.argmax(0).numpy()[clear], labels[clear])


@pytest.mark.parametrize("case", ["enlarge", "shrink"])
def test_pictures_are_resized_as_officially(shared_dir, case):
    vectors = load(shared_dir, "tips_small_public.npz")
    resized = resized_rgb(vectors[f"preprocess/{case}/rgb"], 112)
    np.testing.assert_array_equal(resized, vectors[f"preprocess/{case}/out_uint8"])


def test_other_heads_and_floats_for_tokens_are_refused():
    with refused(ArgumentError, "head"):
        TipsConfig(head="naclip")
    c = golden_tips.SMALL
    towers = {"vision": golden_tips.vision(), "text": golden_tips.text(vocab=7)}
    model = models.from_official("tips", towers, num_heads=c["heads"], text_heads=4)
    assert isinstance(model, Tips)
    with refused(DTypeError, "tokens"):
        model.text_encoder(torch.rand(2, 64))


def changed(tower: str, **values: Any) -> dict[str, Any]:
    towers = {"vision": golden_tips.vision(), "text": golden_tips.text(vocab=7)}
    for key, value in values.items():
        name = key.replace("__", ".")
        if value is None:
            del towers[tower][name]
        else:
            towers[tower][name] = value
    return towers


@pytest.mark.parametrize(
    ("towers", "said"),
    [
        (changed("vision", norm__bias=None), "norm.bias missing"),
        (changed("vision", head__weight=np.ones(2, np.float32)), "head.weight unknown"),
        (changed("vision", cls_token=np.ones((1, 1, 32), np.float32)), "[1, 1, 32]"),
        (changed("vision", norm__bias=np.full(64, np.nan, np.float32)), "NaN"),
        (changed("vision", norm__bias=np.zeros(64)), "float64"),
        (changed("vision", pos_embed=np.ones((1, 60, 64), np.float32)), "60"),
        (changed("vision", **{"blocks__0__mlp__w12__weight": np.ones((2, 2))}), "SwiGLU"),
        (changed("text", ln_final__bias=None), "ln_final.bias missing"),
        (changed("text", temperature=np.float32(0)), "temperature"),
        (changed("text", temperature=np.float32("nan")), "temperature"),
        ({"text": {}}, "'vision'"),
        ({"vision": {}, "words": {}}, "words"),
        ({"vision": {}}, "patch_embed.proj.weight"),
    ],
)
def test_other_weights_are_refused(towers, said):
    with pytest.raises(CheckpointError) as caught:
        models.from_official("tips", towers)
    assert said in str(caught.value)


def test_damaged_files_and_those_that_grow_too_much_are_refused(tmp_path):
    path = tmp_path / "vision.npz"
    for content in (b"", b"PK\x03\x04 not a zip", b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"vision\.npz: expected a TIPSv2"):
            models.create_model("tips", vision=path)
    np.savez_compressed(path, cls_token=np.zeros(1 << 22, np.float32))
    with pytest.raises(CheckpointError, match=r"16777\d+ bytes in a file of \d+"):
        models.create_model("tips", vision=path)


def test_files_and_tensors_make_the_same_model(tmp_path):
    towers = {"vision": golden_tips.vision(), "text": golden_tips.text(vocab=7)}
    towers["text"]["temperature"] = np.float32(0.05)
    for name, tensors in towers.items():
        np.savez(tmp_path / f"{name}.npz", **tensors)
    files = {name: tmp_path / f"{name}.npz" for name in towers}
    heads = {"num_heads": 4, "text_heads": 4, "logit_scale": None}
    read = models.create_model("tips", **files, **heads)
    assert read.logit_scale == pytest.approx(20)
    assert read.size_hw == (112, 112)
    tensors = {n: {k: torch.as_tensor(v) for k, v in t.items()} for n, t in towers.items()}
    model = models.from_official("tips", tensors, **heads)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(read.state_dict()[key], value, rtol=0, atol=0)
