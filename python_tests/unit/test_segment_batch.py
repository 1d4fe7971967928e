"""Several frames at once give what they give one by one."""

import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import Bundle, Engine, EngineConfig, ShapeError
from zsseg_rt.demo import demo_classes, demo_photos
from zsseg_rt.errors import EngineStateError
from zsseg_rt.photos import read_photo


@pytest.fixture(scope="module")
def frames():
    """Twelve frames of several sizes."""
    first, second = (read_photo(photo) for photo in demo_photos("scenes")[:2])
    cut = [np.ascontiguousarray(first[: 60 + 10 * n, n:]) for n in range(5)]
    return [first, second, *cut, np.ascontiguousarray(second[::-1]), *cut[:4]]


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n} lanes")
def engine(request):
    config = EngineConfig(
        device="cpu", use_cache=False, num_lanes=request.param, with_scores=True, num_threads=2
    )
    with Engine(Bundle.demo("scenes"), config) as engine:
        engine.set_classes(demo_classes("scenes"))
        yield engine


def test_results_are_those_of_one_by_one(engine, frames):
    alone = [engine.segment(frame) for frame in frames]
    for given in (frames, iter(frames)):
        together = engine.segment_batch(given)
        for seg, expected in zip(together, alone, strict=True):
            np.testing.assert_array_equal(seg.labels, expected.labels)
            np.testing.assert_array_equal(seg.scores, expected.scores)
            assert seg.vocabulary_version == expected.vocabulary_version
    assert len(engine.segment_batch(frames)) == 12
    assert engine.segment_batch([]) == []


def test_a_frame_that_is_refused_leaves_the_engine_usable(engine, frames):
    with refused(ShapeError, "frame"):
        engine.segment_batch([*frames[:3], None, *frames[3:]])
    assert len(engine.segment_batch(frames[:2])) == 2
    opened = [engine.lane() for _ in range(engine.config.num_lanes - 1)]  # all were closed
    for lane in opened:
        lane.close()


def test_lanes_that_are_open_are_in_the_way(frames):
    config = EngineConfig(device="cpu", use_cache=False, num_lanes=2)
    with Engine(Bundle.demo("scenes"), config) as engine:
        engine.set_classes(["ball", "wall"])
        with engine.lane(), refused(EngineStateError, "lanes"):
            engine.segment_batch(frames)
        assert len(engine.segment_batch(frames)) == 12
