"""Results: shares, label images, drawings, components, polygons, annotations, detections."""

import colorsys
import copy
import dataclasses
import json
import pickle
import sys
import zlib

import cv2
import numpy as np
import pytest

from support.command_line import run
from support.errors import refused
from tools.scenes import CLASS_NAMES
from zsseg_rt import (
    ArgumentError,
    BackendUnavailableError,
    Segmentation,
    ShapeError,
    SourceError,
    read_photo,
)
from zsseg_rt.demo import demo_photos
from zsseg_rt.errors import DTypeError
from zsseg_rt.results.segmentation import Frame
from zsseg_rt.results.visualize import encode_label_png, palette, read_label_png, save_file

NAMES = ("sky", "road", "tree")


def make(labels, names=NAMES, scores=None):
    labels = np.asarray(labels)
    labels = labels.astype(np.uint8) if labels.dtype == int else labels
    return Segmentation(labels=labels, names=names, vocabulary_version=7, scores=scores)


def test_present_lists_classes_by_share_and_leaves_unknown_out():
    seg = make(np.array([[1, 1, 1, 0], [255, 255, 255, 255]], np.uint8))
    shares = seg.present()
    assert [(s.name, s.index, s.pixels) for s in shares] == [("road", 1, 3), ("sky", 0, 1)]
    assert repr(shares[0].share) == "0.375"  # a float of Python's own, in reports too
    wide = np.array([[0, 9, 1], [9, 9, 65535]] * 2, np.uint16)[::2]  # strided
    assert [(s.index, s.pixels) for s in make(wide, "abc").present()] == [(0, 2), (1, 2)]


def test_saved_labels_read_back_exactly(tmp_path):
    labels = np.random.default_rng(0).integers(0, 255, (37, 53)).astype(np.uint8)
    labels[0, 0] = 255
    path = tmp_path / "mask.png"
    names = tuple(f"c{i}" for i in range(255))
    make(labels, names).save(path)
    raw = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    colours = np.zeros((256, 3), np.uint8)
    colours[:255] = palette(names)
    np.testing.assert_array_equal(raw, colours[labels])
    assert list(tmp_path.iterdir()) == [path]
    content = path.read_bytes()
    filtered = b"\1" + zlib.decompress(content[821:-16])[1:]  # as another program writes it
    path.write_bytes(content[:821] + zlib.compress(filtered) + content[-16:])
    with refused(SourceError, None, "mask.png"):
        read_label_png(path)
    wide, path = np.array([[0, 300], [1023, 65535]], np.uint16), tmp_path / "mask.PNG"
    make(wide, ("a",) * 1024).save(path)
    np.testing.assert_array_equal(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), wide)


