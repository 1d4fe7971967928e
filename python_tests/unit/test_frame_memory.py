"""A memory steadies labels along the motion and spares still frames, and never mixes scenes."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import Engine, EngineConfig, FrameMemory, ops
from zsseg_rt.errors import ArgumentError, BackendError, BackendUnavailableError, EngineStateError
from zsseg_rt.runtime import frame_memory as memory_module

STORED = Path(__file__).parents[1] / "bundles" / "v1"
CPU = {"device": "cpu", "precision": "float32", "use_cache": False}
COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (30, 160, 50)}


@pytest.fixture(scope="module")
def shared_engine():
    with Engine(STORED / "dense.zsseg", EngineConfig(**CPU, num_lanes=2)) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine):
    shared_engine.set_classes(list(COLOURS))
    return shared_engine


@pytest.fixture
def runs(monkeypatch):
    """Counts the frames that were run."""
    counted, preprocess = [], ops.preprocess

    def counting(*arguments, **settings):
        counted.append(1)
        return preprocess(*arguments, **settings)

    monkeypatch.setattr(ops, "preprocess", counting)
    return counted


def texture(size_hw, seed=0):
    """Light and dark spots, factors around 1: what optical flow can follow."""
    noise = np.random.default_rng(seed).standard_normal(size_hw)
    smooth = cv2.GaussianBlur(noise, (0, 0), 5)
    return (1 + 0.25 * np.clip(smooth / smooth.std(), -2, 2))[..., None]


def picture(seed=0, size_hw=(256, 256), split=0.5):
    """Red on the left of a line, blue on the right, with spots."""
    colours = np.empty((*size_hw, 3))
    colours[:, : int(split * size_hw[1])] = COLOURS["red"]
    colours[:, int(split * size_hw[1]) :] = COLOURS["blue"]
    return np.clip(colours * texture(size_hw, seed), 0, 255).astype(np.uint8)


def noisy(frame, seed, levels=12):
    noise = np.random.default_rng(seed).normal(0, levels, frame.shape)
    return np.clip(frame + noise, 0, 255).astype(np.uint8)


def panned(scene, x):
    return np.ascontiguousarray(scene[:, x : x + 256])


def test_the_first_frame_is_labelled_as_without_a_memory(engine):
    frame = picture()
    plain = engine.segment(frame, with_scores=True)
    first = engine.segment(frame, with_scores=True, memory=FrameMemory())
    np.testing.assert_array_equal(first.labels, plain.labels)
    np.testing.assert_array_equal(first.scores, plain.scores)
    assert not first.reused


def test_scores_of_a_still_scene_settle_on_the_mean(engine):
    """Each noisy frame moves the scores far less than it would by itself."""
    scene, memory = picture(), FrameMemory()
    plain, steady = [], []
    for seed in range(12):
        frame = noisy(scene, seed)
        plain.append(engine.segment(frame, with_scores=True).scores)
        steady.append(engine.segment(frame, with_scores=True, memory=memory).scores)
    steps = [np.abs(np.diff(scores[5:], axis=0)).mean() for scores in (plain, steady)]
    assert steps[1] < 0.5 * steps[0]


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_labels_follow_a_pan(order):
    """A window that pans fast over red and blue: the border between them stays where it is."""
    scene = picture(size_hw=(256, 640), split=0.55)
    if order == "bgr":
        scene = np.ascontiguousarray(scene[..., ::-1])
    memory = FrameMemory()
    with Engine(STORED / "dense.zsseg", EngineConfig(**CPU, channel_order=order)) as engine:
        engine.set_classes(list(COLOURS))
        for x in range(0, 300, 12):
            frame = panned(scene, x)
            steady = engine.segment(frame, memory=memory).labels
            plain = engine.segment(frame).labels
            assert (steady == plain).mean() > 0.98, x


def test_nothing_remains_behind_a_moving_thing(engine):
    background = np.clip(np.array(COLOURS["blue"]) * texture((256, 256)), 0, 255)
    memory = FrameMemory()
    for x in range(0, 192, 16):
        frame = background.astype(np.uint8)
        frame[96:160, x : x + 64] = COLOURS["red"]
        steady = engine.segment(frame, memory=memory).labels
        plain = engine.segment(frame).labels
        behind = steady[96:160, : max(x - 16, 0)]
        assert (behind == 1).all(), x
        assert (steady == plain).mean() > 0.97, x


CHANGES = {
    "vocabulary": lambda engine, memory: engine.set_classes(["blue", "red", "green"]),
    "same vocabulary again": lambda engine, memory: engine.set_classes(list(COLOURS)),
    "reset": lambda engine, memory: memory.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_ends_a_scene_is_followed_by_a_fresh_start(engine, change):
    memory = FrameMemory(skip_still=True)
    for seed in range(3):
        engine.segment(noisy(picture(), seed), memory=memory)
    CHANGES[change](engine, memory)
    frame = noisy(picture(), 9)
    again = engine.segment(frame, with_scores=True, memory=memory)
    plain = engine.segment(frame, with_scores=True)
    assert not again.reused
    np.testing.assert_array_equal(again.scores, plain.scores)
    assert again.vocabulary_version == plain.vocabulary_version


@pytest.mark.parametrize(
    "other", [picture(7, split=0.2), picture(0, (256, 300)), picture(0, (9, 9))]
)
def test_cuts_and_other_sizes_begin_anew(engine, other):
    memory = FrameMemory()
    for seed in range(3):
        engine.segment(noisy(picture(), seed), memory=memory)
    again = engine.segment(other, with_scores=True, memory=memory)
    plain = engine.segment(other, with_scores=True)
    np.testing.assert_array_equal(again.scores, plain.scores)


def test_lanes_take_turns_with_a_memory(engine):
    frames = [noisy(picture(), seed) for seed in range(4)]
    alone, shared = FrameMemory(), FrameMemory()
    with engine.lane() as lane:
        for number, frame in enumerate(frames):
            expected = engine.segment(frame, with_scores=True, memory=alone)
            where = lane if number % 2 else engine
            found = where.segment(frame, with_scores=True, memory=shared)
            np.testing.assert_array_equal(found.scores, expected.scores)


def test_two_memories_do_not_know_of_each_other(engine):
    one, other = FrameMemory(), FrameMemory()
    expected = [engine.segment(noisy(picture(), s), with_scores=True, memory=one).scores
                for s in range(3)]  # fmt: skip
    one.reset()
    for seed in range(3):
        engine.segment(picture(5 + seed), memory=other)
        found = engine.segment(noisy(picture(), seed), with_scores=True, memory=one).scores
        np.testing.assert_array_equal(found, expected[seed])


def test_a_memory_in_use_is_refused_and_then_serves_again(engine, monkeypatch):
    memory, all_finite, tried = FrameMemory(), ops.all_finite, []

    def intrude(*arguments, **settings):
        with engine.lane() as lane:
            for call in (lambda: lane.segment(picture(), memory=memory), memory.reset):
                with refused(EngineStateError, "memory"):
                    call()
        tried.append(1)
        return all_finite(*arguments, **settings)

    monkeypatch.setattr(ops, "all_finite", intrude)
    engine.segment(picture(), memory=memory)
    monkeypatch.undo()
    assert tried == [1]
    engine.segment(picture(), memory=memory)


def test_after_an_error_the_past_is_forgotten(engine, monkeypatch):
    memory, similarity = FrameMemory(skip_still=True), ops.patch_text_similarity
    engine.segment(noisy(picture(), 0), memory=memory)
    monkeypatch.setattr(
        ops, "patch_text_similarity", lambda *a, **b: similarity(*a, **b) * np.float32(np.nan)
    )
    with refused(BackendError, "mask_logits"):
        engine.segment(noisy(picture(), 1, 60), memory=memory)
    monkeypatch.undo()
    frame = noisy(picture(), 2)
    again = engine.segment(frame, with_scores=True, memory=memory)
    np.testing.assert_array_equal(again.scores, engine.segment(frame, with_scores=True).scores)


@pytest.mark.parametrize("family", ["proposals", "segment_tokens"])
def test_families_without_class_logits_refuse(family):
    with Engine(STORED / f"{family}.zsseg", EngineConfig(**CPU)) as engine:
        engine.set_classes(["name 0", "name 1"])
        with refused(ArgumentError, "memory", family):
            engine.segment(picture(), memory=FrameMemory())
        for settings in ({"steady": True}, {"skip_still": True}):
            with refused(ArgumentError, "memory", family):
                engine.stream("test://", **settings)


def test_what_is_no_memory_is_refused(engine):
    with refused(ArgumentError, "memory"):
        engine.segment(picture(), memory=True)
    with refused(ArgumentError, "memory"):
        FrameMemory(steady=False)


def test_without_opencv_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with refused(BackendUnavailableError, "memory", "'.[opencv]'"):
        FrameMemory()


# ---- still frames ----------------------------------------------------------------------------


def still(**settings):
    return FrameMemory(steady=False, skip_still=True, **settings)


def test_a_still_frame_gets_the_last_labels_again_and_is_not_run(engine, runs):
    memory = FrameMemory(skip_still=True)
    first = engine.segment(picture(), with_scores=True, memory=memory)
    again = engine.segment(noisy(picture(), 1, 2), with_scores=True, memory=memory)
    assert (first.reused, again.reused, len(runs)) == (False, True, 1)
    np.testing.assert_array_equal(again.labels, first.labels)
    np.testing.assert_array_equal(again.scores, first.scores)
    assert (again.names, again.vocabulary_version) == (first.names, first.vocabulary_version)


def test_results_are_the_caller_s_own():
    with Engine(STORED / "dense.zsseg", EngineConfig(**CPU, with_class_scores="low")) as engine:
        engine.set_classes(list(COLOURS))
        memory = still()
        expected = engine.segment(picture(), with_scores=True)
        for reused in (False, True, True, True):
            seg = engine.segment(picture(), with_scores=True, memory=memory)
            assert seg.reused is reused
            for name, value in (("labels", 77), ("scores", -1), ("class_scores", 77)):
                np.testing.assert_array_equal(getattr(seg, name), getattr(expected, name))
                getattr(seg, name)[...] = value


def test_a_change_runs_the_frame(engine):
    memory, changed = still(), picture()
    engine.segment(picture(), memory=memory)
    changed[64:128, 64:128] = COLOURS["green"]
    seg = engine.segment(changed, memory=memory)
    assert not seg.reused
    np.testing.assert_array_equal(seg.labels, engine.segment(changed).labels)


def test_slow_changes_add_up(engine):
    """Frames are compared with the last one that ran, not with the one before."""
    memory, base = still(), np.full((64, 64, 3), 100, np.uint8)
    found = [engine.segment(base + np.uint8(level), memory=memory).reused for level in range(10)]
    assert found == [False, *[True] * 6, False, True, True]


def test_labels_are_given_again_for_a_second(engine):
    memory = still()
    times = [10.0, 10.5, 11.0, 11.01, 12.0, 12.02, 11.9]  # the last is before the one that ran
    found = [engine.segment(picture(), memory=memory, captured_at=at).reused for at in times]
    assert found == [False, True, True, False, True, False, False]


def test_without_a_capture_time_the_monotonic_clock_counts(engine, monkeypatch):
    now = [50.0]
    monkeypatch.setattr(memory_module.time, "monotonic", lambda: now[0])
    memory, found = still(), []
    for now[0] in (50.0, 50.9, 51.1):
        found.append(engine.segment(picture(), memory=memory).reused)
    assert found == [False, True, False]


@pytest.mark.parametrize(
    "settings", [{"unknown_below": 0.9}, {"with_scores": True}, {"unknown_below": 0.0}]
)
def test_another_rule_runs_the_frame(engine, settings):
    memory = still()
    engine.segment(picture(), memory=memory)
    changed = engine.segment(picture(), memory=memory, **settings)
    assert not changed.reused
    np.testing.assert_array_equal(changed.labels, engine.segment(picture(), **settings).labels)
    assert engine.segment(picture(), memory=memory, **settings).reused


def test_times_tell_what_was_done(engine):
    memory = FrameMemory(skip_still=True)
    first = engine.segment(picture(), memory=memory)
    again = engine.segment(picture(), memory=memory)
    assert {"compare", "image_encoder", "steady", "total"} <= set(first.times)
    assert set(again.times) == {"compare", "total"}
    assert not {"compare", "steady"} & set(engine.segment(picture()).times)
