"""Laws of the ZegFormer model that hold for any weights and sizes, and what it refuses."""

import pytest
import torch

from support import tiny, tiny_zegformer
from support.errors import refused
from support.tiny_zegformer import class_prompts
from zsseg_rt.bundles import specs as bundle_specs
from zsseg_rt.errors import ArgumentError, CheckpointError, DTypeError, ShapeError
from zsseg_rt.models import from_official
from zsseg_rt.models.zegformer.decoder import BatchNorm
from zsseg_rt.models.zegformer.model import FUSIONS
from zsseg_rt.torch_files.clip_arrays import ClipTensors, Tower
from zsseg_rt.torch_files.zegformer_arrays import REGION_TEMPLATES, SEGMENT_TEMPLATES

CLIP = tiny_zegformer.CLIP
PREDICTOR = "sem_seg_head.predictor."


def build(state_dict, **settings):
    return from_official("zegformer", state_dict, **{"num_heads": 4} | settings)


def run(model, pictures, out_hw=None):
    text, text_clip = tiny_zegformer.text_features("a"), tiny_zegformer.text_features("b")
    sizes = out_hw or [(picture.shape[1], picture.shape[2]) for picture in pictures]
    with torch.no_grad():
        return model(pictures, text, text_clip, sizes)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def training_state_dict():
    return {k: v for k, v in tiny_zegformer.state_dict().items() if not k.startswith(CLIP)}


def clip_weights():
    """The tiny checkpoint's CLIP, as load_clip gives it."""
    bare = {
        key.removeprefix(CLIP): value
        for key, value in tiny_zegformer.state_dict().items()
        if key.startswith(CLIP) and not key.endswith("logit_scale")
    }
    visual = {k.removeprefix("visual."): v for k, v in bare.items() if k.startswith("visual.")}
    text = {key: value for key, value in bare.items() if not key.startswith("visual.")}
    return ClipTensors(visual=Tower(visual), text=Tower(text))


# ---------------------------------------------------------------- the whole model


