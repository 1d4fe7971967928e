"""Models that start from CLIP weights to be trained: CLIP-RC and the cosine head."""

import numpy as np
import pytest
import torch

from support import tiny
from support.errors import refused
from zsseg_rt import Bundle
from zsseg_rt.errors import ArgumentError, ShapeError
from zsseg_rt.export import export_bundle
from zsseg_rt.export.clip_file import tower_of
from zsseg_rt.models import create_model
from zsseg_rt.models.clip.towers import resize_positional_embedding
from zsseg_rt.networks.heads import dense_embeds
from zsseg_rt.onnx.arrays import Arrays

SIZES = tiny.TinySizes(num_layers=2, text_layers=1, grid_side=3)
NAMES = [f"name {index}" for index in range(7)]
BUILDS = ("clip_rc", "cosine_head", "zegclip")


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(tiny.clip_state_dict(SIZES), path)
    return path


@pytest.fixture(scope="module")
def build(clip_file):
    def build(architecture: str, **settings):
        options = {"image_size": 64, "num_heads": 4, "text_heads": 4, "activation": "quick_gelu"}
        return create_model(architecture, pretrained=clip_file, **options | settings)

    return build


def tower(model):
    return model.image_encoder if hasattr(model, "image_encoder") else model.backbone


@pytest.mark.parametrize("architecture", BUILDS)
def test_towers_are_clips(build, architecture):
    model, weights = build(architecture), tiny.clip_state_dict(SIZES)
    mode = "bicubic" if architecture == "cosine_head" else "bilinear"
    key = "visual.positional_embedding"
    weights[key] = resize_positional_embedding(weights[key], (4, 4), mode)
    visual, text = tower(model).state_dict(), model.text_encoder.state_dict()
    for name, value in weights.items():
        tensor = visual[name[7:]] if name.startswith("visual.") else text[name]
        assert torch.equal(tensor, value)
    assert not model.training
    assert not any(p.requires_grad for p in model.text_encoder.parameters())
    assert any(p.requires_grad for p in model.parameters())


def test_prompts_start_as_officially(build):
    backbone = build("zegclip", num_prompts=5).backbone
    assert backbone.prompt_embeddings.shape == (1, 5, 64)
    assert backbone.deep_prompt_embeddings.shape == (1, 5, 64)
    bound = (6 / (3 * 16 * 16 + 64)) ** 0.5
    assert 0.9 * bound < backbone.prompt_embeddings.abs().max() <= bound
    assert backbone.prompt_proj.weight.std().item() == pytest.approx((2 / 64) ** 0.5, abs=0.01)


def test_cell_tokens_start_as_the_class_token_of_clip_itself(build):
    bridge, sizes = build("clip_rc", num_cells=4).backbone.region_level_bridge, SIZES
    clip = tiny.clip_state_dict(sizes)
    start = clip["visual.class_embedding"] + clip["visual.positional_embedding"][0]
    assert torch.equal(bridge, start.expand(4, -1))
    assert not bridge.requires_grad


