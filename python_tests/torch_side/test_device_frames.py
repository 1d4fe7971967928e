"""Frames in pinned memory and on the GPU, and labels that stay there or come back.

Runs on any CUDA device, the emulated one included.
"""

import gc
from pathlib import Path

import numpy as np
import pytest

from conftest import require_cuda
from support.cuda_counts import count_captures
from support.device_backend import device_backend
from support.errors import refused
from support.host_backend import ForeignArray, host_backend
from zsseg_rt import Engine, EngineConfig, ops
from zsseg_rt.errors import (
    ArgumentError,
    BackendError,
    DeviceError,
    DTypeError,
    EngineStateError,
    ShapeError,
    VocabularyError,
)
from zsseg_rt.runtime import workspace

STORED = Path(__file__).parents[1] / "bundles" / "v1"
NAMES = [f"name {index}" for index in range(7)]


@pytest.fixture
def on_gpu(monkeypatch):
    """Opens engines on the GPU."""
    require_cuda()
    placed, _ = device_backend(monkeypatch)

    def open_engine(bundle="descriptor", classes=NAMES, **settings):
        config = EngineConfig(precision="float32", use_cache=False, **placed, **settings)
        engine = Engine(STORED / f"{bundle}.zsseg", config)
        engine.set_classes(classes)
        return engine

    return open_engine


def frame(seed=1, height=31, width=47):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def on_device(array, stream=0):
    return ops.DeviceArray.from_numpy(array, 0, stream)


@pytest.mark.needs_cuda
class TestResults:
    def test_a_result_keeps_its_labels(self, on_gpu):
        """Whatever is labelled later, and also after the engine is closed."""
        with on_gpu(with_scores=True) as engine:
            expected = [engine.segment(frame(seed)) for seed in range(2)]
            copies = [(seg.labels.copy(), seg.scores.copy()) for seg in expected]
            row = engine.segment(frame(0)).labels[5]  # all that is left of a result
            for seed in range(2, 6):
                engine.segment(frame(seed))
        for seg, (labels, scores) in zip(expected, copies, strict=True):
            np.testing.assert_array_equal(seg.labels, labels)
            np.testing.assert_array_equal(seg.scores, scores)
        np.testing.assert_array_equal(row, copies[0][0][5])

    def test_more_results_can_be_held_than_fit_in_pinned_memory(self, on_gpu, monkeypatch):
        monkeypatch.setattr(workspace, "_MOST_LENT", 3)
        with on_gpu() as engine:
            first = [engine.segment(frame(seed)).labels for seed in range(6)]
            again = [engine.segment(frame(seed)).labels.copy() for seed in range(6)]
        assert len(engine._lane.workspace._lent) == 3
        for one, other in zip(first, again, strict=True):
            np.testing.assert_array_equal(one, other)

    def test_memory_of_collected_results_is_used_again(self, on_gpu):
        with on_gpu() as engine:
            engine.segment(frame())
            addresses = set()
            for seed in range(8):
                addresses.add(engine.segment(frame(seed)).labels.ctypes.data)
                gc.collect()
        assert len(addresses) <= 3

    def test_labels_can_be_written(self, on_gpu):
        with on_gpu() as engine:
            seg = engine.segment(frame())
            seg.labels[:] = 3
            assert [share.index for share in seg.present()] == [3]

    def test_scores_only_if_asked(self, on_gpu):
        with on_gpu() as engine:
            assert engine.segment(frame()).scores is None
            scores = engine.segment(frame(), with_scores=True).scores
            assert scores.shape == (31, 47)
            assert engine.segment(frame()).scores is None


@pytest.mark.needs_cuda
class TestFrameBuffers:
    def test_a_frame_written_there_is_labelled(self, on_gpu):
        with on_gpu() as engine:
            buffer = engine.frame_buffer(31, 47)
            assert (buffer.shape, buffer.dtype) == ((31, 47, 3), np.uint8)
            for seed in range(4):
                buffer[:] = frame(seed)
                found = engine.segment(buffer).labels
                np.testing.assert_array_equal(buffer, frame(seed))
                np.testing.assert_array_equal(found, engine.segment(frame(seed)).labels)

    def test_a_size_has_one_buffer(self, on_gpu):
        with on_gpu() as engine:
            buffer = engine.frame_buffer(20, 30)
            assert np.shares_memory(engine.frame_buffer(20, 30), buffer)
            assert not np.shares_memory(engine.frame_buffer(30, 20), buffer)

    def test_a_dropped_buffer_is_an_ordinary_frame(self, on_gpu):
        with on_gpu() as engine:
            buffer = engine.frame_buffer(31, 47)
            buffer[:] = frame(9)
            for height in range(1, 12):
                engine.frame_buffer(height, 8)
            expected = engine.segment(frame(9)).labels
            np.testing.assert_array_equal(engine.segment(buffer).labels, expected)
        np.testing.assert_array_equal(buffer, frame(9))  # outlives the engine

    def test_an_integrated_gpu_reads_it_in_place(self, on_gpu, monkeypatch):
        with on_gpu() as engine:
            expected = [engine.segment(frame(seed)).labels for seed in range(4)]
        with on_gpu() as engine:
            monkeypatch.setattr(engine._lane.workspace, "_reads_in_place", True)
            for seed in range(4):
                np.testing.assert_array_equal(engine.segment(frame(seed)).labels, expected[seed])


