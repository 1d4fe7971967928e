"""Every system: what ``from_official`` takes and refuses, the registry, and laws of all models."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from support import golden_cat_seg, golden_tips, tiny, tiny_zegformer, tiny_zeroseg
from support.errors import refused
from support.tiny_zeroseg import zeroseg_model
from zsseg_rt.errors import ArgumentError, CheckpointError, DTypeError, ShapeError
from zsseg_rt.export.exporters import EXPORTERS
from zsseg_rt.models import normalize_state_dict
from zsseg_rt.models.registry import ARCHITECTURES, create_model, from_official
from zsseg_rt.training.tasks import TASKS
from zsseg_rt.training.trained import TorchSegmenter

pytestmark = pytest.mark.usefixtures("without_gradients")

VISUAL = golden_cat_seg.CLIP + "visual."
PREDICTOR = "sem_seg_head.predictor."
FIRST = "backbone.transformer.resblocks.0."


class System(NamedTuple):
    """A tiny official ``state_dict``, what shapes do not tell, and how it may be damaged."""

    weights: Callable[[], dict[str, torch.Tensor]]
    settings: dict[str, Any]
    shapes: tuple[tuple[str, tuple[int, ...], str], ...]
    heads: tuple[str, ...]


SYSTEMS = {
    "zegclip": System(
        tiny.zegclip_state_dict,
        tiny.zegclip_config(),
        (
            (FIRST + "ln_1.weight", (65,), r"ln_1\.weight \[65\] instead of \[64\]"),
            ("backbone.conv1.weight", (64, 3, 16), "of 4 axes"),
            ("backbone.positional_embedding", (18, 64), "square grid, got 18 rows"),
            ("decode_head.decoder_1.layers.1.norm3.bias", (31,), r"\[31\] instead of \[32\]"),
            ("backbone.region_level_bridge", (4, 64), r"got backbone\.region_level_bridge unknown"),
        ),
        ("num_heads", "decoder_heads", "text_heads"),
    ),
    "clip_rc": System(
        tiny.clip_rc_state_dict,
        tiny.zegclip_config(),
        (
            ("backbone.region_level_bridge", (5, 64), "square grid, got 5 rows"),
            ("backbone.region_level_bridge", (0, 64), "square grid, got 0 rows"),
            ("backbone.region_level_bridge", (4, 63), r"\[4, 63\] instead of \[4, 64\]"),
            ("decode_head.lateral_proj.weight", (32, 64), r"\[32, 64\] instead of \[32, 96\]"),
            ("decode_head.decoder_1.layers.0.norm3.bias", (32,), r"norm3\.bias unknown"),
        ),
        ("num_heads", "decoder_heads", "text_heads"),
    ),
    "zegformer": System(
        tiny_zegformer.state_dict,
        {"num_heads": 4},
        (
            ("backbone.res2.0.conv2.weight", (8, 8, 1, 1), r"1, 1\] instead of \[8, 8, 3, 3\]"),
            ("backbone.stem.conv1.weight", (8, 3, 7), "of 4 axes"),
            (VISUAL + "positional_embedding", (18, 64), "square grid, got 18 rows"),
            ("backbone.fc.weight", (2, 2), r"backbone\.fc\.weight"),
        ),
        ("num_heads", "clip_heads", "text_heads"),
    ),
    "cat_seg": System(
        golden_cat_seg.tiny_weights,
        golden_cat_seg.TINY_SETTINGS,
        (
            ("backbone.stem.conv1.weight", (1, 1), "earlier generation"),
            (VISUAL + "conv1.weight", (64, 3, 14, 14), "CAT-Seg B"),
            (golden_cat_seg.HEAD + "layers.0.swin_block.block_2.attn_mask", (4, 16, 16), "window"),
            (PREDICTOR + "extra", (1,), "extra unknown"),
        ),
        ("num_heads", "clip_heads", "text_heads"),
    ),
}


def build(name, weights, **settings):
    return from_official(name, weights, **(SYSTEMS[name].settings | settings))


every_system = pytest.mark.parametrize("name", SYSTEMS)


@every_system
def test_weights_load_again_and_are_copies(name):
    weights = {key: value.clone() for key, value in SYSTEMS[name].weights().items()}
    model = build(name, weights)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for value in weights.values():
        value.zero_()
    assert tiny.same(model.state_dict(), before)
    if name != "cat_seg":  # which names its parts otherwise
        assert tiny.same(build(name, before).state_dict(), before)


OPTIONAL = re.compile(
    r"decode_head\.(.*\.(self_attn|norm1)\..*|loss_decode.*)|criterion.*|.*clip_model\.logit_scale"
)


@every_system
def test_a_missing_key_is_named(name):
    weights = SYSTEMS[name].weights()
    needed = [key for key in weights if not OPTIONAL.fullmatch(key)]
    assert len(needed) > 50
    for key in needed[::7]:
        with pytest.raises(CheckpointError, match=re.escape(key)):
            build(name, {k: v for k, v in weights.items() if k != key})


@pytest.mark.parametrize(
    ("name", "key", "shape", "message"),
    [(name, *row) for name, system in SYSTEMS.items() for row in system.shapes],
)
def test_wrong_shapes_and_unknown_keys_are_named(name, key, shape, message):
    with pytest.raises(CheckpointError, match=message):
        build(name, SYSTEMS[name].weights() | {key: torch.zeros(shape)})


@every_system
@pytest.mark.parametrize("weights", [{}, {"fc.weight": torch.zeros(3, 3)}])
def test_other_weights_are_refused(name, weights):
    with refused(CheckpointError, "state_dict"):
        build(name, weights)
    other = "zegclip" if name == "clip_rc" else "clip_rc"
    with pytest.raises(CheckpointError):
        build(name, SYSTEMS[other].weights())


@pytest.mark.parametrize("heads", [5, 0, -1])
@pytest.mark.parametrize(
    ("name", "setting"), [(name, one) for name, system in SYSTEMS.items() for one in system.heads]
)
def test_heads_must_divide_the_width(name, setting, heads):
    with pytest.raises(CheckpointError, match="_heads: expected a divisor"):
        build(name, SYSTEMS[name].weights(), **{setting: heads})


@every_system
def test_wrapped_and_half_precision_weights_need_normalizing(name):
    weights = SYSTEMS[name].weights()
    wrapped = {f"module.{key}": value.half() for key, value in weights.items()}
    with refused(CheckpointError, "state_dict", "'module.'"):
        build(name, {f"module.{key}": value for key, value in weights.items()})
    with refused(CheckpointError, "state_dict", "float16", "normalize_state_dict"):
        build(name, {key: value.half() for key, value in weights.items()})
    plain = normalize_state_dict(wrapped)
    assert tiny.same(plain, {key: value.half().float() for key, value in weights.items()})
    build(name, plain)


@every_system
def test_whole_checkpoints_and_arrays_are_named(name):
    weights = SYSTEMS[name].weights()
    with refused(CheckpointError, "state_dict", "load_checkpoint"):
        build(name, {"meta": {}, "state_dict": weights})
    arrays = {key: value.numpy() for key, value in weights.items()}
    with refused(CheckpointError, "state_dict"):
        build(name, arrays)


# --- one registry, and models that answer for themselves ---


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(tiny.clip_state_dict(tiny.TinySizes(num_layers=2, text_layers=1)), path)
    clip = {"pretrained": path, "activation": "quick_gelu", "num_heads": 4, "text_heads": 4}
    built = {
        "cat_seg": golden_cat_seg.tiny_model(),
        "clip_rc": tiny.clip_rc_model(),
        "cosine_head": create_model("cosine_head", image_size=64, **clip),
        "dense_clip": create_model("dense_clip", image_size=64, **clip),
        "tips": from_official("tips", {"vision": golden_tips.vision(width=32)}, num_heads=4),
        "zegclip": tiny.zegclip_model(),
        "zegformer": tiny_zegformer.model(),
        "zeroseg": tiny_zeroseg.zeroseg_model(),
    }
    assert built.keys() == ARCHITECTURES.keys()
    return built


@pytest.mark.parametrize("protocol", ["whole", "slide"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_is_segmented_with(models, name, protocol):
    model = models[name]
    if protocol == "slide" and model.windows is None:
        pytest.skip("takes whole pictures only")
    width = 48 if name == "zegformer" else 32
    rows = {"text_embeds": tiny.text_embeds(3, width)}
    if model.region_templates:
        rows["region_embeds"] = tiny.text_embeds(3, width, "regions")
    config = model.config
    segmenter = TorchSegmenter(model, ["a, b", "c"], **rows, seen_names=["b"], protocol=protocol)
    labels = segmenter.segment(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))
    assert labels.shape == (64, 80)
    assert set(np.unique(labels)) <= {0, 1, 255}
    assert segmenter.describe()["architecture"] == name
    assert model.config is config  # the caller's model is untouched


def test_windows_are_refused_where_a_model_takes_whole_images(models):
    model = models["zegformer"]
    with refused(ArgumentError, "windows"):
        model.slide(np.zeros((8, 8, 3), np.uint8), tiny.text_embeds(3, 48), None)


def test_every_architecture_is_exported_and_all_but_training_free_ones_have_a_task():
    assert EXPORTERS.keys() == ARCHITECTURES.keys() == {*TASKS, "dense_clip", "tips"}
    assert not {"dense_clip", "tips"} & TASKS.keys()


def test_unknown_architectures_and_settings_are_named():
    with refused(CheckpointError, "architecture", *ARCHITECTURES):
        create_model("x")
    published = ", ".join(name for name, one in ARCHITECTURES.items() if one.from_official)
    with pytest.raises(CheckpointError, match=f"expected one of {published}, got 'zeroseg'"):
        from_official("zeroseg", {})
    with refused(ArgumentError, "pretrained"):
        create_model("zegclip", pretrained=None)
    for architecture in ("zegclip", "zegformer"):
        with refused(ArgumentError, "image_sise", "'image_size'"):
            create_model(architecture, image_sise=512)


# --- laws that every system keeps at every image and vocabulary ---


class Tiny(NamedTuple):
    """A tiny model, an image's size, and rows of images that it alone refuses."""

    build: Callable[[], Any]
    size_hw: tuple[int, int]
    refuses: tuple[tuple[int, int], ...]