def test_the_recovery_decoder_starts_as_officially(build):
    recovery = build("clip_rc").decode_head.recovery_decoder
    linears = [m for m in recovery.modules() if isinstance(m, torch.nn.Linear)]
    weights = torch.cat([linear.weight.flatten() for linear in linears])
    # 27,648 deviates: the standard error of the deviation is 8.5e-5
    assert weights.std().item() == pytest.approx(0.02, abs=5e-4)
    assert weights.mean().item() == pytest.approx(0, abs=6e-4)
    assert not any(linear.bias.any() for linear in linears)
    norms = [m for m in recovery.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert all((n.weight == 1).all() and not n.bias.any() for n in norms)


@pytest.mark.parametrize(
    ("architecture", "stacks"),
    [("zegclip", ("decoder_1",)), ("clip_rc", ("decoder_q", "decoder_v"))],
)
def test_layers_can_start_as_copies_of_one(build, architecture, stacks):
    heads = []
    for start in ("random", "copies"):
        torch.manual_seed(0)
        heads.append(build(architecture, start=start).decode_head)
    for stack in stacks:
        drawn, (first, *others) = (getattr(head, stack).layers for head in heads)
        for name, value in first.state_dict().items():
            assert torch.equal(value, drawn[0].state_dict()[name])
            assert all(torch.equal(value, other.state_dict()[name]) for other in others)
        assert first.linear1.weight is not others[0].linear1.weight


def trained(build, **settings):
    """A cosine head whose head and scale are not what they start as."""
    model = build("cosine_head", **settings)
    with torch.no_grad():
        weight = model.image_encoder.head.weight
        weight += 0.3 * torch.from_numpy(tiny.random_normal("head", weight.shape)).float()
        model.log_scale += 0.5
    return model


@torch.no_grad()
def test_the_head_maps_patches_before_they_are_compared(build):
    model = trained(build)
    image, text = tiny.image(1, 3, 64, 64), tiny.text_embeds(7, SIZES.embed_dim)
    encoder = model.image_encoder
    tokens = encoder.transformer(encoder.embed_patches(image))[:, 1:]
    patches = (encoder.ln_post(tokens) @ encoder.proj @ encoder.head.weight.T)[0].numpy()
    patches /= np.linalg.norm(patches, axis=1, keepdims=True)
    unit_text = text.numpy() / np.linalg.norm(text.numpy(), axis=1, keepdims=True)
    expected = model.log_scale.exp().item() * unit_text @ patches.T
    logits = model(image, text).mask_logits[0].flatten(1)
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4)  # logits to 24, float32
    exported = dense_embeds(Arrays(), tower_of(model), image.numpy(), "vanilla")
    np.testing.assert_allclose(exported[0], patches, atol=1e-5)


@torch.no_grad()
def test_seen_classes_are_lowered_in_probability(build):
    image, text = tiny.image(2, 3, 64, 80), tiny.text_embeds(7, SIZES.embed_dim)
    plain, lowered = (
        trained(build, seen_classes=(0, 3), seen_bias=bias).predict(image, text)
        for bias in (0.0, 0.25)
    )
    shift = torch.zeros(7, 1, 1)
    shift[[0, 3]] = 0.25
    assert plain.shape == (2, 7, 64, 80)
    assert 0 <= plain.min() <= plain.max() <= 1
    torch.testing.assert_close(lowered, plain - shift)
    softmax = trained(build).predict(image, text)
    torch.testing.assert_close(softmax.sum(dim=1), torch.ones(2, 64, 80))


def test_the_cosine_head_exports_and_agrees_with_torch(build, tmp_path):
    model = trained(build, seen_classes=(0, 3), seen_bias=0.1)
    folder = export_bundle(
        model,
        tmp_path / "cosine_head.zsseg",
        class_names=NAMES,
        precisions=("float32",),
        templates=("a {}",),
    )
    bundle = Bundle.load(folder)
    assert (bundle.family, bundle.architecture) == ("dense", "cosine_head")
    assert bundle.head.activation == "softmax"
    assert bundle.head.seen == ("name 0", "name 3")
    assert bundle.head.seen_bias == 0.1
    assert bundle.head.logit_scale == pytest.approx(model.log_scale.exp().item())


REFUSED = [
    *((name, {"image_size": 70}, ShapeError) for name in BUILDS),
    *((name, {"start": "alined"}, ArgumentError) for name in ("zegclip", "clip_rc")),
    ("clip_rc", {"num_cells": 5}, ArgumentError),
    ("cosine_head", {"seen_bias": 2.0}, ArgumentError),
    ("cosine_head", {"logit_scale": 0.0}, ArgumentError),
]


@pytest.mark.parametrize(("architecture", "settings", "error"), REFUSED)
def test_settings_that_do_not_fit_are_refused(build, architecture, settings, error):
    with refused(error, *settings, *(["16"] if error is ShapeError else [])):
        build(architecture, **settings)


@pytest.mark.parametrize(("architecture", "count"), [("clip_rc", 2), ("zegclip", 7)])
def test_readers_of_unit_vectors_can_start_scaled(build, architecture, count):
    heads = []
    for scaled in (False, True):
        torch.manual_seed(0)
        heads.append(build(architecture, unit_inputs=scaled).decode_head.state_dict())
    plain, scaled = heads
    grown = {name for name in plain if not torch.equal(plain[name], scaled[name])}
    assert len(grown) == count  # q_proj; lateral_proj, or keys and values of three layers
    for name in grown:
        torch.testing.assert_close(scaled[name], SIZES.embed_dim**0.5 * plain[name])
