"""The ZegFormer model: laws for any weights and sizes, what it refuses, and how it starts."""

import math
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from support import tiny, tiny_zegformer
from support.errors import refused
from zsseg_rt.bundles import specs as bundle_specs
from zsseg_rt.errors import ArgumentError, CheckpointError, DTypeError, ShapeError
from zsseg_rt.models import create_model, from_official, load_clip
from zsseg_rt.models.zegformer.decoder import BatchNorm, QueryDecoderConfig, ResNet, ResNetConfig
from zsseg_rt.models.zegformer.model import FUSIONS, ZegFormer, load_torchvision_backbone
from zsseg_rt.torch_files.clip_arrays import ClipTensors, Tower
from zsseg_rt.torch_files.official import read_zegformer

CLIP = tiny_zegformer.CLIP
PREDICTOR = "sem_seg_head.predictor."


def build(state_dict, **settings):
    return from_official("zegformer", state_dict, **{"num_heads": 4} | settings)


def run(model, images, out_hw=None):
    text, text_clip = tiny_zegformer.text_features("a"), tiny_zegformer.text_features("b")
    sizes = out_hw or [(image.shape[1], image.shape[2]) for image in images]
    with torch.no_grad():
        return model(images, text, text_clip, sizes)


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


def test_pictures_of_one_padded_size_do_not_see_each_other():
    model = tiny_zegformer.model()
    images = [tiny_zegformer.image(50, 90, "a"), tiny_zegformer.image(64, 70, "b")]
    together = run(model, images)
    for index, image in enumerate(images):
        alone = run(model, [image])
        pairs = [
            (together.pred_masks[index], alone.pred_masks[0]),
            (together.sem_seg[index], alone.sem_seg[0]),
        ]
        for left, right in pairs:  # another blocking of the float32 sums; seen 1.6e-5 of 10
            torch.testing.assert_close(left, right, rtol=0, atol=1e-4)


def test_no_more_regions_than_asked_for_live_at_once():
    region_batch = 3
    expected = run(tiny_zegformer.model(), [tiny_zegformer.image(64, 64)])
    model = tiny_zegformer.model(region_batch=region_batch)
    counts = []
    model.clip_model.visual.conv1.register_forward_pre_hook(
        lambda _, inputs: counts.append(len(inputs[0]))
    )
    output = run(model, [tiny_zegformer.image(64, 64)])
    assert max(counts) <= region_batch
    assert sum(counts) == 8
    torch.testing.assert_close(output.clip_logits, expected.clip_logits, rtol=0, atol=1e-4)


def test_fusion_has_the_words_of_bundles():
    assert FUSIONS == bundle_specs.FUSIONS
    with refused(ArgumentError, "fusion", "'x'"):
        tiny_zegformer.config(fusion="x")


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


def test_keys_without_use_are_ignored(tmp_path):
    extra = {
        "pixel_mean": torch.zeros(3, 1, 1),
        "clip_pixel_std": torch.zeros(3, 1, 1),
        "backbone.stem.conv1.norm.num_batches_tracked": torch.zeros((), dtype=torch.int64),
    }
    state_dict = tiny_zegformer.state_dict()
    assert tiny.same(build(state_dict | extra).state_dict(), build(state_dict).state_dict())
    torch.save({"model": state_dict | extra}, tmp_path / "whole.pth")
    assert not read_zegformer(tmp_path / "whole.pth").keys() & extra.keys()


def test_checkpoints_of_training_take_their_clip_from_elsewhere():
    complete = tiny_zegformer.model().state_dict()
    assert tiny.same(build(training_state_dict(), clip=clip_weights()).state_dict(), complete)
    changed = complete | {CLIP + "visual.proj": torch.zeros(64, 48)}
    assert tiny.same(build(changed, clip=clip_weights()).state_dict(), complete)


@pytest.mark.parametrize("settings", [{}, {"fusion": "all_classes"}, {"fusion": "regions"}])
def test_checkpoints_of_training_lack_clip(settings):
    with refused(CheckpointError, "state_dict", "load_clip"):
        build(training_state_dict(), **settings)


