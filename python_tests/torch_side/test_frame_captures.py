"""Frames recorded as CUDA graphs: the same labels as without, whatever comes in between.

Runs on any CUDA device, the emulated one included.
"""

import itertools
import logging
import threading
from pathlib import Path

import numpy as np
import pytest

from conftest import require_cuda
from support.cuda_counts import count_captures
from support.device_backend import DeviceSession, device_backend
from support.errors import refused
from zsseg_rt import Engine, EngineConfig, FrameMemory
from zsseg_rt.errors import CaptureError, ConfigError
from zsseg_rt.ops import core
from zsseg_rt.runtime import captures
from zsseg_rt.runtime.lane import Lane
from zsseg_rt.runtime.workspace import Workspace

pytestmark = pytest.mark.needs_cuda

STORED = Path(__file__).parents[1] / "bundles" / "v1"
# In how many parts a frame is recorded: the host looks at something before each but the first.
PARTS = {"descriptor": 1, "dense": 1, "segment_tokens": 1, "proposals": 3}
each_family = pytest.mark.parametrize("bundle", PARTS)
# On an emulated GPU a frame of proposals takes ten times as long as one of another family.
slow_proposals = pytest.param("proposals", marks=pytest.mark.nightly)
each_quick_family = pytest.mark.parametrize("bundle", [*list(PARTS)[:3], slow_proposals])
SIZES = [*itertools.product([1, 5, 8, 23, 300], PARTS)]
SIZES[-1] = pytest.param(*SIZES[-1], marks=pytest.mark.nightly)


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


def frame(seed, height=31, width=47):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def open_engine(placed, bundle="descriptor", **settings):
    usual = {"precision": "float32", "with_scores": True, "with_times": True, "use_cache": False}
    config = usual | placed | settings
    return Engine(STORED / f"{bundle}.zsseg", EngineConfig(**config))


def vocabulary(engine, count, *, seed=0, synonyms=False, background=0):
    """Arguments of set_classes: so many phrases with embeddings of their own."""
    names = [f"name {index}" for index in range(count)]
    rng = np.random.default_rng(100 + seed)
    rows = rng.normal(size=(count + background, engine.bundle.text.embed_dim)).astype(np.float32)
    classes = [names[:2], *names[2:]] if synonyms else names
    return {
        "class_names": classes,
        "embeddings": rows / np.linalg.norm(rows, axis=1, keepdims=True),
        "background": [f"thing {index}" for index in range(background)],
    }


def assert_same(found, expected):
    assert found.labels.dtype == expected.labels.dtype
    assert found.names == expected.names
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.scores, expected.scores)


def run_plainly(monkeypatch, placed, bundle, words, frames, **settings):
    """What a fresh engine makes of frames without any capture."""
    with monkeypatch.context() as patch:
        patch.setenv("ZSSEG_CUDA_GRAPHS", "0")
        with open_engine(placed, bundle) as engine:
            engine.set_classes(**words)
            return [engine.segment(f, **settings) for f in frames]


@pytest.mark.parametrize(("count", "bundle"), SIZES)
def test_a_replayed_frame_equals_a_plain_one(monkeypatch, placed, launched, bundle, count):
    frames = [frame(seed) for seed in range(5)]
    with open_engine(placed, bundle) as engine:
        words = vocabulary(engine, count)
        engine.set_classes(**words)
        found = [engine.segment(f) for f in frames]
    assert launched["recorded"] == PARTS[bundle]
    assert launched["launched"] >= 4 * PARTS[bundle]
    before = dict(launched)
    expected = run_plainly(monkeypatch, placed, bundle, words, frames)
    assert launched == before
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
        assert set(one.times) == set(other.times)
        assert all(time >= 0 for time in one.times.values())
    told = {seg.labels.tobytes() + seg.scores.tobytes() for seg in found}
    assert count == 1 or len(told) > 1


