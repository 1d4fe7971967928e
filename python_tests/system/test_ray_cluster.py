"""Photos labelled by Ray Data itself; needs the extra ``ray``."""

import os
import sys
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

NAMES = ["red", "blue", "green", "white"]
LIMIT = 120.0  # seconds
READ = {"num_cpus": 0.1}  # actors may hold all other CPUs


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A cluster of this machine that believes to have two CPUs and a GPU."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        ray.init(
            address="local", num_cpus=2, num_gpus=1, include_dashboard=False,
            object_store_memory=100 << 20, log_to_driver=False,
        )  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture
def folder(tmp_path):
    """Six photos, one of them damaged."""
    return random_photos(tmp_path / "photos", 6, damaged=4)


@pytest.fixture
def settings(colour_bundle):
    return {"bundle": str(colour_bundle), "classes": NAMES}


class Configured(PhotoSegmenter):
    """Shows the settings of its engine."""

    def settings(self):
        return self.engine.config


def written(folder):
    return pq.read_table(folder).to_pylist()


def label(folder, out, settings):
    photos = ray.data.read_binary_files(
        str(folder), include_paths=True, override_num_blocks=6, **READ
    )
    photos.map_batches(
        PhotoSegmenter,
        fn_constructor_kwargs=settings,
        batch_size=2,
        num_cpus=0.8,
        compute=ActorPoolStrategy(
            size=2, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        ),
    ).write_parquet(str(out), ray_remote_args=READ)


def config_in_actor(num_cpus, **settings):
    """The settings that an engine has in an actor with so many CPUs."""
    actor = ray.remote(Configured).options(num_cpus=num_cpus).remote(**settings)
    try:
        return ray.get(actor.settings.remote(), timeout=LIMIT)
    finally:
        ray.kill(actor)


def test_an_actor_s_engine_takes_what_ray_gave(settings):
    config = config_in_actor(1.5, **settings)
    assert (config.device, config.num_threads, config.num_lanes) == ("cpu", 2, 2)
    config = config_in_actor(0.4, **settings)
    assert (config.device, config.num_threads, config.num_lanes) == ("cpu", 1, 1)
    asked = EngineConfig(num_threads=3, use_cache=False)
    config = config_in_actor(0.1, config=asked, **settings)
    assert (config.device, config.num_threads, config.num_lanes) == ("cpu", 3, 1)


def test_part_of_a_gpu_means_that_gpu(settings):
    config = EngineConfig(backend="openvino", use_cache=False)
    actor = ray.remote(PhotoSegmenter).options(num_cpus=0.1, num_gpus=0.25)
    with pytest.raises(ray.exceptions.RayError, match="cuda:0"):
        ray.get(actor.remote(config=config, **settings).label.remote([]), timeout=LIMIT)


def test_rows_are_what_the_class_gives(folder, settings, tmp_path):
    label(folder, tmp_path / "out", settings)
    rows = {Path(row.pop("path")).name: row for row in written(tmp_path / "out")}
    assert sorted(rows) == [f"{index:02}.png" for index in range(6)]
    plain = PhotoSegmenter(**settings, config=EngineConfig(device="cpu", use_cache=False))
    for name, row in rows.items():
        (expected,) = plain.label([(folder / name).read_bytes()], [str(folder / name)])
        assert {key: value for key, value in row.items() if value is not None} == expected
    assert "04.png" in rows["04.png"]["error"]
    assert list(rows["00.png"]) == ["height", "width", "mask", "classes", "unknown_share", "error"]
    plain.engine.close()
