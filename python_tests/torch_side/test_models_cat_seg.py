"""CAT-Seg: what it takes, refuses and leaves alone, and the official code's outputs."""

import json

import numpy as np
import pytest
import torch

from support import golden_cat_seg as rule
from support.errors import refused
from support.golden import assert_close, config_of, load
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.errors import ArgumentError, CheckpointError, DTypeError, ShapeError
from zsseg_rt.export import export_bundle
from zsseg_rt.export.architectures.cat_seg import network_of
from zsseg_rt.models import from_official, slide_predict
from zsseg_rt.models.base import SlideSettings
from zsseg_rt.models.cat_seg.model import AggregatorConfig, CatSegConfig
from zsseg_rt.networks.cat_seg import class_halves, encode_view, head, shift_mask
from zsseg_rt.onnx.arrays import Arrays

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(scope="module")
def weights():
    return rule.tiny_weights()


def build(weights, **settings):
    return from_official("cat_seg", weights, **(rule.TINY_SETTINGS | settings))


def inputs(count, seed=0):
    torch.manual_seed(seed)
    return torch.randn(2, 3, 96, 96), torch.nn.functional.normalize(torch.randn(count, 32), dim=1)


@torch.enable_grad()
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
    logits = build(weights | masks)(image, text).mask_logits
    assert torch.equal(logits, build(bare)(image, text).mask_logits)
    no_text = {k: v for k, v in bare.items() if "visual" in k or rule.CLIP not in k}
    assert build(no_text).text_encoder is None


SIZES = [("embed_dim", 0), ("num_heads", 3), ("hidden", 66), ("decoder", (24, 32)),
         ("decoder_guidance", (128, 16)), ("padding", -1)]  # fmt: skip


def test_bad_settings_and_odd_sizes_of_the_head_are_refused(weights):
    for argument, value in (("window", 4), ("taps", (2, 1)), ("taps", (1, 3)), ("most_classes", 0)):
        with refused(ArgumentError, argument):
            build(weights, **{argument: value})
    for argument, value in SIZES:
        with refused(ArgumentError, "hidden" if value == 3 else argument):
            AggregatorConfig(**{argument: value})


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


# --- against the official code's outputs: torch, NumPy, and the engine on OpenVINO ---


STAGE = 2e-5  # relative to max(1, |x|max); worst seen 8e-7
LOGITS, SCORES = 1e-4, 1e-5


@pytest.fixture(scope="module")
def small(shared_dir):
    vectors = load(shared_dir, "catseg_small_enc_public.npz")
    return rule.build(shared_dir), vectors, config_of(vectors)


def assert_labels(scores, labels):
    """Equal wherever the two best scores are apart."""
    top = scores.topk(min(2, len(scores)), dim=0).values
    clear = (top[0] - top[-1] > SCORES) | (len(scores) == 1)
    assert clear.any()
    assert (scores.argmax(0).numpy() == labels)[clear.numpy()].all()


def test_small_encoder_and_text(small):
    model, vectors, config = small
    image = rule.normalised(rule.image_u8((2, 96, 96, 3)), config)
    assert_close(image, vectors["image"], STAGE)
    text = torch.from_numpy(vectors["text_norm"])
    output = model(image, text)
    assert np.abs(output.mask_logits.numpy() - vectors["logits_names"]).max() <= LOGITS
    dense = torch.from_numpy(vectors["clip_dense"])[:, 1:].transpose(1, 2).unflatten(2, (6, 6))
    assert_close(output.patch_embeds, dense.numpy(), STAGE)
    embeds = model.text_encoder(torch.from_numpy(vectors["tokens"]))
    assert_close(embeds, vectors["text_raw"], STAGE)


COUNTS = [1, 5, 20, 150, 255, 256, 257, 300]


@pytest.mark.parametrize("count", COUNTS)
def test_small_head(shared_dir, small, count):
    model, encoder, config = small
    vectors = load(shared_dir, f"catseg_small_c{count}_public.npz")
    text = rule.text_bank(count, config)
    np.testing.assert_allclose(text.numpy(), vectors["text"], atol=1e-7)
    image = torch.from_numpy(encoder["image"][:1])
    logits = model(image, text).mask_logits[0]
    assert np.abs(logits.numpy() - vectors["logits"]).max() <= LOGITS
    if count > 256:
        kept = np.flatnonzero((logits.flatten(1).amax(1) > -100).numpy())
        np.testing.assert_array_equal(kept, np.sort(vectors["kept"]))


