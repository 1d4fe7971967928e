"""How frames are recorded as CUDA graphs: when, how often, in which thread, and what is told."""

import itertools
import logging
import threading

import pytest

from conftest import require_cuda
from support.cuda_counts import count_captures
from support.device_backend import device_backend
from support.errors import refused
from support.frame_kinds import assert_same, compared, frame, open_engine, vocabulary
from zsseg_rt.errors import CaptureError, ConfigError
from zsseg_rt.ops import core
from zsseg_rt.runtime import captures
from zsseg_rt.runtime.families import aggregation
from zsseg_rt.runtime.workspace import Workspace

pytestmark = pytest.mark.needs_cuda

# On an emulated GPU a frame of proposals takes ten times as long as one of another family.
slow_proposals = pytest.param("proposals", marks=pytest.mark.nightly)


@pytest.fixture(scope="module", autouse=True)
def gpu():
    """Skip, or fail where a GPU is required."""
    require_cuda()


@pytest.fixture
def launched(monkeypatch):
    """Counts how often captures are recorded and launched."""
    return count_captures(monkeypatch)


@pytest.fixture
def placed(monkeypatch):
    """Settings of an engine whose graphs can be captured."""
    return device_backend(monkeypatch)[0]


def run_plainly(monkeypatch, placed, bundle, words, frames, **settings):
    """A fresh engine's results for frames without any capture."""
    with monkeypatch.context() as patch:
        patch.setenv("ZSSEG_CUDA_GRAPHS", "0")
        with open_engine(bundle, placed) as engine:
            engine.set_classes(**words)
            return [compared(engine.segment(f, **settings)) for f in frames]


@pytest.mark.parametrize("bundle", ["descriptor", "segment_tokens", slow_proposals])
def test_another_thread_names_classes_throughout(monkeypatch, placed, launched, bundle):
    """Every result has the labels of the vocabulary whose version it carries."""
    with open_engine(bundle, placed) as engine:
        choices = [vocabulary(engine, count, seed=count) for count in (3, 8, 5, 20)]
        versions, done = {}, threading.Event()
        versions[engine.set_classes(**choices[0]).version] = 0

        def keep_naming():
            for choice in itertools.cycle(range(len(choices))):
                if done.is_set():
                    return
                versions[engine.set_classes(**choices[choice]).version] = choice

        thread = threading.Thread(target=keep_naming)
        thread.start()
        try:
            images = [frame(seed) for seed in range(2)]
            pairs = [(n % 2, engine.segment(images[n % 2])) for n in range(16)]
        finally:
            done.set()
            thread.join(60)
        assert not thread.is_alive()
        engine.set_classes(**choices[0])
        before = launched["launched"]
        for _ in range(4):
            engine.segment(images[0])
        assert launched["launched"] >= before + 2
    plain = [run_plainly(monkeypatch, placed, bundle, words, images) for words in choices]
    for image, seg in pairs:
        assert_same(compared(seg), plain[versions[seg.vocabulary_version]][image])


@pytest.mark.parametrize("bundle", ["descriptor", "proposals", "segment_tokens"])
def test_a_refused_capture_is_told_once_and_labels_are_right(monkeypatch, caplog, bundle):
    fault, level, reason = "waits", "WARNING", "expected pinned host memory in a capture"
    if bundle == "segment_tokens":
        fault, level, reason = "not capturable", "INFO", "sessions"
    refusing, _ = device_backend(monkeypatch, fault=fault)
    frames = [frame(seed) for seed in range(3)]
    with caplog.at_level(logging.INFO), open_engine(bundle, refusing) as engine:
        words = vocabulary(engine, 5)
        engine.set_classes(**words)
        segs = [engine.segment(f) for f in frames]
        segs += [engine.segment(f, unknown_below=0.0) for f in frames]
    records = [r for r in caplog.records if r.name == "zsseg_rt.runtime.captures"]
    assert [record.levelname for record in records] == [level]
    assert reason in records[0].getMessage()
    expected = run_plainly(monkeypatch, refusing, bundle, words, frames)
    expected += run_plainly(monkeypatch, refusing, bundle, words, frames, unknown_below=0.0)
    for one, other in zip(segs, expected, strict=True):
        assert_same(compared(one), other)


