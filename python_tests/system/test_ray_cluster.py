"""Photos labelled by Ray Data itself; needs the extra ``ray``."""

import os
from pathlib import Path

import pytest

try:
    import ray
except ImportError:
    if os.environ.get("ZSSEG_REQUIRE_RAY") == "1":
        raise
    pytest.skip("needs Ray: pip install '.[ray]'", allow_module_level=True)

import pyarrow.parquet as pq
from ray.data import ActorPoolStrategy

from support.picture_files import random_photos
from zsseg_rt import EngineConfig
from zsseg_rt.integrations.ray import PhotoSegmenter

READ = {"num_cpus": 0.1}  # actors may hold all other CPUs


def test_rows_are_what_the_class_gives(colour_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    folder, out = random_photos(tmp_path / "photos", 6, damaged=4), tmp_path / "out"
    settings = {"bundle": str(colour_bundle), "classes": ["red", "blue", "green", "white"]}
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False,
             object_store_memory=100 << 20, log_to_driver=False)  # fmt: skip
    try:
        photos = ray.data.read_binary_files(
            str(folder), include_paths=True, override_num_blocks=6, **READ
        )
        actors = ActorPoolStrategy(
            size=2, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        )
        photos.map_batches(
            PhotoSegmenter, fn_constructor_kwargs=settings, batch_size=2, num_cpus=0.8,
            compute=actors,
        ).write_parquet(str(out), ray_remote_args=READ)  # fmt: skip
        config = EngineConfig(backend="openvino", use_cache=False)
        actor = ray.remote(PhotoSegmenter).options(num_cpus=0.1, num_gpus=0.25)
        with pytest.raises(ray.exceptions.RayError, match="cuda:0"):  # part of it is that GPU
            ray.get(actor.remote(config=config, **settings).label.remote([]), timeout=120.0)
    finally:
        ray.shutdown()
    rows = {Path(row.pop("path")).name: row for row in pq.read_table(out).to_pylist()}
    assert sorted(rows) == [f"{index:02}.png" for index in range(6)]
    plain = PhotoSegmenter(**settings, config=EngineConfig(device="cpu", use_cache=False))
    for name, row in rows.items():
        (expected,) = plain.label([(folder / name).read_bytes()], [str(folder / name)])
        assert {key: value for key, value in row.items() if value is not None} == expected
    assert "04.png" in rows["04.png"]["error"]
    assert list(rows["00.png"]) == ["height", "width", "mask", "classes", "unknown_share", "error"]
    plain.engine.close()
