"""Lanes label frames at the same time on shared weights, each with the classes its result names."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import Engine, EngineConfig, ops
from zsseg_rt.errors import (
    ArgumentError,
    EngineStateError,
    ShapeError,
    VocabularyError,
)

STORED = Path(__file__).parents[1] / "bundles" / "v1" / "dense.zsseg"
COLOURS = ["red", "green", "blue", "white", "black", "grey"]
CPU = {"device": "cpu", "precision": "float32", "use_cache": False}
LISTS = [COLOURS[:2], COLOURS[::-1], COLOURS[2:5], [COLOURS[0], COLOURS[3:5]]]


def frame(seed=0, height=40, width=56):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3)).astype(np.uint8)
    return np.ascontiguousarray(blocks.repeat(8, 0).repeat(8, 1)[:height, :width])


@pytest.fixture
def engine():
    with Engine(STORED, EngineConfig(**CPU, num_lanes=4, num_threads=1)) as engine:
        yield engine


def test_every_result_is_that_of_the_classes_it_names(engine):
    """Three lanes in three threads while a fourth swaps classes: as fresh engines would label."""
    versions, stop = {}, threading.Event()

    def swap():
        while not stop.is_set():
            for names in LISTS:
                versions[engine.set_classes(names).version] = names

    versions[engine.set_classes(LISTS[0]).version] = LISTS[0]

    def label(index):
        with engine.lane() as lane:
            return [(index, lane.segment(frame(index))) for _ in range(60)]

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        with ThreadPoolExecutor(3) as pool:
            results = [pair for pairs in pool.map(label, range(3)) for pair in pairs]
    finally:
        stop.set()
        swapper.join()
    expected = {}
    for number, names in enumerate(LISTS):
        with Engine(STORED, EngineConfig(**CPU)) as fresh:
            fresh.set_classes(names)
            for index in range(3):
                expected[number, index] = fresh.segment(frame(index))
    assert len({seg.vocabulary_version for _, seg in results}) > 1
    for index, seg in results:
        fresh = expected[LISTS.index(versions[seg.vocabulary_version]), index]
        assert seg.names == fresh.names
        np.testing.assert_array_equal(seg.labels, fresh.labels)


def test_no_more_lanes_than_configured(engine):
    lanes = [engine.lane() for _ in range(3)]
    with refused(EngineStateError, "lanes"):
        engine.lane()
    lanes[0].close()
    lanes[0].close()
    engine.lane()


def test_a_closed_lane_says_so_and_the_others_go_on(engine):
    engine.set_classes(COLOURS)
    first, second = engine.lane(), engine.lane()
    first.close()
    with refused(EngineStateError, "lane"):
        first.segment(frame())
    np.testing.assert_array_equal(second.segment(frame()).labels, engine.segment(frame()).labels)


def test_a_lane_whose_engine_closed_says_so():
    engine = Engine(STORED, EngineConfig(**CPU, num_lanes=2))
    engine.set_classes(COLOURS)
    lane = engine.lane()
    engine.close()
    with refused(EngineStateError, "lane"):
        lane.segment(frame())
    lane.close()
    with refused(EngineStateError, "engine"):
        engine.lane()


@pytest.fixture
def hold(monkeypatch):
    """Lets a lane's frame wait until the test says so; returns what says that it began."""
    leave = threading.Event()

    def hold_frames(lane):
        entered, session = threading.Event(), lane.sessions["image_encoder"]
        run = session.run

        def wait(*args, **settings):
            entered.set()
            assert leave.wait(20)
            return run(*args, **settings)

        monkeypatch.setattr(session, "run", wait)
        return entered

    yield hold_frames, leave
    leave.set()


@pytest.mark.parametrize("own", [True, False])
def test_a_lane_serves_one_thread_at_a_time(engine, hold, own):
    """The engine's own lane too; the other one is free meanwhile."""
    engine.set_classes(COLOURS)
    lane, (hold_frames, leave) = engine.lane(), hold
    busy, free = (engine, lane) if own else (lane, engine)
    entered = hold_frames(engine._lane if own else lane)
    with ThreadPoolExecutor(1) as pool:
        labelled = pool.submit(busy.segment, frame())
        assert entered.wait(20)
        with refused(EngineStateError, "engine"):
            busy.segment(frame())
        assert free.segment(frame()).labels.shape == (40, 56)
        leave.set()
        assert labelled.result(20).labels.shape == (40, 56)


