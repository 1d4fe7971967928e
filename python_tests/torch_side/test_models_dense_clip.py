"""Dense CLIP heads against a transcription of their formulas; TIPSv2's and CAT-Seg's vectors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support import golden_cat_seg as rule
from support import golden_tips, tiny
from support.errors import refused
from support.golden import assert_close, case_of, config_of, load
from support.golden_tips import model_of
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.errors import ArgumentError, CheckpointError, DTypeError, ShapeError
from zsseg_rt.export import export_bundle
from zsseg_rt.export.architectures.cat_seg import network_of
from zsseg_rt.models import create_model, from_official, slide_predict
from zsseg_rt.models.base import SlideSettings, slide_scores
from zsseg_rt.models.cat_seg.model import AggregatorConfig, CatSegConfig
from zsseg_rt.models.dense.dense_clip import Tips, TipsConfig, resized_rgb
from zsseg_rt.networks import cat_seg, heads
from zsseg_rt.networks.aggregating import RULES_OF_OUTLIERS
from zsseg_rt.onnx.arrays import Arrays
from zsseg_rt.torch_files.clip_arrays import CLIP_MEAN

pytestmark = pytest.mark.usefixtures("without_gradients")

HEADS = [name for name in heads.HEADS if name not in RULES_OF_OUTLIERS]  # one block, any depth

open_clip = pytest.importorskip("open_clip", reason="needs pip install '.[train]'")

WIDTH, HEADS_PER_BLOCK, LAYERS, PATCH, GRID, DIM = 48, 4, 3, 16, 4, 24
PATCHES_ONLY = {"clearclip", "naclip"}


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def clip(request):
    sizes = {"layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS_PER_BLOCK}
    sizes |= {"patch_size": PATCH, "image_size": GRID * PATCH, "output_tokens": True}
    words = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    quick = request.param == "quick_gelu"
    model = open_clip.model.CLIP(DIM, sizes, words, quick_gelu=quick).eval()
    state_dict = model.state_dict()
    visual = {key: value.shape for key, value in state_dict.items() if key.startswith("visual.")}
    gains = [("in_proj_weight", 2.0)]  # attention far from uniform
    model.load_state_dict({**state_dict, **tiny.rule_state_dict(visual, gains=gains)})
    model.activation = request.param
    return model


@pytest.fixture(scope="module")
def build(clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(clip.state_dict(), path)
    settings = {"pretrained": path, "activation": clip.activation}
    settings |= {"num_heads": HEADS_PER_BLOCK, "text_heads": 2}
    return lambda **config: create_model("dense_clip", **{**settings, **config})


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


@pytest.mark.parametrize("size_hw", [(64, 64), (48, 80), (112, 16)], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_head_is_its_formula(clip, build, head, size_hw):
    image, text = tiny.image(2, 3, *size_hw), tiny.text_embeds(5, DIM)
    model = build(head=head)
    output = model(image, text)
    expected = literal_embeds(clip.visual, image, head)
    grid_hw = size_hw[0] // PATCH, size_hw[1] // PATCH
    assert output.patch_embeds.shape == (2, DIM, *grid_hw)
    # float32, the same sums in another order through three blocks; worst seen below 2e-6
    patches = output.patch_embeds.flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches, expected, rtol=0, atol=1e-5)
    logits = model.config.logit_scale * torch.einsum("bnd,cd->bcn", expected, F.normalize(text))
    assert output.mask_logits.shape == (2, 5, *grid_hw)
    torch.testing.assert_close(output.mask_logits.flatten(2), logits, rtol=0, atol=1e-3)


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
)
def test_refusals(build, config, error, argument):
    with refused(error, argument):
        build(**config)


@pytest.mark.parametrize(
    ("clip_name", "tag", "mean"),
    [("ViT-B-16", "openai", CLIP_MEAN), ("ViT-L-14", "laion2b_s32b_b82k", (0.5, 0.5, 0.5))],
)
def test_normalisation_is_the_weights(monkeypatch, clip, clip_name, tag, mean):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: clip)
    model = create_model("dense_clip", pretrained=tag, clip=clip_name)
    assert model.image_mean == mean


# --- TIPSv2 in torch against the official code's vectors ---


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


def test_pictures_are_resized_as_officially(shared_dir):
    vectors = load(shared_dir, "tips_small_public.npz")
    for case in ("enlarge", "shrink"):
        resized = resized_rgb(vectors[f"preprocess/{case}/rgb"], 112)
        np.testing.assert_array_equal(resized, vectors[f"preprocess/{case}/out_uint8"])


@pytest.fixture
def towers():
    return {"vision": golden_tips.vision(), "text": golden_tips.text(vocab=7)}


def test_other_heads_and_floats_for_tokens_are_refused(towers):
    with refused(ArgumentError, "head"):
        TipsConfig(head="naclip")
    model = from_official("tips", towers, num_heads=4, text_heads=4)
    assert isinstance(model, Tips)
    with refused(DTypeError, "tokens"):
        model.text_encoder(torch.rand(2, 64))


@pytest.mark.parametrize(
    ("tower", "key", "value", "said"),
    [
        ("vision", "norm.bias", None, "norm.bias missing"),
        ("vision", "head.weight", np.ones(2, np.float32), "head.weight unknown"),
        ("vision", "cls_token", np.ones((1, 1, 32), np.float32), "[1, 1, 32]"),
        ("vision", "norm.bias", np.full(64, np.nan, np.float32), "NaN"),
        ("vision", "norm.bias", np.zeros(64), "float64"),
        ("vision", "pos_embed", np.ones((1, 60, 64), np.float32), "60"),
        ("vision", "blocks.0.mlp.w12.weight", np.ones((2, 2)), "SwiGLU"),
        ("text", "ln_final.bias", None, "ln_final.bias missing"),
        ("text", "temperature", np.float32(0), "temperature"),
        ("text", "temperature", np.float32("nan"), "temperature"),
    ],
)
def test_other_weights_of_tips_are_refused(towers, tower, key, value, said):
    towers[tower].pop(key, None)
    if value is not None:
        towers[tower][key] = value
    others = ({"text": {}}, "'vision'"), ({"vision": {}, "words": {}}, "words")
    for weights, named in ((towers, said), *others, ({"vision": {}}, "patch_embed.proj.weight")):
        with pytest.raises(CheckpointError) as caught:
            from_official("tips", weights)
        assert named in str(caught.value)


def test_damaged_files_and_those_that_grow_too_much_are_refused(tmp_path):
    path = tmp_path / "vision.npz"
    for content in (b"", b"PK\x03\x04 not a zip", b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"vision\.npz: expected a TIPSv2"):
            create_model("tips", vision=path)
    np.savez_compressed(path, cls_token=np.zeros(1 << 22, np.float32))
    with pytest.raises(CheckpointError, match=r"16777\d+ bytes in a file of \d+"):
        create_model("tips", vision=path)


def test_files_and_tensors_make_the_same_model(towers, tmp_path):
    towers["text"]["temperature"] = np.float32(0.05)
    for name, tensors in towers.items():
        np.savez(tmp_path / f"{name}.npz", **tensors)
    files = {name: tmp_path / f"{name}.npz" for name in towers}
    heads = {"num_heads": 4, "text_heads": 4, "logit_scale": None}
    read = create_model("tips", **files, **heads)
    assert read.logit_scale == pytest.approx(20)
    assert read.size_hw == (112, 112)
    tensors = {n: {k: torch.as_tensor(v) for k, v in t.items()} for n, t in towers.items()}
    model = from_official("tips", tensors, **heads)
    assert tiny.same(read.state_dict(), model.state_dict())


# --- CAT-Seg: what it takes, refuses and leaves alone, and the official code's outputs ---


def inputs(count):
    torch.manual_seed(0)
    return torch.randn(2, 3, 96, 96), tiny.text_embeds(count, 32)


@torch.enable_grad()
def test_only_q_and_v_of_clip_are_tuned():
    model = rule.tiny_model()
    model(*inputs(3)).mask_logits.sum().backward()
    tuned = {
        name for name, p in model.named_parameters() if p.requires_grad and "_encoder." in name
    }
    assert len(tuned) == 2 * (rule.TINY["v_layers"] + rule.TINY["t_layers"])
    assert all(name.endswith(("q_proj_weight", "v_proj_weight")) for name in tuned)
    unused = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert all(name.startswith("text_encoder.") or ".3.attn.q" in name for name in unused)


def test_keys_that_follow_from_others_may_be_missing_or_present():
    mask, weights = torch.from_numpy(cat_seg.shift_mask(6, 3, 1)), rule.tiny_weights()
    masks = {rule.HEAD + f"layers.{n}.swin_block.block_2.attn_mask": mask for n in (0, 1)}
    bare = {key: value for key, value in weights.items() if "logit_scale" not in key}
    no_text = {k: v for k, v in bare.items() if "visual" in k or rule.CLIP not in k}
    first, second, third = (
        from_official("cat_seg", content, **rule.TINY_SETTINGS)
        for content in (weights | masks, bare, no_text)
    )
    image, text = inputs(3)
    assert torch.equal(first(image, text).mask_logits, second(image, text).mask_logits)
    assert third.text_encoder is None


SIZES = [("embed_dim", 0), ("num_heads", 3), ("hidden", 66), ("decoder", (24, 32)),
         ("decoder_guidance", (128, 16)), ("padding", -1)]  # fmt: skip


def test_settings_inputs_and_sizes_that_do_not_fit_cat_seg_are_refused():
    for argument, value in (("window", 4), ("taps", (2, 1)), ("taps", (1, 3)), ("most_classes", 0)):
        with refused(ArgumentError, argument):
            rule.tiny_model(**{argument: value})
    for argument, value in SIZES:
        with refused(ArgumentError, "hidden" if value == 3 else argument):
            AggregatorConfig(**{argument: value})
    with refused(ShapeError, "image_size"):
        rule.tiny_model(view=100)
    model, text = rule.tiny_model(), tiny.text_embeds(3, 32)
    assert model.windows == SlideSettings(short_side=160, crop_size=96, stride=64)
    for error, argument, image, windows in (
        (DTypeError, "rgb", np.zeros((9, 9, 3), np.float32), {}),
        (ArgumentError, "windows", np.zeros((9, 9, 3), np.uint8), {"stride": 10}),
    ):
        with refused(error, argument):
            slide_predict(model, image, text, **windows)


def test_cat_seg_takes_the_484_tensors_of_the_released_configuration(shared_dir):
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


ENCODER = "catseg_small_enc_public.npz"
STAGE = 2e-5  # relative to max(1, |x|max); worst seen 8e-7
LOGITS, SCORES = 1e-4, 1e-5


def assert_labels(scores, labels):
    """Equal wherever the two best scores are apart."""
    top = scores.topk(min(2, len(scores)), dim=0).values
    clear = (top[0] - top[-1] > SCORES) | (len(scores) == 1)
    assert clear.any()
    assert (scores.argmax(0).numpy() == labels)[clear.numpy()].all()


def differ(actual, expected):
    return np.abs(np.asarray(actual) - expected).max()


@pytest.fixture(scope="module")
def small(shared_dir):
    """CAT-Seg's model of the small vectors, which give it an image, and their settings."""
    vectors = load(shared_dir, ENCODER)
    return rule.build(shared_dir, ENCODER), vectors, config_of(vectors)


