"""Frames on a GPU, the emulated one included: painted there, and seen there by what follows them.

Overlays are the pictures of the CPU, fetched in one copy.
"""

import numpy as np
import pytest

from conftest import require_cuda
from support.cuda_counts import counts_reader
from zsseg_rt import Nv12Frame, ops
from zsseg_rt.errors import CudaError
from zsseg_rt.results.segmentation import Frame, Segmentation
from zsseg_rt.stream import painting
from zsseg_rt.stream.conversion import host_picture
from zsseg_rt.stream.follow import look
from zsseg_rt.stream.painting import Painter

pytest.importorskip("cv2")
pytestmark = pytest.mark.needs_cuda
SIZE = (180, 322)  # wide enough for names
KINDS = ["bt601", "bt709-full", "whole pixels"]


@pytest.fixture(autouse=True)
def gpu():
    require_cuda()


def labelled(kind, order, seed=0, *, fetches=None, size=SIZE, source="cam"):
    """A result whose frame is on the GPU; its picture for the CPU notes that it was asked for."""
    rng = np.random.default_rng(seed)
    if kind == "whole pixels":
        on_gpu = ops.DeviceArray.from_numpy(rng.integers(0, 256, (*size, 3), np.uint8), 0)
        make = on_gpu.numpy
    else:
        shapes = (size, (size[0] // 2, size[1] // 2, 2))
        planes = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
        on_gpu = Nv12Frame(*(ops.DeviceArray.from_numpy(plane, 0) for plane in planes), kind)

        def make():
            return host_picture(on_gpu, order)

    def image():
        (fetches if fetches is not None else []).append(seed)
        return make()

    labels = np.full(size, 255, np.uint8)
    labels[:, :130], labels[90:, 200:], labels[:40, 200:] = 0, 2, 1
    frame = Frame(
        source=source,
        index=seed,
        captured_at=0.1 * seed,
        clock="arrival",
        image=image,
        on_gpu=on_gpu,
    )
    return Segmentation(
        labels=labels, names=("road", "sky", "tree"), vocabulary_version=1, frame=frame
    )


def painted(painter, seg):
    canvas = painter.canvas(seg)
    painter.paint(seg, canvas)
    return canvas


def on_the_cpu(seg):
    seg.frame.leave_gpu()
    return seg


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_the_picture_is_the_cpu_s_and_alone_is_fetched(kind, order):
    counts, fetches = counts_reader(), []
    settings = {"channel_order": order, "alpha": 0.4, "legend": True}
    on_gpu, on_cpu = Painter(**settings), Painter(**settings)
    segs = [labelled(kind, order, seed, fetches=fetches) for seed in range(3)]
    images = [painted(on_gpu, segs[0])]
    before = counts()
    images += [painted(on_gpu, seg) for seg in segs[1:]]
    copies = counts()["copies_to_host"] - before["copies_to_host"]
    assert (copies, fetches, on_gpu.painted) == (2, [], "gpu")
    for seg, image in zip(segs, images, strict=True):
        np.testing.assert_array_equal(image, painted(on_cpu, on_the_cpu(seg)))
    assert on_cpu.painted == "cpu"


def test_a_gpu_that_fails_is_left_once(monkeypatch, caplog):
    painter = Painter(channel_order="rgb", alpha=0.4)
    segs = [labelled("bt709", "rgb", seed) for seed in range(3)]
    first = painted(painter, segs[0])

    def fail(*_):
        raise CudaError("out of memory")

    monkeypatch.setattr(painting.core.DeviceArray, "from_numpy", fail)
    images = [painted(painter, seg) for seg in segs[1:]]
    monkeypatch.undo()
    for seg, image in zip(segs, [first, *images], strict=True):
        expected = painted(Painter(channel_order="rgb", alpha=0.4), on_the_cpu(seg))
        np.testing.assert_array_equal(image, expected)
    assert painter.painted == "cpu"
    assert [r.message for r in caplog.records if "CPU from now on" in r.message] == [
        "overlays are painted on the CPU from now on: out of memory"
    ]


def test_a_recording_of_frames_on_the_gpu_fetches_no_frame(tmp_path):
    pytest.importorskip("av")
    from support.recordings import frames_of, write

    fetches = []
    segs = [labelled("bt709", "rgb", seed, fetches=fetches) for seed in range(3)]
    stats = write(tmp_path / "a.mp4", segs, alpha=0.4)
    assert (stats.written, stats.painted, stats.error, fetches) == (3, "gpu", None, [])
    again = write(tmp_path / "b.mp4", [on_the_cpu(seg) for seg in segs], alpha=0.4)
    assert again.painted == "cpu"
    pairs = zip(frames_of(tmp_path / "a.mp4"), frames_of(tmp_path / "b.mp4"), strict=True)
    for (_, one), (_, other) in pairs:
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_the_small_copy_of_a_frame_on_a_gpu_is_that_of_its_image(order):
    image = np.random.default_rng(0).integers(0, 256, (36, 64, 3), np.uint8).repeat(20, 0)
    image = image.repeat(20, 1)
    settings = {"source": "cam", "index": 0, "captured_at": 0.0, "clock": "pipeline"}

    def never():
        raise AssertionError("the frame stays where it is")

    def on_device(array):
        return ops.DeviceArray.from_numpy(array, 0)

    host = look(Frame(image=image, **settings), order)
    device = look(Frame(image=never, on_gpu=on_device(image), **settings), order)
    assert device.grey.shape == host.grey.shape == (90, 160)
    assert np.abs(device.grey.astype(int) - host.grey).max() <= 1  # rounded at another place
    luma = on_device(np.full((720, 1280), 126, np.uint8))
    chroma = on_device(np.full((360, 640, 2), 128, np.uint8))
    planes = Frame(image=never, on_gpu=Nv12Frame(luma, chroma), **settings)
    assert np.abs(look(planes, order).grey.astype(int) - 128).max() <= 1
