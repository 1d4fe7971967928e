"""Tools that make data: the synthetic world, repeatable and labelled as drawn; labelme's masks."""

import base64
import hashlib
import itertools
import json

import cv2
import numpy as np
import pytest
from scene_clips import SceneClip, flicker

from support.errors import refused
from tools.labelme_masks import convert
from tools.scenes import CLASS_NAMES, IGNORE, SceneDataset, World, write_folder
from tools.scenes.__main__ import main as scenes_command
from zsseg_rt import DatasetError, Segmentation
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


# --- tools/labelme_masks.py draws what labelme and ``segment --format labelme`` write ---


def write(folder, name, shapes, size_hw=(40, 60), **changes):
    """A photo and its labelme file."""
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    (folder / "polygons").mkdir(exist_ok=True)
    photo = folder / "photos" / f"{name}.png"
    cv2.imwrite(str(photo), np.zeros((*size_hw, 3), np.uint8))
    content = {
        "imagePath": f"../photos/{name}.png", "imageHeight": 40, "imageWidth": 60,
        "shapes": shapes,
    }  # fmt: skip
    (folder / "polygons" / f"{name}.json").write_text(json.dumps(content | changes))


def shape(label, points, kind="polygon"):
    return {"label": label, "points": points, "shape_type": kind}


TRIANGLE = [shape("dog", [[1, 1], [9, 1], [9, 9]])]


def make(folder, **options):
    arguments = {"rest": "", "classes": "", "val": 0.25} | options
    return convert(folder / "polygons", folder / "out", **arguments)


def mask(folder, name):
    return cv2.imread(str(folder / "out" / "masks" / f"{name}.png"), cv2.IMREAD_UNCHANGED)


def test_shapes_become_masks(tmp_path):
    square = [[10, 10], [30, 10], [30, 30], [10, 30]]
    hole = [[15, 15], [25, 15], [25, 25], [15, 25]]
    write(tmp_path, "a", [shape("dog", square), shape("_background_", hole)])
    write(tmp_path, "b", [shape("cat", [[5, 5], [20, 20]], "rectangle")])
    write(tmp_path, "c", [shape("cat", [[30, 20], [30, 26]], "circle")])
    assert "out" in make(tmp_path)
    assert (tmp_path / "out" / "classes.txt").read_text().split() == ["cat", "dog"]
    assert (tmp_path / "out" / "train.txt").read_text().split() == ["a", "b"]
    assert (tmp_path / "out" / "val.txt").read_text().split() == ["c"]
    first = mask(tmp_path, "a")
    assert (first[20, 12], first[20, 20], first[5, 5]) == (1, 255, 255)
    assert (mask(tmp_path, "b") == 0).sum() == 15 * 15
    assert abs((mask(tmp_path, "c") == 0).sum() - np.pi * 36) < 5


def test_our_own_polygons_come_back(tmp_path):
    labels = np.full((40, 60), 255, np.uint8)
    labels[4:36, 3:40] = 0
    labels[10:30, 10:30] = 1
    labels[15:25, 15:25] = 255
    labels[0:12, 50:60] = 1
    seg = Segmentation(labels=labels, names=("dog", "cat"), vocabulary_version=1)
    for name in "ab":
        content = seg.to_labelme(f"../photos/{name}.png")
        write(tmp_path, name, content["shapes"])
    make(tmp_path, classes="dog, cat")
    np.testing.assert_array_equal(mask(tmp_path, "a"), labels)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shapes": None}, "b.json"),
        ({"imagePath": "absent.png"}, "absent.png"),
        ({"imageHeight": 41}, "b.png"),
        ({"shapes": [shape("dog", [[1, 1], [2, 2]], "mask") | {"mask": "eA=="}]}, "dog"),
        ({"shapes": [{"label": "dog", "points": [1, 2]}]}, "dog"),
    ],
)
def test_damaged_files_are_named(tmp_path, changes, named):
    write(tmp_path, "a", TRIANGLE)
    write(tmp_path, "b", **({"shapes": TRIANGLE} | changes))
    with refused(DatasetError, None, named):
        make(tmp_path)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_or_guessed(tmp_path):
    write(tmp_path, "a", TRIANGLE)
    with refused(DatasetError, None, "polygons"):
        make(tmp_path)
    write(tmp_path, "b", TRIANGLE)
    with refused(DatasetError, "--classes", "dog"):
        make(tmp_path, classes="cat")
    with refused(DatasetError, "--val"):
        make(tmp_path, val=1.0)
    make(tmp_path)
    with refused(DatasetError, None, "out"):
        make(tmp_path)


@pytest.mark.parametrize("place", ["inside", "beside", "other case", "decomposed"])
def test_the_photo_is_beside_the_file_or_in_it(place, tmp_path):
    """However Windows wrote its path."""
    photo = np.full((40, 60, 3), 200, np.uint8)
    names = {"other case": "É{}.PNG", "decomposed": "E\u0301{}.png"}
    for name in "ab":
        content = {"imagePath": f"C:\\data\\É{name}.png", "imageData": None}
        write(tmp_path, name, TRIANGLE, **content, imageHeight=None, imageWidth=None)
        if place == "inside":
            path = tmp_path / "polygons" / f"{name}.json"
            data = base64.b64encode(cv2.imencode(".png", photo)[1]).decode()
            path.write_text(json.dumps(json.loads(path.read_text()) | {"imageData": data}))
        else:
            stored = names.get(place, "É{}.png").format(name)
            cv2.imwrite(str(tmp_path / "polygons" / stored), photo)
    make(tmp_path)
    images = sorted((tmp_path / "out" / "images").iterdir())
    assert [cv2.imread(str(image)).shape for image in images] == [(40, 60, 3)] * 2
    assert len(create_dataset("folder", tmp_path / "out", "all")) == 2
