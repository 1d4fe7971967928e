"""A memory steadies labels along the motion and spares still frames, and never mixes scenes."""

import sys
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import Engine, EngineConfig, FrameMemory, ops
from zsseg_rt.errors import ArgumentError, BackendError, BackendUnavailableError, EngineStateError
from zsseg_rt.runtime import frame_memory as memory_module
from zsseg_rt.runtime.frame_memory import Glance, MotionEstimator, is_still

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


def spots(size_hw, seed=0, smooth=5):
    """Random light and dark around 0: every place looks different, and optical flow can follow."""
    noise = np.random.default_rng(seed).standard_normal(size_hw)
    noise = cv2.GaussianBlur(noise, (0, 0), smooth)
    return (noise / noise.std())[..., None]


def image(seed=0, size_hw=(256, 256), split=0.5):
    """Red on the left of a line, blue on the right, with spots."""
    colours = np.empty((*size_hw, 3))
    colours[:, : int(split * size_hw[1])] = COLOURS["red"]
    colours[:, int(split * size_hw[1]) :] = COLOURS["blue"]
    textured = colours * (1 + 0.25 * np.clip(spots(size_hw, seed), -2, 2))
    return np.clip(textured, 0, 255).astype(np.uint8)


def noisy(frame, seed, levels=12):
    noise = np.random.default_rng(seed).normal(0, levels, frame.shape)
    return np.clip(frame + noise, 0, 255).astype(np.uint8)


def test_scores_of_a_still_scene_settle_on_the_mean(engine):
    """Each noisy frame moves the scores far less than it would by itself."""
    scene, memory = image(), FrameMemory()
    plain, steady = [], []
    for seed in range(12):
        frame = noisy(scene, seed)
        plain.append(engine.segment(frame, with_scores=True).scores)
        steady.append(engine.segment(frame, with_scores=True, memory=memory).scores)
    steps = [np.abs(np.diff(scores[5:], axis=0)).mean() for scores in (plain, steady)]
    assert steps[1] < 0.5 * steps[0]
    alive = weakref.ref(memory)
    del memory  # is freed at once, and with it what lies on a GPU
    assert alive() is None


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_labels_follow_a_pan(order):
    """A window that pans fast over red and blue: the border between them stays where it is."""
    scene = image(size_hw=(256, 640), split=0.55)
    if order == "bgr":
        scene = np.ascontiguousarray(scene[..., ::-1])
    memory = FrameMemory()
    with Engine(STORED / "dense.zsseg", EngineConfig(**CPU, channel_order=order)) as engine:
        engine.set_classes(list(COLOURS))
        for x in range(0, 300, 12):
            frame = np.ascontiguousarray(scene[:, x : x + 256])
            steady = engine.segment(frame, memory=memory).labels
            plain = engine.segment(frame).labels
            assert (steady == plain).mean() > 0.98, x


def test_nothing_remains_behind_a_moving_thing(engine):
    memory = FrameMemory()
    for x in range(0, 192, 16):
        frame = image(split=0)
        frame[96:160, x : x + 64] = COLOURS["red"]
        steady = engine.segment(frame, memory=memory).labels
        plain = engine.segment(frame).labels
        assert (steady[96:160, : max(x - 16, 0)] == 1).all(), x
        assert (steady == plain).mean() > 0.97, x


