"""Labelled clips: frames depend on their arguments alone, and the motion they state is exact."""

import itertools

import numpy as np
import pytest
from scene_clips import SceneClip, flicker

from support.errors import refused
from tools.scenes import World
from zsseg_rt.errors import ArgumentError, ShapeError

WORLD = World(3, size=320)


def clip(**settings):
    return SceneClip(WORLD, **{"index": 0, "speed": 4.0, "length": 12, **settings})


def moved(picture, frame):
    """Where the pixels that were visible were in the frame before, and are now."""
    y, x = np.nonzero(frame.was_visible)
    dx, dy = frame.motion[y, x].T
    return picture[y + dy, x + dx], (y, x)


def test_frames_depend_on_the_arguments_alone():
    first, again = list(clip()), list(clip())
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.motion, other.motion)
    shorter = list(clip(length=3))
    np.testing.assert_array_equal(shorter[2].image, first[2].image)
    for changed in (clip(index=1), clip(speed=2.0), SceneClip(World(4, size=320), 0, speed=4.0,
                                                             length=12)):  # fmt: skip
        assert not np.array_equal(list(changed)[-1].image, first[-1].image)


@pytest.mark.parametrize("speed", [0.5, 3.0, 8.0])
def test_the_motion_is_exact(speed):
    """Along it, labels are equal and colours differ by the noise of two frames alone."""
    frames = list(clip(speed=speed, num_moving=6))
    for before, frame in itertools.pairwise(frames):
        was, here = moved(before.labels, frame)
        np.testing.assert_array_equal(was, frame.labels[here])
        was, here = moved(before.image.astype(int), frame)
        difference = np.abs(was - frame.image[here])
        assert np.median(difference) < 12  # noise of at most 7 levels, twice
        elsewhere = np.abs(np.roll(before.image.astype(int), 64, (0, 1)) - frame.image)
        assert difference.mean() < 0.5 * elsewhere.mean()


def test_the_window_moves_at_its_speed_and_things_at_half_of_it():
    clips = [SceneClip(WORLD, index, speed=6.0, length=12, num_moving=8) for index in range(3)]
    steps = np.concatenate([frame.motion.reshape(-1, 2) for c in clips for frame in list(c)[1:]])
    lengths = np.unique(np.hypot(*steps.T).round(1))
    assert lengths.min() >= 1.5  # half a pixel of rounding per axis
    assert lengths.max() <= 10.5
    still_world = [frame.motion for frame in list(clip(num_moving=0))[1:]]
    assert all((motion == motion[0, 0]).all() for motion in still_world)
    assert len({tuple(m) for c in clips for f in list(c)[1:] for m in f.motion.reshape(-1, 2)}) > 4


def test_without_speed_only_the_noise_changes():
    frames = list(clip(speed=0.0))
    for frame in frames[1:]:
        np.testing.assert_array_equal(frame.labels, frames[0].labels)
        assert frame.was_visible.all()
        assert not frame.motion.any()
        assert not np.array_equal(frame.image, frames[0].image)


def test_the_first_frame_has_no_past_and_what_comes_in_was_not_visible():
    first, second, *_ = clip(speed=5.0, num_moving=0)
    assert not first.was_visible.any()
    dx, dy = second.motion[0, 0]
    came_in = 1 - (128 - abs(dx)) * (128 - abs(dy)) / 128**2
    assert second.was_visible.mean() == pytest.approx(1 - came_in)


def test_what_a_thing_uncovers_was_not_visible():
    hidden = sum(
        (~frame.was_visible).sum()
        for index in range(4)
        for frame in list(SceneClip(WORLD, index, speed=0.001, length=2, num_moving=0))[1:]
    )
    uncovered = 0
    for index in range(4):
        frames = list(SceneClip(WORLD, index, speed=8.0, length=6, num_moving=8))
        for frame in frames[1:]:
            inner = frame.was_visible[20:-20, 20:-20]
            uncovered += (~inner).sum()
    assert hidden == 0
    assert uncovered > 0


def test_flicker_counts_changes_that_the_truth_does_not_have():
    frames = list(clip(speed=3.0))
    assert flicker(frames[4].labels, frames[5].labels, frames[5])[0] == 0
    compared = flicker(frames[4].labels, frames[5].labels, frames[5])[1]
    assert compared == frames[5].was_visible.sum()
    wrong = frames[5].labels.copy()
    wrong[60:64, 60:64] += 1
    changed, _ = flicker(frames[4].labels, wrong, frames[5])
    assert changed == frames[5].was_visible[60:64, 60:64].sum() > 0
    assert flicker(wrong, wrong, frames[0]) == (0, 0)


BAD = [
    ({"index": -1}, "index"),
    ({"speed": -1.0}, "speed"),
    ({"speed": float("nan")}, "speed"),
    ({"length": 0}, "length"),
    ({"side": 320}, "side"),
    ({"num_moving": -1}, "num_moving"),
]


@pytest.mark.parametrize(("settings", "argument"), BAD)
def test_settings_out_of_range_are_refused(settings, argument):
    with refused(ArgumentError, argument):
        clip(**settings)


def test_magnified_worlds_are_refused():
    with refused(ArgumentError, "world"):
        SceneClip(World(3, size=160, zoom=2), 0, speed=1.0, length=2)


def test_labels_of_another_size_are_refused():
    frame = next(iter(clip()))
    with refused(ShapeError, "labels"):
        flicker(frame.labels[:4], frame.labels, frame)