@pytest.mark.parametrize("bundle", ["descriptor", "dense"])
@pytest.mark.parametrize("steady", [True, False])
def test_frames_with_a_memory_are_recorded(monkeypatch, placed, launched, bundle, steady):
    """All of a frame where the memory only skips, else all up to its logits."""
    pytest.importorskip("cv2")
    scene = np.kron(frame(1, 8, 12), np.ones((6, 6, 1), np.uint8))  # 48x72 pixels
    frames = [np.ascontiguousarray(scene[:31, x : x + 47]) for x in range(0, 20, 4)]

    def run(engine):
        memories = [FrameMemory(steady=steady, skip_still=not steady) for _ in range(2)]
        at = itertools.count()
        return [
            engine.segment(f, memory=memory, captured_at=float(next(at)))
            for f in frames
            for memory in memories  # of two sources, in turns
        ]

    with open_engine(placed, bundle) as engine:
        words = vocabulary(engine, 5)
        engine.set_classes(**words)
        found = run(engine)
        engine.set_classes(**vocabulary(engine, 5, seed=1))  # the past is of other names
        other = run(engine)
    assert launched["recorded"] == 1
    assert launched["launched"] >= len(found) + len(other) - 3
    monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", "0")
    with open_engine(placed, bundle) as engine:
        engine.set_classes(**words)
        expected = run(engine)
    for one, plain in zip(found, expected, strict=True):
        assert_same(one, plain)
        assert one.reused == plain.reused
        assert set(one.times) == set(plain.times)
    alone = run_plainly(monkeypatch, placed, bundle, words, frames[-1:])[0]
    assert np.array_equal(found[-1].scores, alone.scores) != steady


@pytest.mark.parametrize("bundle", ["descriptor", "dense"])
@pytest.mark.parametrize("count", [5, 23])
def test_scores_of_all_classes_come_from_recorded_frames(
    monkeypatch, placed, launched, bundle, count
):
    frames, maps = [frame(seed) for seed in range(4)], []
    for recorded in ("1", "0"):
        monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", recorded)
        with open_engine(placed, bundle, with_class_scores="low") as engine:
            engine.set_classes(**vocabulary(engine, count))
            maps.append([engine.segment(f).class_scores for f in frames])
    assert launched["recorded"] == 1
    assert launched["launched"] >= 3
    assert maps[0][0].shape[0] == count
    np.testing.assert_array_equal(*maps)


@each_family
def test_swaps_equal_fresh_engines(monkeypatch, placed, launched, bundle):
    """Other names, synonyms, background, other sizes of the same bucket and of others, and back."""
    with open_engine(placed, bundle) as engine:
        swaps = [
            vocabulary(engine, 7),
            vocabulary(engine, 5, seed=1),
            vocabulary(engine, 6, seed=2, synonyms=True),
            vocabulary(engine, 4, seed=3, background=3),
            vocabulary(engine, 12, seed=4),
            vocabulary(engine, 300, seed=5, synonyms=True),
            vocabulary(engine, 7),
        ]
        frames, found = [frame(1), frame(2)], []
        for words in swaps:
            engine.set_classes(**words)
            found.append([engine.segment(f) for f in frames])
    assert launched["launched"] >= 7
    if bundle == "segment_tokens":  # nothing on the GPU depends on the classes
        assert launched == {"recorded": 1, "launched": 2 * len(swaps) - 1}
    for words, results in zip(swaps, found, strict=True):
        expected = run_plainly(monkeypatch, placed, bundle, words, frames)
        for one, other in zip(results, expected, strict=True):
            assert_same(one, other)


@each_family
def test_shapes_and_rules_take_turns(monkeypatch, placed, launched, bundle):
    sizes, rules = [(31, 47), (20, 90)], [{}, {"unknown_below": 0.6}]
    kinds = [(frame(3, *size), rule) for size in sizes for rule in rules]
    with open_engine(placed, bundle) as engine:
        words = vocabulary(engine, 9)
        engine.set_classes(**words)
        found = [[engine.segment(f, **rule) for f, rule in kinds] for _ in range(4)]
    assert launched["recorded"] >= len(kinds)
    assert launched["launched"] >= 2 * len(kinds)
    for index, (image, rule) in enumerate(kinds):
        (expected,) = run_plainly(monkeypatch, placed, bundle, words, [image], **rule)
        for results in found:
            assert_same(results[index], expected)


