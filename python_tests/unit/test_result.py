"""Segmentation results: shares, pictures, run lengths."""

import copy
import dataclasses
import pickle
import sys

import cv2
import numpy as np
import pytest

from support.errors import refused
from tools.scenes import CLASS_NAMES
from zsseg_rt import BackendUnavailableError, Segmentation, ShapeError, SourceError
from zsseg_rt.errors import DTypeError
from zsseg_rt.results.segmentation import Frame
from zsseg_rt.results.visualize import encode_label_png, palette, save_file


def make(labels, names=("sky", "road", "tree")):
    return Segmentation(labels=np.asarray(labels), names=names, vocabulary_version=7)


def test_present_lists_classes_by_share_and_leaves_unknown_out():
    seg = make(np.array([[1, 1, 1, 0], [255, 255, 255, 255]], np.uint8))
    shares = seg.present()
    assert [(s.name, s.index, s.pixels) for s in shares] == [("road", 1, 3), ("sky", 0, 1)]
    assert shares[0].share == pytest.approx(3 / 8)
    assert repr(shares[0].share) == "0.375"  # a float of Python's own, in reports too


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_present_counts_strided_labels(dtype):
    labels = np.random.default_rng(0).integers(0, 4, (40, 60)).astype(dtype)[::2, ::3]
    shares = make(labels, ("sky", "road", "tree", "car", "dog")).present()
    values, counts = np.unique(labels, return_counts=True)
    assert {s.index: s.pixels for s in shares} == dict(zip(values, counts, strict=True))
    assert [s.pixels for s in shares] == sorted(counts, reverse=True)


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


def test_wide_labels_read_back_exactly(tmp_path):
    labels = np.array([[0, 300], [1023, 65535]], np.uint16)
    path = tmp_path / "mask.png"
    make(labels, ("a",) * 1024).save(path)
    np.testing.assert_array_equal(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), labels)


def test_label_png_refuses_other_arrays():
    with refused(ShapeError, "labels"):
        encode_label_png(np.zeros(4, np.uint8), palette("a"))
    with refused(DTypeError, "labels"):
        encode_label_png(np.zeros((2, 2), np.int64), palette("a"))


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SourceError, match="No space left on device"):
        save_file(tmp_path / "a.png", b"content")
    assert list(tmp_path.iterdir()) == []


def test_write_to_missing_folder_names_the_file(tmp_path):
    with refused(SourceError, None, "nowhere/a.png"):
        save_file(tmp_path / "nowhere" / "a.png", b"content")


def test_run_lengths_decode_to_the_masks():
    labels = np.random.default_rng(1).integers(0, 3, (11, 7)).astype(np.uint8)
    labels[:2] = 255
    for annotation in make(labels).to_coco_rle():
        counts = annotation["segmentation"]["counts"]
        values = np.arange(len(counts)) % 2
        mask = np.repeat(values, counts).reshape(labels.T.shape).T.astype(bool)
        np.testing.assert_array_equal(mask, labels + 1 == annotation["category_id"])
        assert annotation["area"] == mask.sum()


def test_a_name_keeps_its_colour_wherever_it_stands():
    names = ["road", "person", "forklift", "sky", "tree", "grey wall", "red ball", "Green  Box"]
    colours = {name: tuple(c) for name, c in zip(names, palette(names).tolist(), strict=True)}
    assert len(set(colours.values())) == len(names)
    for order in (names[::-1], names[3:] + names[:3]):
        again = zip(order, palette(order).tolist(), strict=True)
        assert {name: tuple(c) for name, c in again} == colours
    np.testing.assert_array_equal(palette(["green box"])[0], palette(["Green  Box"])[0])


def test_a_name_keeps_its_colour_beside_any_other_names():
    things = (
        "aeroplane bicycle bird boat bottle bus car cat chair cow dog horse sheep sofa train tv"
    )
    names = [*things.split(), "person", *CLASS_NAMES]
    together = palette(names).astype(int)
    alone = np.concatenate([palette([name]) for name in names]).astype(int)
    assert np.abs(together - alone).max() <= 1  # only names of the very same colour move
    away = np.abs(together[:17, None] - together[None, :17]).sum(-1)[np.triu_indices(17, 1)]
    assert away.min() > 75  # and the common ones are told apart


