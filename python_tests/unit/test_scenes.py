"""The synthetic world and its clips: repeatable, labelled as drawn; words recombine."""

import hashlib
import itertools

import numpy as np
import pytest
from scene_clips import SceneClip, flicker

from tools.scenes import CLASS_NAMES, IGNORE, SceneDataset, World, write_folder
from tools.scenes.__main__ import main as scenes_command
from zsseg_rt.evaluation.datasets import create_dataset


def digest(scene):
    return hashlib.sha256(scene.image.tobytes() + scene.labels.tobytes()).hexdigest()


def test_a_scene_depends_on_seed_and_index_alone():
    forward = [digest(World(3).scene(index)) for index in range(4)]
    world = World(3)
    backward = [digest(world.scene(index, num_captions=1)) for index in (3, 2, 1, 0)]
    assert forward == backward[::-1]
    assert digest(World(4).scene(0)) != forward[0]
    splits = ("train", "val", "pretraining", "demo", "train_seen")
    images = [SceneDataset(s, length=3, seed=n)[0].image.tobytes() for s in splits for n in (0, 1)]
    assert len({*forward, *images}) == 14


def test_labels_are_what_was_drawn():
    scene = World(5, class_share=0.5).scene(7)
    for number, kind in enumerate(scene.kinds):
        labels = scene.labels[scene.identities == number]
        assert (
            labels == (CLASS_NAMES.index(kind.name) if kind.name in CLASS_NAMES else IGNORE)
        ).all()
    assert (scene.labels[scene.identities == 255] == IGNORE).all()


@pytest.mark.parametrize("options", [{}, {"zoom": 2}])
def test_a_written_world_reads_as_it_is_drawn(options, tmp_path):
    write_folder(tmp_path, {"val": 3, "train_seen": 1}, **options)
    drawn, read = SceneDataset("val", **options), create_dataset("folder", tmp_path, "val")
    assert (read.class_names, tuple(read.seen)) == (drawn.class_names, drawn.seen)
    assert (len(read), read.ignore_label) == (3, drawn.ignore_label)
    for number in range(3):
        assert np.array_equal(read[number].image, drawn[number].image)
        assert np.array_equal(read[number].labels, drawn[number].labels)


def test_the_command_writes_a_split_once_and_of_the_same_classes(tmp_path, capsys):
    assert scenes_command([str(tmp_path), "--length", "2", "--size", "64"]) == 0
    assert scenes_command([str(tmp_path), "--length", "1", "--split", "val"]) == 1
    (tmp_path / "classes.txt").write_text("other\n")
    assert scenes_command([str(tmp_path), "--length", "1", "--split", "demo"]) == 1
    assert capsys.readouterr().err.count("expected") == 2


@pytest.mark.parametrize("speed", [0.5, 8.0])
def test_the_motion_of_a_clip_is_exact(speed):
    """Along it, labels are equal and colours differ by the noise of two frames alone."""
    clip = SceneClip(World(3, size=320), 0, speed=speed, length=6, num_moving=6)
    frames, again = list(clip), list(clip)
    assert not frames[0].was_visible.any()
    np.testing.assert_array_equal(frames[-1].image, again[-1].image)
    for before, frame in itertools.pairwise(frames):
        y, x = np.nonzero(frame.was_visible)
        dx, dy = frame.motion[y, x].T
        np.testing.assert_array_equal(before.labels[y + dy, x + dx], frame.labels[y, x])
        difference = np.abs(before.image[y + dy, x + dx].astype(int) - frame.image[y, x])
        assert np.median(difference) < 12  # noise of at most 7 levels, twice
        assert flicker(before.labels, frame.labels, frame)[0] == 0