def test_a_refused_capture_is_tried_again(monkeypatch, placed, launched):
    """The cause may be gone later: CUDA was out of memory, a library was not ready."""
    monkeypatch.setattr(captures, "TRIES_AFTER", (2, 4))
    begin, refused_so_far = core.Capture.begin, []

    def refusing_twice(capture, stream):
        if len(refused_so_far) < 2:
            refused_so_far.append(stream)
            raise CaptureError("stream: not now")
        begin(capture, stream)

    monkeypatch.setattr(core.Capture, "begin", refusing_twice)
    with open_engine("descriptor", placed) as engine:
        engine.set_classes(**vocabulary(engine, 5))
        tries = []
        for seed in range(11):  # refused at the 2nd, two plain, refused, four plain
            engine.segment(frame(seed))
            tries.append((len(refused_so_far), launched["recorded"]))
    assert tries[1:5] == [(1, 0)] * 3 + [(2, 0)]
    assert tries[8:] == [(2, 0), (2, 1), (2, 1)]


def test_a_thread_records_only_after_it_has_run_plainly(placed, launched):
    """In a thread's first call torch's libraries make handles, which no capture allows."""
    with open_engine("descriptor", placed) as engine:
        engine.set_classes(**vocabulary(engine, 5))
        engine.segment(frame(0))
        counts = []

        def second_thread():
            for seed in range(3):
                engine.segment(frame(seed))
                counts.append(dict(launched))

        other = threading.Thread(target=second_thread)
        other.start()
        other.join()
    assert [count["recorded"] for count in counts] == [0, 1, 1]
    assert counts[-1]["launched"] == 2


def test_the_first_frame_is_run_before_it_is_timed(monkeypatch):
    settings, sessions = device_backend(monkeypatch)
    monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", "off")
    with refused(ConfigError, "ZSSEG_CUDA_GRAPHS", "off"):
        open_engine("descriptor", settings)
    monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", "0")
    sessions.clear()
    with open_engine("descriptor", settings) as engine:
        engine.set_classes(**vocabulary(engine, 5))
        runs = []
        for seed in range(3):
            engine.segment(frame(seed))
            runs.append([session.runs for session in sessions])
    assert runs == [[2, 2], [3, 3], [4, 4]]


@pytest.mark.parametrize("count", [5, 8])
def test_classes_in_parts_are_recorded_too(monkeypatch, placed, launched, tmp_path_factory, count):
    """Rows that fill a capture's size are in the last part."""
    pytest.importorskip("onnx", reason="needs pip install '.[train]'")
    from support.golden_cat_seg import tiny_model
    from zsseg_rt.export import export_bundle

    monkeypatch.setattr(aggregation, "MOST_AT_ONCE", 3)
    path = tmp_path_factory.mktemp("parts") / "parts.zsseg"
    options = {"precisions": ("float32",), "text_encoder": None, "verify": False}
    export_bundle(tiny_model(most_classes=8), path, **options)
    frames = [frame(seed) for seed in range(4)]
    results = []
    for recorded in ("1", "0"):
        monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", recorded)
        with open_engine(path, placed) as engine:
            engine.set_classes(**vocabulary(engine, count))
            results.append([engine.segment(f) for f in frames])
    assert launched["recorded"] == 2
    assert launched["launched"] >= 3 * 2
    if count == 8:  # else other rows stand beside those that fill the size
        for one, other in zip(*results, strict=True):
            assert_same(compared(one), compared(other))


def test_a_vocabulary_is_whole_on_the_device_before_its_first_frame(monkeypatch, placed):
    """Its arrays on the host may be freed or changed as soon as they were adopted."""
    calls = []

    def note(name):
        method = getattr(Workspace, name)
        monkeypatch.setattr(Workspace, name, lambda *a: (calls.append(name), method(*a))[1])

    with open_engine("descriptor", placed) as engine:
        engine.set_classes(**vocabulary(engine, 5))
        engine.segment(frame(0))
        for name in ("upload", "synchronize", "upload_frame"):
            note(name)
        engine.set_classes(**vocabulary(engine, 6, seed=1))
        engine.segment(frame(1))
    before = calls[: calls.index("upload_frame")]
    assert "upload" in before
    assert before[-1] == "synchronize"
