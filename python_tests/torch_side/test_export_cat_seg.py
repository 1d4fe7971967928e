"""CAT-Seg's bundle and family ``aggregation`` against the model in torch."""

import shutil
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from support import golden_cat_seg as rule
from support.descriptor_models import assert_labels_are_the_models, make_inputs
from support.errors import refused
from support.fakes import edit_manifest
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.backends._openvino import process_core
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.errors import ArgumentError, BundleError, ConfigError, VocabularyError
from zsseg_rt.export import export_bundle
from zsseg_rt.models.cat_seg.model import CatSeg
from zsseg_rt.ops import reference
from zsseg_rt.runtime.families import aggregation

pytestmark = pytest.mark.usefixtures("without_gradients")
CPU = {"device": "cpu", "precision": "float32", "use_cache": False}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = rule.tiny_model(most_classes=8)  # of more, the head is shown the best
    path = tmp_path_factory.mktemp("cat_seg") / "tiny.zsseg"
    return model, export_bundle(model, path, precisions=("float32",))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """As officially of more than 256 names the head is shown 256, in parts of 32."""
    model = rule.tiny_model(padding=256)
    path = tmp_path_factory.mktemp("cat_seg_wide") / "wide.zsseg"
    return model, export_bundle(
        model, path, precisions=("float32",), text_encoder=None, verify=False
    )


@pytest.fixture(scope="module")
def older(wide, tmp_path_factory):
    """The same bundle without the head's parts, as earlier versions wrote them."""
    path = shutil.copytree(wide[1], tmp_path_factory.mktemp("older") / "older.zsseg")
    for stage in aggregation.STAGES:
        edit_manifest(path, ("graphs", stage), ...)
    return wide[0], path


@pytest.fixture(scope="module")
def scores_of():
    """Every class's score on the grid, and the labels; an engine serves all vocabularies."""
    with ExitStack() as stack:

        @cache
        def engine_of(path, settings):
            config = EngineConfig(**(CPU | dict(settings)), with_class_scores="low")
            return stack.enter_context(Engine(path, config))

        def scores_of(path, frame, embeds, **settings):
            engine = engine_of(path, tuple(settings.items()))
            engine.set_classes([f"c{i}" for i in range(len(embeds))], embeddings=embeds)
            seg = engine.segment(frame)
            return seg.class_scores, seg.labels

        yield scores_of


def model_logits(model, frame, embeds):
    planes = reference.preprocess(
        frame, size_hw=(96, 96), mean=model.image_mean, std=model.image_std
    )
    return model(
        torch.from_numpy(planes[None]), torch.from_numpy(np.asarray(embeds, np.float32))
    ).mask_logits


def log_odds(scores):
    scores = scores.astype(np.float64)
    return np.log(scores) - np.log1p(-scores)


@pytest.mark.parametrize(
    ("bundle", "settings", "counts"),
    [
        ("exported", {}, (1, 8, 9)),
        ("wide", {}, (5, 33, 256, 257)),
        ("older", {}, (33, 300)),
        ("wide", {"head_classes": "all"}, (3, 300)),
    ],
    ids=["best of 8", "parts", "one graph", "all"],
)
def test_engine_gives_the_models_scores(request, scores_of, bundle, settings, counts):
    """All classes: exact, but not what the model was trained with."""
    model, path = request.getfixturevalue(bundle)
    if settings:
        model = rule.tiny_model(padding=256, most_classes=None)
    for count in counts:
        frame, embeds = make_inputs(count, seed=count)
        scores, labels = scores_of(path, frame, 3 * embeds, **settings)
        logits = model_logits(model, frame, embeds)
        np.testing.assert_allclose(scores, logits[0].sigmoid(), atol=1e-5)
        shown = scores > 0
        assert shown.all(axis=(1, 2)).sum() == min(count, model.config.most_classes or count)
        np.testing.assert_allclose(log_odds(scores[shown]), logits[0][shown], atol=1e-4)
        up = torch.nn.functional.interpolate(logits, frame.shape[:2], mode="bilinear")
        assert_labels_are_the_models(labels, up[0].sigmoid().numpy())


@pytest.mark.parametrize(
    ("backend", "precision", "atol"),
    [("torch", "float32", 1e-5), ("torch", "bfloat16", 0.03), ("openvino", "bfloat16", 0.03)],
)
def test_backends_and_precisions_agree(wide, scores_of, backend, precision, atol):
    able = process_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if backend == "openvino" and "BF16" not in able:
        pytest.skip("this CPU has no bfloat16")
    frame, embeds = make_inputs(40)
    scores, _ = scores_of(wide[1], frame, embeds, backend=backend, precision=precision)
    np.testing.assert_allclose(scores, scores_of(wide[1], frame, embeds)[0], atol=atol)