@pytest.fixture(scope="module")
def engine(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "small.zsseg"
    export_bundle(small[0], path, precisions=("float32",), text_encoder=None)
    config = EngineConfig(device="cpu", precision="float32", with_class_scores="low")
    with Engine(path, config) as engine:
        yield engine


def engine_logits(engine, small, text):
    engine.set_classes([f"c{i}" for i in range(len(text))], embeddings=text)
    scores = engine.segment(small[1]["image_u8"][0]).class_scores.astype(np.float64)
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(scores) - np.log1p(-scores), -100)


@pytest.fixture(scope="module")
def network(small):
    network = network_of(small[0])
    return network, encode_view(Arrays(), network, small[1]["image"][:1])


def numpy_logits(network, text):
    network, encoded = network
    vocabulary = {"text_embeds": text, "class_halves": class_halves(network, text)}
    missing = np.array([max(0, 256 - len(text))], np.float32)
    return head(Arrays(), network, encoded | vocabulary | {"padding": missing})["mask_logits"][0]


@pytest.mark.parametrize("count", [1, 5, 20])
def test_small_logits_by_numpy(shared_dir, small, network, count):
    text = rule.text_bank(count, small[2]).numpy()
    expected = load(shared_dir, f"catseg_small_c{count}_public.npz")["logits"]
    assert np.abs(numpy_logits(network, text) - expected).max() <= LOGITS


@pytest.mark.nightly
@pytest.mark.parametrize("count", COUNTS)
def test_small_logits_of_the_engine(shared_dir, small, engine, count):
    """It shows the head the 256 best, in parts; test_export_cat_seg compares it in every run."""
    text = rule.text_bank(count, small[2]).numpy()
    expected = load(shared_dir, f"catseg_small_c{count}_public.npz")["logits"]
    logits = engine_logits(engine, small, text)
    assert np.abs(logits - expected).max() <= LOGITS  # worst seen 2e-5


@pytest.mark.parametrize("count", [5, 20, pytest.param(300, marks=pytest.mark.nightly)])
def test_small_views_of_a_whole_picture(shared_dir, small, count):
    model, _, config = small
    vectors = load(shared_dir, "catseg_small_slide_public.npz")
    scores = slide_predict(model, vectors["picture"], rule.text_bank(count, config))
    step = 1 if count == 5 else 2
    maps = scores[vectors[f"classes_c{count}"], ::step, ::step].numpy()
    assert np.abs(maps - vectors[f"sem_seg_c{count}"]).max() <= SCORES
    assert_labels(scores, vectors[f"argmax_c{count}"])


@pytest.mark.nightly
@pytest.mark.parametrize("count", [20, 150])
def test_real_sizes(shared_dir, count):
    name = f"catseg_real_c{count}_public.npz"
    model, vectors = rule.build(shared_dir, "catseg_real_c20_public.npz"), load(shared_dir, name)
    config = config_of(vectors)
    text = rule.text_bank(count, config)
    np.testing.assert_allclose(
        [text.double().sum(), text.double().abs().sum()], vectors["text_sum"]
    )
    image = rule.normalised(rule.image_u8((384, 384, 3))[None], config)
    logits = model(image, text).mask_logits[0]
    assert np.abs(logits[:, ::4, ::4].numpy() - vectors["logits_sub4"]).max() <= LOGITS
    stage = logits[vectors["stage_classes"][:2]]
    assert np.abs(stage.numpy() - vectors["logits_stage"]).max() <= LOGITS
    if count == 20:
        slides = load(shared_dir, "catseg_real_slide_public.npz")
        scores = slide_predict(model, slides["picture"], text)
        assert np.abs(scores[:, ::8, ::8].numpy() - slides["sem_seg_sub8"]).max() <= SCORES
        assert_labels(scores, slides["argmax"])
