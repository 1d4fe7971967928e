"""ZegFormer: laws for any weights and sizes, what it refuses, how it starts, official outputs."""

import ast
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from support import golden, tiny, tiny_zegformer
from support.errors import refused
from support.graph_runs import run_file
from zsseg_rt import ops
from zsseg_rt.bundles import specs as bundle_specs
from zsseg_rt.errors import ArgumentError, CheckpointError, DTypeError, ShapeError
from zsseg_rt.export import export_graphs
from zsseg_rt.models import create_model, from_official, load_clip
from zsseg_rt.models.clip.towers import average_templates
from zsseg_rt.models.zegformer.decoder import (
    BatchNorm,
    QueryDecoderConfig,
    ResNet,
    ResNetConfig,
    Segments,
    crop_regions,
)
from zsseg_rt.models.zegformer.model import FUSIONS, load_torchvision_backbone
from zsseg_rt.networks.zegformer import IMAGE_MEAN, IMAGE_STD, REGION_MEAN, REGION_STD
from zsseg_rt.torch_files.clip_arrays import ClipTensors, Tower
from zsseg_rt.torch_files.official import REGION_TEMPLATES, SINGLE_TEMPLATE, read_zegformer

pytestmark = pytest.mark.usefixtures("without_gradients")

CLIP = tiny_zegformer.CLIP


def build(state_dict, **settings):
    return from_official("zegformer", state_dict, **{"num_heads": 4} | settings)


def run(model, *images):
    text, text_clip = tiny_zegformer.text_features("a"), tiny_zegformer.text_features("b")
    return model(list(images), text, text_clip, [tuple(image.shape[1:]) for image in images])


def test_pictures_of_one_padded_size_do_not_see_each_other():
    model = tiny_zegformer.model()
    images = [tiny_zegformer.image(50, 90, "a"), tiny_zegformer.image(64, 70, "b")]
    together = run(model, *images)
    for index, image in enumerate(images):
        alone = run(model, image)
        for part in ("pred_masks", "sem_seg"):  # another blocking of the sums; seen 1.6e-5 of 10
            left, right = getattr(together, part)[index], getattr(alone, part)[0]
            torch.testing.assert_close(left, right, rtol=0, atol=1e-4)


def test_no_more_regions_than_asked_for_live_at_once():
    image, counts = tiny_zegformer.image(64, 64), []
    model = tiny_zegformer.model(region_batch=3)
    model.clip_model.visual.conv1.register_forward_pre_hook(
        lambda _, inputs: counts.append(len(inputs[0]))
    )
    logits, expected = (run(one, image).clip_logits for one in (model, tiny_zegformer.model()))
    assert max(counts) <= 3
    assert sum(counts) == 8
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_frozen_parts_stay_frozen_in_training():
    model = tiny_zegformer.model().train()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("clip_model" in name or "logit_scale" in name for name in names)
    assert not any(".norm." in name for name in names if name.startswith("backbone."))
    assert "sem_seg_head.predictor.bg_feature" in names
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    before = [norm.running_mean.clone() for norm in norms]
    model.backbone(tiny.image(2, 3, 64, 64))
    assert norms
    assert all(torch.equal(a, b.running_mean) for a, b in zip(before, norms, strict=True))


def test_keys_without_use_are_ignored_and_clip_alone_may_be_half_precision(tmp_path):
    extra = {
        "pixel_mean": torch.zeros(3, 1, 1),
        "clip_pixel_std": torch.zeros(3, 1, 1),
        "backbone.stem.conv1.norm.num_batches_tracked": torch.zeros((), dtype=torch.int64),
    }
    state_dict = tiny_zegformer.state_dict()
    assert tiny.same(build(state_dict | extra).state_dict(), build(state_dict).state_dict())
    torch.save({"model": state_dict | extra}, tmp_path / "whole.pth")
    assert not read_zegformer(tmp_path / "whole.pth").keys() & extra.keys()
    half = {k: v.half() if k.startswith(CLIP) else v for k, v in state_dict.items()}
    assert build(half).clip_model.visual.proj.dtype == torch.float32


