"""Labels as components, polygons, COCO annotations and detections: nothing is lost or moved."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from support.errors import refused
from zsseg_rt import ArgumentError, BackendUnavailableError, Segmentation
from zsseg_rt.integrations.batch import AnnotationFiles, PhotoResult

NAMES = ("sky", "road", "tree")


def make(labels, scores=None):
    labels = np.asarray(labels, np.uint8)
    return Segmentation(labels=labels, names=NAMES, vocabulary_version=1, scores=scores)


def noise(seed, height=23, width=31):
    """Labels full of corners, holes and parts that touch by corners."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 4, (height, width)).astype(np.uint8)
    coarse[coarse == 3] = 255
    return coarse


def blocks():
    """Two parts of one class, one with a hole, and a part of another."""
    labels = np.full((9, 12), 255, np.uint8)
    labels[1:6, 1:6] = 1
    labels[3, 3] = 0
    labels[7:9, 8:12] = 1
    return labels


def inside(polygon, size_hw):
    """Which pixel centres are in a polygon, by counting crossings to their left."""
    result = np.zeros(size_hw, bool)
    columns = np.arange(size_hw[1]) + 0.5
    for ring in (polygon.exterior, *polygon.holes):
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            assert x0 == x1 or y0 == y1
            if x0 == x1:
                result[min(y0, y1) : max(y0, y1)] ^= columns > x0
    return result


def test_components_of_a_class():
    seg = make(blocks(), scores=np.full((9, 12), 0.25, np.float32))
    first, second, third = seg.components()
    assert (first.name, first.area, first.box) == ("road", 24, (1, 1, 6, 6))
    assert (second.name, second.area, second.box) == ("road", 8, (8, 7, 12, 9))
    assert second.centroid == (9.5, 7.5)
    assert (third.name, third.area, third.box) == ("sky", 1, (3, 3, 4, 4))
    assert first.confidence == pytest.approx(0.25)
    assert not first.mask[2, 2]
    assert [part.area for part in seg.components(min_area=8)] == [24, 8]
    assert make(blocks()).components()[0].confidence is None


@pytest.mark.parametrize("seed", range(3))
def test_components_put_together_are_the_labels(seed):
    labels = noise(seed)
    again = np.full_like(labels, 255)
    for part in make(labels).components():
        mask = part.full_mask(labels.shape)
        assert mask.sum() == part.area
        assert (again[mask] == 255).all()
        again[mask] = part.index
    np.testing.assert_array_equal(again, labels)


@pytest.mark.parametrize("seed", range(3))
def test_polygons_enclose_exactly_their_pixels(seed):
    labels = noise(seed)
    seg = make(labels)
    for part, polygon in zip(seg.components(), seg.polygons(), strict=True):
        assert (polygon.name, polygon.area) == (part.name, part.area)
        mask = inside(polygon, labels.shape)
        np.testing.assert_array_equal(mask, part.full_mask(labels.shape))
        for ring in (polygon.exterior, *polygon.holes):
            assert len({tuple(corner) for corner in ring.tolist()}) == len(ring)  # none twice


def test_a_polygon_has_corners_only_and_its_hole():
    first, *_ = make(blocks()).polygons()
    assert sorted(first.exterior.tolist()) == [[1, 1], [1, 6], [6, 1], [6, 6]]
    (hole,) = first.holes
    assert sorted(hole.tolist()) == [[3, 3], [3, 4], [4, 3], [4, 4]]


def test_simpler_polygons_stay_near():
    y, x = np.mgrid[:80, :80]
    labels = np.where((x - 40) ** 2 + (y - 40) ** 2 < 900, 1, 255)
    (exact,), (simple,) = (make(labels).polygons(tolerance=t) for t in (0.0, 1.5))
    assert len(simple.exterior) < len(exact.exterior) / 3
    radii = np.hypot(*(simple.exterior - 40.0).T)
    assert np.abs(radii - 30).max() < 3


@pytest.mark.parametrize("call", [{"min_area": 0}, {"tolerance": -1.0}, {"tolerance": np.nan}])
def test_useless_settings_are_refused(call):
    with refused(ArgumentError, next(iter(call))):
        make(blocks()).polygons(**call)


