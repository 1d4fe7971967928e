"""Photos labelled by Ray Data itself; needs the extra ``ray``."""

import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

try:
    import ray
except ImportError:
    if os.environ.get("ZSSEG_REQUIRE_RAY") == "1":
        raise
    pytest.skip("needs Ray: pip install '.[ray]'", allow_module_level=True)

import pyarrow.parquet as pq
from ray.data import ActorPoolStrategy, DataContext

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
    rng = np.random.default_rng(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(6):
        picture = np.kron(rng.integers(0, 256, (5, 7, 3)), np.ones((8, 8 + index, 1)))
        _, encoded = cv2.imencode(".png", picture.astype(np.uint8))
        (photos / f"{index:02}.png").write_bytes(encoded.tobytes())
    (photos / "04.png").write_bytes(b"none")
    return photos


@pytest.fixture
def settings(colour_bundle):
    return {"bundle": str(colour_bundle), "classes": NAMES}


class Watched(PhotoSegmenter):
    """Notes each photo that it labels as a file in a folder.

    A photo whose name is in the folder ``fail`` there ends the run, once Ray has saved that some
    other is done.
    """

    def __init__(self, *, notes, **settings):
        super().__init__(**settings)
        self.notes = Path(notes)

    def __call__(self, batch):
        for path in batch["path"]:
            if (self.notes / "fail" / Path(path).name).exists():
                wait_for(lambda: saved(self.notes.parent / "done"))
                raise RuntimeError("the machine went away")
            (self.notes / Path(path).name).touch()
        return super().__call__(batch)

    def settings(self):
        return self.engine.config


def saved(checkpoint):
    """Names of the photos that Ray has saved as done."""
    files = [path for path in checkpoint.glob("*.parquet") if ".pending" not in path.name]
    return {Path(row["path"]).name for path in files for row in written(path)}


def wait_for(condition):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def written(folder):
    return pq.read_table(folder).to_pylist()


def label(folder, out, kind, settings):
    photos = ray.data.read_binary_files(
        str(folder), include_paths=True, override_num_blocks=6, **READ
    )
    photos.map_batches(
        kind,
        fn_constructor_kwargs=settings,
        batch_size=2,
        num_cpus=0.8,
        compute=ActorPoolStrategy(
            size=2, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        ),
    ).write_parquet(str(out), ray_remote_args=READ)


def config_in_actor(num_cpus, **settings):
    """The settings that an engine has in an actor with so many CPUs."""
    actor = ray.remote(Watched).options(num_cpus=num_cpus).remote(**settings)
    try:
        return ray.get(actor.settings.remote(), timeout=LIMIT)
    finally:
        ray.kill(actor)


def test_an_actor_s_engine_takes_what_ray_gave(settings, tmp_path):
    settings = settings | {"notes": str(tmp_path)}
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
    label(folder, tmp_path / "out", PhotoSegmenter, settings)
    rows = {Path(row.pop("path")).name: row for row in written(tmp_path / "out")}
    assert sorted(rows) == [f"{index:02}.png" for index in range(6)]
    plain = PhotoSegmenter(**settings, config=EngineConfig(device="cpu", use_cache=False))
    for name, row in rows.items():
        (expected,) = plain.label([(folder / name).read_bytes()], [str(folder / name)])
        assert {key: value for key, value in row.items() if value is not None} == expected
    assert "04.png" in rows["04.png"]["error"]
    assert list(rows["00.png"]) == ["height", "width", "mask", "classes", "unknown_share", "error"]
    plain.engine.close()


def test_ray_resumes_what_was_interrupted(folder, settings, tmp_path):
    checkpoint = pytest.importorskip("ray.data.checkpoint", reason="this Ray cannot resume")
    notes, out = tmp_path / "notes", tmp_path / "out"
    (notes / "fail").mkdir(parents=True)
    (notes / "fail" / "05.png").touch()
    settings = settings | {"notes": str(notes)}
    context = DataContext.get_current()
    context.checkpoint_config = checkpoint.CheckpointConfig(
        id_column="path", checkpoint_path=str(tmp_path / "done")
    )
    try:
        with pytest.raises(Exception, match="the machine went away"):
            label(folder, out, Watched, settings)
        finished = saved(tmp_path / "done")
        assert finished
        shutil.rmtree(notes / "fail")
        for note in notes.iterdir():
            note.unlink()
        label(folder, out, Watched, settings)
    finally:
        context.checkpoint_config = None
    again = {path.name for path in notes.iterdir()}
    assert "05.png" in again
    assert not again & finished
    counts = Counter(Path(row["path"]).name for row in written(out))
    assert counts == Counter(path.name for path in folder.iterdir())