def test_on_the_cpu_a_frame_buffer_is_an_ordinary_array():
    config = EngineConfig(device="cpu", precision="float32", use_cache=False)
    with Engine(STORED / "dense.zsseg", config) as engine:
        engine.set_classes(["red", "blue"])
        buffer = engine.frame_buffer(20, 30)
        buffer[:] = frame(1, 20, 30)
        expected = engine.segment(frame(1, 20, 30)).labels
        np.testing.assert_array_equal(engine.segment(buffer).labels, expected)
        with refused(DeviceError, "segment_device"):
            engine.segment_device(buffer)
        for wrong in ((0, 5), (5, 40000), (5, 2.5), ("5", 5)):
            with pytest.raises(ArgumentError, match="expected from 1 to 32767 pixels"):
                engine.frame_buffer(*wrong)
    with pytest.raises(EngineStateError):
        engine.frame_buffer(20, 30)


class WrongDevice:
    """A frame that says it is on the second GPU."""

    shape, dtype = (31, 47, 3), np.dtype(np.uint8)

    def __dlpack_device__(self):
        return (2, 1)

    def __dlpack__(self, **options):
        raise AssertionError("nothing should be borrowed from it")


class Unlendable(WrongDevice):
    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **options):
        raise BufferError("it requires grad")