def test_closing_waits_for_the_frame_under_way(engine, hold):
    engine.set_classes(COLOURS)
    lane, (hold_frames, leave) = engine.lane(), hold
    entered = hold_frames(lane)
    with ThreadPoolExecutor(2) as pool:
        labelled = pool.submit(lane.segment, frame())
        assert entered.wait(20)
        others = [engine.lane(), engine.lane(spare=True)]
        with refused(EngineStateError, "lanes"):
            engine.lane(spare=True)  # there is one
        closed = pool.submit(engine.close)
        while engine.vocabulary is not None:
            time.sleep(0.001)
        for other in others:
            with pytest.raises(EngineStateError):
                other.segment(frame())
        leave.set()
        closed.result(20)
        assert labelled.result(20).labels.shape == (40, 56)


class TestPerCall:
    def test_unknown_below(self):
        config = EngineConfig(**CPU, unknown_below=1.0)
        with Engine(STORED, config) as engine:
            engine.set_classes(COLOURS)
            for _ in range(2):
                assert (engine.segment(frame()).labels == 255).mean() > 0.5
                assert (engine.segment(frame(), unknown_below=0.0).labels != 255).all()

    @pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "much"])
    def test_outside_the_range(self, engine, value):
        engine.set_classes(COLOURS)
        with refused(ArgumentError, "unknown_below"):
            engine.segment(frame(), unknown_below=value)


class TestVocabularyTakenBack:
    def test_same_labels_and_a_version_of_its_own(self, engine):
        first = engine.set_classes([COLOURS[0], COLOURS[2:4]], background=["grey"])
        before = engine.segment(frame()).labels
        engine.set_classes(COLOURS)
        again = engine.set_classes(first)
        assert again.version > first.version
        assert (again.names, again.phrases) == (first.names, first.phrases)
        np.testing.assert_array_equal(engine.segment(frame()).labels, before)

    def test_of_another_width(self, engine, colour_bundle, zegclip_bundle):
        with Engine(zegclip_bundle, EngineConfig(**CPU)) as other:
            wide = other.set_classes(["cat"])
        with refused(ShapeError, "embeddings"):
            engine.set_classes(wide)

    @pytest.mark.parametrize(
        "settings", [{"background": ["sky"]}, {"templates": ["{}"]}, {"embeddings": np.ones(3)}]
    )
    def test_beside_what_it_holds(self, engine, settings):
        vocabulary = engine.set_classes(COLOURS)
        (name,) = settings
        with refused(ArgumentError, name, "Vocabulary"):
            engine.set_classes(vocabulary, **settings)


def test_times_can_be_off():
    with Engine(STORED, EngineConfig(**CPU, with_times=False)) as engine:
        engine.set_classes(COLOURS)
        assert engine.segment(frame()).times == {}


def test_num_threads_is_the_engines_own(monkeypatch):
    """What one engine is given changes neither the process's count nor another engine's."""
    before, seen = ops.get_num_threads(), []
    argmax = ops.upsample_argmax

    def counting(*args, **options):
        seen.append(ops.get_num_threads())
        return argmax(*args, **options)

    monkeypatch.setattr(ops, "upsample_argmax", counting)
    with (
        Engine(STORED, EngineConfig(**CPU, num_threads=3)) as three,
        Engine(STORED, EngineConfig(**CPU, num_threads=1)) as one,
        Engine(STORED, EngineConfig(**CPU)) as free,
    ):
        for engine in (three, one, free):
            engine.set_classes(COLOURS)
        for engine in (three, one, free, three):
            engine.segment(frame())
    assert seen == [3, 1, before, 3]
    assert ops.get_num_threads() == before


def test_too_many_phrases_in_a_vocabulary(engine):
    names, rows = [f"c{i}" for i in range(5)], np.eye(5, 4, dtype=np.float32) + 0.1
    vocabulary = engine.set_classes(names, embeddings=rows)
    object.__setattr__(engine.bundle.head, "max_classes", 4)
    with refused(VocabularyError, "class_names"):
        engine.set_classes(vocabulary)