def test_checkpoints_of_training_take_their_clip_from_elsewhere():
    whole, complete = tiny_zegformer.state_dict(), tiny_zegformer.model().state_dict()
    trained = {k: v for k, v in whole.items() if not k.startswith(CLIP)}
    bare = {k.removeprefix(CLIP): v for k, v in whole.items() if k not in trained}
    del bare["logit_scale"]
    visual = {k.removeprefix("visual."): v for k, v in bare.items() if k.startswith("visual.")}
    text = Tower({key: value for key, value in bare.items() if not key.startswith("visual.")})
    clip = ClipTensors(visual=Tower(visual), text=text)
    changed = complete | {CLIP + "visual.proj": torch.zeros(64, 48)}
    for weights in (trained, changed):
        assert tiny.same(build(weights, clip=clip).state_dict(), complete)
    for settings in ({}, {"fusion": "all_classes"}, {"fusion": "regions"}):
        with refused(CheckpointError, "state_dict", "load_clip"):
            build(trained, **settings)
    other = ClipTensors(visual=Tower({**visual, "proj": torch.zeros(64, 40)}), text=text)
    with refused(CheckpointError, "state_dict", "clip_model.visual.proj", "48", "40"):
        build(trained, clip=other)


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
    inputs = {"images": [tiny_zegformer.image(32, 32)], "out_hw": [(32, 32)]}
    inputs |= {"text_features": TEXT, "text_features_clip": TEXT}
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
    return create_model("zegformer", **(settings | changes))


def test_sizes_follow_from_clip_and_settings(clip_file):
    weights = load_clip(clip_file, activation="quick_gelu")
    embed_dim = weights.visual["proj"].shape[1]
    model = new_model(clip_file, seen_classes=[0, 2], calibration=0.25, region_style="crop")
    config, clip = model.config, model.clip_model
    assert embed_dim != 512
    assert config.decoder == replace(DECODER, num_queries=5, embed_dim=embed_dim)
    assert (config.seen_classes, config.calibration, config.image_size) == ((0, 2), 0.25, 64)
    assert clip.image_side == 64
    assert torch.equal(clip.visual.state_dict()["proj"], torch.tensor(weights.visual["proj"]))
    assert clip.logit_scale.exp().item() == pytest.approx(17.0)
    assert not any(p.requires_grad for p in clip.parameters())
    assert not model.training
    text = torch.nn.functional.normalize(torch.randn(3, embed_dim), dim=1)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    output = model([image], text, text, [(64, 96)])
    assert output.pred_logits.shape == (1, 5, 4)
    assert output.sem_seg[0].shape == (3, 64, 96)
    assert torch.isfinite(output.sem_seg[0]).all()


def test_start_is_official(clip_file):
    torch.manual_seed(0)
    model = new_model(clip_file, decoder=replace(DECODER, conv_dim=64, mask_dim=64))
    pixels, predictor = model.sem_seg_head.pixel_decoder, model.sem_seg_head.predictor
    for conv in (pixels.layer_4, pixels.adapter_1, pixels.mask_features, predictor.input_proj):
        limit = math.sqrt(3 / conv.weight[0].numel())
        assert limit * 0.95 < conv.weight.abs().max() <= limit
        assert conv.bias is None or not conv.bias.any()
    conv = model.backbone.res3[0].conv2
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (6 * 9)), rel=0.2)
    limit = 1 / math.sqrt(predictor.bg_feature.shape[1])
    assert 0.7 * limit < predictor.bg_feature.abs().max() <= limit
    assert predictor.logit_scale.exp().item() == pytest.approx(100.0)
    assert not predictor.logit_scale.requires_grad
    assert predictor.query_embed.weight.std().item() == pytest.approx(1.0, abs=0.2)


def test_learned_norms_are_frozen_ones_in_evaluation():
    learned = ResNet(replace(BACKBONE, norm="learned")).train()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):  # so that statistics move
        learned(2 * torch.randn(2, 3, 64, 64, generator=generator) + 1)
    for parameter in learned.parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    learned, frozen = learned.eval(), ResNet(BACKBONE).eval()
    frozen.load_state_dict(learned.state_dict())  # the same names
    image = torch.randn(2, 3, 64, 96, generator=generator)
    before = {key: value.clone() for key, value in learned.state_dict().items()}
    assert learned.stem.conv1.norm.running_mean.abs().max() > 0.1
    for ours, expected in zip(learned(image), frozen(image), strict=True):
        assert torch.equal(ours, expected)
    assert tiny.same(learned.state_dict(), before)
    assert not torch.allclose(learned.train()(image)[0], frozen.train()(image)[0])
    assert not any(name.endswith("norm.weight") for name, _ in frozen.named_parameters())


TORCHVISION = ResNetConfig(stem_width=64, widths=(64, 128, 256, 512), depths=(1, 2, 1, 1))