def test_nothing_comes_of_nothing():
    seg = make(np.full((4, 5), 255))
    assert (seg.components(), seg.polygons(), seg.to_coco_rle()) == ([], [], [])
    assert seg.to_coco_rle(per_component=True) == []


def test_without_opencv_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with refused(BackendUnavailableError, "cv2"):
        make(blocks()).components()


@pytest.mark.parametrize("per_component", [False, True])
def test_pycocotools_reads_the_annotations(per_component, tmp_path):
    coco = pytest.importorskip("pycocotools.coco", reason="needs pip install pycocotools")
    from pycocotools import mask as rle

    labels = noise(4)
    seg = make(labels)
    annotations = seg.to_coco_rle(image_id=7, per_component=per_component, min_area=2)
    height, width = labels.shape
    content = {
        "images": [{"id": 7, "height": height, "width": width, "file_name": "a.png"}],
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for index, name in enumerate(NAMES, 1)],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    read = coco.COCO(str(tmp_path / "a.json"))
    found = read.loadAnns(read.getAnnIds(imgIds=[7]))
    expected = (
        [(p.index, p.full_mask(labels.shape)) for p in seg.components(min_area=2)]
        if per_component
        else [(s.index, labels == s.index) for s in seg.present()]
    )
    assert len(found) == len(expected)
    for annotation, (index, mask) in zip(found, expected, strict=True):
        assert annotation["category_id"] == index + 1
        np.testing.assert_array_equal(read.annToMask(annotation).astype(bool), mask)
        encoded = read.annToRLE(annotation)
        assert rle.area(encoded) == annotation["area"]
        assert rle.toBbox(encoded).tolist() == annotation["bbox"]


def test_a_component_s_score_is_in_its_annotation():
    seg = make(blocks(), scores=np.full((9, 12), 0.5, np.float32))
    assert [a["score"] for a in seg.to_coco_rle(per_component=True)] == [0.5, 0.5, 0.5]
    assert "score" not in seg.to_coco_rle()[0]


def test_supervision_gets_confidence_and_a_detection_per_component():
    supervision = pytest.importorskip("supervision", reason="needs the extra supervision")
    labels = blocks()
    scores = np.where(labels == 1, np.float32(0.75), np.float32(0.5))
    seg = make(labels, scores)
    whole, parts = seg.to_supervision(), seg.to_supervision(per_component=True, min_area=2)
    assert isinstance(parts, supervision.Detections)
    np.testing.assert_allclose(whole.confidence, [0.75, 0.5])
    np.testing.assert_allclose(parts.confidence, [0.75, 0.75])
    assert parts.class_id.tolist() == [1, 1]
    assert parts.xyxy.tolist() == [[1, 1, 5, 5], [8, 7, 11, 8]]
    assert parts.area.tolist() == [24, 8]
    assert len(parts[parts.confidence > 0.8]) == 0
    plain = dataclasses.replace(seg, scores=None).to_supervision(per_component=True)
    assert plain.confidence is None


# --- GeoJSON and labelme ---


def drawn(rings, size_hw):
    """Which pixel centres are in the rings together."""
    rings = [np.array(ring).astype(int) for ring in rings]
    return inside(SimpleNamespace(exterior=rings[0], holes=rings[1:]), size_hw)


