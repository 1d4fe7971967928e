"""Laws that every system keeps at every image and vocabulary, and what all refuse to take."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from support import golden_cat_seg, golden_tips, tiny
from support.errors import refused
from support.tiny_zeroseg import zeroseg_model
from zsseg_rt.errors import ArgumentError, CheckpointError, DTypeError, ShapeError
from zsseg_rt.models import from_official

pytestmark = pytest.mark.usefixtures("without_gradients")


class System(NamedTuple):
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


SYSTEMS = {
    "zegclip": System(lambda: tiny.zegclip_model(seen_classes=()), (64, 80), ((64, 15),)),
    "clip_rc": System(lambda: tiny.clip_rc_model(seen_classes=()), (64, 80), ((8, 64),)),
    "cat_seg": System(golden_cat_seg.tiny_model, (96, 96), ((96, 80),)),
    "tips": System(tips, (84, 126), ((100, 112), (112, 513), (7, 14))),
    "zeroseg": System(zeroseg_model, (64, 80), ((8, 64),)),
    "naclip": System(lambda: dense_clip(head="naclip"), (64, 80), ((64, 8),)),
    "sfp l2": System(lambda: dense_clip(12, head="sfp", pm="l2"), (96, 128), ((48, 48),)),
    "sfp lof": System(lambda: dense_clip(12, head="sfp", pm="lof"), (96, 128), ((80, 96),)),
    "sc_clip": System(lambda: dense_clip(12, head="sc_clip"), (96, 128), ((16, 16),)),
}
TEXT = tiny.text_embeds(7, 32)
every_system = pytest.mark.parametrize("name", SYSTEMS)


@pytest.fixture(scope="module")
def models():
    return {name: system.build() for name, system in SYSTEMS.items()}


@every_system
def test_images_of_a_batch_do_not_see_each_other(models, name):
    model, images = models[name], tiny.image(3, 3, *SYSTEMS[name].size_hw)
    together = model.predict(images, TEXT)
    assert together.shape == (3, 7, *images.shape[2:])
    alone = torch.cat([model.predict(image[None], TEXT) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@every_system
def test_the_order_of_classes_changes_nothing(models, name):
    model, image = models[name], tiny.image(1, 3, *SYSTEMS[name].size_hw)
    order = torch.tensor([4, 1, 6, 0, 5, 2, 3])
    scores = model.predict(image, TEXT)
    assert scores.std() > 1e-3  # lively enough for the comparison to mean something
    found = model.predict(image, TEXT[order])
    torch.testing.assert_close(found, scores[:, order], rtol=1e-4, atol=1e-4)


@every_system
@pytest.mark.parametrize("shape", [(7, 31), (0, 32), (32,), (1, 7, 32)])
def test_wrong_text_embeddings_are_refused(models, name, shape):
    with refused(ShapeError, "text_embeds"):
        models[name].predict(tiny.image(1, 3, *SYSTEMS[name].size_hw), torch.zeros(shape))


@every_system
def test_wrong_images_are_refused(models, name):
    height, width = SYSTEMS[name].size_hw
    model, shapes = models[name], [(3, height, width), (1, 4, height, width), (1, height, width, 3)]
    for shape in shapes + [(1, 3, *size_hw) for size_hw in SYSTEMS[name].refuses]:
        with refused(ShapeError, "image"):
            model.predict(torch.zeros(shape), TEXT)


@every_system
def test_arrays_of_another_dtype_are_refused(models, name):
    model, image = models[name], tiny.image(1, 3, *SYSTEMS[name].size_hw)
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


def test_nan_in_an_image_of_tips_is_refused(models):
    image = torch.rand(1, 3, 112, 112)
    image[0, 0, 3, 4] = float("nan")
    with refused(ArgumentError, "image", "NaN"):
        models["tips"](image, TEXT)


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
