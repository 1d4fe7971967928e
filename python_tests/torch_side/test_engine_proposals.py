"""ZegFormer bundles through the engine: equal to the torch model, and what is saved or refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from support import tiny_zegformer
from support.errors import refused
from support.frame_kinds import STORED
from zsseg_rt import Bundle, Engine, EngineConfig
from zsseg_rt.backends._openvino import _OpenVinoSession
from zsseg_rt.errors import ArgumentError, BackendError, ShapeError, VocabularyError
from zsseg_rt.export import export_bundle
from zsseg_rt.export.architectures.zegformer import export_zegformer
from zsseg_rt.export.options import ExportOptions
from zsseg_rt.runtime.families.proposals import class_probabilities

NAMES = [f"name {index}" for index in range(7)]
SIZE = (96, 128)
EXACT = {"device": "cpu", "precision": "float32", "use_cache": False}


@pytest.fixture(scope="module")
def model():
    return tiny_zegformer.model(region_batch=3)


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    """A tiny ZegFormer with a text bank of both branches; three regions a look."""
    path = tmp_path_factory.mktemp("bundles") / "zegformer.zsseg"
    export_bundle(model, path, class_names=NAMES, size_hw=SIZE, text_bank=(NAMES, embeddings()))
    return path


@pytest.fixture(scope="module")
def exact(bundle):
    """An engine of it."""
    with Engine(bundle, EngineConfig(**EXACT, with_scores=True)) as engine:
        yield engine


def embeddings():
    """Class embeddings of segments and of regions, [2, C, D]."""
    return np.stack([tiny_zegformer.text_features(salt).numpy() for salt in ("a", "b")])


def frame():
    return np.ascontiguousarray(tiny_zegformer.image(*SIZE).numpy().transpose(1, 2, 0))


def score_maps(model):
    """The torch model's own score maps of the frame, [C, H, W]."""
    image = torch.from_numpy(frame()).permute(2, 0, 1).contiguous()
    with torch.no_grad():
        text, regions = (torch.from_numpy(part) for part in embeddings())
        return model([image], text, regions, [SIZE]).sem_seg[0].numpy()


def assert_same_labels(labels, maps):
    ranked = np.sort(maps, axis=0)
    clear = ranked[-1] - ranked[-2] > 5e-5  # float32 sums in another order: seen 3e-6
    assert clear.mean() > 0.05
    assert (labels == maps.argmax(axis=0))[clear].all()


def assert_same_result(result, maps, head):
    """Scores are the winners' before calibration, at most 1."""
    assert_same_labels(result.labels, maps)
    seen = np.isin(NAMES, head.seen)
    plain = np.minimum(maps + head.seen_bias * seen[:, None, None], 1.0)
    winners = np.take_along_axis(plain, result.labels[None].astype(np.int64), axis=0)[0]
    np.testing.assert_allclose(result.scores, winners, rtol=0, atol=2e-4)


def test_engine_labels_as_the_torch_model(exact, model):
    exact.set_classes(NAMES, embeddings=embeddings())
    result = exact.segment(frame())
    assert_same_result(result, score_maps(model), exact.bundle.head)
    assert {"image_encoder", "similarity", "regions", "upsample_argmax"} <= set(result.times)


def test_the_text_bank_serves_both_branches(exact):
    exact.set_classes(NAMES, embeddings=embeddings())
    labels = exact.segment(frame()).labels
    exact.set_classes(NAMES)
    np.testing.assert_array_equal(exact.segment(frame()).labels, labels)
    exact.set_classes(NAMES, embeddings=embeddings()[0])
    np.testing.assert_array_equal(exact.vocabulary.prompt_embeds["regions"], embeddings()[0])
    with refused(VocabularyError, "class_names"):
        exact.set_classes(["moon"])
    for wrong in (embeddings()[:, :6], np.concatenate([embeddings()] * 2)):
        with refused(ShapeError, "embeddings"):
            exact.set_classes(NAMES, embeddings=wrong)


@pytest.mark.parametrize(
    ("settings", "fusion", "style"),
    [
        ({"region_style": "mask"}, "seen_and_unseen", "mask"),
        ({"region_style": "crop", "fusion": "all_classes"}, "all_classes", "crop"),
        ({"ensemble": False, "calibration": -1.0}, "regions", "cropmask"),
        ({"fusion": "segments"}, "segments", None),
    ],
)
def test_every_rule_of_the_official_configurations(bundle, settings, fusion, style):
    """The graphs are the same for all; the rule is in the manifest."""
    model = tiny_zegformer.model(**settings)
    exported = export_zegformer(model, ExportOptions(size_hw=SIZE, class_names=NAMES))
    regions = exported.sections["regions"]
    assert regions.fusion == fusion
    assert (regions.encoder is None) == (style is None)
    assert style is None or regions.encoder.style == style
    ruled = replace(Bundle.load(bundle), head=exported.head, **exported.sections)
    with Engine(ruled, EngineConfig(**EXACT, with_scores=True)) as engine:
        engine.set_classes(NAMES, embeddings=embeddings() if style else embeddings()[0])
        result = engine.segment(frame())
    assert_same_result(result, score_maps(model), exported.head)


