"""CAT-Seg from weights of our own rule: what it takes, refuses and leaves alone."""

import json

import pytest
import torch

from support import golden_cat_seg as rule
from support.errors import refused
from zsseg_rt.errors import ArgumentError, CheckpointError, DTypeError, ShapeError
from zsseg_rt.models import create_model, from_official, slide_predict
from zsseg_rt.models.base import SlideSettings
from zsseg_rt.models.cat_seg.model import (
    AggregatorConfig,
    CatSegConfig,
)
from zsseg_rt.networks.cat_seg import shift_mask


@pytest.fixture(scope="module")
def weights():
    return rule.tiny_weights()


def build(weights, **settings):
    return from_official("cat_seg", weights, **(rule.TINY_SETTINGS | settings))


def inputs(count, seed=0):
    torch.manual_seed(seed)
    return torch.randn(2, 3, 96, 96), torch.nn.functional.normalize(torch.randn(count, 32), dim=1)


@torch.no_grad()
def test_the_order_of_classes_changes_nothing(weights):
    model, (image, text) = build(weights, most_classes=6), inputs(10)
    order = torch.randperm(10)
    logits = model(image, text).mask_logits
    assert logits.shape == (2, 10, 24, 24)
    assert ((logits == -100).all(-1).all(-1).sum(1) == 4).all()  # of each image by itself
    torch.testing.assert_close(model(image, text[order]).mask_logits, logits[:, order])
    alone = torch.cat([model(one[None], text).mask_logits for one in image])
    torch.testing.assert_close(alone, logits)


def test_only_q_and_v_of_clip_are_tuned(weights):
    model, (image, text) = build(weights), inputs(3)
    model(image, text).mask_logits.sum().backward()
    tuned = {
        name for name, p in model.named_parameters() if p.requires_grad and "_encoder." in name
    }
    assert len(tuned) == 2 * (rule.TINY["v_layers"] + rule.TINY["t_layers"])
    assert all(name.endswith(("q_proj_weight", "v_proj_weight")) for name in tuned)
    unused = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert all(name.startswith("text_encoder.") or ".3.attn.q" in name for name in unused)


def test_keys_that_follow_from_others_may_be_missing_or_present(weights):
    mask = torch.from_numpy(shift_mask(6, 3, 1))
    masks = {rule.HEAD + f"layers.{n}.swin_block.block_2.attn_mask": mask for n in (0, 1)}
    bare = {key: value for key, value in weights.items() if "logit_scale" not in key}
    image, text = inputs(3)
    with torch.no_grad():
        found = build(weights | masks)(image, text).mask_logits
        assert torch.equal(found, build(bare)(image, text).mask_logits)
    no_text = {k: v for k, v in bare.items() if "visual" in k or rule.CLIP not in k}
    assert build(no_text).text_encoder is None


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("window", 4),
        ("taps", (2, 1)),
        ("taps", (1, 3)),
        ("most_classes", 0),
    ],
)
def test_bad_settings_are_refused(weights, argument, value):
    with refused(ArgumentError, argument):
        build(weights, **{argument: value})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("embed_dim", 0),
        ("window", 0),
        ("num_heads", 0),
        ("num_heads", 3),
        ("hidden", 66),
        ("decoder", (64, 0)),
        ("decoder", (24, 32)),
        ("decoder_guidance", (128, 16)),
        ("decoder_guidance", (32, 64)),
        ("padding", -1),
    ],
)
def test_odd_sizes_of_the_head_are_refused(argument, value):
    with refused(ArgumentError, "hidden" if value == 3 else argument):
        AggregatorConfig(**{argument: value})


@pytest.mark.needs_shared
def test_it_takes_the_484_tensors_of_the_released_configuration(shared_dir):
    stored = json.loads((shared_dir / "specs" / "statedict_catseg_b.json").read_text())
    shapes = stored["configs/vitb_384.yaml"]["shapes"]
    assert len(shapes) == 484
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model = from_official("cat_seg", weights)
    assert sum(p.numel() for p in model.parameters()) == 154_455_266 - 1 - 2 * 4 * 144 * 144
    assert model.config == CatSegConfig(
        image_encoder=model.config.image_encoder, text_encoder=model.config.text_encoder
    )
    for key in (*list(shapes)[3::60], rule.CLIP + "token_embedding.weight"):
        with pytest.raises(CheckpointError):
            from_official("cat_seg", {k: v for k, v in weights.items() if k != key})


def test_bad_inputs_are_refused(weights):
    model, (_, text) = build(weights), inputs(3)
    with refused(ShapeError, "image_size"):
        build(weights, view=100)
    with refused(DTypeError, "rgb"):
        slide_predict(model, torch.zeros(9, 9, 3).numpy(), text)
    with refused(ArgumentError, "windows"):
        slide_predict(model, torch.zeros(9, 9, 3, dtype=torch.uint8).numpy(), text, stride=10)
    assert model.windows == SlideSettings(short_side=160, crop_size=96, stride=64)


def test_a_start_from_clip_gives_finite_logits():
    head = AggregatorConfig(window=2, hidden=16, num_heads=2, up=(16, 16), decoder_guidance=(8, 4))
    model = create_model("cat_seg", pretrained="demo", view=64, aggregator=head)
    text = torch.nn.functional.normalize(
        torch.randn(4, model.config.image_encoder.embed_dim), dim=1
    )
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 64, 64), text).mask_logits
    assert logits.shape[1] == 4
    assert logits.isfinite().all()
