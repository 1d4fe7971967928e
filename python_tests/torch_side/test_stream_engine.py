"""Engine.stream: the frames of real sources, labelled by a real engine."""

import numpy as np
import pytest

from support.colour_words import COLOUR_WORDS
from support.errors import refused
from support.recordings import frames_of
from support.streams import write_video
from zsseg_rt import Engine, EngineConfig, EngineStateError, FrameMemory
from zsseg_rt.errors import VocabularyError
from zsseg_rt.results.visualize import palette

pytest.importorskip("av")
NAMES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def engine(colour_bundle):
    """Of the rarer order of channels; the command's tests have the other."""
    config = EngineConfig(device="cpu", use_cache=False, channel_order="bgr")
    with Engine(colour_bundle, config) as engine:
        engine.set_classes(NAMES)
        yield engine


def colour(name, size_hw=(48, 64)):
    return np.full((*size_hw, 3), COLOUR_WORDS[name], np.uint8)


def test_several_lanes_give_what_one_gives(colour_bundle, engine, tmp_path):
    names = ["red", "green", "blue", "blue", "red"] * 3
    path = write_video(tmp_path / "in.mp4", [colour(name) for name in names], gop=1)
    expected = [seg.labels for seg in engine.stream(path)]
    config = EngineConfig(device="cpu", use_cache=False, channel_order="bgr", num_lanes=3)
    sink = tmp_path / "out.mp4"
    with Engine(colour_bundle, config) as several:
        several.set_classes(NAMES)
        with several.stream(path, sinks=[sink], alpha=1.0) as stream:
            segs = list(stream)
            assert stream.sink_stats()[0].written == len(names)
        shown = [image.mean(axis=(0, 1)) for _, image in frames_of(sink)]
        colours = palette(NAMES)[[NAMES.index(name) for name in names]]
        np.testing.assert_allclose(shown, colours, atol=6)
        np.testing.assert_array_equal([seg.labels for seg in segs], expected)
        assert [seg.frame.index for seg in segs] == [*range(len(names))]
        with several.lane(), refused(EngineStateError, "lanes"):
            several.stream(path, sinks=[tmp_path / "none.mp4"])
        assert not (tmp_path / "none.mp4").exists()
        # A closed stream has given its lanes back, and a camera's takes none.
        camera = several.stream("test://?size=64x48&rate=100")
        with camera, several.lane() as lane, several.lane():
            seg = next(camera)
            np.testing.assert_array_equal(lane.segment(seg.frame.image).labels, seg.labels)


def test_still_frames_are_counted_and_each_source_has_a_memory_of_its_own(engine, tmp_path):
    """A video's own time counts, however fast it is read: after a second, a frame runs again."""
    paths = {
        str(write_video(tmp_path / f"{name}.mp4", [colour(name)] * 16, gop=1)): name
        for name in NAMES[:2]
    }
    stream = engine.stream(list(paths), skip_still=True)
    segs = list(stream)
    for path, name in paths.items():
        mine = [seg for seg in segs if seg.frame.source == path]
        assert {seg.present()[0].name for seg in mine} == {name}
        reused = [seg.reused for seg in mine]
        assert reused[:10] == [False] + [True] * 9  # 10 frames per second
        assert 1 <= reused[10:].count(False) <= 2
        assert stream.stats()[path].reused == reused.count(True)
        assert stream.stats()[path].labelled == 16


def test_a_steadied_stream_gives_what_a_memory_gives(engine, tmp_path):
    rng = np.random.default_rng(0)
    images = [
        np.clip(colour(name, (96, 96)) + rng.normal(0, 30, (96, 96, 3)), 0, 255).astype(np.uint8)
        for name in ["red"] * 4 + ["blue"] * 4
    ]
    path, memory = write_video(tmp_path / "in.mp4", images, gop=1), FrameMemory()
    segs = list(engine.stream(path, steady=True))
    assert len(segs) == len(images)
    for seg in segs:
        alone = engine.segment(seg.frame.image, memory=memory)
        np.testing.assert_array_equal(seg.labels, alone.labels)
        assert "steady" in seg.times
        assert not seg.reused


def test_an_engine_without_classes_or_closed_says_so(colour_bundle):
    engine = Engine(colour_bundle, EngineConfig(device="cpu", use_cache=False))
    with refused(VocabularyError, "class_names"):
        next(engine.stream("test://?size=64x48"))
    engine.close()
    with pytest.raises(EngineStateError):
        engine.stream("test://")


@pytest.mark.nightly
def test_a_real_recording_is_labelled_to_its_end(engine, shared_dir, tmp_path):
    out = tmp_path / "out.mp4"
    path = shared_dir / "data" / "video" / "highway_960x540.mp4"
    stream = engine.stream(path, sinks=[out, f"{tmp_path}/masks/"])
    assert sum(1 for _ in stream) == 221
    assert [sink.error for sink in stream.sink_stats()] == [None, None]
    times = [time for time, _ in frames_of(out)]
    assert len(times) == 221
    assert times[-1] == pytest.approx(220 / 25, abs=0.01)
    assert len(list((tmp_path / "masks").iterdir())) == 221
