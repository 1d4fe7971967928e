"""Frames in two planes, through the engine: the labels of the RGB frame that they stand for.

On the CPU, and on any CUDA device, the emulated one included.
"""

from pathlib import Path

import numpy as np
import pytest

from conftest import require_cuda
from support.device_backend import device_backend
from support.errors import refused
from support.host_backend import ForeignArray
from zsseg_rt import Engine, EngineConfig, FrameMemory, Nv12Frame, ops
from zsseg_rt.errors import ArgumentError, DeviceError, DTypeError, ShapeError
from zsseg_rt.ops import core, reference
from zsseg_rt.results.visualize import palette

STORED = Path(__file__).parents[1] / "bundles" / "v1"
NAMES = [f"name {index}" for index in range(7)]


def planes(seed=1, height=30, width=46):
    """Every brightness beside every colour, out of the limited range too."""
    rng = np.random.default_rng(seed)
    luma = rng.integers(0, 256, (height, width), np.uint8)
    return luma, rng.integers(0, 256, (height // 2, width // 2, 2), np.uint8)


def rgb_of(frame, matrix="bt601"):
    """The RGB frame of two planes, by the NumPy definition."""
    settings = {"size_hw": frame[0].shape, "mean": (0, 0, 0), "std": (1, 1, 1)}
    result = reference.preprocess(frame, colour_matrix=matrix, **settings)
    return np.ascontiguousarray(np.rint(255 * result).astype(np.uint8).transpose(1, 2, 0))


def pitched(array, row_bytes):
    """The same in rows that lie further apart, with other numbers between them."""
    row = array[0].size
    memory = np.full((len(array), row_bytes), 99, np.uint8)
    memory[:, :row] = array.reshape(len(array), row)
    return np.lib.stride_tricks.as_strided(
        memory, array.shape, (row_bytes, *array.strides[1:]), writeable=False
    )


class PitchedOnDevice:
    """A plane with gaps between its rows, as a decoder describes it."""

    def __init__(self, array, row_bytes):
        rows = pitched(array, row_bytes)
        self.shape, self.dtype = array.shape, array.dtype
        self._memory = ops.DeviceArray.from_numpy(np.array(rows.base.base), 0)
        self.__cuda_array_interface__ = {
            **self._memory.__cuda_array_interface__, "shape": array.shape, "strides": rows.strides
        }  # fmt: skip


def on_device(frame, stream=0):
    return tuple(ops.DeviceArray.from_numpy(plane, 0, stream) for plane in frame)


@pytest.fixture(scope="module")
def on_cpu():
    config = EngineConfig(device="cpu", precision="float32", with_scores=True, use_cache=False)
    with Engine(STORED / "descriptor.zsseg", config) as engine:
        engine.set_classes(NAMES)
        yield engine


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


class TestOnTheHost:
    @pytest.mark.parametrize("matrix", ["bt601", "bt709"])
    def test_labels_are_those_of_the_rgb_frame(self, on_cpu, matrix):
        expected = on_cpu.segment(rgb_of(planes(), matrix))
        found = on_cpu.segment(Nv12Frame(*planes(), colour_matrix=matrix))
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_array_equal(found.scores, expected.scores)

    def test_a_tuple_is_bt601(self, on_cpu):
        expected = on_cpu.segment(Nv12Frame(*planes())).scores
        np.testing.assert_array_equal(on_cpu.segment(planes()).scores, expected)
        other = on_cpu.segment(Nv12Frame(*planes(), colour_matrix="bt709")).scores
        assert not np.array_equal(other, expected)

    def test_the_configured_channel_order_is_no_matter(self, on_cpu):
        config = EngineConfig(
            device="cpu", precision="float32", channel_order="bgr", with_scores=True,
            use_cache=False,
        )  # fmt: skip
        with Engine(STORED / "descriptor.zsseg", config) as engine:
            engine.set_classes(NAMES)
            found = engine.segment(planes())
        np.testing.assert_array_equal(found.scores, on_cpu.segment(planes()).scores)
        assert found.channel_order == "bgr"

    def test_rows_may_lie_further_apart(self, on_cpu):
        luma, chroma = planes()
        frame = Nv12Frame(pitched(luma, 64), pitched(chroma, 80))
        expected = on_cpu.segment((luma, chroma)).scores
        np.testing.assert_array_equal(on_cpu.segment(frame).scores, expected)

    def test_a_memory_is_refused(self, on_cpu):
        with refused(ArgumentError, "memory"):
            on_cpu.segment(planes(), memory=FrameMemory(steady=False, skip_still=True))


LUMA, CHROMA = planes()
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
]


@pytest.mark.parametrize(("frame", "error", "argument"), BAD)
def test_planes_that_are_refused(on_cpu, frame, error, argument):
    with refused(error, argument):
        on_cpu.segment(frame)


@pytest.mark.parametrize(
    ("frame", "error", "argument"),
    [
        ((LUMA.tolist(), CHROMA), DeviceError, "luma"),
        (
            (LUMA.repeat(2, axis=1)[:, ::2], CHROMA),
            ShapeError,
            "frame[0]",
        ),
        ((LUMA, CHROMA[::-1]), ShapeError, "frame[1]"),
    ],
)
def test_planes_that_are_refused_on_the_host(on_cpu, frame, error, argument):
    with refused(error, argument):
        on_cpu.segment(frame)


def test_the_reference_takes_the_same_rows(on_cpu):
    settings = {"size_hw": (9, 7), "mean": (0, 0, 0), "std": (1, 1, 1)}
    apart = pitched(LUMA, 48), pitched(CHROMA, 47)
    expected = reference.preprocess((LUMA, CHROMA), **settings)
    np.testing.assert_array_equal(reference.preprocess(apart, **settings), expected)
    np.testing.assert_allclose(ops.preprocess(apart, **settings), expected, atol=4e-6)
    bad = (LUMA.repeat(2, axis=1)[:, ::2], CHROMA)
    with pytest.raises(ShapeError):
        ops.preprocess(bad, **settings)


@pytest.mark.needs_cuda
class TestOnTheGpu:
    @pytest.mark.parametrize("wrap", [lambda plane: plane, ForeignArray])
    def test_labels_are_those_of_the_rgb_frame(self, on_gpu, wrap):
        with on_gpu(with_scores=True) as engine:
            for seed in range(3):
                expected = engine.segment(rgb_of(planes(seed)))
                frame = Nv12Frame(*map(wrap, on_device(planes(seed))))
                found = engine.segment_device(frame).to_host()
                np.testing.assert_array_equal(found.labels, expected.labels)
                np.testing.assert_array_equal(found.scores, expected.scores)
                again = engine.segment(planes(seed))  # from the host
                np.testing.assert_array_equal(again.scores, expected.scores)
                fetched = engine.segment(Nv12Frame(*on_device(planes(seed))))  # to the host
                np.testing.assert_array_equal(fetched.scores, expected.scores)

    def test_rows_may_lie_further_apart(self, on_gpu):
        luma, chroma = planes()
        with on_gpu(with_scores=True) as engine:
            expected = engine.segment((luma, chroma)).scores
            frame = Nv12Frame(PitchedOnDevice(luma, 64), PitchedOnDevice(chroma, 128))
            found = engine.segment_device(frame).scores.numpy()
            np.testing.assert_array_equal(found, expected)
            host = engine.segment(Nv12Frame(pitched(luma, 64), pitched(chroma, 48))).scores
            np.testing.assert_array_equal(host, expected)

    def test_the_producer_s_stream_is_waited_for(self, on_gpu):
        """Brightness is written on a stream of its own, which nothing else waits for."""
        producer = ops.Stream(0)
        height, width = 30, 46
        rng = np.random.default_rng(4)
        flat = rng.integers(0, 256, (height * width // 3, 1, 3), np.uint8)
        source = ops.DeviceArray.from_numpy(flat, 0, producer.handle)
        labels = ops.DeviceArray.from_numpy(np.zeros(flat.shape[:2], np.uint8), 0, producer.handle)
        colours = ops.DeviceArray.from_numpy(np.array([[9, 200, 80]], np.uint8), 0, producer.handle)
        written = ops.DeviceArray.empty(flat.shape, np.uint8, 0, producer.handle)
        chroma = ops.DeviceArray.from_numpy(planes()[1], 0, producer.handle)
        with on_gpu() as engine:
            engine.segment_device(on_device(planes()))
            ops.overlay(source, labels, colours, out=written, stream=producer.handle)
            luma = ForeignArray(written.view((height, width)))
            found = engine.segment_device((luma, chroma)).labels.numpy()
            host = written.numpy(producer.handle).reshape(height, width)
            np.testing.assert_array_equal(found, engine.segment((host, planes()[1])).labels)

    @pytest.mark.parametrize("size", [(48, 64), (47, 63)])
    def test_a_stream_s_frames_are_on_the_gpu_when_they_are_labelled(self, on_gpu, tmp_path, size):
        """Nothing is staged in the lane; decoded planes, or RGB of an odd size, are as before."""
        av = pytest.importorskip("av")
        pytest.importorskip("cv2")
        from support.streams import write_video

        rng = np.random.default_rng(0)
        frames = [rng.integers(0, 256, (*size, 3), np.uint8) for _ in range(3)]
        path = write_video(tmp_path / "a.mkv", frames, codec="ffv1", pix_fmt="bgr0")
        if size[0] % 2 == 0:
            path = write_video(tmp_path / "a.mp4", frames)
        with on_gpu(with_scores=True) as engine, av.open(str(path)) as container:
            decoded = list(container.decode(video=0))
            if size[0] % 2 == 0:
                given = [frame.reformat(format="nv12").to_ndarray() for frame in decoded]
                given = [(a[:48].copy(), a[48:].reshape(24, 32, 2).copy()) for a in given]
            else:
                given = [np.array(frame.to_ndarray(format="rgb24")) for frame in decoded]
            expected = [engine.segment(frame).scores for frame in given]
            engine._lane.workspace.upload_frame = None
            with engine.stream(path) as stream:
                found = list(stream)
        for seg, scores in zip(found, expected, strict=True):
            np.testing.assert_array_equal(seg.scores, scores)
            assert seg.frame.image.shape == (*size, 3)

    def test_one_capture_serves_rgb_and_planes_of_a_size(self, on_gpu, monkeypatch):
        recorded = []

        class Counting(core.Capture):
            def end(self):
                super().end()
                recorded.append(self)

        monkeypatch.setattr(core, "Capture", Counting)
        with on_gpu() as engine:
            expected = [engine.segment(rgb_of(planes(seed))).labels for seed in range(4)]
            assert len(recorded) == 1
            for seed in range(4):
                frame = on_device(planes(seed))
                found = engine.segment_device(frame).labels.numpy()
                np.testing.assert_array_equal(found, expected[seed])
        assert len(recorded) == 1

    @pytest.mark.parametrize("order", ["rgb", "bgr"])
    @pytest.mark.parametrize("wrap", [lambda plane: plane, ForeignArray])
    def test_the_overlay_is_that_of_the_reference(self, on_gpu, order, wrap):
        """Recorded with frames that are not drawn on, and the caller's own."""
        with on_gpu(channel_order=order) as engine:
            found = []
            for seed in range(4):
                frame = Nv12Frame(*map(wrap, on_device(planes(seed))), "bt709")
                found.append(engine.segment_device(frame, with_overlay=True, alpha=0.3))
                assert engine.segment_device(frame).picture is None
            for seed, result in enumerate(found):
                labels = engine.segment_device(Nv12Frame(*on_device(planes(seed)), "bt709")).labels
                np.testing.assert_array_equal(result.labels.numpy(), labels.numpy())
                expected = reference.overlay(
                    planes(seed), labels.numpy(), palette(NAMES)[:, :: 1 if order == "rgb" else -1],
                    alpha=0.3, channel_order=order, colour_matrix="bt709",
                )  # fmt: skip
                np.testing.assert_array_equal(result.picture.numpy(), expected)

    @pytest.mark.parametrize("bundle", ["segment_tokens", "descriptor"])
    def test_the_overlay_of_labels_that_become_classes_on_the_host(self, on_gpu, bundle):
        with on_gpu(bundle, classes=[["name 0", "name 3"], "name 1"]) as engine:
            found = engine.segment_device(on_device(planes()), with_overlay=True)
            expected = reference.overlay(planes(), found.labels.numpy(), palette(found.names))
        np.testing.assert_array_equal(found.picture.numpy(), expected)

    @pytest.mark.parametrize(
        ("frame", "error", "message"),
        [
            (lambda: planes(), DeviceError, "luma: .* numpy.ndarray in host memory. Use segment"),
            (
                lambda: (on_device(planes())[0], planes()[1]),
                DeviceError,
                "chroma: expected an array on cuda:0 .* in host memory",
            ),
            (
                lambda: (on_device(planes())[0], OnTheSecond()),
                DeviceError,
                "chroma: expected an array on cuda:0, got one on cuda:1",
            ),
            (lambda: on_device((LUMA[:29], CHROMA)), ShapeError, "luma: expected even sides"),
            (lambda: on_device((LUMA, CHROMA[:3])), ShapeError, "chroma: expected shape"),
        ],
    )
    def test_planes_that_are_refused(self, on_gpu, frame, error, message):
        with on_gpu() as engine:
            expected = engine.segment(planes()).labels
            with pytest.raises(error, match=message):
                engine.segment_device(frame())
            np.testing.assert_array_equal(engine.segment(planes()).labels, expected)


class OnTheSecond:
    shape, dtype = CHROMA.shape, CHROMA.dtype

    def __dlpack_device__(self):
        return (2, 1)
