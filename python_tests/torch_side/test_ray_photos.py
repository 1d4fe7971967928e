"""The class for Ray's ``map_batches`` by itself, without Ray: photos in, descriptions out."""

import contextlib
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from support.errors import refused
from support.picture_files import random_photos
from zsseg_rt import Engine, EngineConfig
from zsseg_rt.errors import (
    ArgumentError,
    BackendUnavailableError,
    ConfigError,
    VocabularyError,
    ZssegError,
)
from zsseg_rt.integrations.batch import segment_photos
from zsseg_rt.integrations.ray import PhotoSegmenter
from zsseg_rt.photos import find_photos, read_photo

NAMES = ["red", "blue", "green", "white"]


@pytest.fixture
def photos(tmp_path):
    return find_photos([str(random_photos(tmp_path / "in", 6, damaged=4))])


@pytest.fixture
def segmenter(colour_bundle):
    with contextlib.ExitStack() as opened:

        def make(num_lanes=1, **settings):
            config = EngineConfig(device="cpu", use_cache=False, num_lanes=num_lanes)
            segmenter = PhotoSegmenter(colour_bundle, NAMES, config=config, **settings)
            opened.callback(segmenter.engine.close)
            return segmenter

        yield make


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_photos_become_what_segment_writes(segmenter, colour_bundle, photos, tmp_path, num_lanes):
    with Engine(colour_bundle, EngineConfig(device="cpu", use_cache=False)) as engine:
        engine.set_classes(NAMES)
        written = segment_photos(engine, photos, tmp_path / "out")
    contents, paths = [path.read_bytes() for path in photos], [str(path) for path in photos]
    rows = segmenter(num_lanes).label(contents, paths)
    for row, result in zip(rows, written, strict=True):
        assert row.get("error") == result.error
        if result.error is None:
            path = tmp_path / "out" / result.mask.split("/")[-1]
            assert row["mask"] == path.read_bytes()
            assert row["classes"] == list(result.classes)
            assert (row["height"], row["width"]) == result.size_hw
            assert row["unknown_share"] == pytest.approx(result.unknown_share, abs=1e-6)
    assert [row.keys() == {"error"} for row in rows] == [False] * 4 + [True, False]


def test_pictures_are_labelled_as_their_files(segmenter, photos):
    one, sound = segmenter(), [path for path in photos if path.name != "04.png"]
    frames = [read_photo(path) for path in sound]
    for frame in frames:
        frame.setflags(write=False)  # as Ray's object store has them
    from_frames = one.label(np.array([*frames, None], dtype=object)[:-1])
    assert from_frames == one.label([path.read_bytes() for path in sound])
    turned = one.label([frames[0][:, ::-1]])
    assert turned == one.label([frames[0][:, ::-1].copy()])


def test_rows_without_a_photo_are_reported(segmenter):
    flat, floats = np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)
    photos = [None, b"", flat, floats, cv2_png(11, 11), cv2_png(10, 10)]
    texts = ["row 0: expected bytes or an array, got NoneType", "row 1: ", "row 2: frame: expected",
            "row 3: frame: expected uint8", "row 4: expected at most 100 pixels", ""]  # fmt: skip
    for row, words in zip(segmenter(max_pixels=100).label(photos), texts, strict=True):
        error = row.get("error", "")
        assert error.startswith(words)
        assert bool(error) == bool(words)


@pytest.mark.parametrize(
    ("resources", "config", "expected"),
    [
        ({"CPU": 1.5}, None, ("cpu", 2, 2)),
        ({"CPU": 0.4}, None, ("cpu", 1, 1)),
        ({}, EngineConfig(num_threads=3, use_cache=False), ("cpu", 3, 1)),
        ({"GPU": 0.25}, EngineConfig(backend="openvino"), None),
    ],
)
def test_an_actor_s_engine_takes_what_ray_gave(
    colour_bundle, resources, config, expected, monkeypatch
):
    actor = SimpleNamespace(get_actor_id=lambda: "1", get_assigned_resources=lambda: resources)
    ray = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: actor)
    monkeypatch.setitem(sys.modules, "ray", ray)
    if expected is None:
        with pytest.raises(ZssegError, match="cuda:0"):
            PhotoSegmenter(colour_bundle, NAMES, config=config)
        return
    with PhotoSegmenter(colour_bundle, NAMES, config=config).engine as engine:
        used = engine.config
    assert (used.device, used.num_threads, used.num_lanes) == expected


def cv2_png(height, width):
    return cv2.imencode(".png", np.zeros((height, width, 3), np.uint8))[1].tobytes()


def test_wrong_settings_and_batches_are_refused(segmenter, colour_bundle, monkeypatch):
    with refused(ConfigError, "channel_order"):
        PhotoSegmenter(colour_bundle, NAMES, config=EngineConfig(channel_order="bgr"))
    with refused(VocabularyError, "class_names"):
        PhotoSegmenter(colour_bundle, ["red", "red"], config=EngineConfig(use_cache=False))
    one, both = segmenter(), {"bytes": np.array([b""]), "image": np.zeros((1, 2, 2, 3), np.uint8)}
    for batch in ([b""], {"path": np.array(["a"])}, both):
        with refused(ArgumentError, "batch"):
            one(batch)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with refused(BackendUnavailableError, "pyarrow"):
        one({"bytes": np.array([cv2_png(2, 2)], dtype=object)})
