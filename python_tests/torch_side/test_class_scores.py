"""Scores of every class at the grid's resolution, and names left out before a frame is labelled."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.cells import NAMES, bundle_at, image
from support.colour_words import COLOUR_WORDS
from support.errors import refused
from zsseg_rt import ArgumentError, Bundle, Engine, EngineConfig, FrameMemory, read_photo
from zsseg_rt.demo import demo_photos

FRAME = read_photo(demo_photos("scenes")[0])
LOW = {"device": "cpu", "precision": "float32", "use_cache": False, "with_class_scores": "low"}


@pytest.fixture(scope="module")
def scenes():
    with Engine(Bundle.demo("scenes"), EngineConfig(**LOW)) as engine:
        yield engine


def test_maps_are_activated_scores_of_each_class(scenes):
    names = [["red ball", "red striped ball"], "grey stone wall", "yellow brick wall"]
    scenes.set_classes(names, background=["blue sky"])
    seg = scenes.segment(FRAME)
    scenes.set_classes([*names[0], *names[1:]])
    every = scenes.segment(FRAME)
    assert seg.class_scores.shape == (3, *scenes.bundle.head.grid_hw)
    assert seg.class_scores.dtype == np.float32
    assert ((seg.class_scores > 0) & (seg.class_scores < 1)).all()  # sigmoid
    assert len(every.names) == 4
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


def test_the_best_class_of_a_frame_of_the_grid_s_size_is_its_label(scenes):
    """Sampled at the grid's points, labels are the best score, less the bias of seen classes."""
    vocabulary = scenes.set_classes(["ball", "wall", "floor", "box"])
    seg = scenes.segment(np.ascontiguousarray(FRAME[:16, :16]))
    assert vocabulary.seen(scenes.bundle.head.seen) is not None
    np.testing.assert_array_equal(seg.class_scores.argmax(axis=0), seg.labels)
    np.testing.assert_array_equal(seg.top_k(1)[0][0], seg.labels)
    order, scores = seg.top_k(4)
    assert (np.diff(scores, axis=0) <= 0).all()
    assert (np.sort(order, axis=0) == np.arange(4)[:, None, None]).all()
    for k in (0, 5):
        with refused(ArgumentError, "k"):
            seg.top_k(k)


STORED = Path(__file__).parents[1] / "bundles" / "v1"


def stored(family):
    bundle = Bundle.load(STORED / f"{family}.zsseg")
    return bundle, list(bundle.text_bank.names)


def test_regions_vote_on_the_grid_as_they_do_for_labels():
    bundle, names = stored("proposals")
    with Engine(bundle, EngineConfig(**LOW)) as engine:
        engine.set_classes(names)
        seg = engine.segment(FRAME)
        seen = set(bundle.head.seen)
    assert np.isfinite(seg.class_scores).all()
    assert (seg.class_scores >= 0).all()
    lowered = np.array([bundle.head.seen_bias * (name in seen) for name in names], np.float32)
    best = (seg.class_scores - lowered[:, None, None]).argmax(axis=0)
    height, width = seg.labels.shape
    rows = (np.arange(height) * best.shape[0]) // height
    columns = (np.arange(width) * best.shape[1]) // width
    assert (best[rows][:, columns] == seg.labels).mean() > 0.8  # resized after, not before


def test_without_being_asked_for_there_are_none(cells):
    seg = label(cells, ["red", "blue"], FRAME)
    assert seg.class_scores is None
    with refused(ArgumentError, "class_scores"):
        seg.top_k(1)


# --- names that are left out of a frame before it is labelled ---


THINGS = ["dog", "cat", ["taxi", "car"], "sofa", "person", "boat", ["bird", "parrot"], "train"]


def engine_of(bundle, classes, **settings):
    engine = Engine(bundle, EngineConfig(device="cpu", use_cache=False, **settings))
    engine.set_classes(classes, background=())  # what is background depends on the other names
    return engine


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return bundle_at(tmp_path_factory.mktemp("cells"))


def label(bundle, classes, frame, **settings):
    with engine_of(bundle, classes, **settings) as engine:
        return engine.segment(frame)


