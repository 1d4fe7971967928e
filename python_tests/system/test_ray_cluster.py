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

LIMIT = 120.0  # seconds
READ = {"num_cpus": 0.1}  # actors may hold all other CPUs


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A cluster of this machine that believes to have two CPUs and a GPU."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("USAGE_STATS_ENABLED", "0"), ("DATA_DISABLE_PROGRESS_BARS", "1")):
            patch.setenv(f"RAY_{name}", value)
        ray.init(
            address="local", num_cpus=2, num_gpus=1, include_dashboard=False,
            object_store_memory=100 << 20, log_to_driver=False,
        )  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture
def settings(colour_bundle):
    return {"bundle": str(colour_bundle), "classes": ["red", "blue", "green", "white"]}


class Configured(PhotoSegmenter):
    """Shows the settings of its engine."""

    def settings(self):
        config = self.engine.config
        return config.device, config.num_threads, config.num_lanes


@pytest.mark.parametrize(
    ("num_cpus", "config", "expected"),
    [
        (1.5, None, ("cpu", 2, 2)),
        (0.4, None, ("cpu", 1, 1)),
        (0.1, EngineConfig(num_threads=3, use_cache=False), ("cpu", 3, 1)),
    ],
)
def test_an_actor_s_engine_takes_what_ray_gave(settings, num_cpus, config, expected):
    actor = ray.remote(Configured).options(num_cpus=num_cpus).remote(**settings, config=config)
    try:
        assert ray.get(actor.settings.remote(), timeout=LIMIT) == expected
    finally:
        ray.kill(actor)


def test_part_of_a_gpu_means_that_gpu(settings):
    config = EngineConfig(backend="openvino", use_cache=False)
    actor = ray.remote(PhotoSegmenter).options(num_cpus=0.1, num_gpus=0.25)
    with pytest.raises(ray.exceptions.RayError, match="cuda:0"):
        ray.get(actor.remote(config=config, **settings).label.remote([]), timeout=LIMIT)


def test_rows_are_what_the_class_gives(settings, tmp_path):
    folder, out = random_photos(tmp_path / "photos", 6, damaged=4), tmp_path / "out"
    photos = ray.data.read_binary_files(
        str(folder), include_paths=True, override_num_blocks=6, **READ
    )
    actors = ActorPoolStrategy(
        size=2, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
    )
    photos.map_batches(
        PhotoSegmenter, fn_constructor_kwargs=settings, batch_size=2, num_cpus=0.8, compute=actors
    ).write_parquet(str(out), ray_remote_args=READ)
    rows = {Path(row.pop("path")).name: row for row in pq.read_table(out).to_pylist()}
    assert sorted(rows) == [f"{index:02}.png" for index in range(6)]
    plain = PhotoSegmenter(**settings, config=EngineConfig(device="cpu", use_cache=False))
    for name, row in rows.items():
        (expected,) = plain.label([(folder / name).read_bytes()], [str(folder / name)])
        assert {key: value for key, value in row.items() if value is not None} == expected
    assert "04.png" in rows["04.png"]["error"]
    assert list(rows["00.png"]) == ["height", "width", "mask", "classes", "unknown_share", "error"]
    plain.engine.close()
