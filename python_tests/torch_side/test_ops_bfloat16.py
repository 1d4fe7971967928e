"""bfloat16, which NumPy lacks, at the array boundary and in the kernels beside the networks.

Arrays come from torch by DLPack; a :class:`DeviceArray` holds them on a GPU. The truth is what the
same numbers give in float32.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import require_cuda  # noqa: E402
from support.errors import refused  # noqa: E402
from zsseg_rt import ops  # noqa: E402
from zsseg_rt.backends._tensorrt_device import read_feed  # noqa: E402
from zsseg_rt.backends._torch import DeviceResult  # noqa: E402
from zsseg_rt.errors import DTypeError  # noqa: E402
from zsseg_rt.ops import reference  # noqa: E402
from zsseg_rt.runtime.workspace import Workspace  # noqa: E402

CLIP = {"mean": (0.481, 0.458, 0.408), "std": (0.269, 0.261, 0.276)}
ODD = [0.0, -0.0, 1.0, -3.5, 3e38, -1e-38, 1e-40, np.inf, -np.inf, np.nan]


def bfloat16(values):
    """A torch array on the CPU, and the same numbers in float32."""
    tensor = torch.tensor(np.asarray(values, np.float32)).to(torch.bfloat16)
    return tensor, tensor.float().numpy()


def place(device, tensor):
    """On the device; on the CPU torch's own array."""
    return tensor if device.name == "cpu" else ops.DeviceArray.from_numpy(tensor, 0, device.stream)


@pytest.fixture(params=[1, 9, 257])
def logits(request):
    rng = np.random.default_rng(request.param)
    values = 4 * rng.standard_normal((2, request.param, 5, 7)).astype(np.float32)
    values[0, 0, 1, 2], values[1, -1, 3, 3] = np.nan, -np.inf
    return bfloat16(values)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation": "sigmoid", "with_scores": True, "unknown_below": 0.6},
        {"activation": "softmax", "with_scores": True, "seen_bias": 0.1},
    ],
)
def test_labels_are_those_of_the_same_numbers_in_float32(device, logits, settings):
    half, wide = logits
    settings = dict(settings)
    if "seen_bias" in settings:
        settings["seen"] = np.arange(wide.shape[1]) % 2 == 0
    given = dict(settings, stream=device.stream)
    if "seen" in given:
        given["seen"] = device.place(given["seen"])
    labels, scores = ops.upsample_argmax(place(device, half), (33, 41), **given)
    same, same_scores = ops.upsample_argmax(device.place(wide), (33, 41), **given)
    assert device.holds(labels)
    np.testing.assert_array_equal(device.fetch(labels), device.fetch(same))
    expected, expected_scores = reference.upsample_argmax(wide, (33, 41), **settings)
    assert (device.fetch(labels) == expected).mean() > 0.999  # near ties of activated values
    if scores is not None:
        np.testing.assert_array_equal(device.fetch(scores), device.fetch(same_scores))
        np.testing.assert_allclose(device.fetch(scores), expected_scores, atol=1e-5)


@pytest.mark.parametrize("nv12", [False, True])
@pytest.mark.parametrize("size_hw", [(16, 16), (7, 9)])
def test_preprocess_writes_the_rounded_numbers(device, nv12, size_hw):
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (22, 30, 3), np.uint8)
    if nv12:
        frame = (frame[..., 0].copy(), rng.integers(0, 256, (11, 15, 2), np.uint8))
    placed = tuple(map(device.place, frame)) if nv12 else device.place(frame)
    out = place(device, torch.full((3, *size_hw), torch.nan, dtype=torch.bfloat16))
    ops.preprocess(placed, size_hw=size_hw, **CLIP, out=out, stream=device.stream)
    found = out.float().numpy() if device.name == "cpu" else device.fetch(out)
    wide = ops.preprocess(placed, size_hw=size_hw, **CLIP, stream=device.stream)
    _, rounded = bfloat16(device.fetch(wide))
    np.testing.assert_array_equal(found, rounded)
    expected = reference.preprocess(frame, size_hw=size_hw, **CLIP)
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-5)  # 8 significant bits


@pytest.mark.parametrize("odd", [None, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_what_is_not_finite_is_found(device, count, odd):
    values = np.full(count, 3e38, np.float32)
    values[count // 2 : count // 2 + 1] = 3e38 if odd is None else odd
    flag = ops.all_finite(place(device, bfloat16(values)[0]), stream=device.stream)
    assert device.fetch(flag)[0] == (odd is None or count == 0)


@pytest.mark.needs_cuda
def test_a_device_array_holds_bfloat16():
    require_cuda()
    tensor, wide = bfloat16(ODD)
    array = ops.DeviceArray.from_numpy(tensor)
    assert (array.dtype, array.shape, array.nbytes) == ("bfloat16", (10,), 20)
    assert array.__cuda_array_interface__["typestr"] == "<V2"
    np.testing.assert_array_equal(array.numpy(), wide)
    assert array.numpy().dtype == np.float32
    copied = ops.DeviceArray.empty((10,), "bfloat16")
    copied.copy_from(array)
    np.testing.assert_array_equal(copied.numpy(), wide)
    back = torch.zeros(10, dtype=torch.bfloat16)
    copied.copy_to(back)
    np.testing.assert_array_equal(back.float().numpy(), wide)
    with refused(DTypeError, "array", "bfloat16", "float16"):
        copied.copy_from(np.zeros(10, np.float16))


@pytest.mark.needs_cuda
def test_other_libraries_arrays_name_it_in_their_interface():
    """NumPy's name for the types that others add to it: ml_dtypes' bfloat16 has it too."""
    require_cuda()
    tensor, _ = bfloat16([1.0, np.inf])
    array = ops.DeviceArray.from_numpy(tensor)

    class Foreign:
        __cuda_array_interface__ = array.__cuda_array_interface__

    assert ops.all_finite(Foreign()).numpy()[0] == 0


def test_an_operation_without_bfloat16_says_so(device):
    tensor, _ = bfloat16(np.zeros((1, 2, 3, 3)))
    grid = place(device, tensor)
    arrays = [device.place(np.zeros(shape, np.float32)) for shape in ((1, 3, 3, 2), (1, 3, 3))]
    with refused(DTypeError, "logits"):
        ops.warp_blend(grid, grid, *arrays, stream=device.stream)


@pytest.mark.needs_cuda
def test_buffers_and_feeds_may_be_bfloat16():
    """Of a lane's workspace, of torch's results, and of what TensorRT is fed."""
    require_cuda()
    workspace = Workspace("cuda:0")
    tensor, wide = bfloat16([1.0, -2.5, 3e38, 0.0])
    buffer = workspace.array("image", (4,), "bfloat16")
    buffer.copy_from(tensor, workspace.stream)
    assert (
        workspace.array("image", (2, 2), "bfloat16").__cuda_array_interface__["data"]
        == (buffer.__cuda_array_interface__["data"])
    )
    np.testing.assert_array_equal(workspace.fetch(buffer), wide)
    feed = read_feed("image", buffer)
    assert (feed.dtype, feed.shape) == ("bfloat16", (4,))
    assert DeviceResult(tensor, 7).__cuda_array_interface__["typestr"] == "<V2"
    workspace.close()
