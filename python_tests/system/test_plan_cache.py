"""The plan cache: one build a key, checked on reading, whole files or none."""

import json
import logging
import multiprocessing
import os

import pytest

from zsseg_rt.backends.plan_cache import Plan, PlanCache, PlanKey, kernels_path
from zsseg_rt.common import files as store

KEY = PlanKey(
    graph_name="decoder",
    graph_sha256="ab" * 32,
    runtime="tensorrt-10.3.0",
    target="sm87-Orin",
    precision="float16",
    shapes={"classes": (1, 32, 1024)},
)
REPORT = {"precision": "float16", "layers": []}


class Builder:
    def __init__(self, data=b"plan bytes"):
        self.calls = 0
        self.data = data

    def __call__(self):
        self.calls += 1
        return Plan(data=self.data, report=REPORT)


def files(folder):
    return sorted(p.name for p in (folder / "engines").glob("*") if not p.name.endswith(".lock"))


def stored(folder):
    cache = PlanCache(folder)
    cache.get_or_build(KEY, Builder())
    return cache, cache.path(KEY)


def test_file_name_and_record_say_what_the_plan_is(tmp_path):
    _, path = stored(tmp_path)
    assert path.name.startswith("decoder-tensorrt-10.3.0-sm87-orin-float16-")
    head = json.loads(path.open("rb").readline())
    assert head["key"]["graph_sha256"] == "ab" * 32
    assert head["key"]["shapes"] == {"classes": [1, 32, 1024]}
    assert head["about"] == REPORT


def test_discard_makes_the_next_request_build(tmp_path, caplog):
    cache, path = stored(tmp_path)
    kernels_path(path).write_bytes(b"compiled for the plan")
    cache.discard(KEY, "the runtime refused it")
    assert files(tmp_path) == []
    assert "the runtime refused it" in caplog.text
    builder = Builder()
    cache.get_or_build(KEY, builder)
    assert builder.calls == 1


def test_a_cache_folder_that_is_a_file_is_a_warning(tmp_path, caplog):
    (tmp_path / "engines").write_text("in the way")
    plan = PlanCache(tmp_path).get_or_build(KEY, Builder())
    assert plan.data == b"plan bytes"
    assert plan.path is None
    assert "cannot write" in caplog.text
    assert (tmp_path / "engines").read_text() == "in the way"


def test_no_folder_means_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    builder = Builder()
    cache = PlanCache(None)
    assert cache.get_or_build(KEY, builder).path is None
    cache.get_or_build(KEY, builder)
    cache.discard(KEY, "nothing to discard")
    assert builder.calls == 2
    assert list(tmp_path.iterdir()) == []


def test_a_failing_build_stores_nothing_and_frees_the_lock(tmp_path):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        PlanCache(tmp_path).get_or_build(KEY, fail)
    assert files(tmp_path) == []
    assert PlanCache(tmp_path).get_or_build(KEY, Builder()).path is not None


class SetWhenWaiting(logging.Handler):
    def __init__(self, event):
        super().__init__()
        self.event = event

    def emit(self, record):
        if "waiting for another process" in record.getMessage():
            self.event.set()


def build_while_the_other_waits(folder, log, waiting):
    def build():
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        assert waiting.wait(60)
        return Plan(data=b"plan bytes", report=REPORT)

    logger = logging.getLogger(store.__name__)
    logger.setLevel(logging.INFO)
    logger.addHandler(SetWhenWaiting(waiting))
    assert PlanCache(folder).get_or_build(KEY, build).data == b"plan bytes"


def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    waiting, log = context.Event(), tmp_path / "log"
    workers = [
        context.Process(target=build_while_the_other_waits, args=(tmp_path, log, waiting))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(90)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(log.read_text().splitlines()) == 1