def signed_area(ring):
    x, y = np.array(ring, float)[:-1].T
    return (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2


@pytest.mark.parametrize("seed", range(3))
def test_geojson_read_back_is_the_labels(seed):
    seg = make(noise(seed))
    collection = json.loads(json.dumps(seg.to_geojson()))
    assert collection["type"] == "FeatureCollection"
    again = np.full(seg.labels.shape, 255, np.uint8)
    for feature in collection["features"]:
        rings = feature["geometry"]["coordinates"]
        assert feature["geometry"]["type"] == "Polygon"
        assert all(ring[0] == ring[-1] and len(ring) >= 5 for ring in rings)
        pixels = drawn([ring[:-1] for ring in rings], seg.labels.shape)
        assert pixels.sum() == feature["properties"]["area"]
        assert seg.names[feature["properties"]["index"]] == feature["properties"]["name"]
        again[pixels] = feature["properties"]["index"]
    np.testing.assert_array_equal(again, seg.labels)


@pytest.mark.parametrize(
    "transform",
    [None, (0.5, 0, 100, 0, -0.5, 900), (0, 2, 5, 2, 0, 7), (1, 0.5, 0, 0, 1, 0, 0, 0, 1)],
)
def test_geojson_of_a_map(transform):
    seg = make(blocks(), scores=np.full((9, 12), 0.25, np.float32))
    feature = seg.to_geojson(transform=transform)["features"][0]
    outer, hole = feature["geometry"]["coordinates"]
    a, b, c, d, e, f = (transform or (1, 0, 0, 0, 1, 0))[:6]
    corners = {(a * x + b * y + c, d * x + e * y + f) for x in (1, 6) for y in (1, 6)}
    assert {tuple(corner) for corner in outer} == corners
    scale = abs(a * e - b * d)
    assert signed_area(outer) == pytest.approx(25 * scale)  # anticlockwise
    assert signed_area(hole) == pytest.approx(-scale)
    assert feature["properties"]["confidence"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    "transform",
    [(1, 0, 0, 0, 1), (1, 2, 0, 2, 4, 0), (1, 0, np.nan, 0, 1, 0), "abcdef", 5, (1,) * 9],
)
def test_useless_transforms_are_refused(transform):
    with refused(ArgumentError, "transform"):
        make(blocks()).to_geojson(transform=transform)


@pytest.mark.parametrize("seed", range(3))
def test_labelme_drawn_in_order_is_the_labels(seed):
    seg = make(noise(seed))
    content = json.loads(json.dumps(seg.to_labelme("photo.png")))
    assert (content["imageHeight"], content["imageWidth"]) == seg.labels.shape
    assert (content["imagePath"], content["imageData"]) == ("photo.png", None)
    values = {name: index for index, name in enumerate(NAMES)} | {"_background_": 255}
    again = np.full(seg.labels.shape, 255, np.uint8)
    for shape in content["shapes"]:
        assert shape["shape_type"] == "polygon"
        again[drawn([shape["points"]], seg.labels.shape)] = values[shape["label"]]
    np.testing.assert_array_equal(again, seg.labels)
    assert "_background_" in {shape["label"] for shape in content["shapes"]}


def test_labelme_without_unknown_parts():
    labels = np.full((9, 9), 1, np.uint8)
    labels[3:5, 3:5] = 255
    seg = make(labels)
    named = [shape["label"] for shape in seg.to_labelme("p.png", unknown="nothing")["shapes"]]
    assert named == ["road", "nothing"]
    assert len(seg.to_labelme("p.png", unknown=None)["shapes"]) == 1
    labels[4:, 4] = 255  # the hole opens to the edge: no hole, and no polygon for it
    assert [shape["label"] for shape in make(labels).to_labelme("p.png")["shapes"]] == ["road"]
    assert make(np.full((2, 2), 255)).to_labelme("p.png")["shapes"] == []
    assert make(np.full((2, 2), 255)).to_geojson()["features"] == []


@pytest.fixture
def coco_file(tmp_path):
    """Two photos below one folder, labelled with --format coco."""
    files = AnnotationFiles("coco", tmp_path, NAMES)
    for name in ("a.png", "sub/b.png"):
        photo = tmp_path / "images" / name
        photo.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(photo), np.zeros((9, 12, 3), np.uint8))
        files.add(PhotoResult(photo=str(photo), mask=f"{name}.mask.png"), make(blocks()))
    return files.finish()


def test_coco_counts_from_one_and_names_photos_from_their_folder(coco_file):
    content = json.loads(coco_file.read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.png", "sub/b.png"]
    assert [(c["id"], c["name"]) for c in content["categories"]] == [*enumerate(NAMES, 1)]
    assert {a["category_id"] for a in content["annotations"]} == {1, 2}
    assert AnnotationFiles("coco", coco_file.parent, NAMES).finish() == coco_file  # no photo