def test_more_kinds_than_are_kept(monkeypatch, placed, launched):
    monkeypatch.setattr(captures, "_MOST_CAPTURES", 2)
    image, limits = frame(4), [0.5, 0.52, 0.54]
    with open_engine(placed) as engine:
        words = vocabulary(engine, 9)
        engine.set_classes(**words)
        found = [[engine.segment(image, unknown_below=limit) for _ in "abc"] for limit in limits]
        assert launched["recorded"] == len(limits)
        engine.segment(image, unknown_below=limits[0])  # was dropped: runs plainly
        assert launched["launched"] == 2 * len(limits)
    for limit, results in zip(limits, found, strict=True):
        (expected,) = run_plainly(
            monkeypatch, placed, "descriptor", words, [image], unknown_below=limit
        )
        for one in results:
            assert_same(one, expected)


def test_parts_of_which_some_are_dropped(monkeypatch, placed, launched):
    """A frame of more parts than are kept."""
    monkeypatch.setattr(captures, "_MOST_CAPTURES", 2)
    frames = [frame(seed) for seed in range(4)]
    with open_engine(placed, "proposals") as engine:
        words = vocabulary(engine, 9)
        engine.set_classes(**words)
        found = [engine.segment(f) for f in frames]
    assert launched["launched"] < 4 * len(frames)
    expected = run_plainly(monkeypatch, placed, "proposals", words, frames)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("bundle", ["segment_tokens", "proposals"])
def test_arrays_of_another_library_are_recorded_too(monkeypatch, launched, bundle):
    foreign, _ = device_backend(monkeypatch, foreign=True)
    frames = [frame(seed) for seed in range(4)]
    with open_engine(foreign, bundle) as engine:
        words = vocabulary(engine, 9)
        engine.set_classes(**words)
        found = [engine.segment(f) for f in frames]
    assert launched["recorded"] == PARTS[bundle]
    expected = run_plainly(monkeypatch, foreign, bundle, words, frames)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("settings", [{"min_region_score": 0.9}, {"min_region_score": 1.0}])
def test_frames_of_which_few_regions_are_shown(monkeypatch, placed, launched, settings):
    frames = [frame(seed) for seed in range(6)]
    results = []
    for wanted in ("1", "0"):
        monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", wanted)
        with open_engine(placed, "proposals", **settings) as engine:
            engine.set_classes(**vocabulary(engine, 9))
            results.append([engine.segment(f) for f in frames])
    assert launched["launched"] >= 2 * (len(frames) - 2)
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


@each_quick_family
def test_another_thread_names_classes_throughout(monkeypatch, placed, launched, bundle):
    """Every result has the labels of the vocabulary whose version it carries."""
    with open_engine(placed, bundle) as engine:
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
            found = [(n % 2, engine.segment(images[n % 2])) for n in range(16)]
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
    for image, seg in found:
        assert_same(seg, plain[versions[seg.vocabulary_version]][image])


@pytest.mark.parametrize(
    ("fault", "level", "reason"),
    [
        ("waits", "WARNING", "expected pinned host memory in a capture"),
        ("not capturable", "INFO", "sessions"),
    ],
)
@pytest.mark.parametrize("bundle", ["descriptor", "segment_tokens", "proposals"])
def test_a_refused_capture_is_told_once_and_labels_are_right(
    monkeypatch, caplog, bundle, fault, level, reason
):
    refusing, _ = device_backend(monkeypatch, fault=fault)
    frames = [frame(seed) for seed in range(5)]
    with caplog.at_level(logging.INFO), open_engine(refusing, bundle) as engine:
        words = vocabulary(engine, 5)
        engine.set_classes(**words)
        found = [engine.segment(f) for f in frames]
        found += [engine.segment(f, unknown_below=0.0) for f in frames[:3]]
    told = [r for r in caplog.records if r.name == "zsseg_rt.runtime.captures"]
    assert [record.levelname for record in told] == [level]
    assert reason in told[0].getMessage()
    expected = run_plainly(monkeypatch, refusing, bundle, words, frames)
    expected += run_plainly(monkeypatch, refusing, bundle, words, frames[:3], unknown_below=0.0)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_a_refused_capture_is_tried_again(monkeypatch, placed, launched):
    """What stood in the way may be gone later: CUDA was out of memory, a library was not ready."""
    monkeypatch.setattr(captures, "_TRIES_AFTER", (2, 4))
    begin, refused_so_far = core.Capture.begin, []

    def refusing_twice(capture, stream):
        if len(refused_so_far) < 2:
            refused_so_far.append(stream)
            raise CaptureError("stream: not now")
        begin(capture, stream)

    monkeypatch.setattr(core.Capture, "begin", refusing_twice)
    with open_engine(placed) as engine:
        engine.set_classes(**vocabulary(engine, 5))
        tries = []
        for seed in range(11):  # refused at the 2nd, two plain, refused, four plain
            engine.segment(frame(seed))
            tries.append((len(refused_so_far), launched["recorded"]))
    assert tries[1:5] == [(1, 0)] * 3 + [(2, 0)]
    assert tries[8:] == [(2, 0), (2, 1), (2, 1)]


