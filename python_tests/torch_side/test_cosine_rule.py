"""Cosines beside masks: the engine labels as torch does, and nothing changes where they are off."""

import numpy as np
import pytest
import torch

from support import tiny
from support.errors import refused
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.common.cosine_rule import CosineRule
from zsseg_rt.errors import ArgumentError, ConfigError
from zsseg_rt.export import export_bundle
from zsseg_rt.training.segmenters.torch_segmenter import TorchSegmenter

RULE = CosineRule(seen_weight=0.2, unseen_weight=0.6, scale=8.0)
NAMES = [f"name {index}" for index in range(7)]
MAKERS = {"zegclip": tiny.zegclip_model, "clip_rc": tiny.clip_rc_model}
OFF = {"device": "cpu", "precision": "float32"}


@pytest.fixture(scope="module", params=MAKERS)
def model(request):
    return MAKERS[request.param](seen_classes=(0, 1, 3)).eval()


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("cosine") / f"{model.architecture}.zsseg"
    options = {"class_names": NAMES, "precisions": ("float32",), "text_encoder": None}
    return Bundle.load(export_bundle(model, path, cosine=RULE, **options))


@pytest.fixture
def frame():
    return np.random.default_rng(5).integers(0, 256, (50, 70, 3), np.uint8)


def embeds(model, count):
    return tiny.text_embeds(count, model.config.image_encoder.embed_dim).numpy()


def engine_labels(bundle, frame, names, rows, **settings):
    with Engine(bundle.path, EngineConfig(**OFF, **settings)) as engine:
        engine.set_classes(names, embeddings=rows)
        return engine.segment(frame).labels


def test_the_bundle_says_how_much_they_count(bundle):
    assert bundle.head.cosine == RULE
    with Engine(bundle.path, EngineConfig(**OFF)) as engine:
        assert engine.self_check().passed
    settings = EngineConfig(**OFF, cosine_weight=(0.0, 1.0))
    with Engine(bundle.path, settings) as engine:  # judged as exported
        assert engine.self_check().passed


def test_the_engine_equals_torch(model, bundle, frame):
    rows = embeds(model, 7)
    found = engine_labels(bundle, frame, NAMES, rows)
    twin = model.with_cosine(RULE)
    with torch.inference_mode():
        expected = twin.label(frame, torch.from_numpy(rows)).numpy()
    assert (found == expected).mean() > 0.999
    plain = engine_labels(bundle, frame, NAMES, rows, cosine_weight=(0, 0))
    assert (plain != found).mean() > 0.02


def test_synonyms_and_background_count_as_in_torch(model, bundle, frame):
    rows = embeds(model, 7)
    names = ["name 0, name 4", "name 2", "name 3, name 5, name 6", "name 1"]
    order = [0, 4, 2, 3, 5, 6, 1]
    segmenter = TorchSegmenter(
        model.with_cosine(RULE),
        names,
        torch.from_numpy(rows[order]),
        seen_names=[NAMES[row] for row in model.config.seen_classes],
    )
    groups = [name.split(", ") for name in names]
    found = engine_labels(bundle, frame, groups, rows[order])
    assert (found == segmenter.segment(frame)).mean() > 0.999


def test_off_is_bit_for_bit_what_it_was(model, bundle, frame, tmp_path):
    options = {"class_names": NAMES, "precisions": ("float32",), "text_encoder": None}
    plain = Bundle.load(export_bundle(model, tmp_path / "plain.zsseg", **options))
    assert plain.head.cosine is None
    rows, scores = embeds(model, 7), []
    for given, settings in ((plain, {}), (bundle, {"cosine_weight": (0.0, 0.0)})):
        with Engine(given.path, EngineConfig(**OFF, **settings, with_scores=True)) as engine:
            engine.set_classes(NAMES, embeddings=rows)
            scores.append(engine.segment(frame).scores)
    np.testing.assert_array_equal(*scores)


def test_the_sliding_protocol_blends_too(model):
    rows = torch.from_numpy(embeds(model, 7))
    picture = tiny.image(1, 3, *model.size_hw)
    with torch.inference_mode():
        plain, blended = (m.predict(picture, rows) for m in (model, model.with_cosine(RULE)))
    assert plain.shape == blended.shape
    assert not torch.allclose(plain, blended, atol=1e-3)


def test_a_weight_for_a_bundle_that_has_none_needs_a_scale(zegclip_bundle):
    with refused(ConfigError, "cosine_scale"):
        Engine(zegclip_bundle, EngineConfig(**OFF, cosine_weight=(0.2, 0.5)))
    with refused(ConfigError, "cosine_scale"):
        Engine(zegclip_bundle, EngineConfig(**OFF, cosine_scale=9.0))
    with Engine(zegclip_bundle, EngineConfig(**OFF, cosine_weight=(0.2, 0.5), cosine_scale=9.0)):
        pass


def test_clip_rc_needs_clip_s_own_patches(tmp_path):
    options = {"class_names": NAMES, "precisions": ("float32",), "text_encoder": None}
    path = export_bundle(tiny.clip_rc_model(), tmp_path / "plain.zsseg", verify=False, **options)
    settings = EngineConfig(**OFF, cosine_weight=(0.2, 0.5), cosine_scale=9.0)
    with refused(ConfigError, "cosine_weight"):
        Engine(path, settings)


def test_other_families_have_no_such_setting():
    with refused(ArgumentError, "cosine_weight"):
        Engine("python_tests/bundles/v1/dense.zsseg", EngineConfig(**OFF, cosine_weight=(0.1, 0.1)))


@pytest.mark.parametrize("weight", [0.5, (0.5,), (0.5, 1.5), (-0.1, 0.5), ("a", "b"), (0.5, None)])
def test_weights_that_are_none(weight):
    with refused(ConfigError, "cosine_weight"):
        EngineConfig(cosine_weight=weight)


@pytest.mark.parametrize("scale", [0.0, -1.0, 2000.0, float("nan"), "10", True])
def test_scales_that_are_none(scale):
    with refused(ConfigError, "cosine_scale"):
        EngineConfig(cosine_scale=scale)