def test_cat_seg_encoder_and_text(small):
    model, vectors, config = small
    image = rule.normalised(rule.image_u8(2, 96, 96, 3), config)
    assert_close(image, vectors["image"], STAGE)
    text = torch.from_numpy(vectors["text_norm"])
    output = model(image, text)
    assert differ(output.mask_logits, vectors["logits_names"]) <= LOGITS
    dense = torch.from_numpy(vectors["clip_dense"])[:, 1:].transpose(1, 2).unflatten(2, (6, 6))
    assert_close(output.patch_embeds, dense.numpy(), STAGE)
    embeds = model.text_encoder(torch.from_numpy(vectors["tokens"]))
    assert_close(embeds, vectors["text_raw"], STAGE)


COUNTS = [1, 5, 20, 150, 255, 256, 257, 300]


@pytest.mark.parametrize("count", COUNTS)
def test_cat_seg_head_by_torch_and_numpy(shared_dir, small, count):
    model, encoder, config = small
    vectors = load(shared_dir, f"catseg_small_c{count}_public.npz")
    text, image = rule.text_bank(count, config), encoder["image"][:1]
    np.testing.assert_allclose(text.numpy(), vectors["text"], atol=1e-7)
    logits = model(torch.from_numpy(image), text).mask_logits[0]
    assert differ(logits, vectors["logits"]) <= LOGITS
    if count > 256:
        shown = np.flatnonzero((logits.flatten(1).amax(1) > -100).numpy())
        np.testing.assert_array_equal(shown, np.sort(vectors["kept"]))
    if count <= 20:
        network, ops, text = network_of(model), Arrays(), text.numpy()
        feeds = cat_seg.encode_view(ops, network, image) | {"text_embeds": text}
        feeds["class_halves"] = cat_seg.class_halves(network, text)
        feeds["padding"] = np.array([256 - count], np.float32)
        by_numpy = cat_seg.head(ops, network, feeds)["mask_logits"][0]
        assert differ(by_numpy, vectors["logits"]) <= LOGITS