def dense_clip(num_layers: int = 4, **settings: Any) -> Any:
    weights = tiny.clip_state_dict(tiny.TinySizes(num_layers=num_layers))
    heads = {"num_heads": 4, "text_heads": 4, "activation": "quick_gelu"}
    return from_official("dense_clip", weights, **heads, **settings)


def tips() -> Any:
    return from_official("tips", {"vision": golden_tips.vision(width=32)}, num_heads=4)


TINY = {
    "zegclip": Tiny(lambda: tiny.zegclip_model(seen_classes=()), (64, 80), ((64, 15),)),
    "clip_rc": Tiny(lambda: tiny.clip_rc_model(seen_classes=()), (64, 80), ((8, 64),)),
    "cat_seg": Tiny(golden_cat_seg.tiny_model, (96, 96), ((96, 80),)),
    "tips": Tiny(tips, (84, 126), ((100, 112), (112, 513), (7, 14))),
    "zeroseg": Tiny(zeroseg_model, (64, 80), ((8, 64),)),
    "naclip": Tiny(lambda: dense_clip(head="naclip"), (64, 80), ((64, 8),)),
    "sfp l2": Tiny(lambda: dense_clip(12, head="sfp", pm="l2"), (96, 128), ((48, 48),)),
    "sfp lof": Tiny(lambda: dense_clip(12, head="sfp", pm="lof"), (96, 128), ((80, 96),)),
    "sc_clip": Tiny(lambda: dense_clip(12, head="sc_clip"), (96, 128), ((16, 16),)),
}
TEXT = tiny.text_embeds(7, 32)
every_tiny = pytest.mark.parametrize("name", TINY)