TINY = make(np.zeros((2, 2), np.uint8))
REFUSED = {
    "one axis": (lambda: encode_label_png(np.zeros(4, np.uint8), ()), ShapeError, "labels"),
    "int64": (lambda: encode_label_png(np.zeros((2, 2), int), ()), DTypeError, "labels"),
    "no folder": (lambda: save_file("nowhere/a.png", b"x"), SourceError, None),
    "no name": (lambda: save_file("", b"x"), SourceError, None),
    "jpeg": (lambda: TINY.save("mask.jpg"), ArgumentError, "path"),
    "no suffix": (lambda: TINY.save("mask"), ArgumentError, "path"),
    "another size": (lambda: TINY.overlay(np.zeros((3, 3, 3), np.uint8)), ShapeError, "labels"),
    "no frame": (TINY.plot, ArgumentError, "frame"),
    "no supervision": (TINY.to_supervision, BackendUnavailableError, "supervision"),
    "no opencv": (TINY.components, BackendUnavailableError, "cv2"),
    "no area": (lambda: TINY.polygons(min_area=0), ArgumentError, "min_area"),
    **{f"tolerance {n}": (lambda n=n: TINY.polygons(tolerance=n), ArgumentError, "tolerance")
       for n in (-1.0, np.nan)},
    **{f"transform {i}": (lambda t=t: TINY.to_geojson(transform=t), ArgumentError, "transform")
       for i, t in enumerate([(1, 0, 0, 0, 1), (1, 2, 0, 2, 4, 0), (1, 0, np.nan, 0, 1, 0),
                              "abcdef", 5, (1,) * 9])},
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_made_of_a_result_is_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, error, argument = REFUSED[case]
    if case.startswith("no ") and issubclass(error, BackendUnavailableError):
        monkeypatch.setitem(sys.modules, argument, None)
    with refused(error, argument):
        call()
    assert list(tmp_path.iterdir()) == []


def test_a_name_keeps_its_colour_wherever_and_beside_whatever_it_stands():
    things = (
        "aeroplane bicycle bird boat bottle bus car cat chair cow dog horse sheep sofa train tv"
    )
    names = [*things.split(), "person", *CLASS_NAMES]
    together = palette(names).astype(int)
    np.testing.assert_array_equal(palette(names[::-1]), together[::-1])
    alone = np.concatenate([palette([name]) for name in names]).astype(int)
    assert np.abs(together - alone).max() <= 1  # only names of the very same colour move
    away = np.abs(together[:17, None] - together[None, :17]).sum(-1)[np.triu_indices(17, 1)]
    assert away.min() > 75  # and the common ones are told apart
    np.testing.assert_array_equal(palette(["green box"])[0], palette(["Green  Box"])[0])


def test_a_colour_in_a_name_is_the_colour_it_is_drawn_in():
    hues = {"red": 0, "orange": 30, "yellow": 54, "green": 120, "blue": 220, "purple": 278}
    for name, rgb in zip(CLASS_NAMES, palette(CLASS_NAMES).tolist(), strict=True):
        hue, saturation, _ = colorsys.rgb_to_hsv(*(value / 255 for value in rgb))
        word = name.split()[0]
        if word == "grey":
            assert saturation == 0
        else:
            assert abs((hue * 360 - hues[word] + 180) % 360 - 180) <= 16, name


def test_many_names_have_colours_of_their_own():
    names = [f"class {index}" for index in range(171)] + [f"red {index}" for index in range(30)]
    assert len({tuple(colour) for colour in palette(names).tolist()}) == len(names)
    assert palette([]).shape == (0, 3)
    assert palette(names, "bgr") is palette(names, "bgr")  # made once, not for each frame


def test_an_overlay_paints_classes_keeps_unknown_and_the_frame_s_channel_order():
    frame = np.arange(9, dtype=np.uint8).reshape(1, 3, 3) * 20
    seg = make(np.array([[0, 1, 255]], np.uint8))
    rgb = seg.overlay(frame, alpha=1.0)
    np.testing.assert_array_equal(rgb, [[*palette(seg.names)[:2], frame[0, 2]]])
    bgr = dataclasses.replace(seg, channel_order="bgr").overlay(
        np.ascontiguousarray(frame[..., ::-1]), alpha=1.0
    )
    np.testing.assert_array_equal(bgr[..., ::-1], rgb)


def test_results_pickle_and_copy():
    image = np.ones((2, 2, 3), np.uint8)
    frame = Frame(source="0", index=7, captured_at=1.5, clock="driver", image=image)
    seg = make([[0, 1], [2, 255]], scores=np.full((2, 2), 0.5, np.float32))
    seg = dataclasses.replace(seg, times={"total": 1.5}, reused=True, frame=frame)
    for again in (pickle.loads(pickle.dumps(seg)), copy.deepcopy(seg)):
        assert str(vars(again)) == str(vars(seg))
        np.testing.assert_array_equal(again.frame.image, seg.frame.image)
        with pytest.raises(dataclasses.FrozenInstanceError):
            again.names = ()


# --- names and a legend on an image ---


def halves(names=("road", "blue sky"), height=600, width=800):
    labels = np.zeros((height, width), np.uint8)
    labels[: height // 2] = 1
    return make(labels, names)


def black(seg):
    return np.zeros((*seg.labels.shape, 3), np.uint8)


def test_names_are_on_the_parts_and_the_legend_is_below():
    seg = halves()
    frame = black(seg)
    overlay, plot = seg.overlay(frame), seg.plot(frame)
    assert (plot.shape[0] > 600, plot.shape[1]) == (True, 800)
    changed = (plot[:600] != overlay).any(axis=2)
    for half in (changed[:300], changed[300:]):
        rows = np.flatnonzero(half.any(axis=1))
        assert 800 * 11 / 400 <= np.ptp(rows) < 80  # as high as can be read at a phone's width
    strip = plot[600:].reshape(-1, 3)
    assert {one.colour for one in seg.legend()} == set(map(tuple, palette(seg.names)))
    for colour in palette(seg.names):
        assert (strip == colour).all(axis=1).sum() > 100
    np.testing.assert_array_equal(seg.plot(frame, names=False)[:600], overlay)
    assert seg.plot(frame, legend=False).shape == (600, 800, 3)


def test_letters_have_a_dark_edge_all_around():
    seg = dataclasses.replace(halves(), labels=np.zeros((600, 800), np.uint8))
    plot = seg.plot(np.full((600, 800, 3), 128, np.uint8), alpha=0.0, legend=False)
    masks = plot[..., 0] > 200, plot[..., 0] < 60
    light, dark = (np.flatnonzero(mask.any(axis=0)) for mask in masks)
    assert 0 < light[0] - dark[0] < 10
    assert 0 < dark[-1] - light[-1] < 10


def test_plots_in_the_frame_s_order_of_a_stream_s_frame_and_of_nothing():
    seg = halves()
    plot, bgr = seg.plot(black(seg)), dataclasses.replace(seg, channel_order="bgr")
    np.testing.assert_array_equal(bgr.plot(black(bgr))[..., ::-1], plot)
    frame = Frame(source="0", index=0, captured_at=0.0, clock="file", image=black(seg))
    np.testing.assert_array_equal(dataclasses.replace(seg, frame=frame).plot(), plot)
    nothing = dataclasses.replace(seg, labels=np.full((600, 800), 255, np.uint8))
    np.testing.assert_array_equal(nothing.plot(black(seg)), black(seg))


@pytest.mark.parametrize("width", [1, 40, 399, 400, 2000])
def test_odd_sizes_and_names(width):
    for name in ("Straße über café", "道路", "a" * 300, "{odd} %s \\ name"):
        seg = halves((name, "sky"), height=max(1, width // 2), width=width)
        plot = seg.plot(black(seg))
        assert plot.shape[1] >= 400
        assert plot.shape[1] % width == 0


def test_segment_writes_legends_on_request(tmp_path):
    call = ("segment", demo_photos("scenes")[0], "--demo", "scenes", "-o", tmp_path)
    assert run(*call) == 0
    height, width, _ = cv2.imread(str(tmp_path / "playroom.overlay.png")).shape
    assert (height, width) == read_photo(demo_photos("scenes")[0]).shape[:2]
    assert run(*call, "--legend", "--resume") == 0  # other settings: done again
    with_legend = cv2.imread(str(tmp_path / "playroom.overlay.png"))
    assert (with_legend.shape[0] > 2 * height, with_legend.shape[1]) == (True, 2 * width)


# --- components, polygons, COCO annotations and detections: nothing is lost or moved ---


def noise(seed):
    """Labels full of corners, holes and parts that touch by corners."""
    values = np.array([0, 1, 2, 255], np.uint8)
    return values[np.random.default_rng(seed).integers(0, 4, (23, 31))]


def blocks():
    """Two parts of one class, one with a hole, and a part of another."""
    labels = np.full((9, 12), 255, np.uint8)
    labels[1:6, 1:6] = 1
    labels[3, 3] = 0
    labels[7:9, 8:12] = 1
    return labels


def inside(rings, size_hw):
    """Which pixel centres are in the rings together, by counting crossings to their left."""
    result = np.zeros(size_hw, bool)
    columns = np.arange(size_hw[1]) + 0.5
    for ring in (np.array(ring).astype(int) for ring in rings):
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
    assert [a["score"] for a in seg.to_coco_rle(per_component=True)] == [0.25] * 3
    assert "score" not in seg.to_coco_rle()[0]
    assert make(blocks()).components()[0].confidence is None


@pytest.mark.parametrize("seed", [0, 2])
def test_components_polygons_geojson_and_labelme_put_together_are_the_labels(seed):
    seg = make(noise(seed))
    shape = seg.labels.shape
    parts, features, drawn = (np.full_like(seg.labels, 255) for _ in range(3))
    for part, polygon in zip(seg.components(), seg.polygons(), strict=True):
        mask, rings = part.full_mask(shape), (polygon.exterior, *polygon.holes)
        assert (polygon.name, polygon.area, part.area) == (part.name, part.area, mask.sum())
        assert (parts[mask] == 255).all()
        parts[mask] = part.index
        np.testing.assert_array_equal(inside(rings, shape), mask)
        for ring in rings:
            assert len({tuple(corner) for corner in ring.tolist()}) == len(ring)  # none twice
    np.testing.assert_array_equal(parts, seg.labels)
    collection = json.loads(json.dumps(seg.to_geojson()))
    assert collection["type"] == "FeatureCollection"
    for feature in collection["features"]:
        rings, about = feature["geometry"]["coordinates"], feature["properties"]
        assert feature["geometry"]["type"] == "Polygon"
        assert all(ring[0] == ring[-1] and len(ring) >= 5 for ring in rings)
        pixels = inside([ring[:-1] for ring in rings], shape)
        assert (pixels.sum(), seg.names[about["index"]]) == (about["area"], about["name"])
        features[pixels] = about["index"]
    np.testing.assert_array_equal(features, seg.labels)
    content = json.loads(json.dumps(seg.to_labelme("photo.png")))
    assert (content["imageHeight"], content["imageWidth"]) == shape
    assert (content["imagePath"], content["imageData"]) == ("photo.png", None)
    values = {name: index for index, name in enumerate(NAMES)} | {"_background_": 255}
    for one in content["shapes"]:  # in order
        assert one["shape_type"] == "polygon"
        drawn[inside([one["points"]], shape)] = values[one["label"]]
    np.testing.assert_array_equal(drawn, seg.labels)
    assert "_background_" in {one["label"] for one in content["shapes"]}


def test_simpler_polygons_stay_near():
    y, x = np.mgrid[:80, :80]
    labels = np.where((x - 40) ** 2 + (y - 40) ** 2 < 900, 1, 255)
    (exact,), (simple,) = (make(labels).polygons(tolerance=t) for t in (0.0, 1.5))
    assert len(simple.exterior) < len(exact.exterior) / 3
    radii = np.hypot(*(simple.exterior - 40.0).T)
    assert np.abs(radii - 30).max() < 3


def test_nothing_comes_of_nothing():
    seg = make(np.full((4, 5), 255))
    assert (seg.components(), seg.polygons(), seg.to_coco_rle()) == ([], [], [])
    assert seg.to_coco_rle(per_component=True) == seg.to_geojson()["features"] == []
    assert seg.to_labelme("p.png")["shapes"] == []


@pytest.mark.parametrize("per_component", [False, True])
def test_pycocotools_reads_the_annotations(per_component, tmp_path):
    coco = pytest.importorskip("pycocotools.coco", reason="needs pip install pycocotools")
    labels = noise(4)
    seg, (height, width) = make(labels), labels.shape
    content = {
        "images": [{"id": 7, "height": height, "width": width, "file_name": "a.png"}],
        "annotations": seg.to_coco_rle(image_id=7, per_component=per_component, min_area=2),
        "categories": [{"id": index, "name": name} for index, name in enumerate(NAMES, 1)],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    read = coco.COCO(str(tmp_path / "a.json"))
    expected = [(share.index, labels == share.index) for share in seg.present()]
    if per_component:
        expected = [(p.index, p.full_mask(labels.shape)) for p in seg.components(min_area=2)]
    annotations = read.loadAnns(read.getAnnIds(imgIds=[7]))
    for annotation, (index, mask) in zip(annotations, expected, strict=True):
        assert annotation["category_id"] == index + 1
        np.testing.assert_array_equal(read.annToMask(annotation).astype(bool), mask)
        encoded = read.annToRLE(annotation)
        assert coco.maskUtils.area(encoded) == annotation["area"]
        assert coco.maskUtils.toBbox(encoded).tolist() == annotation["bbox"]


def test_supervision_gets_confidence_and_a_detection_per_component():
    supervision = pytest.importorskip("supervision", reason="needs the extra supervision")
    labels = blocks()
    scores = np.where(labels == 1, np.float32(0.75), np.float32(0.5))
    seg = make(labels, scores=scores)
    whole, parts = seg.to_supervision(), seg.to_supervision(per_component=True, min_area=2)
    assert isinstance(parts, supervision.Detections)
    np.testing.assert_allclose(whole.confidence, [0.75, 0.5])
    np.testing.assert_allclose(parts.confidence, [0.75, 0.75])
    assert parts.class_id.tolist() == [1, 1]
    assert parts.xyxy.tolist() == [[1, 1, 5, 5], [8, 7, 11, 8]]
    assert parts.area.tolist() == [24, 8]
    np.testing.assert_array_equal(whole.mask, [labels == 1, labels == 0])
    assert whole.data["class_name"].tolist() == ["road", "sky"]
    assert len(parts[parts.confidence > 0.8]) == 0
    plain = dataclasses.replace(seg, scores=None).to_supervision(per_component=True)
    assert plain.confidence is None
    assert len(make(np.full((3, 4), 255)).to_supervision()) == 0


def signed_area(ring):
    x, y = np.array(ring, float)[:-1].T
    return (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2


@pytest.mark.parametrize(
    "transform",
    [None, (0.5, 0, 100, 0, -0.5, 900), (0, 2, 5, 2, 0, 7), (0.5, 0.5, 0, 0, 1, 0, 0, 0, 1)],
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


def test_labelme_without_unknown_parts():
    labels = np.full((9, 9), 1, np.uint8)
    labels[3:5, 3:5] = 255
    seg = make(labels)
    shapes = seg.to_labelme("p.png", unknown="nothing")["shapes"]
    assert [shape["label"] for shape in shapes] == ["road", "nothing"]
    assert len(seg.to_labelme("p.png", unknown=None)["shapes"]) == 1
    labels[4:, 4] = 255  # the hole opens to the edge: no hole, and no polygon for it
    assert [shape["label"] for shape in make(labels).to_labelme("p.png")["shapes"]] == ["road"]