def test_a_thread_records_only_after_it_has_run_plainly(placed, launched):
    """In a thread's first call torch's libraries make handles, which no capture allows."""
    with open_engine(placed) as engine:
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


@each_family
def test_captures_can_be_left_out(monkeypatch, placed, launched, caplog, bundle):
    monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", "0")
    with caplog.at_level(logging.WARNING), open_engine(placed, bundle) as engine:
        engine.set_classes(**vocabulary(engine, 5))
        for _ in range(3):
            engine.segment(frame(1))
    assert launched == {"recorded": 0, "launched": 0}
    assert not [r for r in caplog.records if r.name == "zsseg_rt.runtime.captures"]


def test_an_unknown_setting_is_refused(monkeypatch, placed):
    monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", "off")
    with refused(ConfigError, "ZSSEG_CUDA_GRAPHS", "off"):
        open_engine(placed)


def test_lanes_have_captures_of_their_own(monkeypatch, placed, launched):
    images = [frame(seed) for seed in range(4)]
    with open_engine(placed, num_lanes=2) as engine, engine.lane() as lane:
        words = vocabulary(engine, 9)
        engine.set_classes(**words)
        found = [[each.segment(image) for each in (engine, lane)] for image in images]
    assert launched == {"recorded": 2, "launched": 6}
    expected = run_plainly(monkeypatch, placed, "descriptor", words, images)
    for pair, one in zip(found, expected, strict=True):
        for seg in pair:
            assert_same(seg, one)


def test_the_first_frame_is_run_before_it_is_timed(monkeypatch):
    monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", "0")
    settings, sessions = device_backend(monkeypatch)
    with open_engine(settings) as engine:
        engine.set_classes(**vocabulary(engine, 5))
        runs = []
        for seed in range(3):
            engine.segment(frame(seed))
            runs.append([session.runs for session in sessions])
    assert runs == [[2, 2], [3, 3], [4, 4]]


@each_family
def test_self_check_and_frames_take_turns(monkeypatch, placed, launched, bundle):
    """The golden sample has classes of its own, in the same buffers."""
    with open_engine(placed, bundle) as engine:
        words = vocabulary(engine, 5)
        engine.set_classes(**words)
        found = []
        for seed in range(4):
            found.append(engine.segment(frame(seed)))
            engine.self_check()
    expected = run_plainly(monkeypatch, placed, bundle, words, map(frame, range(4)))
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("bundle", ["descriptor", "dense"])
def test_windows_replay_one_capture(placed, launched, monkeypatch, bundle):
    """Whichever window of the frame it is."""
    wide = frame(3, 31, 75)
    with monkeypatch.context() as plain:
        plain.setenv("ZSSEG_CUDA_GRAPHS", "0")
        with open_engine(placed, bundle, windows="auto") as engine:
            given = vocabulary(engine, 6)
            engine.set_classes(**given)
            expected = engine.segment(wide)
    with open_engine(placed, bundle, windows="auto") as engine:
        engine.set_classes(**given)
        for _ in range(3):
            assert_same(engine.segment(wide), expected)
    assert launched["recorded"] == 2  # of a window, and of the labels