def corners(last):
    """A grey frame whose first corner is red, and whose last is of another colour."""
    frame = np.full((120, 120, 3), 128, np.uint8)
    frame[:40, :40], frame[80:, 80:] = (250, 20, 20), last
    return frame


BLUE = (20, 20, 250)


@pytest.mark.parametrize("family", ["descriptor", "aggregation", "dense"])
def test_labels_are_those_of_the_candidates_alone(family):
    bundle, names = (Bundle.demo(), THINGS) if family == "dense" else stored(family)
    frame, settings = image(120, 160), {"with_scores": True, "with_class_scores": "low"}
    plain = label(bundle, names, frame, **settings)
    assert plain.candidates is None
    seg = label(bundle, names, frame, max_candidates=len(names), **settings)
    assert seg.candidates == seg.names
    for part in ("labels", "scores", "class_scores"):
        np.testing.assert_array_equal(getattr(seg, part), getattr(plain, part))
    for most in (1, 3):
        seg = label(bundle, names, frame, max_candidates=most, with_scores=True)
        assert len(seg.candidates) == most
        subset = [name for name, shown in zip(names, seg.names, strict=True)
                  if shown in seg.candidates]  # fmt: skip
        alone = label(bundle, subset, frame, with_scores=True)
        assert seg.candidates == alone.names  # in their order
        labelled = alone.labels != alone.unknown
        assert labelled.any()
        table = np.array([seg.names.index(name) for name in alone.names])
        assert np.array_equal(seg.labels != seg.unknown, labelled)
        assert np.array_equal(seg.labels[labelled], table[alone.labels[labelled]])
        np.testing.assert_allclose(seg.scores, alone.scores, atol=1e-5)


def test_candidates_are_those_nearest_to_some_cell(cells):
    frame, config = corners(BLUE), EngineConfig(device="cpu", use_cache=False, max_candidates=1)
    assert label(cells, NAMES, frame, max_candidates=2).candidates == ("red", "blue")
    with Engine(cells, config) as engine:
        engine.set_classes([["green", "red"], "grey"], background=["blue"])  # which stays
        seg = engine.segment(frame)
    assert seg.candidates == ("green",)  # by its best synonym
    assert [seg.labels[20, 20], seg.labels[100, 100]] == [0, seg.unknown]


def test_windows_and_letterboxes_take_candidates_too(cells):
    frame = image(60, 96)
    for settings in ({"windows": "auto"}, {"resize": "letterbox"}):
        plain = label(cells, NAMES, frame, **settings)
        same = label(cells, NAMES, frame, max_candidates=4, **settings)
        assert np.array_equal(plain.labels, same.labels)
        few = label(cells, NAMES, frame, max_candidates=2, **settings)
        shown = {few.names[index] for index in np.unique(few.labels)}
        assert shown <= set(few.candidates)
        assert len(few.candidates) == 2


def test_a_memory_carries_candidates_from_frame_to_frame(cells):
    frame, weaker = corners(BLUE), corners((20, 200, 90))
    with engine_of(cells, NAMES, max_candidates=2) as engine:
        alone = engine.segment(weaker).candidates
        memory = FrameMemory(steady=False, skip_still=True)
        assert engine.segment(frame, memory=memory).candidates == ("red", "blue")
        after = engine.segment(weaker, memory=memory).candidates
        assert set(alone) < set(after)
        assert "blue" in after
        again = engine.segment(weaker, memory=memory)
        assert again.reused
        assert again.candidates == after


@pytest.mark.parametrize("family", ["proposals", "segment_tokens"])
def test_families_without_class_logits_refuse_it(family):
    bundle, names = stored(family)
    with refused(ArgumentError, "max_candidates"):
        Engine(bundle, EngineConfig(device="cpu", max_candidates=2))
    if family == "segment_tokens":  # each has one class
        with (
            engine_of(bundle, names, with_class_scores="low") as engine,
            refused(ArgumentError, "with_class_scores"),
        ):
            engine.segment(FRAME)