def test_another_clip_is_refused():
    weights = clip_weights()
    visual = Tower({**weights.visual, "proj": torch.zeros(64, 40)})
    clip = ClipTensors(visual=visual, text=weights.text)
    with refused(CheckpointError, "state_dict", "clip_model.visual.proj", "48", "40"):
        build(training_state_dict(), clip=clip)


def test_only_clip_may_be_half_precision():
    state_dict = tiny_zegformer.state_dict()
    half = {k: v.half() if k.startswith(CLIP) else v for k, v in state_dict.items()}
    assert build(half).clip_model.visual.proj.dtype == torch.float32


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
    image = tiny_zegformer.image(32, 32)
    inputs = {
        "images": [image],
        "text_features": TEXT,
        "text_features_clip": TEXT,
        "out_hw": [(32, 32)],
    }
    with refused(error, argument):
        tiny_zegformer.model()(**inputs | changes)


# --- built to be trained: from CLIP, with a pretrained or an untrained backbone ---


BACKBONE = ResNetConfig(stem_width=8, widths=(4, 6, 8, 10), depths=(1, 2, 1, 1))
DECODER = QueryDecoderConfig(
    conv_dim=32, mask_dim=16, hidden_dim=32, num_layers=2, num_heads=2, ffn_dim=48
)


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "tiny.safetensors"
    tensors = {k: v.contiguous() for k, v in tiny.clip_state_dict().items()}
    save_file(tensors | {"logit_scale": torch.tensor(math.log(17.0))}, path)
    return path


def new_model(clip_file, **changes):
    settings = {"backbone": BACKBONE, "decoder": DECODER, "queries": 5, "image_size": 64}
    settings |= {"pretrained": clip_file, "activation": "quick_gelu"}
    model = create_model("zegformer", **(settings | changes))
    assert isinstance(model, ZegFormer)
    return model


def train_norms(backbone, steps=3):
    """Run in training mode, so that statistics move, and give scale and shift some values."""
    generator = torch.Generator().manual_seed(1)
    backbone.train()
    for _ in range(steps):
        backbone(2 * torch.randn(2, 3, 64, 64, generator=generator) + 1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return backbone.eval()


def test_sizes_follow_from_clip_and_settings(clip_file):
    weights = load_clip(clip_file, activation="quick_gelu")
    embed_dim = weights.visual["proj"].shape[1]
    model = new_model(clip_file, seen_classes=[0, 2], calibration=0.25, region_style="crop")
    config, clip = model.config, model.clip_model
    assert embed_dim != 512
    assert config.decoder == replace(DECODER, num_queries=5, embed_dim=embed_dim)
    assert (config.seen_classes, config.calibration, config.image_size) == ((0, 2), 0.25, 64)
    patch = weights.visual["conv1.weight"].shape[2]
    positions = weights.visual["positional_embedding"].shape[0]
    assert clip.image_side == patch * math.isqrt(positions - 1)
    assert torch.equal(clip.visual.state_dict()["proj"], torch.tensor(weights.visual["proj"]))
    assert clip.logit_scale.exp().item() == pytest.approx(17.0)
    assert not any(p.requires_grad for p in clip.parameters())
    assert not model.training
    text = torch.nn.functional.normalize(torch.randn(3, embed_dim), dim=1)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        output = model([image], text, text, [(64, 96)])
    assert output.pred_logits.shape == (1, 5, 4)
    assert output.sem_seg[0].shape == (3, 64, 96)
    assert torch.isfinite(output.sem_seg[0]).all()


def test_start_is_official(clip_file):
    torch.manual_seed(0)
    model = new_model(clip_file, decoder=replace(DECODER, conv_dim=64, mask_dim=64))
    head = model.sem_seg_head
    for conv in (
        head.pixel_decoder.layer_4,
        head.pixel_decoder.adapter_1,
        head.pixel_decoder.mask_features,
        head.predictor.input_proj,
    ):
        limit = math.sqrt(3 / conv.weight[0].numel())
        assert limit * 0.95 < conv.weight.abs().max() <= limit
        assert conv.bias is None or not conv.bias.any()
    conv = model.backbone.res3[0].conv2
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (6 * 9)), rel=0.2)
    limit = 1 / math.sqrt(head.predictor.bg_feature.shape[1])
    assert 0.7 * limit < head.predictor.bg_feature.abs().max() <= limit
    assert head.predictor.logit_scale.exp().item() == pytest.approx(100.0)
    assert not head.predictor.logit_scale.requires_grad
    assert head.predictor.query_embed.weight.std().item() == pytest.approx(1.0, abs=0.2)