def test_a_model_of_all_classes_makes_a_bundle_of_all(scores_of, tmp_path):
    model = rule.tiny_model(most_classes=None)
    options = {"precisions": ("float32",), "text_encoder": None, "verify": False}
    path = export_bundle(model, tmp_path / "all.zsseg", **options)
    assert Bundle.load(path).aggregation.most is None
    frame, embeds = make_inputs(40)
    scores, _ = scores_of(path, frame, embeds)
    np.testing.assert_allclose(log_odds(scores), model_logits(model, frame, embeds)[0], atol=1e-4)
    best, _ = scores_of(path, frame, embeds, head_classes="best")
    assert (best > 0).all(axis=(1, 2)).sum() == model.config.aggregator.padding


def test_only_this_family_has_such_a_head(exported):
    with refused(ConfigError, "head_classes"):
        EngineConfig(head_classes="some")
    with refused(ArgumentError, "head_classes"):
        Engine(Bundle.demo("scenes"), EngineConfig(**CPU, head_classes="all"))
    with Engine(exported[1], EngineConfig(**CPU, head_classes="all")) as engine:
        for count in (0, 1025, 10_000):
            with refused(VocabularyError, "class_names"):
                engine.set_classes([f"c{i}" for i in range(count)])


def test_a_part_is_a_share_of_the_vocabulary(wide, monkeypatch):
    """So is what is in memory at once; and no vocabulary compiles anything."""
    from zsseg_rt.backends.registry import get_backend

    loaded, sizes, run = [], [], aggregation.AggregationPipeline.run_stage
    backend = get_backend("openvino")
    load_graph = type(backend).load
    monkeypatch.setattr(
        type(backend), "load", lambda *a, **k: (loaded.append(a), load_graph(*a, **k))[1]
    )

    def noting(parts, stage, feeds):
        sizes.append((stage, len(feeds["class_halves"])))
        return run(parts, stage, feeds)

    monkeypatch.setattr(aggregation.AggregationPipeline, "run_stage", noting)
    with Engine(wide[1], EngineConfig(**CPU)) as engine:
        num_loaded = len(loaded)
        for count, expected in ((32, []), (33, [17, 16]), (150, [30] * 5), (257, [32] * 8)):
            frame, embeds = make_inputs(count)
            engine.set_classes([f"c{i}" for i in range(count)], embeddings=embeds)
            sizes.clear()
            engine.segment(frame)
            assert sizes == [(stage, size) for stage in range(3) for size in expected]
        assert len(loaded) == num_loaded == 5


def test_names_are_embedded_by_the_tuned_tower(exported):
    model, path = exported
    bundle = Bundle.load(path)
    assert bundle.text.templates == ("A photo of a {} in the scene",)
    assert bundle.text.space.startswith("CAT-Seg")
    with Engine(path, EngineConfig(**CPU)) as engine:
        vocabulary = engine.set_classes(["cat", "traffic light"])
        assert engine.self_check().passed
    from zsseg_rt.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(path / "tokenizer.json", context_length=77)
    tokens = tokenizer.encode([f"A photo of a {name} in the scene" for name in vocabulary.names])
    expected = torch.nn.functional.normalize(model.text_encoder(torch.from_numpy(tokens)), dim=1)
    np.testing.assert_allclose(vocabulary.embeds, expected, atol=1e-5)


def test_phrases_of_another_text_tower_are_refused(exported, tmp_path):
    with Engine(exported[1], EngineConfig(**CPU)) as engine:
        own = engine.set_classes(["red", "blue"])
        assert own.space == CatSeg.text_space
        stock = replace(own, space="OpenAI CLIP ViT-B/16")
        with refused(VocabularyError, "class_names"):
            engine.set_classes(stock)
        engine.set_classes(own)
        engine.set_classes(replace(own, space=""))
        vocabulary = engine.set_classes(["red", "blue"], embeddings=own.embeds)
        assert vocabulary.space == ""
    with refused(ArgumentError, "text_encoder"):
        export_bundle(exported[0], tmp_path / "a.zsseg", text_encoder=exported[0].text_encoder)
    with refused(ArgumentError, "space"):
        export_bundle(exported[0], tmp_path / "a.zsseg", space="OpenAI CLIP ViT-B/16")
    assert not (tmp_path / "a.zsseg").exists()


def test_what_does_not_fit_is_refused(exported, tmp_path):
    with refused(ArgumentError, "size_hw"):
        export_bundle(exported[0], tmp_path / "other.zsseg", size_hw=(128, 128))
    with refused(ArgumentError, "windows"):
        Engine(exported[1], EngineConfig(**CPU, windows="auto"))
    broken = shutil.copytree(exported[1], tmp_path / "broken.zsseg")
    edit_manifest(broken, ("aggregation",), ...)
    with pytest.raises(BundleError, match="aggregation"):
        Bundle.load(broken)