@pytest.mark.needs_cuda
class TestFramesOnTheDevice:
    @pytest.mark.parametrize("bundle", ["descriptor", "dense"])
    def test_labels_are_those_of_segment(self, on_gpu, bundle):
        with on_gpu(bundle, ["red", ["green", "blue"], "black"] if bundle == "dense" else NAMES,
                    with_scores=True) as engine:  # fmt: skip
            for seed in range(4):
                expected = engine.segment(frame(seed))
                found = engine.segment_device(on_device(frame(seed)))
                assert isinstance(found.labels, ops.DeviceArray)
                assert found.device == "cuda:0"
                assert found.unknown == expected.unknown
                assert set(found.times) == set(expected.times)
                host = found.to_host()
                np.testing.assert_array_equal(host.labels, expected.labels)
                np.testing.assert_array_equal(host.scores, expected.scores)
                assert (host.names, host.vocabulary_version) == (expected.names, 1)
        assert "47x31 uint8 on cuda:0" in repr(found)

    @pytest.mark.parametrize("order", ["rgb", "bgr"])
    @pytest.mark.parametrize("bundle", ["descriptor", "dense"])
    def test_the_overlay_is_that_of_the_host(self, on_gpu, bundle, order):
        names = ["red", ["green", "blue"], "black"] if bundle == "dense" else NAMES
        with on_gpu(bundle, names, channel_order=order) as engine:
            pictures = []
            for seed in range(4):
                expected = engine.segment(frame(seed))
                found = engine.segment_device(on_device(frame(seed)), with_overlay=True, alpha=0.3)
                np.testing.assert_array_equal(found.labels.numpy(), expected.labels)
                pictures.append((found.picture, expected.overlay(frame(seed), alpha=0.3)))
                assert engine.segment_device(on_device(frame(seed))).picture is None
            for picture, drawn in pictures:  # a result keeps its own
                np.testing.assert_array_equal(picture.numpy(), drawn)

    def test_overlays_are_recorded_and_the_caller_s_own(self, on_gpu, monkeypatch):
        launched = count_captures(monkeypatch)
        with on_gpu() as engine:
            given = [on_device(frame(seed)) for seed in range(5)]
            alphas = [0.3, 0.3, 0.3, 0.8, 0.3]
            found = [
                engine.segment_device(one, with_overlay=True, alpha=alpha)
                for one, alpha in zip(given, alphas, strict=True)
            ]
            host = [engine.segment(frame(seed)) for seed in range(5)]
        assert launched["recorded"] >= 1
        assert launched["launched"] >= 3
        for seed, (one, alpha, seg) in enumerate(zip(found, alphas, host, strict=True)):
            expected = seg.overlay(frame(seed), alpha=alpha)
            np.testing.assert_array_equal(one.picture.numpy(), expected)

    def test_the_overlay_of_a_foreign_frame_and_what_is_refused(self, on_gpu):
        with on_gpu() as engine:
            given = ForeignArray(on_device(frame(2)))
            found = engine.segment_device(given, with_overlay=True).picture.numpy()
            expected = engine.segment(frame(2)).overlay(frame(2))
            np.testing.assert_array_equal(found, expected)
            for alpha in (1.5, -0.1, float("nan"), None):
                with refused(ArgumentError, "alpha", "0", "1"):
                    engine.segment_device(given, with_overlay=True, alpha=alpha)

    def test_labels_are_the_result_s_own(self, on_gpu):
        with on_gpu() as engine:
            results = [engine.segment_device(on_device(frame(seed))) for seed in range(5)]
            expected = [engine.segment(frame(seed)).labels for seed in range(5)]
        for found, labels in zip(results, expected, strict=True):
            np.testing.assert_array_equal(found.labels.numpy(), labels)

    @pytest.mark.parametrize("wrap", [lambda array: array, ForeignArray])
    def test_the_producer_s_stream_is_waited_for(self, on_gpu, wrap):
        """The frame is written on a stream of its own, which nothing else waits for."""
        producer = ops.Stream(0)
        labels = on_device(np.zeros((31, 47), np.uint8), producer.handle)
        colours = on_device(np.array([[9, 200, 80]], np.uint8), producer.handle)
        written = ops.DeviceArray.empty((31, 47, 3), np.uint8, 0, producer.handle)
        background = on_device(frame(3), producer.handle)
        with on_gpu() as engine:
            engine.segment_device(on_device(frame()))
            ops.overlay(background, labels, colours, alpha=0.5, out=written, stream=producer.handle)
            found = engine.segment_device(wrap(written)).labels.numpy()
            blended = written.numpy(producer.handle)
            np.testing.assert_array_equal(found, engine.segment(blended).labels)

    @pytest.mark.parametrize("session_kind", ["own arrays", "foreign arrays"])
    def test_families_that_decide_on_the_host(self, monkeypatch, session_kind):
        require_cuda()
        config = EngineConfig(
            precision="float32", use_cache=False, **host_backend(monkeypatch, session_kind)
        )
        with Engine(STORED / "segment_tokens.zsseg", config) as engine:
            engine.set_classes(engine.bundle.text_bank.names[:4])
            expected = engine.segment(frame(), with_scores=True)
            found = engine.segment_device(on_device(frame()), with_scores=True)
            np.testing.assert_array_equal(found.labels.numpy(), expected.labels)
            np.testing.assert_array_equal(found.scores.numpy(), expected.scores)
            drawn = engine.segment_device(on_device(frame()), with_overlay=True).picture
            np.testing.assert_array_equal(drawn.numpy(), expected.overlay(frame()))

    @pytest.mark.parametrize(
        ("made", "error", "message"),
        [
            (lambda: frame(), DeviceError, "numpy.ndarray in host memory. Use segment"),
            (lambda: [1, 2], DeviceError, "a list of 2 in host memory"),
            (WrongDevice, DeviceError, "expected an array on cuda:0, got one on cuda:1"),
            (Unlendable, DeviceError, "can be lent on cuda:0, got: it requires grad"),
            (lambda: on_device(frame().astype(np.float32)), DTypeError, "uint8, got float32"),
            (lambda: on_device(frame()[..., 0].copy()), ShapeError, r"\[H, W, 3\], got \(31, 47\)"),
            (lambda: on_device(np.zeros((0, 4, 3), np.uint8)), ShapeError, "from 1 to 32767"),
        ],
    )
    def test_frames_that_are_refused(self, on_gpu, made, error, message):
        with on_gpu() as engine:
            expected = engine.segment(frame()).labels
            with pytest.raises(error, match=message):
                engine.segment_device(made())
            np.testing.assert_array_equal(engine.segment(frame()).labels, expected)

    def test_without_classes(self, on_gpu, monkeypatch):
        with on_gpu() as engine:
            monkeypatch.setattr(engine, "_classes", None)
            with pytest.raises(VocabularyError, match="Call set_classes"):
                engine.segment_device(on_device(frame()))

    def test_what_is_not_finite_is_an_error(self, on_gpu, monkeypatch):
        with on_gpu("dense", ["red", "blue"]) as engine:
            engine.segment(frame())
            monkeypatch.setattr(engine._lane._pipeline, "_head", _Huge(engine.bundle.head))
            rows = np.full((2, engine.bundle.text.embed_dim), 1e11, np.float32)
            engine.set_classes(["red", "blue"], embeddings=rows)
            for _ in range(3):
                with refused(BackendError, "mask_logits"):
                    engine.segment_device(on_device(frame()))
                with refused(BackendError, "mask_logits"):
                    engine.segment(frame())


class _Huge:
    """A head whose scale overflows float32."""

    def __init__(self, head):
        self._head, self.logit_scale = head, 3e38

    def __getattr__(self, name):
        return getattr(self._head, name)