def test_torchvision_weights_compute_what_torchvision_does(clip_file, tmp_path):
    resnet = pytest.importorskip("torchvision.models.resnet")
    theirs = resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1], num_classes=3).eval()
    generator = torch.Generator().manual_seed(3)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
            module.running_var.uniform_(0.5, 2, generator=generator)
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    pretrained = new_model(
        clip_file, backbone=TORCHVISION, backbone_weights=tmp_path / "resnet.pth"
    ).backbone
    learned = ResNet(replace(TORCHVISION, norm="learned")).eval()
    load_torchvision_backbone(learned, theirs.state_dict())
    image = torch.randn(1, 3, 64, 64, generator=generator)
    for ours in (pretrained, learned):
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        for index, features in enumerate(ours(image), start=1):
            x = theirs.get_submodule(f"layer{index}")(x)
            torch.testing.assert_close(features, x, rtol=1e-5, atol=1e-5)
    # Norms are learned where nothing was pretrained.
    for backbone, norms in ((pretrained, False), (new_model(clip_file).backbone, True)):
        trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
        assert ("stem.conv1.norm.weight" in trained) == norms
        assert "stem.conv1.weight" in trained
    lacking = {k: v for k, v in theirs.state_dict().items() if k != "layer3.0.conv2.weight"}
    with refused(CheckpointError, "state_dict", "res4.0.conv2.weight"):
        load_torchvision_backbone(learned, lacking)


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
        ({"fusion": "x"}, "fusion"),
    ],
)
def test_wrong_settings_are_named(changes, argument, clip_file):
    assert FUSIONS == bundle_specs.FUSIONS
    with refused(ArgumentError, argument):
        new_model(clip_file, **changes)
    with refused(ArgumentError, "widths"):
        ResNetConfig(widths=(4, 8), depths=(1,))


# --- against the official code's outputs ---


TOLERANCE = 1e-4  # features, masks and score maps, as the reference's notes recommend
CLIP_TOLERANCE = 1e-3  # a pixel at the mask's edge may flip
VARIANTS = {
    "ens_cropmask": {},
    "ens_mask": {"region_style": "mask"},
    "ens_crop": {"region_style": "crop"},
    "ens_all_cls": {"fusion": "all_classes"},
    "clip_only": {"ensemble": False},
    "seg_only": {"fusion": "segments"},
    "ens_cropmask_nocal": {"calibration": -1.0},
}


def assert_close(actual, expected, tolerance=TOLERANCE):
    golden.assert_close(actual, expected, tolerance)


class Small:
    """The small vectors, as tensors too, what builds their model, and its inputs."""

    def __init__(self, shared_dir):
        self.vectors = golden.load(shared_dir, "zegformer_public.npz")
        self.config = config = golden.config_of(self.vectors)
        key, (vocabulary, width) = CLIP + "token_embedding.weight", config["clip"][6:8]
        weights = golden.state_dict_of(self.vectors)
        weights[key] = tiny_zegformer.rule_tensor(key, (vocabulary, width))
        self.build = partial(
            from_official, "zegformer", weights, num_heads=config["heads"],
            **{"seen_classes": config["seen_indexes"], "calibration": config["gz"]},
        )  # fmt: skip
        self.model, self.images = self.build(), [self("image0")]
        text = [self("text/text_features_test" + tower) for tower in ("", "_clip")]
        self.inputs = (self.images, *text, config["outs"])

    def __call__(self, key) -> Tensor:
        return torch.from_numpy(self.vectors[key])


@pytest.fixture(scope="module")
def small(shared_dir):
    return Small(shared_dir)


def boxes_of(masks, size_hw) -> Tensor:
    return torch.from_numpy(ops.mask_boxes(masks.numpy(), size_hw)[:, :4].astype(np.int64))


@pytest.mark.parametrize("style", ["cropmask", "mask", "crop"])
def test_small_regions(small, style):
    plane = small.model.prepare(small.images, REGION_MEAN, REGION_STD)[0]
    crops = crop_regions(plane, small("mid/pred_masks")[0], style=style, side=224)
    assert_close(crops[None, :, :, ::14, ::14], small.vectors[f"mid/clip_in_{style}_sub14"])
    if style == "cropmask":
        assert_close(crops.mean(dim=(2, 3))[None], small.vectors["mid/clip_in_cropmask_mean"])
    embeds = small.model.clip_model.visual.encode_image(crops)
    assert_close(embeds[None], small.vectors[f"mid/clip_feat_{style}"], CLIP_TOLERANCE)


