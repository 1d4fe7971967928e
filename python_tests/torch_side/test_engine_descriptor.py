"""ZegCLIP and CLIP-RC through the engine: labels, embeddings and the self-check."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support import tiny
from support.descriptor_models import assert_labels_are_the_models, make_inputs, torch_scores
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.export import export_bundle
from zsseg_rt.text.tokenizer import Tokenizer

NAMES = [f"name {index}" for index in range(7)]
CPU = {"device": "cpu", "precision": "float32", "use_cache": False}


@pytest.fixture(scope="module")
def model():
    return tiny.clip_rc_model()


@pytest.fixture(scope="module")
def bundle_path(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip_rc")
    return export_bundle(model, folder / "tiny.zsseg", class_names=NAMES, text_encoder=None)


@pytest.mark.parametrize(("backend", "count"), [("openvino", 1), ("openvino", 19), ("torch", 7)])
def test_engine_equals_torch(model, bundle_path, backend, count):
    frame, embeds = make_inputs(count, seed=count)
    names = [f"name {index}" for index in range(count)]
    with Engine(bundle_path, EngineConfig(**CPU, backend=backend)) as engine:
        engine.set_classes(names, embeddings=embeds)
        labels = engine.segment(frame).labels
    assert_labels_are_the_models(labels, torch_scores(model, frame, embeds))


def test_seen_bias_follows_names_not_places(zegclip_bundle):
    frame, embeds = make_inputs(7)
    order = np.array([6, 2, 0, 5, 1, 4, 3])
    with Engine(zegclip_bundle, EngineConfig(**CPU)) as engine:
        engine.set_classes(NAMES, embeddings=embeds)
        straight = engine.segment(frame).labels
        engine.set_classes([NAMES[i] for i in order], embeddings=embeds[order])
        shuffled = engine.segment(frame).labels
    assert (order[shuffled] == straight).mean() > 0.999


def test_text_encoder_gives_the_embeddings(zegclip_model, zegclip_bundle, tmp_path):
    config = EngineConfig(device="cpu", precision="float32", cache_dir=tmp_path)
    with Engine(zegclip_bundle, config) as engine:
        vocabulary = engine.set_classes(["a dog", "the road"], templates=["{}", "see {}."])
        tokenizer = Tokenizer(engine.bundle.open_path(engine.bundle.text.tokenizer))
        prompts = ["a dog", "see a dog.", "the road", "see the road."]
        tokens = torch.from_numpy(tokenizer.encode(prompts))
        with torch.inference_mode():
            rows = F.normalize(zegclip_model.text_encoder(tokens), dim=-1)
        expected = F.normalize(rows.reshape(2, 2, -1).mean(1), dim=-1)
        np.testing.assert_allclose(vocabulary.embeds, expected.numpy(), atol=2e-6)
        seg = engine.segment(np.zeros((20, 30, 3), np.uint8))
        assert seg.names == ("a dog", "the road")


def test_text_encoder_is_freed_on_request_and_comes_back(zegclip_bundle):
    with Engine(zegclip_bundle, EngineConfig(**CPU, keep_text_encoder=False)) as engine:
        first = engine.set_classes(["a dog"]).embeds
        assert engine._maker._embedder._session is None
        both = engine.set_classes(["a cat", "a dog"]).embeds
        np.testing.assert_array_equal(both[1], first[0])
        assert not np.array_equal(both[0], both[1])


@pytest.mark.parametrize("settings", [{"channel_order": "bgr"}, {"unknown_below": 0.9}])
def test_self_check_does_not_depend_on_the_engines_settings(zegclip_bundle, settings):
    with Engine(zegclip_bundle, EngineConfig(**CPU, **settings)) as engine:
        report = engine.self_check()
    assert report.passed, report.first_failure