@pytest.fixture(scope="module")
def tiny_models():
    return {name: system.build() for name, system in TINY.items()}


@every_tiny
def test_images_of_a_batch_do_not_see_each_other(tiny_models, name):
    model, images = tiny_models[name], tiny.image(3, 3, *TINY[name].size_hw)
    together = model.predict(images, TEXT)
    assert together.shape == (3, 7, *images.shape[2:])
    alone = torch.cat([model.predict(image[None], TEXT) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@every_tiny
def test_the_order_of_classes_changes_nothing(tiny_models, name):
    model, image = tiny_models[name], tiny.image(1, 3, *TINY[name].size_hw)
    order = torch.tensor([4, 1, 6, 0, 5, 2, 3])
    scores = model.predict(image, TEXT)
    assert scores.std() > 1e-3  # lively enough for the comparison to mean something
    permuted = model.predict(image, TEXT[order])
    torch.testing.assert_close(permuted, scores[:, order], rtol=1e-4, atol=1e-4)


@every_tiny
@pytest.mark.parametrize("shape", [(7, 31), (0, 32), (32,), (1, 7, 32)])
def test_wrong_text_embeddings_are_refused(tiny_models, name, shape):
    with refused(ShapeError, "text_embeds"):
        tiny_models[name].predict(tiny.image(1, 3, *TINY[name].size_hw), torch.zeros(shape))


@every_tiny
def test_wrong_images_are_refused(tiny_models, name):
    height, width = TINY[name].size_hw
    model = tiny_models[name]
    shapes = [(3, height, width), (1, 4, height, width), (1, height, width, 3)]
    for shape in shapes + [(1, 3, *size_hw) for size_hw in TINY[name].refuses]:
        with refused(ShapeError, "image"):
            model.predict(torch.zeros(shape), TEXT)


@every_tiny
def test_arrays_of_another_dtype_are_refused(tiny_models, name):
    model, image = tiny_models[name], tiny.image(1, 3, *TINY[name].size_hw)
    with refused(DTypeError, "image"):
        model.predict(image.to(torch.uint8), TEXT)
    if name == "zeroseg":  # which leaves the rest to torch
        return
    for wrong in (image.half(), image.double(), image.numpy()):
        with refused(DTypeError, "image"):
            model.predict(wrong, TEXT)
    for text in (TEXT.numpy(), torch.ones(7, 32, dtype=torch.int64)):
        with refused(DTypeError, "text_embeds"):
            model.predict(image, text)


def test_nan_in_an_image_of_tips_is_refused(tiny_models):
    image = torch.rand(1, 3, 112, 112)
    image[0, 0, 3, 4] = float("nan")
    with refused(ArgumentError, "image", "NaN"):
        tiny_models["tips"](image, TEXT)


@pytest.mark.parametrize("head", ["maskclip", "sclip", "clearclip", "naclip"])
def test_an_image_tower_alone_gives_cosines(head):
    tower = {
        key.removeprefix("visual."): value
        for key, value in tiny.clip_state_dict().items()
        if key.startswith("visual.")
    }
    model = from_official("dense_clip", tower, head=head, num_heads=4)
    logits = model(tiny.image(1, 3, 96, 64), TEXT).mask_logits
    assert logits.shape == (1, 7, 6, 4)
    assert logits.abs().max() <= 1 + 1e-5
    assert dense_clip(head=head, logit_scale=40.0).logit_scale == 40.0
    del tower["ln_post.bias"]
    with refused(CheckpointError, "state_dict", "ln_post.bias"):
        from_official("dense_clip", tower, head=head, num_heads=4)


def test_a_trunk_with_too_few_blocks_is_refused():
    with refused(ArgumentError, "pre"):
        dense_clip(6, head="sfp")
