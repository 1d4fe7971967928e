"""Frames in pinned memory and on the GPU: whose memory is whose, who waits, what is refused."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import require_cuda
from support.device_backend import device_backend
from support.errors import refused
from support.frame_kinds import STORED, frame, on_device, open_engine, planes
from support.host_backend import ForeignArray, host_backend
from zsseg_rt import Bundle, FrameMemory, Nv12Frame, ops
from zsseg_rt.errors import (
    ArgumentError,
    BackendError,
    DeviceError,
    DTypeError,
    EngineStateError,
    ShapeError,
)
from zsseg_rt.runtime import workspace

NAMES = [f"name {index}" for index in range(7)]
CPU = {"device": "cpu", "with_scores": False}
LUMA, CHROMA = planes()
same = np.testing.assert_array_equal


@pytest.fixture
def on_gpu(monkeypatch):
    """Opens engines on the GPU."""
    require_cuda()
    placed, _ = device_backend(monkeypatch)

    def named(bundle="descriptor", classes=NAMES, **settings):
        engine = open_engine(bundle, placed, **{"with_scores": False} | settings)
        engine.set_classes(classes)
        return engine

    return named


def elsewhere(place, shape=(31, 47, 3)):
    """An array that says where it is, and that is not lent."""

    def lend(**_):
        raise BufferError("it requires grad")

    return SimpleNamespace(
        shape=shape, dtype=np.dtype(np.uint8), __dlpack_device__=lambda: place, __dlpack__=lend
    )


BAD_ON_THE_GPU = [
    (lambda: frame(), DeviceError, "numpy.ndarray in host memory. Use segment"),
    (lambda: [1, 2], DeviceError, "a list of 2 in host memory"),
    (lambda: elsewhere((2, 1)), DeviceError, "expected an array on cuda:0, got one on cuda:1"),
    (lambda: elsewhere((2, 0)), DeviceError, "can be lent on cuda:0, got: it requires grad"),
    (lambda: on_device(frame().astype(np.float32)), DTypeError, "uint8, got float32"),
    (lambda: on_device(frame()[..., 0].copy()), ShapeError, r"\[H, W, 3\], got \(31, 47\)"),
    (lambda: on_device(np.zeros((0, 4, 3), np.uint8)), ShapeError, "from 1 to 32767"),
    (planes, DeviceError, "luma: .* numpy.ndarray in host memory. Use segment"),
    (lambda: (on_device(LUMA), CHROMA), DeviceError, "chroma: .* in host memory"),
    (lambda: (on_device(LUMA), elsewhere((2, 1), CHROMA.shape)), DeviceError,
     "chroma: .* one on cuda:1"),
    (lambda: on_device((LUMA[:29], CHROMA)), ShapeError, "luma: expected even sides"),
    (lambda: on_device((LUMA, CHROMA[:3])), ShapeError, "chroma: expected shape"),
]  # fmt: skip


@pytest.mark.needs_cuda
class TestOnTheGpu:
    def test_a_result_keeps_its_labels_and_memory_of_collected_ones_is_used_again(
        self, on_gpu, monkeypatch
    ):
        """More than fit in pinned memory, after later frames and the engine's end."""
        with on_gpu() as engine:
            engine.segment(frame())
            addresses = set()
            for seed in range(8):
                addresses.add(engine.segment(frame(seed)).labels.ctypes.data)
                gc.collect()
        assert len(addresses) <= 3
        monkeypatch.setattr(workspace, "MOST_LENT", 3)
        with on_gpu(with_scores=True) as engine:
            results = [engine.segment(frame(seed)) for seed in range(6)]
            copies = [(seg.labels.copy(), seg.scores.copy()) for seg in results]
            row = engine.segment(frame(0)).labels[5]  # all that is left of a result
            for seed in range(2, 6):
                engine.segment(frame(seed))
        for seg, (labels, scores) in zip(results, copies, strict=True):
            same(seg.labels, labels)
            same(seg.scores, scores)
        same(row, copies[0][0][5])

    def test_a_frame_written_into_a_buffer_is_labelled_and_a_dropped_one_is_ordinary(self, on_gpu):
        with on_gpu() as engine:
            buffer = engine.frame_buffer(31, 47)
            assert (buffer.shape, buffer.dtype) == ((31, 47, 3), np.uint8)
            assert np.shares_memory(engine.frame_buffer(31, 47), buffer)
            assert not np.shares_memory(engine.frame_buffer(47, 31), buffer)
            for seed in range(4):
                buffer[:] = frame(seed)
                labels = engine.segment(buffer).labels
                same(buffer, frame(seed))
                same(labels, engine.segment(frame(seed)).labels)
            for height in range(1, 12):
                engine.frame_buffer(height, 8)
            same(engine.segment(buffer).labels, labels)
        same(buffer, frame(3))  # outlives the engine

    def test_an_integrated_gpu_reads_it_in_place(self, on_gpu, monkeypatch):
        with on_gpu() as engine:
            expected = [engine.segment(frame(seed)).labels for seed in range(4)]
        with on_gpu() as engine:
            monkeypatch.setattr(engine._lane.workspace, "reads_in_place", True)
            for seed in range(4):
                same(engine.segment(frame(seed)).labels, expected[seed])

    def test_labels_and_overlays_are_the_result_s_own(self, on_gpu):
        with on_gpu(with_scores=True) as engine:
            arrays = [on_device(frame(seed)) for seed in range(5)]
            results = [engine.segment_device(one, with_overlay=True) for one in arrays]
            expected = [engine.segment(frame(seed)) for seed in range(5)]
            assert isinstance(results[0].labels, ops.DeviceArray)
            assert (results[0].device, results[0].to_host().vocabulary_version) == ("cuda:0", 1)
            assert "47x31 uint8 on cuda:0" in repr(results[0])
        for seed, (result, seg) in enumerate(zip(results, expected, strict=True)):
            same(result.labels.numpy(), seg.labels)
            same(result.scores.numpy(), seg.scores)
            same(result.picture.numpy(), seg.overlay(frame(seed)))

    @pytest.mark.parametrize("wrap", [lambda array: array, ForeignArray])
    @pytest.mark.parametrize("is_planes", [False, True])
    def test_the_producer_s_stream_is_waited_for(self, on_gpu, is_planes, wrap):
        """The frame, or its brightness, is written on a stream that nothing else waits for."""
        producer = ops.Stream(0)
        shape = (30 * 46 // 3, 1, 3) if is_planes else (31, 47, 3)
        pixels = np.random.default_rng(4).integers(0, 256, shape, np.uint8)
        background, labels, colours, chroma = (
            on_device(array, producer.handle)
            for array in (pixels, np.zeros(shape[:2], np.uint8), np.uint8([[9, 200, 80]]), CHROMA)
        )
        written = ops.DeviceArray.empty(shape, np.uint8, 0, producer.handle)
        with on_gpu() as engine:
            engine.segment_device(on_device(planes() if is_planes else frame()))
            ops.overlay(background, labels, colours, alpha=0.5, out=written, stream=producer.handle)
            image = wrap(written.view((30, 46)) if is_planes else written)
            ours = engine.segment_device((image, chroma) if is_planes else image).labels.numpy()
            host = written.numpy(producer.handle)
            host = (host.reshape(30, 46), CHROMA) if is_planes else host
            same(ours, engine.segment(host).labels)

    def test_frames_that_are_refused(self, on_gpu):
        with on_gpu() as engine:
            expected = engine.segment(frame()).labels
            for make, error, message in BAD_ON_THE_GPU:
                with pytest.raises(error, match=message):
                    engine.segment_device(make())
            for alpha in (1.5, -0.1, float("nan"), None):
                with refused(ArgumentError, "alpha", "0", "1"):
                    engine.segment_device(on_device(frame()), with_overlay=True, alpha=alpha)
            same(engine.segment(frame()).labels, expected)
        bundle = Bundle.load(STORED / "dense.zsseg")
        huge = replace(bundle, head=replace(bundle.head, logit_scale=3e38))  # overflows float32
        with on_gpu(huge, ["red", "blue"]) as engine:
            rows = np.full((2, engine.bundle.text.embed_dim), 1e11, np.float32)
            engine.set_classes(["red", "blue"], embeddings=rows)
            for _ in range(3):
                with refused(BackendError, "mask_logits"):
                    engine.segment_device(on_device(frame()))
                with refused(BackendError, "mask_logits"):
                    engine.segment(frame())


def test_on_the_cpu_a_frame_buffer_is_an_ordinary_array():
    with open_engine("dense", CPU) as engine:
        engine.set_classes(["red", "blue"])
        buffer = engine.frame_buffer(20, 30)
        buffer[:] = frame(1, 20, 30)
        same(engine.segment(buffer).labels, engine.segment(frame(1, 20, 30)).labels)
        with refused(DeviceError, "segment_device"):
            engine.segment_device(buffer)
        for wrong in ((0, 5), (5, 40000), (5, 2.5), ("5", 5)):
            with pytest.raises(ArgumentError, match="expected from 1 to 32767 pixels"):
                engine.frame_buffer(*wrong)
    with pytest.raises(EngineStateError):
        engine.frame_buffer(20, 30)


BAD = [
    ((LUMA, CHROMA, LUMA), ArgumentError, "frame"),
    (Nv12Frame(LUMA, CHROMA, "bt2020"), ArgumentError, "colour_matrix"),
    ((LUMA[:29], CHROMA), ShapeError, "luma"),
    ((LUMA[:, :45].copy(), CHROMA), ShapeError, "luma"),
    ((LUMA[:0], CHROMA[:0]), ShapeError, "luma"),
    ((LUMA[0], CHROMA), ShapeError, "luma"),
    ((LUMA, CHROMA[:14]), ShapeError, "chroma"),
    ((LUMA, CHROMA.reshape(15, 46)), ShapeError, "chroma"),
    ((LUMA.astype("u2"), CHROMA), DTypeError, "luma"),
    ((LUMA, CHROMA.astype("i1")), DTypeError, "chroma"),
    ((LUMA.tolist(), CHROMA), DeviceError, "luma"),
    ((LUMA.repeat(2, axis=1)[:, ::2], CHROMA), ShapeError, "frame[0]"),
    ((LUMA, CHROMA[::-1]), ShapeError, "frame[1]"),
]


def test_planes_that_are_refused_on_the_host():
    with open_engine("descriptor", CPU) as engine:
        engine.set_classes(NAMES)
        for image, error, argument in BAD:
            with refused(error, argument):
                engine.segment(image)
        with refused(ArgumentError, "memory"):
            engine.segment(planes(), memory=FrameMemory(steady=False, skip_still=True))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("bundle", ["descriptor", "dense"])
def test_a_memory_stays_on_the_device(monkeypatch, bundle):
    """A pan with a cut in it, labelled with a memory on both devices."""
    require_cuda()
    cv2 = pytest.importorskip("cv2")
    names = NAMES if bundle == "descriptor" else ["red", "blue", "green"]
    rng, blended, warp_blend = np.random.default_rng(3), [], ops.warp_blend
    scenes = [cv2.resize(rng.integers(0, 256, (20, 40, 3), np.uint8), (400, 200)) for _ in "ab"]
    frames = [scene[:, 9 * n : 9 * n + 256].copy() for scene in scenes for n in (0, 1, 2)]

    def watched(*arrays, **settings):
        blended.append([type(array) for array in arrays])
        return warp_blend(*arrays, **settings)

    monkeypatch.setattr(ops, "warp_blend", watched)
    results = []
    for placed in ({"device": "cpu"}, host_backend(monkeypatch, "own arrays")):
        memory = FrameMemory(skip_still=True)
        with open_engine(bundle, placed) as engine:
            engine.set_classes(names)
            results.append([engine.segment(f, memory=memory) for f in (*frames, frames[-1])])
            assert all("steady" in seg.times for seg in results[-1][:-1])
            assert [seg.reused for seg in results[-1]] == [False] * len(frames) + [True]
    assert blended[len(frames) :] == [[ops.DeviceArray] * 4] * len(frames)
    for cpu, gpu in zip(*results, strict=True):
        assert (gpu.labels == cpu.labels).mean() > 0.999
        np.testing.assert_allclose(gpu.scores, cpu.scores, rtol=0, atol=2e-3)
