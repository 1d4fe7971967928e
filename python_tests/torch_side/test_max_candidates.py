"""Names that are left out of a frame before it is labelled."""

from pathlib import Path

import numpy as np
import pytest

from support.cells import NAMES, bundle_at, picture
from support.errors import refused
from zsseg_rt import ArgumentError, Bundle, ConfigError, Engine, EngineConfig, FrameMemory
from zsseg_rt.runtime.families.candidates import CandidateGate
from zsseg_rt.text.class_names import ClassList
from zsseg_rt.text.vocabulary import Vocabulary

STORED = Path(__file__).parents[1] / "bundles" / "v1"
SCENES = ["red ball", "brick wall", "grey metal box", "blue sky", "green grass", "yellow cone"]
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


@pytest.fixture
def frame():
    return picture(120, 160)


def stored(name):
    """A small bundle and the names of its bank."""
    bundle = Bundle.load(STORED / f"{name}.zsseg")
    return bundle, list(bundle.text_bank.names)


def cases():
    made = [(name, lambda name=name: stored(name)) for name in ("descriptor", "aggregation")]
    made += [("dense", lambda: (Bundle.demo(), THINGS))]
    made += [("scenes", lambda: (Bundle.demo("scenes"), SCENES))]
    return pytest.mark.parametrize("find", [pytest.param(find, id=name) for name, find in made])


@cases()
@pytest.mark.parametrize("extra", [{}, {"with_scores": True, "with_class_scores": "low"}])
def test_as_many_candidates_as_names_change_nothing(find, extra, frame):
    bundle, names = find()
    plain = label(bundle, names, frame, **extra)
    assert plain.candidates is None
    for most in (len(names), 1000):
        found = label(bundle, names, frame, max_candidates=most, **extra)
        assert found.candidates == found.names
        assert np.array_equal(found.labels, plain.labels)
        if extra:
            assert np.array_equal(found.scores, plain.scores)
            assert np.array_equal(found.class_scores, plain.class_scores)


@cases()
@pytest.mark.parametrize("most", [1, 3])
def test_labels_are_those_of_the_candidates_alone(find, most, frame):
    bundle, names = find()
    found = label(bundle, names, frame, max_candidates=most, with_scores=True)
    assert len(found.candidates) == most
    assert list(found.candidates) == [name for name in found.names if name in found.candidates]
    given = [
        name for name, shown in zip(names, found.names, strict=True) if shown in found.candidates
    ]
    alone = label(bundle, given, frame, with_scores=True)
    known = alone.labels != alone.unknown
    assert known.any()
    table = np.array([found.names.index(name) for name in alone.names])
    assert np.array_equal(found.labels != found.unknown, known)
    assert np.array_equal(found.labels[known], table[alone.labels[known]])
    np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)


def test_candidates_are_those_nearest_to_some_cell(cells):
    frame = np.full((120, 120, 3), 128, np.uint8)
    frame[:40, :40] = (250, 20, 20)
    frame[80:, 80:] = (20, 20, 250)
    assert label(cells, NAMES, frame, max_candidates=2).candidates == ("red", "blue")


def test_windows_and_letterboxes_take_candidates_too(cells):
    frame = picture(60, 96)
    for settings in ({"windows": "auto"}, {"resize": "letterbox"}):
        plain = label(cells, NAMES, frame, **settings)
        same = label(cells, NAMES, frame, max_candidates=4, **settings)
        assert np.array_equal(plain.labels, same.labels)
        few = label(cells, NAMES, frame, max_candidates=2, **settings)
        shown = {few.names[index] for index in np.unique(few.labels)}
        assert shown <= set(few.candidates)
        assert len(few.candidates) == 2


def vocabulary(groups, background=()):
    classes = ClassList.of_groups(groups, background=background)
    return Vocabulary(
        names=classes.names,
        phrases=classes.phrases,
        phrase_classes=classes.phrase_classes,
        embeds=np.eye(len(classes.phrases), dtype=np.float32),
        version=1,
    )


def test_a_class_ranks_by_its_best_phrase_and_background_stays():
    named = vocabulary([["dog", "puppy"], ["cat"], ["car"]], background=["sky"])
    gate = CandidateGate(1)
    gate.begin(None, None)
    rows = gate.choose(np.float32([0.1, 0.9, 0.5, 0.2, -3.0]), named)
    assert gate.names(named) == ("dog",)
    assert [named.phrases[row] for row in rows] == ["dog", "puppy", "sky"]


def test_a_class_of_the_last_frame_stays_while_it_ranks_near():
    named, gate = vocabulary([[letter] for letter in "abcdef"]), CandidateGate(2)

    class Past:
        candidates = ()

    past = Past()
    for best, kept in (
        ([6, 5, 4, 3, 2, 1], ("a", "b")),
        ([6, 4, 5, 3, 2, 1], ("a", "b", "c")),  # b is third of the best three
        ([6, 3, 5, 4, 2, 1], ("a", "c")),  # and fourth
        ([4, 3, 6, 5, 2, 1], ("a", "c", "d")),
    ):
        gate.begin(None, past)
        gate.choose(np.float32(best), named)
        assert gate.names(named) == kept
    gate.begin(None, None)
    gate.choose(np.float32([4, 3, 6, 5, 2, 1]), named)
    assert gate.names(named) == ("c", "d")


def test_a_memory_carries_candidates_from_frame_to_frame(cells):
    frame = np.full((120, 120, 3), 128, np.uint8)
    frame[:40, :40], frame[80:, 80:] = (250, 20, 20), (20, 20, 250)
    weaker = frame.copy()
    weaker[80:, 80:] = (20, 200, 90)
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


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "8"])
def test_what_is_no_number_of_classes_is_refused(wrong):
    with refused(ConfigError, "max_candidates"):
        EngineConfig(max_candidates=wrong)


@pytest.mark.parametrize("name", ["proposals", "segment_tokens"])
def test_families_without_class_logits_refuse_it(name):
    with refused(ArgumentError, "max_candidates"):
        Engine(STORED / f"{name}.zsseg", EngineConfig(device="cpu", max_candidates=2))