def test_small_outputs(small):
    output, vectors = small.model(*small.inputs), small.vectors
    assert_close(output.pred_logits, vectors["mid/pred_logits"])
    assert_close(output.pred_masks, vectors["mid/pred_masks"])
    assert_close(output.clip_logits, vectors["mid/clip_logits"], CLIP_TOLERANCE)
    assert_close(output.class_scores, vectors["mid/fused_cls"])
    boxes = boxes_of(small("mid/pred_masks")[0], (96, 128))
    assert_close(boxes, vectors["mid/boxes"], 0)


def test_small_graphs_and_kernels(small, tmp_path):
    vectors, regions = small.vectors, np.arange(8, dtype=np.int32)
    padded = vectors["mid/padded_input"]
    files = export_graphs(small.model, tmp_path, size_hw=padded.shape[2:], precisions=("float32",))
    paths = {name: tmp_path / kinds["float32"].file for name, kinds in files.items()}
    outputs = run_file(paths["image_encoder"], {"image": padded})
    masks = outputs["region_masks"][0]
    assert_close(outputs["region_masks"], vectors["mid/pred_masks"])
    logits = 100 * outputs["segment_embeds"] @ vectors["text/text_features_test"].T
    logits = np.dstack([logits, outputs["no_object"][..., None]])
    assert_close(logits, vectors["mid/pred_logits"])
    boxes = ops.mask_boxes(masks, padded.shape[2:])
    planes = small.model.prepare(small.images, REGION_MEAN, REGION_STD)[0].numpy()
    crops = ops.crop_regions(planes, masks, regions, boxes[:, :4].copy(), side=224)
    assert_close(crops[None, :, :, ::14, ::14], vectors["mid/clip_in_cropmask_sub14"])
    embeds = run_file(paths["region_encoder"], {"crops": crops})["region_embeds"]
    clip = 100 * embeds @ vectors["text/text_features_test_clip"].T
    assert_close(clip, vectors["mid/clip_logits"][0, :, :-1], CLIP_TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_small_score_maps(small, variant):
    (scores,) = small.build(**VARIANTS[variant])(*small.inputs).sem_seg
    step = 1 if variant == "ens_cropmask" else 4
    assert_close(scores[:, ::step, ::step], small.vectors[f"sem_seg/{variant}/0"])


def test_small_crafted_masks(small):
    model, image, masks = small.model, small("crafted/image"), small("crafted/pred_masks")
    expected = {k.partition("/")[2]: v for k, v in small.vectors.items() if k.startswith("crafted")}
    segments = Segments(small("crafted/pred_logits"), masks)
    planes = model.prepare([image], REGION_MEAN, REGION_STD)
    padded_hw = (planes.shape[2], planes.shape[3])
    assert_close(boxes_of(masks[0], padded_hw), expected["boxes"], 0)
    crops = crop_regions(planes[0], masks[0], style="cropmask", side=224)
    assert_close(crops[None, :, :, ::14, ::14], expected["clip_in_sub14"])
    assert_close(crops.mean(dim=(2, 3))[None], expected["clip_in_mean"])
    logits = model.classify_regions(planes, segments, small.inputs[2])
    assert_close(logits[0], expected["clip_logits"], CLIP_TOLERANCE)
    scores = model.fuse(segments.logits, logits)[0]
    assert_close(scores, expected["fused_cls"])
    size = (image.shape[1], image.shape[2])
    maps = model.score_maps(scores, masks[0], padded_hw, size, size)
    assert_close(maps[:, ::4, ::4], expected["sem_seg_sub4"])


def embed_classes(encoder, names, templates, context=77) -> Tensor:
    """The mean of each template with each synonym of a class name filled in."""
    open_clip, rows = pytest.importorskip("open_clip"), []
    for name in names:
        prompts = [template.format(part) for template in templates for part in name.split(", ")]
        tokens = open_clip.tokenize(prompts)
        assert not tokens[:, context:].any()
        rows.append(average_templates(encoder(tokens[:, :context])))
    return torch.stack(rows)


def test_small_text_features(small):
    encoder, names = small.model.text_encoder, small.config["ALL"]
    single = embed_classes(encoder, names, SINGLE_TEMPLATE)
    assert_close(single, small.vectors["text/text_features_test"])
    regions = embed_classes(encoder, names, REGION_TEMPLATES)
    assert_close(regions, small.vectors["text/text_features_test_clip"])
    assert_close(regions[: len(small.config["seen"])], small.vectors["text/text_features_clip"])


def read_shapes(shared_dir, depth: int) -> dict[str, tuple[int, ...]]:
    lines = (shared_dir / "specs" / f"zegformer_r{depth}_eval_keys.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return {key: tuple(ast.literal_eval(shape)) for key, shape, _ in rows}


@pytest.mark.parametrize(("depth", "trainable"), [(50, 41.35e6), (101, 60.29e6)])
def test_every_official_layout_loads(shared_dir, depth, trainable):
    with torch.device("meta"):
        state_dict = {k: torch.empty(v) for k, v in read_shapes(shared_dir, depth).items()}
    model = from_official("zegformer", state_dict)
    assert model.clip_model.image_side == 224
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parameters == pytest.approx(trainable, abs=0.005e6)
    training = {k: v for k, v in state_dict.items() if not k.startswith(CLIP)}
    assert from_official("zegformer", training, ensemble=False).clip_model is None


CONTEXT = 13  # the longest prompt; the text tower is causal, so what follows has no effect
SAMPLED = slice(2, None, 6)  # regions that are classified; all 100 take a minute


@pytest.mark.nightly
def test_real_features_segments_regions_and_score_maps(shared_dir):
    """The official VOC model by the rule, and what it makes of one photo."""
    pil = pytest.importorskip("PIL.Image")
    expected = golden.load(shared_dir, "zegformer_real_r50_voc.npz")
    state_dict = tiny_zegformer.rule_state_dict(read_shapes(shared_dir, 50))
    state_dict[CLIP + "positional_embedding"] = state_dict[CLIP + "positional_embedding"][:CONTEXT]
    model = from_official("zegformer", state_dict, seen_classes=range(15))
    del state_dict
    listed = (shared_dir / "data/clip_text_embeddings/vitb16/voc20_names.txt").read_text()
    names = listed.replace("pottedplant", "potted plant").splitlines()
    text = embed_classes(model.text_encoder, names, SINGLE_TEMPLATE, CONTEXT)
    text_clip = embed_classes(model.text_encoder, names, REGION_TEMPLATES, CONTEXT)
    assert_close(text[:, ::8], expected["text/test"], 1e-6)
    assert_close(text_clip[:, ::8], expected["text/test_clip"], 1e-6)

    photo = pil.fromarray(np.ascontiguousarray(expected["image"].transpose(1, 2, 0)))
    resized = np.array(photo.resize((512, 683), pil.Resampling.BILINEAR))
    assert resized.sum(dtype=np.int64) == expected["resized_sum"]
    image, head = torch.from_numpy(resized).permute(2, 0, 1), model.sem_seg_head
    planes = model.prepare([image], IMAGE_MEAN, IMAGE_STD)
    maps, segments = model.backbone(planes), model.propose(planes, text)
    mask_features, queries = head.pixel_decoder(maps), head.predictor.decode(maps[-1])[-1]
    assert_close(maps[-1].mean(dim=(2, 3)), expected["mid/res5_mean"])
    assert_close(mask_features[:, ::8, ::8, ::8], expected["mid/mask_features_sub8"])
    assert_close(queries, expected["mid/hs_last"])
    assert_close(segments.logits, expected["mid/pred_logits"])
    assert_close(segments.masks[:, :, ::4, ::4], expected["mid/pred_masks_sub4"])

    boxes = boxes_of(segments.masks[0], (704, 512)).numpy()
    assert np.mean((boxes == expected["mid/boxes"]).all(axis=1)) >= 0.98
    planes = model.prepare([image], REGION_MEAN, REGION_STD)
    sampled = Segments(segments.logits[:, SAMPLED], segments.masks[:, SAMPLED])
    logits = model.classify_regions(planes, sampled, text_clip)
    errors = np.abs(logits[0].numpy() - expected["mid/clip_logits"][SAMPLED]).max(axis=1)
    # About three pixels a mask lie within 2e-4 of its edge; one that flips moves a region's logits.
    assert np.median(errors) <= TOLERANCE
    assert np.quantile(errors, 0.8) <= CLIP_TOLERANCE
    assert errors.max() <= 0.2
    scores = model.fuse(sampled.logits, logits)[0].numpy()
    assert np.abs(scores - expected["mid/fused_cls"][SAMPLED]).max() <= 1e-3  # likewise

    scores = model.fuse(segments.logits[0], torch.from_numpy(expected["mid/clip_logits"]))
    assert_close(scores, expected["mid/fused_cls"])
    scored = model.score_maps(scores, segments.masks[0], (704, 512), (683, 512), (500, 375))
    assert_close(scored[:, ::8, ::8], expected["sem_seg_sub8"])
    assert np.mean(scored.argmax(dim=0).numpy() == expected["argmax"]) >= 0.9999