def test_a_model_without_clip_is_exported(tmp_path):
    """The text branch alone, from a training checkpoint too; a bank of both branches serves it."""
    model = tiny_zegformer.model(fusion="segments")
    options = {"class_names": NAMES, "size_hw": SIZE, "text_bank": (NAMES, embeddings())}
    path = export_bundle(model, tmp_path / "a.zsseg", precisions=("float32",), **options)
    with Engine(path, EngineConfig(**EXACT)) as engine:
        assert engine.self_check().passed
        engine.set_classes(NAMES)
        labels = engine.segment(frame()).labels
    assert_same_labels(labels, score_maps(model))


def test_a_wrong_rule_is_noticed(bundle):
    other = Bundle.load(bundle)
    encoder = replace(other.regions.encoder, style="crop")
    with Engine(replace(other, regions=replace(other.regions, encoder=encoder))) as engine:
        report = engine.self_check()
    assert not report.passed
    assert report.first_failure.stage == "class_scores"


ONE = {"class_names": NAMES[3:4], "embeddings": embeddings()[:, 3:4]}


def count_crops(engine, monkeypatch, change=lambda results: None):
    """A frame's labels, and the batches of crops that the region encoder is shown for it.

    ``change`` alters what the image encoder gives.
    """
    sessions, counts = engine._lane.sessions, []
    run = {name: session.run for name, session in sessions.items()}

    def counting(feeds, *, stream=0):
        counts.append(len(feeds["crops"]))
        return run["region_encoder"](feeds, stream=stream)

    def changing(feeds, *, stream=0):
        results = run["image_encoder"](feeds, stream=stream)
        results = {name: np.array(array) for name, array in results.items()}
        change(results)
        return results

    engine.set_classes(**ONE)  # which three of the eight segments are likely to be
    with monkeypatch.context() as patch:
        patch.setattr(sessions["region_encoder"], "run", counting)
        patch.setattr(sessions["image_encoder"], "run", changing)
        return engine.segment(frame()).labels, counts


def test_a_few_crops_at_a_time_and_fewer_with_a_threshold(bundle, exact, monkeypatch):
    assert count_crops(exact, monkeypatch)[1] == [3, 3, 2]
    for score, crops in ((0.3, [3]), (1.0, [])):
        with Engine(bundle, EngineConfig(**EXACT, min_region_score=score)) as engine:
            assert count_crops(engine, monkeypatch)[1] == crops


def test_what_an_empty_mask_shows_is_kept_from_frame_to_frame(bundle, monkeypatch):
    def empty(results):
        results["region_masks"][:, [2, 5]] = -0.5

    with Engine(bundle, EngineConfig(**EXACT)) as engine:
        shown = [count_crops(engine, monkeypatch, empty) for _ in range(2)]
    assert [sum(crops) for _, crops in shown] == [7, 6]  # the two share one look, later none
    np.testing.assert_array_equal(shown[0][0], shown[1][0])


def spoilt(value):
    return lambda array: np.where(np.arange(array.size).reshape(array.shape) == 5, value, array)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("region_masks", spoilt(np.nan), ("mask_logits", "NaN")),
        ("segment_embeds", spoilt(np.inf), ("class_scores", "NaN")),
        ("region_embeds", spoilt(np.nan), ("class_scores", "NaN")),
        ("region_embeds", lambda rows: rows[:-1].copy(), ("region_embeds",)),
        ("region_embeds", np.ravel, ("region_embeds",)),
    ],
)
def test_wrong_results_of_a_graph_are_an_error(exact, monkeypatch, name, change, words):
    run = _OpenVinoSession.run

    def broken(self, feeds, *, stream=0):
        results = run(self, feeds, stream=stream)
        return {key: change(array) if key == name else array for key, array in results.items()}

    monkeypatch.setattr(_OpenVinoSession, "run", broken)
    exact.set_classes(NAMES, embeddings=embeddings())
    with refused(BackendError, *words):
        exact.segment(frame())


def test_a_threshold_needs_a_region_encoder():
    with refused(ArgumentError, "min_region_score", "'descriptor'"):
        Engine(STORED / "descriptor.zsseg", EngineConfig(device="cpu", min_region_score=0.1))


def test_probabilities_of_extreme_logits_stay_finite():
    logits = np.array([[400.0, -400.0], [-400.0, -400.0]], np.float32)
    probabilities, objectness = class_probabilities(logits, np.array([0.0, 400.0], np.float32))
    np.testing.assert_array_equal(probabilities, [[1, 0], [0, 0]])
    np.testing.assert_array_equal(objectness, [1, 0])


def test_seen_classes_without_names_are_told(model, caplog):
    exported = export_zegformer(model, ExportOptions(size_hw=(64, 64)))
    assert "Pass class_names to keep the calibration" in caplog.text
    assert (exported.head.seen, exported.head.seen_bias) == ((), 0.0)
