"""Frames on a GPU, the emulated one included: painted there, and seen there by what follows them.

Overlays are the pictures of the CPU, fetched in one copy, while other work is recorded.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from conftest import require_cuda
from support.cuda_counts import count_captures, counts_reader
from support.device_backend import device_backend
from support.frame_kinds import on_device, open_engine, vocabulary
from support.recordings import result, write
from zsseg_rt import Nv12Frame, ops
from zsseg_rt.errors import CaptureError, CudaError
from zsseg_rt.ops import core
from zsseg_rt.results.segmentation import Frame
from zsseg_rt.stream import painting
from zsseg_rt.stream.conversion import host_picture
from zsseg_rt.stream.follow import look
from zsseg_rt.stream.painting import Painter
from zsseg_rt.stream.runner import StreamParts

pytest.importorskip("av")
pytestmark = pytest.mark.needs_cuda


@pytest.fixture(autouse=True)
def gpu():
    require_cuda()


def labelled(kind, order, seed=0, fetches=None):
    """A result whose frame is on the GPU; its picture for the CPU notes that it was asked for."""
    rng, size = np.random.default_rng(seed), (180, 322)  # wide enough for names
    if kind == "whole pixels":
        on_gpu = on_device(rng.integers(0, 256, (*size, 3), np.uint8))
    else:
        shapes = (size, (size[0] // 2, size[1] // 2, 2))
        planes = (on_device(rng.integers(0, 256, shape, np.uint8)) for shape in shapes)
        on_gpu = Nv12Frame(*planes, kind)

    def image():
        (fetches if fetches is not None else []).append(seed)
        return on_gpu.numpy() if kind == "whole pixels" else host_picture(on_gpu, order)

    seg = result(seed, size, label=255, on_gpu=on_gpu, image=image)
    seg.labels[:, :130], seg.labels[90:, 200:], seg.labels[:40, 200:] = 0, 2, 1
    return seg


def painted(painter, seg):
    canvas = painter.canvas(seg)
    painter.paint(seg, canvas)
    return canvas


def on_the_cpu(seg):
    seg.frame.leave_gpu()
    return seg


@pytest.mark.parametrize("kind", ["bt601", "bt709-full", "whole pixels"])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_the_picture_is_the_cpu_s_and_alone_is_fetched(kind, order, tmp_path):
    counts, fetches = counts_reader(), []
    settings = {"channel_order": order, "alpha": 0.4, "legend": True}
    on_gpu, on_cpu = Painter(**settings), Painter(**settings)
    segs = [labelled(kind, order, seed, fetches) for seed in range(3)]
    images = [painted(on_gpu, segs[0])]
    before = counts()
    images += [painted(on_gpu, seg) for seg in segs[1:]]
    copies = counts()["copies_to_host"] - before["copies_to_host"]
    stats = write(tmp_path / "a.mp4", segs, **settings)
    assert (stats.written, stats.painted, stats.error) == (3, "gpu", None)
    assert (copies, fetches, on_gpu.painted) == (2, [], "gpu")
    for seg, image in zip(segs, images, strict=True):
        np.testing.assert_array_equal(image, painted(on_cpu, on_the_cpu(seg)))
    assert on_cpu.painted == "cpu"


def test_a_gpu_that_fails_is_left_once(monkeypatch, caplog):
    painter = Painter(channel_order="rgb", alpha=0.4)
    segs = [labelled("bt709", "rgb", seed) for seed in range(3)]
    images = [painted(painter, segs[0])]

    def fail(*_):
        raise CudaError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(painting.core.DeviceArray, "from_numpy", fail)
        images += [painted(painter, seg) for seg in segs[1:]]
    for seg, image in zip(segs, images, strict=True):
        expected = painted(Painter(channel_order="rgb", alpha=0.4), on_the_cpu(seg))
        np.testing.assert_array_equal(image, expected)
    assert painter.painted == "cpu"
    message = "overlays are painted on the CPU from now on: out of memory"
    assert [text for text in caplog.messages if "CPU from now on" in text] == [message]


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_the_small_copy_of_a_frame_on_a_gpu_is_that_of_its_image(order):
    image = np.random.default_rng(0).integers(0, 256, (36, 64, 3), np.uint8)
    image = image.repeat(20, 0).repeat(20, 1)

    def grey(on_gpu=None):
        image_on_cpu = image if on_gpu is None else None  # the frame stays where it is
        frame = {"source": "cam", "index": 0, "captured_at": 0.0, "clock": "pipeline"}
        return look(Frame(image=image_on_cpu, on_gpu=on_gpu, **frame), order).grey.astype(int)

    assert grey().shape == (90, 160)
    assert np.abs(grey(on_device(image)) - grey()).max() <= 1  # rounded at another place
    planes = np.full((720, 1280), 126, np.uint8), np.full((360, 640, 2), 128, np.uint8)
    assert np.abs(grey(Nv12Frame(*on_device(planes))) - 128).max() <= 1


def test_every_sink_gets_every_frame_whatever_is_recorded_meanwhile(tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    from support.streams import write_video

    placed, launched = device_backend(monkeypatch)[0], count_captures(monkeypatch)
    rng, count, shown = np.random.default_rng(0), 12, []
    videos = [
        write_video(tmp_path / f"{size[0]}.mp4", rng.integers(0, 256, (count, *size, 3), np.uint8))
        for size in ((180, 322), (96, 128))
    ]
    with open_engine("descriptor", placed, with_scores=False, with_times=False) as engine:
        engine.set_classes(**vocabulary(engine, 9))

        def segment(frame):  # with another threshold from the middle on: another recording
            return engine.segment(frame, unknown_below=0.2 if len(shown) > count else None)

        def look_at(seg):
            assert seg.frame.on_gpu is not None
            shown.append((seg.frame.source, float(seg.frame.image.mean())))

        parts = StreamParts.open(videos, "rgb", sinks=[str(tmp_path / "out.mp4"), look_at])
        with parts.start(segment, None, engine.device) as stream:
            assert sum(1 for _ in stream) == 2 * count
        overlay, callback = stream.sink_stats()
    assert launched["recorded"] >= 3
    assert (overlay.written, overlay.painted, overlay.error) == (2 * count, "gpu", None)
    assert (callback.written, callback.error, len(shown)) == (2 * count, None, 2 * count)


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
    array = on_device(values, lane.handle)
    lane.synchronize()
    with recorded(lane) as (_, elsewhere):
        copied = elsewhere(lambda: array.numpy(other.handle))
    np.testing.assert_array_equal(copied, values)


def test_an_array_of_a_recording_is_in_order_after_a_launch():
    lane, other = core.Stream(0), core.Stream(0)
    array = on_device(np.ones(4, np.float32), lane.handle)
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
    array = on_device(np.ones(4, np.float32), lane.handle)
    with recorded(lane) as (capture, elsewhere):
        with pytest.raises(CaptureError, match="got a capture of one of the two"):
            elsewhere(array.numpy)
        with ThreadPoolExecutor(1) as third:
            retry = third.submit(core.outside_captures, array.numpy)
            capture.end()
            np.testing.assert_array_equal(retry.result(60), np.ones(4, np.float32))
