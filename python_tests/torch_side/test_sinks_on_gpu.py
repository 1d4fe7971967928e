"""Streams on a GPU, the emulated one included, whose sinks use frames while others are recorded."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from conftest import require_cuda
from support.cuda_counts import count_captures
from support.device_backend import device_backend
from zsseg_rt import Engine, EngineConfig, ops
from zsseg_rt.errors import CaptureError
from zsseg_rt.ops import core
from zsseg_rt.stream.runner import StreamParts

pytestmark = pytest.mark.needs_cuda

STORED = Path(__file__).parents[1] / "bundles" / "v1" / "descriptor.zsseg"
COUNT = 12


@pytest.fixture(autouse=True)
def gpu():
    require_cuda()


def test_every_sink_gets_every_frame_whatever_is_recorded_meanwhile(tmp_path, monkeypatch):
    pytest.importorskip("av")
    pytest.importorskip("cv2")
    from support.streams import write_video

    placed, launched = device_backend(monkeypatch)[0], count_captures(monkeypatch)
    rng = np.random.default_rng(0)
    videos = []
    for name, size in (("a", (180, 322)), ("b", (96, 128))):
        images = rng.integers(0, 256, (COUNT, *size, 3), np.uint8)
        videos.append(tmp_path / f"{name}.mp4")
        write_video(videos[-1], images)
    shown, config = [], EngineConfig(precision="float32", use_cache=False, **placed)
    with Engine(STORED, config) as engine:
        rows = rng.normal(size=(9, engine.bundle.text.embed_dim)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        engine.set_classes([f"name {number}" for number in range(9)], embeddings=rows)

        def segment(frame):  # with another threshold from the middle on: another recording
            return engine.segment(frame, unknown_below=0.2 if len(shown) > COUNT else None)

        def look(seg):
            assert seg.frame.on_gpu is not None
            shown.append((seg.frame.source, float(seg.frame.image.mean())))

        parts = StreamParts.open(videos, "rgb", sinks=[str(tmp_path / "out.mp4"), look])
        with parts.start(segment, None, engine.device) as stream:
            assert sum(1 for _ in stream) == 2 * COUNT
        overlay, callback = stream.sink_stats()
    assert launched["recorded"] >= 3
    assert (overlay.written, overlay.painted, overlay.error) == (2 * COUNT, "gpu", None)
    assert (callback.written, callback.error) == (2 * COUNT, None)
    assert len(shown) == 2 * COUNT


@contextlib.contextmanager
def recorded(stream):
    capture = core.Capture(0)
    with ThreadPoolExecutor(1) as other:
        capture.begin(stream.handle)
        try:
            yield capture, lambda work: other.submit(work).result(60)
        finally:
            capture.cancel()


@pytest.mark.parametrize("sleeps", [False, True])
def test_an_array_whose_work_was_waited_for_needs_no_order(sleeps):
    lane, other = core.Stream(0, sleeps=sleeps), core.Stream(0)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    array = ops.DeviceArray.from_numpy(values, 0, lane.handle)
    lane.synchronize()
    with recorded(lane) as (_, elsewhere):
        copied = elsewhere(lambda: array.numpy(other.handle))
    np.testing.assert_array_equal(copied, values)


def test_an_array_of_a_recording_is_in_order_after_a_launch():
    lane, other = core.Stream(0), core.Stream(0)
    array = ops.DeviceArray.from_numpy(np.ones(4, np.float32), 0, lane.handle)
    out = ops.DeviceArray.empty((1,), "uint8", 0, lane.handle)
    ops.all_finite(array, out=out, stream=lane.handle)
    with recorded(lane) as (capture, _):
        ops.all_finite(array, out=out, stream=lane.handle)
        capture.end()
    array.copy_from(np.full(4, np.nan, np.float32), lane.handle)
    lane.synchronize()
    capture.launch(lane.handle)  # writes `out` again
    assert out.numpy(other.handle)[0] == 0


def test_an_array_not_waited_for_is_refused_while_its_stream_is_recorded_and_then_tried_again():
    lane = core.Stream(0)
    array = ops.DeviceArray.from_numpy(np.ones(4, np.float32), 0, lane.handle)
    with recorded(lane) as (capture, elsewhere):
        with pytest.raises(CaptureError, match="got a capture of one of the two"):
            elsewhere(array.numpy)
        with ThreadPoolExecutor(1) as third:
            retry = third.submit(core.outside_captures, array.numpy)
            capture.end()
            np.testing.assert_array_equal(retry.result(60), np.ones(4, np.float32))
