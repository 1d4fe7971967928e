"""The engine end to end: right labels, swaps between frames, lanes, and clear refusals."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from support.colour_words import COLOUR_WORDS, colour_embeds
from support.errors import refused
from zsseg_rt import (
    ArgumentError,
    BackendError,
    Engine,
    EngineConfig,
    EngineStateError,
    ShapeError,
    VocabularyError,
    ops,
)
from zsseg_rt.ops import reference

PLAIN = {"device": "cpu", "precision": "float32", "use_cache": False}
CPU = EngineConfig(**PLAIN, num_threads=1)


@pytest.fixture(scope="module")
def colours(colour_bundle):
    with Engine(colour_bundle, EngineConfig(**PLAIN, num_threads=1, with_scores=True)) as engine:
        yield engine


def stripes(*names, height=40, width=30):
    """A picture of vertical stripes in the given colour words."""
    columns = [np.full((height, width, 3), COLOUR_WORDS[name], np.uint8) for name in names]
    return np.ascontiguousarray(np.concatenate(columns, axis=1))


def test_labels_are_the_named_colours(colours):
    colours.set_classes(["blue", "red", "white"])
    seg = colours.segment(stripes("red", "white", "blue"))
    colours.segment(stripes("blue", "blue", "blue"))  # into arrays of its own
    assert seg.labels.shape == (40, 90)
    assert seg.labels.dtype == np.uint8
    assert seg.labels[20, [15, 45, 75]].tolist() == [1, 2, 0]
    assert {s.name for s in seg.present()} == {"red", "white", "blue"}
    assert sum(s.share for s in seg.present()) == pytest.approx(1.0)
    assert seg.scores.shape == seg.labels.shape
    assert 0.0 <= seg.scores.min() <= seg.scores.max() <= 1.0


def test_engine_equals_the_reference_pipeline(colours):
    frame = np.random.default_rng(4).integers(0, 256, (97, 131, 3)).astype(np.uint8)
    names, embeds = colour_embeds()
    colours.set_classes(names)
    image = reference.preprocess(frame, size_hw=(256, 256), mean=(0, 0, 0), std=(1, 1, 1))
    patches = image.reshape(3, 64, 4, 64, 4).mean(axis=(2, 4)).reshape(3, -1).T
    patches = np.concatenate([patches, np.ones((len(patches), 1), np.float32)], axis=1)
    head = colours.bundle.head
    logits = reference.patch_text_similarity(
        np.ascontiguousarray(patches[None]), embeds, logit_scale=head.logit_scale, normalize=False
    ).reshape(1, len(names), 64, 64)
    expected, scores = reference.upsample_argmax(
        logits, frame.shape[:2], activation=head.activation, with_scores=True
    )
    seg = colours.segment(frame)
    assert (seg.labels == expected[0]).mean() > 0.999  # sums of 16 pixels in another order
    np.testing.assert_allclose(seg.scores, scores[0], atol=2e-4)  # softmax at scale 50


@pytest.mark.parametrize("height_width", [(1, 1), (1, 7), (5, 1), (3, 2), (255, 257), (700, 33)])
def test_any_frame_size(colours, height_width):
    colours.set_classes(["red", "blue"])
    seg = colours.segment(np.full((*height_width, 3), COLOUR_WORDS["blue"], np.uint8))
    assert seg.labels.shape == height_width
    assert (seg.labels == 1).all()


def test_synonyms_count_for_their_class_and_background_is_unknown(colours):
    colours.set_classes([["blue", "light blue", "dark blue"], "red"], background=["white"])
    seg = colours.segment(stripes("dark blue", "red", "light blue", "white"))
    assert seg.labels[20, [15, 45, 75, 105]].tolist() == [0, 1, 0, 255]
    assert seg.names == ("blue", "red")
    assert seg.unknown == 255


def test_more_than_254_classes_are_uint16(colours):
    names, embeds = colour_embeds()  # which replace the text side
    many = [f"{name} {i}" for i in range(15) for name in names]
    colours.set_classes(many, embeddings=np.tile(embeds, (15, 1)))
    seg = colours.segment(stripes("red", "blue"))
    assert seg.labels.dtype == np.uint16
    assert seg.labels[20, [15, 45]].tolist() == [names.index("red"), names.index("blue")]


def test_times_cover_the_stages(colours):
    colours.set_classes(["red", "blue"])
    times = colours.segment(stripes("red")).times
    assert {"preprocess", "image_encoder", "similarity", "upsample_argmax", "total"} <= set(times)
    parts = sum(ms for stage, ms in times.items() if stage != "total")
    assert parts == pytest.approx(times["total"])
    assert min(times.values()) >= 0.0


def test_self_check_passes_and_finds_a_wrong_stage(colours, monkeypatch):
    report = colours.self_check()
    assert report.passed
    assert report.first_failure is None
    assert {"image", "patch_embeds", "mask_logits", "labels"} <= {s.stage for s in report.stages}
    original = ops.patch_text_similarity
    monkeypatch.setattr(ops, "patch_text_similarity", lambda *a, **b: -original(*a, **b))
    report = colours.self_check()
    assert not report.passed
    assert report.first_failure.stage == "mask_logits"


def test_what_is_used_before_or_after_its_time_is_refused(colour_bundle):
    engine = Engine(colour_bundle, CPU)
    with refused(VocabularyError, "class_names"):
        engine.segment(np.zeros((4, 4, 3), np.uint8))
    engine.close()
    engine.close()
    with refused(EngineStateError, "engine"):
        engine.segment(np.zeros((4, 4, 3), np.uint8))
    with refused(EngineStateError, "engine"):
        engine.set_classes(["red"])


def test_bad_classes_leave_the_old_ones_in_force(colours):
    before = colours.set_classes(["red", "blue"])
    for names in (["purpel"], None, 3, {"red", "blue"}, "red"):
        with refused(VocabularyError, "class_names"):
            colours.set_classes(names)
    for norm in (1e-13, 1e13, 3e38):  # whose products no float32 holds
        with refused(VocabularyError, "embeddings"):
            colours.set_classes(["x"], embeddings=np.float32([[norm, 0, 0, 0]]))
    with refused(ShapeError, "embeddings"):
        colours.set_classes(["x"], embeddings=np.ones((1, 5), np.float32))
    with refused(VocabularyError, "templates"):
        colours.set_classes(["x"], templates=["no braces"])
    assert colours.vocabulary is before


def test_nan_from_the_graphs(colours, monkeypatch):
    colours.set_classes(["red"])
    similarity = ops.patch_text_similarity
    monkeypatch.setattr(
        ops, "patch_text_similarity", lambda *a, **b: similarity(*a, **b) * np.float32(np.nan)
    )
    with refused(BackendError, "mask_logits"):
        colours.segment(np.full((4, 4, 3), 255, np.uint8))


# --- lanes, each with the classes its result names ------------------------------------------------

STORED = Path(__file__).parents[1] / "bundles" / "v1" / "dense.zsseg"
COLOURS = ["red", "green", "blue", "white", "black", "grey"]
LISTS = [COLOURS[:2], COLOURS[::-1], COLOURS[2:5], [COLOURS[0], COLOURS[3:5]]]


def frame(seed=0):
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    return np.ascontiguousarray(blocks.repeat(8, 0).repeat(8, 1))


@pytest.fixture
def engine():
    with Engine(STORED, EngineConfig(**PLAIN, num_lanes=4, num_threads=1)) as engine:
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
        with Engine(STORED, EngineConfig(**PLAIN)) as fresh:
            fresh.set_classes(names)
            for index in range(3):
                expected[number, index] = fresh.segment(frame(index))
    assert len({seg.vocabulary_version for _, seg in results}) > 1
    for index, seg in results:
        fresh = expected[LISTS.index(versions[seg.vocabulary_version]), index]
        assert seg.names == fresh.names
        np.testing.assert_array_equal(seg.labels, fresh.labels)


def test_lanes_close_one_by_one_and_with_their_engine(engine):
    engine.set_classes(COLOURS)
    first, second, _ = (engine.lane() for _ in range(3))
    with refused(EngineStateError, "lanes"):
        engine.lane()
    first.close()
    first.close()
    with refused(EngineStateError, "lane"):
        first.segment(frame())
    np.testing.assert_array_equal(second.segment(frame()).labels, engine.segment(frame()).labels)
    engine.lane()
    engine.close()
    with refused(EngineStateError, "lane"):
        second.segment(frame())
    second.close()
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


def test_unknown_below_of_an_engine_and_of_a_call():
    with Engine(STORED, EngineConfig(**PLAIN, unknown_below=1.0)) as engine:
        engine.set_classes(COLOURS)
        for _ in range(2):
            assert (engine.segment(frame()).labels == 255).mean() > 0.5
            assert (engine.segment(frame(), unknown_below=0.0).labels != 255).all()
        for value in (-0.1, 1.1, float("nan"), "much"):
            with refused(ArgumentError, "unknown_below"):
                engine.segment(frame(), unknown_below=value)


def test_a_vocabulary_is_taken_back_with_a_version_of_its_own(engine):
    first = engine.set_classes([COLOURS[0], COLOURS[2:4]], background=["grey"])
    before = engine.segment(frame()).labels
    engine.set_classes(COLOURS)
    again = engine.set_classes(first)
    assert again.version > first.version
    assert (again.names, again.phrases) == (first.names, first.phrases)
    np.testing.assert_array_equal(engine.segment(frame()).labels, before)
    for name, value in {
        "background": ["sky"],
        "templates": ["{}"],
        "embeddings": np.ones(3),
    }.items():
        with refused(ArgumentError, name, "Vocabulary"):
            engine.set_classes(first, **{name: value})
    with Engine(STORED.with_name("descriptor.zsseg"), EngineConfig(**PLAIN)) as other:
        wide = other.set_classes(["name 0"])
    with refused(ShapeError, "embeddings"):
        engine.set_classes(wide)
    names, rows = [f"c{i}" for i in range(5)], np.eye(5, 4, dtype=np.float32) + 0.1
    many = engine.set_classes(names, embeddings=rows)
    object.__setattr__(engine.bundle.head, "max_classes", 4)
    with refused(VocabularyError, "class_names"):
        engine.set_classes(many)


def test_num_threads_is_the_engines_own(monkeypatch):
    """One engine's count changes neither the process's nor another engine's."""
    before, counts = ops.get_num_threads(), []
    argmax = ops.upsample_argmax

    def counting(*args, **options):
        counts.append(ops.get_num_threads())
        return argmax(*args, **options)

    monkeypatch.setattr(ops, "upsample_argmax", counting)
    with (
        Engine(STORED, EngineConfig(**PLAIN, num_threads=3)) as three,
        Engine(STORED, EngineConfig(**PLAIN)) as free,
    ):
        for engine in (three, free, three):
            engine.set_classes(COLOURS)
            engine.segment(frame())
    assert counts == [3, before, 3]
    assert ops.get_num_threads() == before
