"""Scores of every class at the grid's resolution agree with the labels."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from support.colour_words import COLOUR_WORDS
from support.errors import refused
from zsseg_rt import ArgumentError, Bundle, Engine, EngineConfig, read_photo
from zsseg_rt.demo import demo_photos
from zsseg_rt.errors import ConfigError
from zsseg_rt.text.class_names import ClassList

FRAME = read_photo(demo_photos("scenes")[0])
LOW = {"device": "cpu", "precision": "float32", "use_cache": False, "with_class_scores": "low"}


def test_maps_are_activated_scores_of_each_class():
    with Engine(Bundle.demo("scenes"), EngineConfig(**LOW, with_scores=True)) as engine:
        names = [["red ball", "red striped ball"], "grey stone wall", "yellow brick wall"]
        engine.set_classes(names, background=["blue sky"])
        seg = engine.segment(FRAME)
        flat = engine.set_classes([phrase for entry in names for phrase in
                                   ([entry] if isinstance(entry, str) else entry)])  # fmt: skip
        every = engine.segment(FRAME)
    assert seg.class_scores.shape == (3, *engine.bundle.head.grid_hw)
    assert seg.class_scores.dtype == np.float32
    assert ((seg.class_scores > 0) & (seg.class_scores < 1)).all()  # sigmoid
    assert len(flat.names) == 4
    best = np.maximum(every.class_scores[0], every.class_scores[1])
    np.testing.assert_allclose(seg.class_scores[0], best, atol=1e-5)  # float32, two vocabularies


def test_a_softmax_sums_to_one(colour_bundle):
    bundle = Bundle.load(colour_bundle)
    bundle = replace(bundle, head=replace(bundle.head, activation="softmax"))
    with Engine(bundle, EngineConfig(**LOW)) as engine:
        engine.set_classes(["red", "green", "blue"])
        seg = engine.segment(np.full((64, 64, 3), COLOUR_WORDS["green"], np.uint8))
    np.testing.assert_allclose(seg.class_scores.sum(axis=0), 1.0, atol=1e-5)
    order, scores = seg.top_k(2)
    assert (order[0] == 1).all()
    assert (scores[0] > scores[1]).all()


def test_the_best_class_of_a_frame_of_the_grid_s_size_is_its_label():
    """Sampled at the grid's points, labels are the best score, less the bias of seen classes."""
    with Engine(Bundle.demo("scenes"), EngineConfig(**LOW)) as engine:
        vocabulary = engine.set_classes(["ball", "wall", "floor", "box"])
        seg = engine.segment(np.ascontiguousarray(FRAME[:16, :16]))
        assert vocabulary.seen(engine.bundle.head.seen) is not None
    np.testing.assert_array_equal(seg.class_scores.argmax(axis=0), seg.labels)
    np.testing.assert_array_equal(seg.top_k(1)[0][0], seg.labels)


def stored(family):
    """A bundle of that family, its names and the frame of its golden sample."""
    bundle = Bundle.load(Path(__file__).parents[1] / "bundles" / "v1" / f"{family}.zsseg")
    with np.load(bundle.path / "golden.npz") as golden:
        return bundle, list(bundle.text_bank.names), golden["frame"]


def test_regions_vote_on_the_grid_as_they_do_for_labels():
    bundle, names, frame = stored("proposals")
    with Engine(bundle, EngineConfig(**LOW)) as engine:
        engine.set_classes(names)
        seg = engine.segment(frame)
        seen = set(bundle.head.seen)
    assert np.isfinite(seg.class_scores).all()
    assert (seg.class_scores >= 0).all()
    lowered = np.array([bundle.head.seen_bias * (name in seen) for name in names], np.float32)
    best = (seg.class_scores - lowered[:, None, None]).argmax(axis=0)
    height, width = seg.labels.shape
    rows = (np.arange(height) * best.shape[0]) // height
    columns = (np.arange(width) * best.shape[1]) // width
    assert (best[rows][:, columns] == seg.labels).mean() > 0.8  # resized after, not before


def test_segments_have_one_class_each():
    bundle, names, frame = stored("segment_tokens")
    with Engine(bundle, EngineConfig(**LOW)) as engine:
        engine.set_classes(names)
        with refused(ArgumentError, "with_class_scores"):
            engine.segment(frame)


def test_top_k_is_sorted_and_refuses_what_is_not_there():
    with Engine(Bundle.demo("scenes"), EngineConfig(**LOW)) as engine:
        engine.set_classes(["ball", "wall", "floor", "box"])
        seg = engine.segment(FRAME)
    order, scores = seg.top_k(4)
    assert (np.diff(scores, axis=0) <= 0).all()
    assert (np.sort(order, axis=0) == np.arange(4)[:, None, None]).all()
    for k in (0, 5):
        with refused(ArgumentError, "k"):
            seg.top_k(k)


def test_without_being_asked_for_there_are_none(colour_bundle):
    with Engine(colour_bundle, EngineConfig(device="cpu", use_cache=False)) as engine:
        engine.set_classes(["red", "blue"])
        seg = engine.segment(FRAME)
    assert seg.class_scores is None
    with refused(ArgumentError, "class_scores"):
        seg.top_k(1)
    with refused(ConfigError, "with_class_scores"):
        EngineConfig(with_class_scores="high")


def test_synonyms_and_background_are_reduced():
    classes = ClassList.read(["a", ["b", "c"], "d"], ["e"])
    scores = np.array([1, 2, 5, 3, 9], np.float32)[:, None, None]
    assert classes.best_of_synonyms(scores).ravel().tolist() == [1, 5, 3]