CHANGES = {
    "vocabulary": lambda engine, memory: engine.set_classes(["blue", "red", "green"]),
    "same vocabulary again": lambda engine, memory: engine.set_classes(list(COLOURS)),
    "reset": lambda engine, memory: memory.reset(),
    "cut": lambda engine, memory: image(7, split=0.2),
    "size": lambda engine, memory: image(0, (256, 300)),
    "tiny": lambda engine, memory: image(0, (9, 9)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_ends_a_scene_is_followed_by_a_fresh_start(engine, change):
    memory = FrameMemory(skip_still=True)
    for seed in range(3):
        engine.segment(noisy(image(), seed), memory=memory)
    other = CHANGES[change](engine, memory)
    frame = other if isinstance(other, np.ndarray) else noisy(image(), 9)
    again = engine.segment(frame, with_scores=True, memory=memory)
    plain = engine.segment(frame, with_scores=True)
    assert not again.reused
    np.testing.assert_array_equal(again.scores, plain.scores)
    assert again.vocabulary_version == plain.vocabulary_version


def test_lanes_take_turns_with_a_memory(engine):
    frames = [noisy(image(), seed) for seed in range(4)]
    alone, shared = FrameMemory(), FrameMemory()
    with engine.lane() as lane:
        for number, frame in enumerate(frames):
            expected = engine.segment(frame, with_scores=True, memory=alone)
            where = lane if number % 2 else engine
            seg = where.segment(frame, with_scores=True, memory=shared)
            np.testing.assert_array_equal(seg.scores, expected.scores)


def test_a_memory_in_use_is_refused_and_then_serves_again(engine, monkeypatch):
    memory, all_finite, tried = FrameMemory(), ops.all_finite, []

    def intrude(*arguments, **settings):
        monkeypatch.undo()
        with engine.lane() as lane:
            for call in (lambda: lane.segment(image(), memory=memory), memory.reset):
                with refused(EngineStateError, "memory"):
                    call()
        tried.append(1)
        return all_finite(*arguments, **settings)

    monkeypatch.setattr(ops, "all_finite", intrude)
    for _ in range(2):
        engine.segment(image(), memory=memory)
    assert tried == [1]


def test_after_an_error_the_past_is_forgotten(engine, monkeypatch):
    memory, similarity = FrameMemory(skip_still=True), ops.patch_text_similarity
    engine.segment(noisy(image(), 0), memory=memory)
    monkeypatch.setattr(
        ops, "patch_text_similarity", lambda *a, **b: similarity(*a, **b) * np.float32(np.nan)
    )
    with refused(BackendError, "mask_logits"):
        engine.segment(noisy(image(), 1, 60), memory=memory)
    monkeypatch.undo()
    frame = noisy(image(), 2)
    again = engine.segment(frame, with_scores=True, memory=memory)
    np.testing.assert_array_equal(again.scores, engine.segment(frame, with_scores=True).scores)


def test_what_is_no_memory_and_families_without_class_logits_are_refused(engine, monkeypatch):
    with refused(ArgumentError, "memory"):
        engine.segment(image(), memory=True)
    with refused(ArgumentError, "memory"):
        FrameMemory(steady=False)
    with Engine(STORED / "proposals.zsseg", EngineConfig(**CPU)) as other:
        other.set_classes(["name 0", "name 1"])
        with refused(ArgumentError, "memory", "proposals"):
            other.segment(image(), memory=FrameMemory())
        with refused(ArgumentError, "memory", "proposals"):
            other.stream("test://", steady=True)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with refused(BackendUnavailableError, "memory", "'.[opencv]'"):
        FrameMemory()


# ---- still frames ----------------------------------------------------------------------------


def still(**settings):
    return FrameMemory(steady=False, skip_still=True, **settings)


def test_results_are_the_caller_s_own():
    with Engine(STORED / "dense.zsseg", EngineConfig(**CPU, with_class_scores="low")) as engine:
        engine.set_classes(list(COLOURS))
        memory = still()
        expected = engine.segment(image(), with_scores=True)
        for reused in (False, True, True, True):
            seg = engine.segment(image(), with_scores=True, memory=memory)
            assert seg.reused is reused
            for name, value in (("labels", 77), ("scores", -1), ("class_scores", 77)):
                np.testing.assert_array_equal(getattr(seg, name), getattr(expected, name))
                getattr(seg, name)[...] = value


def test_slow_changes_add_up(engine):
    """Frames are compared with the last one that ran, not with the one before."""
    memory, base = still(), np.full((64, 64, 3), 100, np.uint8)
    reused = [engine.segment(base + np.uint8(level), memory=memory).reused for level in range(10)]
    assert reused == [False, *[True] * 6, False, True, True]


def test_labels_are_given_again_for_a_second(engine, monkeypatch):
    memory = still()
    times = [10.0, 10.5, 11.0, 11.01, 12.0, 12.02, 11.9]  # the last is before the one that ran
    reused = [engine.segment(image(), memory=memory, captured_at=at).reused for at in times]
    assert reused == [False, True, True, False, True, False, False]
    memory, reused = still(), []
    for at in (50.0, 50.9, 51.1):  # without a capture time
        monkeypatch.setattr(memory_module.time, "monotonic", lambda at=at: at)
        reused.append(engine.segment(image(), memory=memory).reused)
    assert reused == [False, True, False]


def test_another_rule_runs_the_frame_and_times_tell_what_was_done(engine):
    memory = still()
    engine.segment(image(), memory=memory)
    for settings in ({"unknown_below": 0.9}, {"with_scores": True}):
        changed = engine.segment(image(), memory=memory, **settings)
        assert not changed.reused
        np.testing.assert_array_equal(changed.labels, engine.segment(image(), **settings).labels)
        assert engine.segment(image(), memory=memory, **settings).reused
    memory = FrameMemory(skip_still=True)
    first, again = (engine.segment(image(), memory=memory).times for _ in range(2))
    assert {"compare", "image_encoder", "steady", "total"} <= set(first)
    assert set(again) == {"compare", "total"}
    assert not {"compare", "steady"} & set(engine.segment(image()).times)


GRID = (8, 16)  # rows, columns: cells of 16 by 8 pixels


def grey_spots(seed, contrast=60.0):
    grey = 128 + contrast * spots((192, 192), seed, smooth=4)[:128, :128, 0]
    return np.clip(grey, 0, 255).astype(np.uint8)


def glance(grey):
    return Glance(colours=np.repeat(grey[..., None], 3, axis=2), grey=grey)


def between(past, now):
    return MotionEstimator().between(past, now, GRID)


def test_colours_of_equal_grey_differ():
    past, now = glance(grey_spots(2)), glance(grey_spots(2))
    now.colours[64:96, 32:64] = (87, 40, 255)
    past.colours[64:96, 32:64] = (87, 200, 0)
    weight = between(past, now).past_weight[0]
    assert weight[4:6, 4:8].max() == 0.0
    assert weight[:3].min() > 0.5


@pytest.mark.parametrize("contrast", [60.0, 20.0])
def test_a_cut_is_seen_in_bright_and_in_dull_scenes(contrast):
    scenes = [grey_spots(seed, contrast) for seed in range(6)]
    cuts = [between(glance(a), glance(b)) is None for a in scenes for b in scenes if a is not b]
    assert all(cuts)
    fading = (scenes[0] * 0.95).astype(np.uint8)
    assert between(glance(scenes[0]), glance(fading)) is not None
    flat = glance(np.full((128, 128), round(contrast), np.uint8))
    assert between(flat, flat) is not None


@pytest.mark.parametrize(("cells", "levels", "expected"), [(1024, 6, True), (10, 100, True),
                                                        (11, 7, False), (11, 6, True)])  # fmt: skip
def test_a_picture_is_still_while_few_cells_change_or_all_by_little(cells, levels, expected):
    """Of 32 by 32 cells of 4 by 4 pixels."""
    past = np.full((128, 128), 90, np.uint8)
    changes = np.uint8(levels) * (np.arange(1024) < cells).reshape(32, 32)
    grey = past + np.kron(changes, np.ones((4, 4), np.uint8)).astype(np.uint8)
    assert is_still(glance(past), glance(grey)) is expected
    assert is_still(glance(grey), glance(past)) is expected
