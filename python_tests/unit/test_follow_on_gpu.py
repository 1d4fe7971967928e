"""Labels that follow frames on a GPU, the emulated one included: a small copy leaves it."""

import numpy as np
import pytest

from conftest import require_cuda
from zsseg_rt.ops import core
from zsseg_rt.results.segmentation import Frame
from zsseg_rt.runtime.frames import Nv12Frame
from zsseg_rt.stream.follow import look

pytestmark = pytest.mark.needs_cuda


def on_device(array):
    return core.DeviceArray.from_numpy(array, 0, 0)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_the_small_copy_of_a_frame_on_a_gpu_is_that_of_its_image(order):
    require_cuda()
    pytest.importorskip("cv2")
    image = np.random.default_rng(0).integers(0, 256, (36, 64, 3), np.uint8).repeat(20, 0)
    image = image.repeat(20, 1)
    settings = {"source": "cam", "index": 0, "captured_at": 0.0, "clock": "pipeline"}

    def never():
        raise AssertionError("the frame stays where it is")

    host = look(Frame(image=image, **settings), order)
    device = look(Frame(image=never, on_gpu=on_device(image), **settings), order)
    assert device.grey.shape == host.grey.shape == (90, 160)
    assert np.abs(device.grey.astype(int) - host.grey).max() <= 1  # rounded at another place
    luma = on_device(np.full((720, 1280), 126, np.uint8))
    chroma = on_device(np.full((360, 640, 2), 128, np.uint8))
    planes = Frame(image=never, on_gpu=Nv12Frame(luma, chroma), **settings)
    assert np.abs(look(planes, order).grey.astype(int) - 128).max() <= 1