@pytest.mark.nightly
def test_cat_seg_logits_of_the_engine(shared_dir, small, tmp_path):
    """It shows the head the 256 best, in parts; test_export_cat_seg compares it in every run."""
    model, encoder, settings = small
    path, options = tmp_path / "small.zsseg", {"precisions": ("float32",), "text_encoder": None}
    config = EngineConfig(device="cpu", precision="float32", with_class_scores="low")
    with Engine(export_bundle(model, path, **options), config) as engine:
        for count in COUNTS:
            text = rule.text_bank(count, settings).numpy()
            engine.set_classes([f"c{i}" for i in range(count)], embeddings=text)
            scores = engine.segment(encoder["image_u8"][0]).class_scores.astype(np.float64)
            with np.errstate(divide="ignore"):
                logits = np.maximum(np.log(scores) - np.log1p(-scores), -100)
            expected = load(shared_dir, f"catseg_small_c{count}_public.npz")["logits"]
            assert differ(logits, expected) <= LOGITS  # worst seen 2e-5


@pytest.mark.parametrize("count", [5, 20, pytest.param(300, marks=pytest.mark.nightly)])
def test_cat_seg_views_of_a_whole_picture(shared_dir, small, count):
    model, _, config = small
    vectors = load(shared_dir, "catseg_small_slide_public.npz")
    scores = slide_predict(model, vectors["picture"], rule.text_bank(count, config))
    step = 1 if count == 5 else 2
    maps = scores[vectors[f"classes_c{count}"], ::step, ::step]
    assert differ(maps, vectors[f"sem_seg_c{count}"]) <= SCORES
    assert_labels(scores, vectors[f"argmax_c{count}"])


@pytest.mark.nightly
@pytest.mark.parametrize("count", [20, 150])
def test_cat_seg_at_real_size(shared_dir, count):
    model = rule.build(shared_dir, "catseg_real_c20_public.npz")
    vectors = load(shared_dir, f"catseg_real_c{count}_public.npz")
    config = config_of(vectors)
    text = rule.text_bank(count, config)
    sums = [text.double().sum(), text.double().abs().sum()]
    np.testing.assert_allclose(sums, vectors["text_sum"])
    image = rule.normalised(rule.image_u8(1, 384, 384, 3), config)
    logits = model(image, text).mask_logits[0]
    assert differ(logits[:, ::4, ::4], vectors["logits_sub4"]) <= LOGITS
    assert differ(logits[vectors["stage_classes"][:2]], vectors["logits_stage"]) <= LOGITS
    if count == 20:
        slides = load(shared_dir, "catseg_real_slide_public.npz")
        scores = slide_predict(model, slides["picture"], text)
        assert differ(scores[:, ::8, ::8], slides["sem_seg_sub8"]) <= SCORES
        assert_labels(scores, slides["argmax"])
