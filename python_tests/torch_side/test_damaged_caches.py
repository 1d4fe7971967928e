"""No state of a cache folder stops an engine: what is damaged is made again, with one warning."""

import dataclasses
import logging
import os
import shutil

import numpy as np
import pytest

from support.graphs import write_scale
from zsseg_rt.backends._openvino import BACKEND
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.plan_cache import Plan, PlanCache, PlanKey
from zsseg_rt.text.embeddings import RowCache

KEY = PlanKey(
    graph_name="decoder",
    graph_sha256="ab" * 32,
    runtime="tensorrt-10.3.0",
    target="sm87-Orin",
    precision="float16",
    shapes={"classes": (1, 32, 1024)},
)
ROW = np.array([0.6, 0.8], np.float32)


class PlanUser:
    """Uses the cache once; says whether the content was made anew."""

    def __init__(self, folder):
        self.cache, self.made = folder / "cache", 0

    def use(self):
        before = self.made
        assert PlanCache(self.cache).get_or_build(KEY, self._build).data == b"plan bytes"
        return self.made > before

    def _build(self):
        self.made += 1
        return Plan(data=b"plan bytes", report={"layers": []})


class RowUser:
    def __init__(self, folder):
        self.cache = folder / "cache"

    def use(self):
        rows = RowCache(self.cache, "encoder", 2)
        found = rows.read("templates", "cat")
        if found is None:
            rows.write("templates", {"cat": ROW})
        else:
            np.testing.assert_array_equal(found, ROW)
        return found is None


class OpenVinoUser:
    def __init__(self, folder):
        pytest.importorskip("openvino")
        self.cache, self.graph = folder / "cache", write_scale(folder / "scale.onnx")

    def use(self):
        before = self._written()
        options = BackendOptions(num_threads=1, cache_dir=self.cache)
        session = BACKEND.load(
            self.graph, device="cpu", precision="float32", options=options
        ).session()
        x = np.arange(64, dtype=np.float32)[None]
        np.testing.assert_allclose(session.run({"x": x})["y"], 3 * x, rtol=1e-2)
        session.close()
        return self._written() != before

    def _written(self):
        blobs = [blob for blob in self.cache.rglob("*.blob") if blob.is_file()]
        return [(blob.stat().st_ino, blob.stat().st_mtime_ns) for blob in blobs]


@dataclasses.dataclass(frozen=True)
class Kind:
    user: type
    pattern: str


KINDS = {
    "row": Kind(RowUser, "text/*/*.row"),
    "blob": Kind(OpenVinoUser, "openvino/*/*.blob"),
    "checksums": Kind(OpenVinoUser, "openvino/*/checksums.json"),
    "model folder": Kind(OpenVinoUser, "openvino/" + "[0-9a-f]" * 32),
}


def make_folder(entry):
    (entry / "deeper").mkdir(parents=True)
    (entry / "deeper" / "file").write_text("x")


# Each is given the free place of the entry and the content it had (None: it was a folder).
CONTENTS = {
    "garbage": lambda entry, content: entry.write_bytes(b"\x93NUMPY\x01\0v\0{'descr':\n" * 9),
    "truncated": lambda entry, content: entry.write_bytes((content or b"xx")[:-2]),
    "empty": lambda entry, content: entry.write_bytes(b""),
    "nested": lambda entry, content: entry.write_bytes(b"[" * 200_000),
    "not UTF-8": lambda entry, content: entry.write_bytes(b'{"\xff": 1}'),
    "huge number": lambda entry, content: entry.write_bytes(b"9" * 10_000),
}
OBSTACLES = {
    "folder": lambda entry, content: make_folder(entry),
    "pipe": lambda entry, content: os.mkfifo(entry),
}
CASES = [
    pytest.param(kind, damage, id=f"{name}-{how}")
    for name, kind in KINDS.items()
    for how, damage in {**CONTENTS, **OBSTACLES}.items()
    if (name, how) != ("model folder", "folder")
]


def replace_entry(user, kind, damage):
    (entry,) = user.cache.glob(kind.pattern)
    content = None if entry.is_dir() else entry.read_bytes()
    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    damage(entry, content)
    return entry


@pytest.mark.parametrize(("kind", "damage"), CASES)
def test_damaged_entries_are_made_again_with_one_warning(tmp_path, caplog, kind, damage):
    caplog.set_level(logging.WARNING, logger="zsseg_rt")
    user = kind.user(tmp_path)
    assert user.use()
    entry = replace_entry(user, kind, damage)
    user.use()
    assert len(caplog.records) == 1, caplog.text
    assert str(entry) in caplog.text or str(entry.parent) in caplog.text
    caplog.clear()
    assert not user.use(), "the entry was not made again"
    assert not caplog.records


@pytest.mark.parametrize("obstacle", OBSTACLES.values(), ids=OBSTACLES)
@pytest.mark.parametrize(
    ("user", "lock"), [(PlanUser, "engines/*.plan.lock"), (OpenVinoUser, "openvino/*.lock")]
)
def test_what_is_no_lock_costs_no_more_than_the_cache(tmp_path, user, lock, obstacle):
    user = user(tmp_path)
    user.use()
    (place,) = user.cache.glob(lock)
    place.unlink()
    obstacle(place, None)
    user.use()


@pytest.mark.parametrize("user", [RowUser, PlanUser, OpenVinoUser])
@pytest.mark.parametrize("place", ["cache", "part"])
def test_a_file_where_a_folder_belongs_only_costs_the_cache(tmp_path, caplog, user, place):
    caplog.set_level(logging.WARNING, logger="zsseg_rt")
    user = user(tmp_path)
    parts = [user.cache / part for part in ("text", "engines", "openvino")]
    for path in [user.cache] if place == "cache" else parts:
        path.parent.mkdir(exist_ok=True)
        path.write_text("in the way")
    user.use()
    assert caplog.records
    assert (user.cache if place == "cache" else parts[0]).read_text() == "in the way"
