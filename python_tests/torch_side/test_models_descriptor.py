"""ZegCLIP, CLIP-RC and the cosine head: laws, starts from CLIP, refusals, official outputs."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import tiny
from support.descriptor_models import run_parts
from support.errors import refused
from support.golden import (
    MIN_AGREEMENT,
    REAL_TOLERANCE,
    arguments_of,
    assert_close,
    config_of,
    load,
    state_dict_of,
)
from zsseg_rt import Bundle
from zsseg_rt.errors import ArgumentError, DTypeError, ShapeError
from zsseg_rt.export import export_bundle, export_graphs
from zsseg_rt.export.clip_file import tower_of
from zsseg_rt.models import create_model, from_official, slide_predict
from zsseg_rt.models.base import prepare_image, slide_scores
from zsseg_rt.models.clip.towers import average_templates, resize_positional_embedding
from zsseg_rt.models.clip.weights import build_text_encoder
from zsseg_rt.networks.descriptor import cells_of_patches
from zsseg_rt.networks.heads import dense_embeds
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.torch_files.clip_arrays import ClipTensors, Tower

pytestmark = pytest.mark.usefixtures("without_gradients")

IMAGE, TEXT = tiny.image(1, 3, 64, 64), tiny.text_embeds(7, 32)
SIZES = tiny.TinySizes(num_layers=2, text_layers=1, grid_side=3)
BUILDS = ("clip_rc", "cosine_head", "zegclip")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(tiny.clip_state_dict(SIZES), path)

    def build(architecture: str, **settings):
        options = {"image_size": 64, "num_heads": 4, "text_heads": 4, "activation": "quick_gelu"}
        return create_model(architecture, pretrained=path, **options | settings)

    return build


@pytest.mark.parametrize("stride", [8, 4])
def test_overlapping_patches_make_a_finer_grid(build, stride):
    model, side = build("zegclip", patch_stride=stride, num_prompts=2), 64 // stride
    image, text = IMAGE, TEXT
    output = model(image, text)
    assert model.size_hw == (64, 64)
    assert output.mask_logits.shape == (1, 7, side, side)
    torch.testing.assert_close(run_parts(model, image, text), output.mask_logits, rtol=0, atol=1e-5)
    # A patch sees 16 pixels around the middle of its cell; outside of the image are zeros.
    encoder = model.backbone
    rim = (16 - stride) // 2
    padded = torch.nn.functional.pad(image, (rim,) * 4)
    row, column = 1, side - 1
    window = padded[0, :, row * stride :, column * stride :][:, :16, :16]
    token = (encoder.conv1.weight * window).sum((1, 2, 3))
    place = 1 + row * side + column
    rest = encoder.input_tokens(image)[0, place] - encoder.patch_positions((side, side))[place - 1]
    torch.testing.assert_close(rest, token, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt_dropout", [0.0, 0.1])
@pytest.mark.parametrize("decoder_dropout", [0.0, 0.1])
def test_dropout_acts_in_training_only(prompt_dropout, decoder_dropout):
    rates = {"prompt_dropout": prompt_dropout, "decoder_dropout": decoder_dropout}
    model = tiny.zegclip_model(**rates)
    image, text = tiny.image(2, 3, 64, 64), tiny.text_embeds(7, 32)
    expected = model(image, text)
    assert torch.equal(model(image, text).mask_logits, expected.mask_logits)
    trained = model.train()(image, text)
    features_equal = torch.equal(trained.patch_embeds, expected.patch_embeds)
    assert features_equal == (prompt_dropout == 0)
    assert torch.equal(trained.mask_logits, expected.mask_logits) == (not any(rates.values()))


def test_what_does_not_fit_is_refused():
    model, rgb = tiny.zegclip_model(), np.zeros((8, 8, 3), np.uint8)
    for seen in (7, -1):
        with refused(ShapeError, "seen_classes"):
            tiny.zegclip_model(seen_classes=(seen,)).predict(IMAGE, TEXT)
    short = torch.zeros(2, 15, dtype=torch.int64)
    for error, tokens in ((ShapeError, short), (DTypeError, torch.zeros(2, 16))):
        with refused(error, "tokens"):
            model.text_encoder(tokens)
    floats = (np.zeros((4, 4, 3), np.float32), torch.zeros(4, 4, 3))
    shapes = (np.zeros((4, 4), np.uint8), rgb[:0])
    for error, wrong in ((ShapeError, shapes), (DTypeError, floats)):
        for image in wrong:
            with refused(error, "rgb"):
                slide_predict(model, image, TEXT)
    with refused(ShapeError, "stride"):
        slide_predict(model, rgb, TEXT, crop_size=64, stride=65)


SETTINGS = [
    *((name, {"image_size": 70}, ShapeError) for name in BUILDS),
    *(("zegclip", {"patch_stride": stride}, ShapeError) for stride in (3, 0, 32)),
    *((name, {"start": "alined"}, ArgumentError) for name in ("zegclip", "clip_rc")),
    ("clip_rc", {"num_cells": 5}, ArgumentError),
    ("cosine_head", {"seen_bias": 2.0}, ArgumentError),
    ("cosine_head", {"logit_scale": 0.0}, ArgumentError),
]


@pytest.mark.parametrize(("architecture", "settings", "error"), SETTINGS)
def test_settings_that_do_not_fit_are_refused(build, architecture, settings, error):
    with refused(error, *settings, *(["16"] if error is ShapeError else [])):
        build(architecture, **settings)


def cell_of_patches(grid_hw, num_cells, **official):
    return torch.from_numpy(cells_of_patches(grid_hw, num_cells, **official))


@pytest.mark.parametrize("grid_hw", [(32, 32), (4, 4), (8, 24), (5, 7), (1, 4), (2, 2)])
@pytest.mark.parametrize("num_cells", [1, 4, 16])
def test_cells_cut_the_grid_evenly(grid_hw, num_cells):
    cells = cell_of_patches(grid_hw, num_cells).reshape(grid_hw)
    side = int(num_cells**0.5)
    assert cells.min() == 0
    rows, columns = cells // side, cells % side
    assert (rows == rows[:, :1]).all()
    assert (columns == columns[:1]).all()
    for line, size in ((rows[:, 0], grid_hw[0]), (columns[0], grid_hw[1])):
        assert (line.diff() >= 0).all()
        sizes = torch.bincount(line, minlength=side)
        assert sizes.max() - sizes.min() <= 1
        assert sizes.sum() == size


def test_recovery_is_for_training_only_and_changes_no_mask():
    image, text = IMAGE, TEXT
    rates = {"prompt_dropout": 0.0, "decoder_dropout": 0.0}
    weights = tiny.clip_rc_state_dict()
    bare = {k: v for k, v in weights.items() if not k.startswith("decode_head.recovery_decoder.")}
    model, lean = (clip_rc(content, **rates) for content in (weights, bare))
    assert model(image, text).recovery is None
    trained = model.train()(image, text)
    assert trained.recovery.queries.shape == trained.recovery.query_targets.shape == (1, 28, 64)
    assert trained.recovery.patches.shape == trained.recovery.patch_targets.shape == (1, 16, 32)
    without = lean.train()(image, text)
    assert without.recovery is None
    assert torch.equal(without.mask_logits, trained.mask_logits)


def clip_rc(state_dict, **config):
    return from_official("clip_rc", state_dict, **tiny.zegclip_config(), **config)


@pytest.mark.parametrize(
    ("architecture", "weights", "unread"),
    [("zegclip", tiny.zegclip_state_dict, 19), ("clip_rc", tiny.clip_rc_state_dict, 48)],
)
def test_unread_keys_may_be_absent_as_in_the_jittor_port(architecture, weights, unread):
    whole = weights()
    names = (".self_attn.", ".norm1.", "empty_weight")
    lean = {k: v for k, v in whole.items() if not any(name in k for name in names)}
    assert len(whole) - len(lean) == unread
    image, text = IMAGE, TEXT
    scores, expected = (
        from_official(architecture, content, **tiny.zegclip_config())(image, text).mask_logits
        for content in (lean, whole)
    )
    assert torch.equal(scores, expected)
    optional = ("decode_head.recovery_decoder.", "text_encoder.")
    less = {key: value for key, value in lean.items() if not key.startswith(optional)}
    assert from_official(architecture, less, **tiny.zegclip_config()).text_encoder is None


# --- started from CLIP weights, to be trained ---


@pytest.mark.parametrize("architecture", BUILDS)
def test_towers_are_clips(build, architecture):
    model, weights = build(architecture), tiny.clip_state_dict(SIZES)
    mode = "bicubic" if architecture == "cosine_head" else "bilinear"
    key = "visual.positional_embedding"
    weights[key] = resize_positional_embedding(weights[key], (4, 4), mode)
    tower = model.image_encoder if architecture == "cosine_head" else model.backbone
    visual, text = tower.state_dict(), model.text_encoder.state_dict()
    for name, value in weights.items():
        tensor = visual[name[7:]] if name.startswith("visual.") else text[name]
        assert torch.equal(tensor, value)
    assert not model.training
    assert not any(p.requires_grad for p in model.text_encoder.parameters())
    assert any(p.requires_grad for p in model.parameters())


def test_what_clip_lacks_starts_as_officially(build):
    backbone = build("zegclip", num_prompts=5).backbone
    assert backbone.prompt_embeddings.shape == (1, 5, 64)
    assert backbone.deep_prompt_embeddings.shape == (1, 5, 64)
    bound = (6 / (3 * 16 * 16 + 64)) ** 0.5
    assert 0.9 * bound < backbone.prompt_embeddings.abs().max() <= bound
    assert backbone.prompt_proj.weight.std().item() == pytest.approx((2 / 64) ** 0.5, abs=0.01)
    model, clip = build("clip_rc", num_cells=4), tiny.clip_state_dict(SIZES)
    bridge, recovery = model.backbone.region_level_bridge, model.decode_head.recovery_decoder
    start = clip["visual.class_embedding"] + clip["visual.positional_embedding"][0]
    assert torch.equal(bridge, start.expand(4, -1))
    assert not bridge.requires_grad
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
    weight = model.image_encoder.head.weight
    weight += 0.3 * torch.from_numpy(tiny.random_normal("head", weight.shape)).float()
    model.log_scale += 0.5
    return model


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
    names, path = [f"name {index}" for index in range(7)], tmp_path / "cosine_head.zsseg"
    options = {"class_names": names, "precisions": ("float32",), "templates": ("a {}",)}
    bundle = Bundle.load(export_bundle(model, path, **options))
    assert (bundle.family, bundle.architecture) == ("dense", "cosine_head")
    assert bundle.head.activation == "softmax"
    assert bundle.head.seen == ("name 0", "name 3")
    assert bundle.head.seen_bias == 0.1
    assert bundle.head.logit_scale == pytest.approx(model.log_scale.exp().item())


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


# --- against their official codes' outputs, by torch, NumPy and OpenVINO ---


FILES = {"zegclip": "zegclip", "clip_rc": "cliprc"}


class Small:
    """Vectors, the model that they were made with, and its inputs."""

    def __init__(self, shared_dir: Path, architecture: str) -> None:
        self.golden = load(shared_dir, f"{FILES[architecture]}_small_public.npz")
        self.config, state_dict = config_of(self.golden), state_dict_of(self.golden)
        self.build = partial(from_official, architecture, state_dict, **arguments_of(self.config))
        self.model = self.build()
        self.image = torch.from_numpy(self.golden["image"])
        self.text = torch.from_numpy(self.golden["text_embeddings"])


def official_layouts(shared_dir: Path, architecture: str) -> dict[str, Any]:
    path = shared_dir / "specs" / f"statedict_{FILES[architecture]}.json"
    return json.loads(path.read_text())


@pytest.fixture(scope="module", params=FILES)
def small(request, shared_dir):
    return Small(shared_dir, request.param)


def test_small_scores(small):
    golden, model, text = small.golden, small.model, small.text
    output = model(small.image, text)
    assert_close(output.mask_logits, golden["low_logits"])
    assert_close(output.patch_embeds, golden["patch_feat"])
    assert_close(output.cls_embed, golden["cls_feat"])
    if model.architecture == "clip_rc":
        assert_close(output.cell_embeds, golden["rlb_feat"])
    scores = model.predict(small.image, text)
    assert_close(model.upsample(output.mask_logits), golden["mask_logits_up"])
    assert_close(scores, golden["pred"])
    assert np.mean(scores.argmax(1).numpy() == golden["pred_argmax"]) >= MIN_AGREEMENT
    trained = small.build(self_trained=True).predict(small.image, text)
    assert_close(trained, golden["pred_self_training"])
    if "alt_image" in golden.files:  # another size
        image = torch.from_numpy(golden["alt_image"])
        low_logits = model(image, text).mask_logits
        assert_close(low_logits.flatten(2), golden["alt_low_attn"])
        assert_close(model.upsample(low_logits), golden["alt_mask_logits_up"])
        assert_close(model.predict(image, text), golden["alt_pred"])
    embeds = model.text_encoder(torch.from_numpy(golden["text_tokens"]))
    assert_close(embeds, golden["text_encoder_out"])
    if "text_encoder_out_normed" in golden.files:
        assert_close(average_templates(embeds[:, None]), golden["text_encoder_out_normed"])


def test_small_whole_image(small):
    golden, model, text = small.golden, small.model, small.text
    rgb, crop, stride = golden["raw_rgb"], small.config["crop"], small.config["stride"]
    image = prepare_image(rgb, short_side=crop, mean=model.image_mean, std=model.image_std)
    assert_close(image, golden["pipe_image"])
    averaged = slide_scores(
        lambda window: model.predict(window, text), image, crop_size=crop, stride=stride
    )
    assert_close(averaged, golden["slide_raw"])
    sizes = {"short_side": crop, "crop_size": crop, "stride": stride}
    rescaled = slide_predict(model, rgb, text, **sizes, softmax=False)
    assert_close(rescaled[None], golden["slide_rescaled"])
    probabilities = slide_predict(model, rgb, text, **sizes)
    assert_close(probabilities[None], golden["slide_softmax"])
    labels = probabilities.argmax(0).numpy()
    assert np.mean(labels == golden["slide_argmax"]) >= MIN_AGREEMENT


@pytest.mark.parametrize("computed", ["numpy", "openvino"])
def test_small_network(small, computed, tmp_path):
    graphs = None
    if computed == "openvino":
        written = export_graphs(small.model, tmp_path, precisions=("float32",))
        graphs = {name: tmp_path / files["float32"].file for name, files in written.items()}
    logits = run_parts(small.model, small.image, small.text.float(), graphs)
    assert_close(logits, small.golden["low_logits"])


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", FILES)
@pytest.mark.parametrize("dataset", ["voc", "coco"])
def test_real_scores_and_whole_images(shared_dir, architecture, dataset):
    """At the official size; the small vectors hold the arithmetic in every run."""
    golden = load(shared_dir, f"{FILES[architecture]}_real_{dataset}_public.npz")
    config = config_of(golden)
    shapes = official_layouts(shared_dir, architecture)[config["config"]]["shapes"]
    unused = ("text_encoder.", "decode_head.recovery_decoder.")
    shapes = {key: size for key, size in shapes.items() if not key.startswith(unused)}
    state_dict = tiny.rule_state_dict(shapes, config["salt"], config["gains"])
    model = from_official(architecture, state_dict, seen_classes=config["seen"])
    text = tiny.text_embeds(golden["low_logits"].shape[1], 512, config["salt"])
    image = tiny.image(1, 3, 512, 512, salt=config["salt"])
    outputs = []
    handle = model.register_forward_hook(lambda *call: outputs.append(call[2]))
    scores = model.predict(image, text)
    handle.remove()
    (output,) = outputs
    for logits in (output.mask_logits, run_parts(model, image, text)):
        assert np.abs(logits.numpy() - golden["low_logits"]).max() <= REAL_TOLERANCE
    assert_close(output.cls_embed, golden["cls_feat"])
    for name, value in (("rlb_feat", "cell_embeds"), ("patch_feat", "patch_embeds")):
        if name in golden.files:
            assert_close(getattr(output, value), golden[name])
    assert_close(scores[:, :, ::8, ::8], golden["pred_sub8"], REAL_TOLERANCE)
    assert np.mean(scores.argmax(1).numpy() == golden["pred_argmax"]) >= MIN_AGREEMENT
    if dataset == "coco":
        return
    rgb = golden["raw_rgb"]
    image = prepare_image(rgb, short_side=512, mean=model.image_mean, std=model.image_std)
    assert tuple(image.shape) == tuple(golden["pipe_shape"])
    assert_close(image[:, :, ::8, ::8], golden["pipe_sub8"])
    probabilities = slide_predict(model, rgb, text)
    assert_close(probabilities[None, :, ::5, ::5], golden["slide_softmax_sub5"], REAL_TOLERANCE)
    labels = probabilities.argmax(0).numpy()
    assert np.mean(labels == golden["slide_argmax"]) >= MIN_AGREEMENT


@pytest.mark.parametrize("architecture", FILES)
def test_every_official_layout_loads(shared_dir, architecture):
    layouts = official_layouts(shared_dir, architecture)
    assert len(layouts) == {"zegclip": 7, "clip_rc": 6}[architecture]
    for entry in layouts.values():
        with torch.device("meta"):
            state_dict = {key: torch.empty(size) for key, size in entry["shapes"].items()}
        model = from_official(architecture, state_dict)
        assert model.architecture == architecture
        assert model.config.image_size == 512
        if architecture == "clip_rc":
            assert model.config.image_encoder.num_cells == 16
        never_read = sum(
            int(np.prod(size))
            for key, size in entry["shapes"].items()
            if re.search(r"^decode_head\..*(self_attn|norm1)\.", key)
        )
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable == entry["params"]["trainable"] - never_read


@pytest.mark.nightly
def test_real_text_encoder_and_tokens(shared_dir):
    golden, tokens = (
        load(shared_dir, name) for name in ("zegclip_text_real_public.npz", "zs_tokens_public.npz")
    )
    shapes = next(iter(official_layouts(shared_dir, "zegclip").values()))["shapes"]
    prefix = "text_encoder."
    weights: dict[str, Tensor] = {
        key.removeprefix(prefix): tiny.rule_tensor(key, size, str(golden["salt"]))
        for key, size in shapes.items()
        if key.startswith(prefix)
    }
    encoder = build_text_encoder(ClipTensors(visual=Tower({}), text=Tower(weights)))
    voc = encoder(torch.from_numpy(tokens["voc_single"].astype(np.int64)))
    assert_close(voc, golden["voc_single_raw"])
    assert_close(average_templates(voc[:, None]), golden["voc_single_normed"])
    multi = encoder(torch.from_numpy(tokens["coco_multi"][7].astype(np.int64)))
    assert_close(average_templates(multi), golden["coco_class7_multi"])
