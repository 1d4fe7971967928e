"""The class for Ray's ``map_batches`` by itself, and in Ray Data where the extra is installed."""

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
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


CPU = EngineConfig(device="cpu", use_cache=False)


@pytest.fixture
def photos(tmp_path):
    return find_photos([str(random_photos(tmp_path / "in", 6, damaged=4))])


@pytest.fixture
def segmenter(colour_bundle):
    with contextlib.ExitStack() as opened:

        def make(config=CPU, **settings):
            segmenter = PhotoSegmenter(colour_bundle, NAMES, config=config, **settings)
            opened.callback(segmenter.engine.close)
            return segmenter

        yield make


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_photos_become_what_segment_writes(segmenter, colour_bundle, photos, tmp_path, num_lanes):
    with Engine(colour_bundle, CPU) as engine:
        engine.set_classes(NAMES)
        written = segment_photos(engine, photos, tmp_path / "out")
    contents, paths = [path.read_bytes() for path in photos], [str(path) for path in photos]
    rows = segmenter(replace(CPU, num_lanes=num_lanes)).label(contents, paths)
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


@pytest.mark.parametrize(("resources", "config", "expected"), [
    ({"CPU": 1.5}, None, ("cpu", 2, 2)), ({"CPU": 0.4}, None, ("cpu", 1, 1)),
    ({}, EngineConfig(num_threads=3, use_cache=False), ("cpu", 3, 1)),
    ({"GPU": 0.25}, EngineConfig(backend="openvino"), None),
])  # fmt: skip
def test_an_actor_s_engine_takes_what_ray_gave(segmenter, resources, config, expected, monkeypatch):
    actor = SimpleNamespace(get_actor_id=lambda: "1", get_assigned_resources=lambda: resources)
    ray = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: actor)
    monkeypatch.setitem(sys.modules, "ray", ray)
    if expected is None:
        with pytest.raises(ZssegError, match="cuda:0"):
            segmenter(config)
    else:
        used = segmenter(config).engine.config
        assert (used.device, used.num_threads, used.num_lanes) == expected


def cv2_png(height, width):
    return cv2.imencode(".png", np.zeros((height, width, 3), np.uint8))[1].tobytes()


def test_wrong_settings_and_batches_are_refused(segmenter, colour_bundle, monkeypatch):
    with refused(ConfigError, "channel_order"):
        segmenter(EngineConfig(channel_order="bgr"))
    with refused(VocabularyError, "class_names"):
        PhotoSegmenter(colour_bundle, ["red", "red"], config=CPU)
    one, both = segmenter(), {"bytes": np.array([b""]), "image": np.zeros((1, 2, 2, 3), np.uint8)}
    for batch in ([b""], {"path": np.array(["a"])}, both):
        with refused(ArgumentError, "batch"):
            one(batch)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with refused(BackendUnavailableError, "pyarrow"):
        one({"bytes": np.array([cv2_png(2, 2)], dtype=object)})


def test_rows_of_ray_data_are_what_the_class_gives(segmenter, colour_bundle, tmp_path, monkeypatch):
    try:
        import ray.data
    except ImportError:
        if os.environ.get("ZSSEG_REQUIRE_RAY") == "1":
            raise
        pytest.skip("needs Ray: pip install '.[ray]'")
    import pyarrow.parquet as pq

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    folder, out = random_photos(tmp_path / "photos", 6, damaged=4), tmp_path / "out"
    settings = {"bundle": str(colour_bundle), "classes": NAMES}
    read = {"num_cpus": 0.1}  # actors may hold all other CPUs
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False,
             object_store_memory=100 << 20, log_to_driver=False)  # fmt: skip
    try:
        photos = ray.data.read_binary_files(
            str(folder), include_paths=True, override_num_blocks=6, **read
        )
        actors = ray.data.ActorPoolStrategy(
            size=2, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        )
        photos.map_batches(
            PhotoSegmenter, fn_constructor_kwargs=settings, batch_size=2, num_cpus=0.8,
            compute=actors,
        ).write_parquet(str(out), ray_remote_args=read)  # fmt: skip
        config = EngineConfig(backend="openvino", use_cache=False)
        actor = ray.remote(PhotoSegmenter).options(num_cpus=0.1, num_gpus=0.25)
        with pytest.raises(ray.exceptions.RayError, match="cuda:0"):  # part of it is that GPU
            ray.get(actor.remote(config=config, **settings).label.remote([]), timeout=120.0)
    finally:
        ray.shutdown()
    rows = {Path(row.pop("path")).name: row for row in pq.read_table(out).to_pylist()}
    assert sorted(rows) == [f"{index:02}.png" for index in range(6)]
    plain = segmenter()
    for name, row in rows.items():
        (expected,) = plain.label([(folder / name).read_bytes()], [str(folder / name)])
        assert {key: value for key, value in row.items() if value is not None} == expected
    assert "04.png" in rows["04.png"]["error"]
    assert list(rows["00.png"]) == ["height", "width", "mask", "classes", "unknown_share", "error"]
