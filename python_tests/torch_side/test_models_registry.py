"""Architectures: one registry, and models that answer for themselves."""

import numpy as np
import pytest
import torch

from support import golden_cat_seg, golden_tips, tiny, tiny_zegformer, tiny_zeroseg
from support.errors import refused
from zsseg_rt.errors import ArgumentError, CheckpointError
from zsseg_rt.export.exporters import EXPORTERS
from zsseg_rt.models.registry import ARCHITECTURES, create_model, from_official
from zsseg_rt.training.tasks import TASKS
from zsseg_rt.training.trained import TorchSegmenter


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model of every architecture, and the width of its embeddings."""
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


def test_every_architecture_is_exported():
    assert EXPORTERS.keys() == ARCHITECTURES.keys()


def test_all_but_training_free_models_have_a_task():
    assert set(ARCHITECTURES) - set(TASKS) == {"dense_clip", "tips"}
    assert set(TASKS) <= set(ARCHITECTURES)


def test_unknown_architectures_are_named():
    with refused(CheckpointError, "architecture", *ARCHITECTURES):
        create_model("x")
    published = ", ".join(name for name, one in ARCHITECTURES.items() if one.from_official)
    with pytest.raises(CheckpointError, match=f"expected one of {published}, got 'zeroseg'"):
        from_official("zeroseg", {})


def test_a_start_without_weights_is_refused():
    with refused(ArgumentError, "pretrained"):
        create_model("zegclip", pretrained=None)


@pytest.mark.parametrize("architecture", ["zegclip", "zegformer"])
def test_an_unknown_setting_names_the_nearest(architecture):
    with refused(ArgumentError, "image_sise", "'image_size'"):
        create_model(architecture, image_sise=512)
