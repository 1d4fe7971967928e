"""tools/labelme_masks.py draws what labelme and ``segment --format labelme`` write."""

import base64
import json

import cv2
import numpy as np
import pytest

from support.errors import refused
from tools.labelme_masks import convert
from zsseg_rt import DatasetError, Segmentation
from zsseg_rt.evaluation.datasets import create_dataset


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
    triangle = [shape("dog", [[1, 1], [9, 1], [9, 9]])]
    write(tmp_path, "a", triangle)
    write(tmp_path, "b", **({"shapes": triangle} | changes))
    with refused(DatasetError, None, named):
        make(tmp_path)


def test_nothing_is_overwritten_or_guessed(tmp_path):
    triangle = [shape("dog", [[1, 1], [9, 1], [9, 9]])]
    write(tmp_path, "a", triangle)
    with refused(DatasetError, None, "polygons"):
        make(tmp_path)
    write(tmp_path, "b", triangle)
    with refused(DatasetError, "--classes", "dog"):
        make(tmp_path, classes="cat")
    with refused(DatasetError, "--val"):
        make(tmp_path, val=1.0)
    make(tmp_path)
    with refused(DatasetError, None, "out"):
        make(tmp_path)


def png(values):
    return base64.b64encode(cv2.imencode(".png", np.asarray(values, np.uint8))[1]).decode()


@pytest.mark.parametrize("place", ["inside", "beside", "other case", "decomposed"])
def test_the_photo_is_beside_the_file_or_in_it(place, tmp_path):
    """However Windows wrote its path."""
    photo = np.full((40, 60, 3), 200, np.uint8)
    names = {"other case": "É{}.PNG", "decomposed": "E\u0301{}.png"}
    for name in "ab":
        triangle = [shape("dog", [[1, 1], [9, 1], [9, 9]])]
        content = {"imagePath": f"C:\\data\\é{name}.png".replace("é", "É"), "imageData": None}
        write(tmp_path, name, triangle, **content, imageHeight=None, imageWidth=None)
        if place == "inside":
            path = tmp_path / "polygons" / f"{name}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"imageData": png(photo)}))
        else:
            stored = names.get(place, "É{}.png").format(name)
            (tmp_path / "polygons" / stored).write_bytes(base64.b64decode(png(photo)))
    make(tmp_path)
    images = sorted((tmp_path / "out" / "images").iterdir())
    assert [cv2.imread(str(image)).shape for image in images] == [(40, 60, 3)] * 2
    assert len(create_dataset("folder", tmp_path / "out", "all")) == 2