def test_learned_norms_are_frozen_ones_in_evaluation():
    learned = train_norms(ResNet(replace(BACKBONE, norm="learned")))
    frozen = ResNet(BACKBONE).eval()
    frozen.load_state_dict(learned.state_dict())  # the same names
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    before = {key: value.clone() for key, value in learned.state_dict().items()}
    assert learned.stem.conv1.norm.running_mean.abs().max() > 0.1
    for ours, expected in zip(learned(image), frozen(image), strict=True):
        assert torch.equal(ours, expected)
    assert all(torch.equal(value, before[key]) for key, value in learned.state_dict().items())
    assert not torch.allclose(learned.train()(image)[0], frozen.train()(image)[0])
    assert not any(name.endswith("norm.weight") for name, _ in frozen.named_parameters())


@pytest.mark.parametrize("pretrained", [False, True])
def test_norms_follow_from_weights(pretrained, clip_file, tmp_path):
    weights, start = None, train_norms(ResNet(replace(BACKBONE, norm="learned"))).state_dict()
    if pretrained:
        weights = tmp_path / "resnet.pth"
        torch.save({torchvision_key(key): value for key, value in start.items()}, weights)
    model = new_model(clip_file, backbone_weights=weights)
    assert model.config.backbone.norm == ("frozen" if pretrained else "learned")
    trained = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert ("stem.conv1.norm.weight" in trained) != pretrained
    assert "stem.conv1.weight" in trained
    copied = [torch.equal(value, start[key]) for key, value in model.backbone.state_dict().items()]
    assert all(copied) == pretrained


def torchvision_key(key):
    """Torchvision's key of a tensor of ours."""
    key = re.sub(r"^stem\.", "", key)
    key = re.sub(r"^res(\d)", lambda match: f"layer{int(match[1]) - 1}", key)
    key = key.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    return re.sub(r"conv(\d)\.norm", r"bn\1", key)


TORCHVISION = ResNetConfig(stem_width=64, widths=(64, 128, 256, 512), depths=(1, 1, 1, 1))


def torchvision_resnet():
    resnet = pytest.importorskip("torchvision.models.resnet")
    model = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=3).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.running_mean, module.bias):
                    tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model


@pytest.mark.parametrize("norm", ["frozen", "learned"])
def test_torchvision_weights_compute_what_torchvision_does(norm):
    theirs = torchvision_resnet()
    ours = ResNet(replace(TORCHVISION, norm=norm)).eval()
    load_torchvision_backbone(ours, theirs.state_dict())
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        for index, features in enumerate(ours(image), start=1):
            x = theirs.get_submodule(f"layer{index}")(x)
            torch.testing.assert_close(features, x, rtol=1e-5, atol=1e-5)


def test_weights_of_another_resnet_are_refused():
    state_dict = torchvision_resnet().state_dict()
    with refused(CheckpointError, "state_dict", "res4.0.conv2.weight"):
        load_torchvision_backbone(
            ResNet(TORCHVISION),
            {k: v for k, v in state_dict.items() if k != "layer3.0.conv2.weight"},
        )


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"backbone": "resnet18"}, "backbone"),
        ({"decoder": replace(DECODER, conv_dim=48)}, "decoder.conv_dim"),
        ({"decoder": replace(DECODER, num_heads=3)}, "decoder.hidden_dim"),
        ({"queries": 0}, "queries"),
        ({"region_style": "masks"}, "region_style"),
        ({"region_batch": 0}, "region_batch"),
        ({"image_size": 0}, "image_size"),
    ],
)
def test_wrong_settings_are_named(changes, argument, clip_file):
    with refused(ArgumentError, argument):
        new_model(clip_file, **changes)
    with refused(ArgumentError, "widths"):
        ResNetConfig(widths=(4, 8), depths=(1,))