def test_a_colour_in_a_name_is_the_colour_it_is_drawn_in():
    import colorsys

    hues = {"red": 0, "orange": 30, "yellow": 54, "green": 120, "blue": 220, "purple": 278}
    for name, rgb in zip(CLASS_NAMES, palette(CLASS_NAMES).tolist(), strict=True):
        hue, saturation, _ = colorsys.rgb_to_hsv(*(value / 255 for value in rgb))
        word = name.split()[0]
        if word == "grey":
            assert saturation == 0
            continue
        away = abs((hue * 360 - hues[word] + 180) % 360 - 180)
        assert away <= 16, name


def test_many_names_have_colours_of_their_own():
    names = [f"class {index}" for index in range(171)] + [f"red {index}" for index in range(30)]
    assert len({tuple(colour) for colour in palette(names).tolist()}) == len(names)
    assert palette([]).shape == (0, 3)


def test_overlay_paints_classes_and_keeps_unknown():
    labels = np.array([[0, 255]], np.uint8)
    frame = np.full((1, 2, 3), 100, np.uint8)
    out = make(labels, ("a",)).overlay(frame, alpha=1.0)
    np.testing.assert_array_equal(out, [[palette(["a"])[0], [100, 100, 100]]])


def test_an_overlay_has_the_frame_s_channel_order():
    labels = np.array([[0, 1, 255]], np.uint8)
    frame = np.arange(9, dtype=np.uint8).reshape(1, 3, 3) * 20
    rgb = make(labels).overlay(frame)
    bgr = dataclasses.replace(make(labels), channel_order="bgr").overlay(
        np.ascontiguousarray(frame[..., ::-1])
    )
    np.testing.assert_array_equal(bgr[..., ::-1], rgb)
    assert not np.array_equal(rgb[0, 0], rgb[0, 0, ::-1])


def test_overlay_refuses_a_frame_of_another_size():
    with pytest.raises(ShapeError):
        make(np.zeros((2, 2), np.uint8)).overlay(np.zeros((3, 3, 3), np.uint8))


@pytest.mark.parametrize("way", [lambda seg: pickle.loads(pickle.dumps(seg)), copy.deepcopy])
def test_results_pickle_and_copy(way):
    seg = Segmentation(
        labels=np.array([[0, 1], [2, 255]], np.uint8),
        names=("sky", "road", "tree"),
        vocabulary_version=7,
        scores=np.full((2, 2), 0.5, np.float32),
        times={"total": 1.5},
        reused=True,
        frame=Frame(source="0", index=7, captured_at=1.5, clock="driver", image=np.ones((2, 2, 3))),
    )
    again = way(seg)
    np.testing.assert_array_equal(again.labels, seg.labels)
    np.testing.assert_array_equal(again.scores, seg.scores)
    assert (again.names, again.vocabulary_version) == (seg.names, 7)
    assert again.times == {"total": 1.5}
    assert again.reused
    assert (again.frame.source, again.frame.index, again.frame.captured_at) == ("0", 7, 1.5)
    np.testing.assert_array_equal(again.frame.image, seg.frame.image)
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.names = ()


def test_supervision_gets_a_mask_a_box_and_a_name_per_present_class():
    supervision = pytest.importorskip("supervision", reason="needs the extra supervision")
    labels = np.array([[2, 2, 2, 255], [2, 2, 2, 0], [255, 255, 255, 0]], np.uint8)
    found = make(labels).to_supervision()
    assert isinstance(found, supervision.Detections)
    assert found.class_id.tolist() == [2, 0]
    assert found.data["class_name"].tolist() == ["tree", "sky"]
    np.testing.assert_array_equal(found.mask, [labels == 2, labels == 0])
    assert found.xyxy.tolist() == [[0, 0, 2, 1], [3, 1, 3, 2]]
    picture = np.zeros((3, 4, 3), np.uint8)
    assert supervision.MaskAnnotator().annotate(picture.copy(), found).any()


def test_supervision_gets_nothing_where_all_is_unknown():
    pytest.importorskip("supervision", reason="needs the extra supervision")
    assert len(make(np.full((3, 4), 255, np.uint8)).to_supervision()) == 0


def test_without_supervision_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with refused(BackendUnavailableError, "supervision"):
        make(np.zeros((2, 2), np.uint8)).to_supervision()