@pytest.mark.parametrize(("count", "parts"), [(8, 2), (9, 1)])
def test_classes_that_attend_to_each_other(monkeypatch, placed, launched, count, parts):
    """Of more phrases than the head's 8, the host chooses, and only the labels are recorded."""
    frames = [frame(seed) for seed in range(4)]
    with open_engine(placed, "aggregation") as engine:
        words = vocabulary(engine, count)
        engine.set_classes(**words)
        found = [engine.segment(f) for f in frames]
    assert launched["recorded"] == parts
    assert launched["launched"] >= 3 * parts
    expected = run_plainly(monkeypatch, placed, "aggregation", words, frames)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("count", [1, 5])
def test_rows_that_fill_a_capture_have_no_keys(placed, launched, count):
    """What they change in the head is in test_export_cat_seg.py."""
    with open_engine(placed, "aggregation", num_lanes=2) as engine, engine.lane() as lane:
        engine.set_classes(**vocabulary(engine, count))
        for seed in range(3):
            lane.segment(frame(seed))
        adopted = lane._adopted
        halves = lane.workspace.fetch(adopted.text_queries).reshape(8, 4, -1)
        own = engine._classes.text_queries.reshape(count, 4, -1)
    assert launched["launched"] >= 2 * 2
    np.testing.assert_array_equal(halves[:count], own)
    assert (halves[count:, 1::2] == -1e4).all()
    assert np.isfinite(halves).all()


@pytest.mark.parametrize("count", [5, 8])
def test_classes_in_parts_are_recorded_too(monkeypatch, placed, launched, tmp_path_factory, count):
    """Rows that fill a capture's size are in the last part, and all parts have one size."""
    from support.golden_cat_seg import tiny_model
    from zsseg_rt.export import export_bundle
    from zsseg_rt.runtime.families import aggregation

    sizes, run = set(), DeviceSession.run

    def noting(self, feeds, *, stream=0):
        sizes.update(feed.shape[0] for name, feed in feeds.items() if name == "class_halves")
        return run(self, feeds, stream=stream)

    monkeypatch.setattr(DeviceSession, "run", noting)
    monkeypatch.setattr(aggregation, "MOST_AT_ONCE", 3)
    path = tmp_path_factory.mktemp("parts") / "parts.zsseg"
    options = {"precisions": ("float32",), "text_encoder": None, "verify": False}
    export_bundle(tiny_model(most_classes=8), path, **options)
    frames = [frame(seed) for seed in range(4)]
    results = []
    for recorded in ("1", "0"):
        monkeypatch.setenv("ZSSEG_CUDA_GRAPHS", recorded)
        with open_engine(placed, path.with_suffix("")) as engine:
            engine.set_classes(**vocabulary(engine, count))
            results.append([engine.segment(f) for f in frames])
    assert len(sizes) == 1
    assert launched["recorded"] == 2
    assert launched["launched"] >= 3 * 2
    if count == 8:  # else other rows stand beside those that fill the size
        for one, other in zip(*results, strict=True):
            assert_same(one, other)


def test_a_vocabulary_is_whole_on_the_device_before_its_first_frame(monkeypatch, placed):
    """Its arrays on the host may be freed or changed as soon as they were adopted."""
    seen = []
    upload, synchronize, adopt = Workspace.upload, Workspace.synchronize, Lane._adopt

    def adopt_and_note(path, *arguments):
        adopted = adopt(path, *arguments)
        seen.append("adopted")
        return adopted

    with open_engine(placed) as engine:
        engine.set_classes(**vocabulary(engine, 5))
        engine.segment(frame(0))
        monkeypatch.setattr(Workspace, "upload", lambda *a: (seen.append("copy"), upload(*a))[1])
        monkeypatch.setattr(
            Workspace, "synchronize", lambda self: (seen.append("wait"), synchronize(self))[1]
        )
        monkeypatch.setattr(Lane, "_adopt", adopt_and_note)
        engine.set_classes(**vocabulary(engine, 6, seed=1))
        engine.segment(frame(1))
    before = seen[: seen.index("adopted")]
    assert "copy" in before
    assert before[-1] == "wait"