def test_pictures_of_one_padded_size_do_not_see_each_other():
    model = tiny_zegformer.model()
    pictures = [tiny_zegformer.picture(50, 90, "a"), tiny_zegformer.picture(64, 70, "b")]
    together = run(model, pictures)
    for index, picture in enumerate(pictures):
        alone = run(model, [picture])
        pairs = [
            (together.pred_masks[index], alone.pred_masks[0]),
            (together.sem_seg[index], alone.sem_seg[0]),
        ]
        for left, right in pairs:  # another blocking of the float32 sums; seen 1.6e-5 of 10
            torch.testing.assert_close(left, right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("region_batch", [1, 3, 8, 100])
def test_no_more_regions_than_asked_for_live_at_once(region_batch):
    expected = run(tiny_zegformer.model(), [tiny_zegformer.picture(64, 64)])
    model = tiny_zegformer.model(region_batch=region_batch)
    counts = []
    model.clip_model.visual.conv1.register_forward_pre_hook(
        lambda _, inputs: counts.append(len(inputs[0]))
    )
    output = run(model, [tiny_zegformer.picture(64, 64)])
    assert max(counts) <= region_batch
    assert sum(counts) == 8
    torch.testing.assert_close(output.clip_logits, expected.clip_logits, rtol=0, atol=1e-4)


def test_without_clip_the_text_branch_decides():
    model = build(training_state_dict(), ensemble=False, seen_classes=tiny_zegformer.SEEN)
    assert model.clip_model is None
    assert model.text_encoder is None
    picture, text = tiny_zegformer.picture(64, 64), tiny_zegformer.text_features("a")
    with torch.no_grad():
        output = model([picture], text, None, [(64, 64)])
    assert output.clip_logits is None
    expected = output.pred_logits.softmax(dim=-1)[..., :-1]
    assert torch.equal(output.class_scores, expected)
    both = tiny_zegformer.model(fusion="segments")
    assert torch.equal(run(both, [picture]).sem_seg[0], output.sem_seg[0])


def test_fusion_has_the_words_of_bundles():
    assert FUSIONS == bundle_specs.FUSIONS
    with refused(ArgumentError, "fusion", "'x'"):
        tiny_zegformer.config(fusion="x")


@pytest.mark.parametrize(
    ("settings", "fusion"),
    [
        ({}, "seen_and_unseen"),
        ({"ensemble": False}, "regions"),
        ({"fusion": "all_classes"}, "all_classes"),
        ({"fusion": "segments"}, "segments"),
    ],
)
def test_who_decides(settings, fusion):
    assert tiny_zegformer.model(**settings).config.fusion == fusion


def test_frozen_parts_stay_frozen_in_training():
    model = tiny_zegformer.model().train()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("clip_model" in name or "logit_scale" in name for name in names)
    assert not any(".norm." in name for name in names if name.startswith("backbone."))
    assert PREDICTOR + "bg_feature" in names
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    before = [norm.running_mean.clone() for norm in norms]
    model.backbone(tiny.image(2, 3, 64, 64))
    assert norms
    assert all(torch.equal(a, b.running_mean) for a, b in zip(before, norms, strict=True))


# ---------------------------------------------------------------- prompts


def test_prompts():
    assert len(set(SEGMENT_TEMPLATES)) == 8
    assert len(set(REGION_TEMPLATES)) == 32
    prompts = class_prompts("sofa, couch", REGION_TEMPLATES)
    assert len(prompts) == 64
    assert "This is a masked photo of a medium couch" in prompts
    assert class_prompts("a,b", ["{}!"]) == ["a,b!"]


# ---------------------------------------------------------------- checkpoints


def test_keys_without_use_are_ignored():
    extra = {
        "pixel_mean": torch.zeros(3, 1, 1),
        "clip_pixel_std": torch.zeros(3, 1, 1),
        "backbone.stem.conv1.norm.num_batches_tracked": torch.zeros(()),
    }
    state_dict = tiny_zegformer.state_dict()
    assert same(build(state_dict | extra).state_dict(), build(state_dict).state_dict())


def test_checkpoints_of_training_take_their_clip_from_elsewhere():
    complete = tiny_zegformer.model().state_dict()
    assert same(build(training_state_dict(), clip=clip_weights()).state_dict(), complete)
    changed = complete | {CLIP + "visual.proj": torch.zeros(64, 48)}
    assert same(build(changed, clip=clip_weights()).state_dict(), complete)


@pytest.mark.parametrize("settings", [{}, {"fusion": "all_classes"}, {"fusion": "regions"}])
def test_checkpoints_of_training_lack_clip(settings):
    with refused(CheckpointError, "state_dict", "load_clip"):
        build(training_state_dict(), **settings)


def test_another_clip_is_refused():
    weights = clip_weights()
    visual = Tower({**weights.visual, "proj": torch.zeros(64, 40)})
    clip = ClipTensors(visual=visual, text=weights.text)
    with refused(
        CheckpointError, "sem_seg_head.predictor.clip_model.visual.proj", "visual.proj", "48", "40"
    ):
        build(training_state_dict(), clip=clip)


def test_only_clip_may_be_half_precision():
    state_dict = tiny_zegformer.state_dict()
    half = {k: v.half() if k.startswith(CLIP) else v for k, v in state_dict.items()}
    assert build(half).clip_model.visual.proj.dtype == torch.float32


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"region_style": "masks"}, "region_style"),
        ({"region_batch": 0}, "region_batch"),
    ],
)
def test_settings_outside_their_range(settings, argument):
    with refused(ArgumentError, argument):
        tiny_zegformer.model(**settings)


TEXT = tiny_zegformer.text_features()


@pytest.mark.parametrize(
    ("changes", "error", "argument"),
    [
        ({"images": []}, ShapeError, "images"),
        ({"out_hw": []}, ShapeError, "images"),
        ({"out_hw": [(0, 32)]}, ShapeError, "out_hw[0]"),
        ({"out_hw": [(32, 32, 3)]}, ShapeError, "out_hw[0]"),
        ({"images": [torch.zeros(32, 32, 3)]}, ShapeError, "images[0]"),
        ({"images": [torch.zeros(3, 32, 32)]}, DTypeError, "images[0]"),
        ({"text_features": TEXT[:, :40]}, ShapeError, "text_features"),
        ({"text_features_clip": None}, ShapeError, "text_features_clip"),
        ({"text_features_clip": TEXT[:6]}, ShapeError, "text_features_clip"),
        ({"text_features": TEXT[:4]}, ShapeError, "seen_classes"),
    ],
)
def test_wrong_inputs(changes, error, argument):
    picture = tiny_zegformer.picture(32, 32)
    inputs = {
        "images": [picture],
        "text_features": TEXT,
        "text_features_clip": TEXT,
        "out_hw": [(32, 32)],
    }
    with refused(error, argument):
        tiny_zegformer.model()(**inputs | changes)
