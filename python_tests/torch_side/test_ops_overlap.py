"""Outputs of an operation share no memory with its other arguments; and bfloat16 arrays."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import require_cuda
from support.errors import refused
from support.operations import OPERATIONS, PAIRED
from zsseg_rt import ops
from zsseg_rt.backends._tensorrt_session import read_feed
from zsseg_rt.backends._torch import DeviceResult
from zsseg_rt.common.arrays import TensorSpec
from zsseg_rt.errors import ArgumentError, DTypeError
from zsseg_rt.runtime.workspace import Workspace

IN_PLACE = {
    ("warp_blend", "out", "logits"),
    ("overlay", "out", "frame"),
    ("upsample_argmax_overlay", "picture", "frame"),
}


def results_of(operation):
    """Arrays, settings, and what is written, of a sound call on numbers."""
    arrays, settings = OPERATIONS[operation]
    rows = np.random.default_rng(0)
    arrays = {
        name: rows.random(array.shape, np.float32) if array.dtype == np.float32 else array
        for name, array in arrays.items()
        if name not in ("out", "picture")
    }
    if operation == "ink":
        return arrays, settings, {"picture": np.zeros((31, 67, 3), np.uint8)}
    if operation in PAIRED:
        results = getattr(ops, operation)(**arrays, **settings, with_scores=True)
        return arrays, settings, dict(zip(("labels", "scores", "picture"), results, strict=False))
    written = {"out": getattr(ops, operation)(**arrays, **settings)}
    if operation == "patch_text_similarity":
        written["finite"] = np.zeros(1, np.uint8)
    return arrays, settings, written


PAIRS = [
    (operation, output, other)
    for operation in OPERATIONS
    for arrays, _, written in [results_of(operation)]
    for output in written
    for other in [*arrays, *written]
    if other != output
]


def shared(written, other, in_last):
    """Both arrays in one memory, aligned: one begins where the other does, or in its last."""
    memory = aligned(written.nbytes + other.nbytes + 64)
    step = max(written.itemsize, other.itemsize)
    at = in_last * max(0, written.nbytes - step) // 8 * 8
    beside = memory[at : at + other.nbytes].view(other.dtype).reshape(other.shape)
    beside[...] = other
    return memory[: written.nbytes].view(written.dtype).reshape(written.shape), beside


def aligned(size):
    memory = np.zeros(size + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:size]


def call(operation, arrays, settings, written):
    if operation in PAIRED:
        settings = settings | {"out": (written["labels"], written["scores"]), "with_scores": True}
        written = {name: array for name, array in written.items() if name == "picture"}
    return getattr(ops, operation)(**arrays, **settings, **written)


@pytest.mark.parametrize("in_last", [False, True])
@pytest.mark.parametrize(("operation", "output", "other"), PAIRS)
def test_overlap_is_refused(operation, output, other, in_last):
    arrays, settings, written = results_of(operation)
    written = {name: np.zeros_like(array) for name, array in written.items()}
    source = arrays if other in arrays else written
    written[output], source[other] = shared(written[output], source[other], in_last)
    if (operation, output, other) in IN_PLACE and not in_last:
        expected = call(operation, arrays, settings, results_of(operation)[2])
        for result, sound in zip(call(operation, arrays, settings, written), expected, strict=True):
            np.testing.assert_array_equal(result, sound)
        return
    names = list(written)
    if other in names and names.index(other) > names.index(output):
        output, other = other, output  # of two outputs, the later one is named first
    words = re.escape(f"{output}: expected memory apart from {other}'s, got an overlap. Pass")
    with pytest.raises(ArgumentError, match=words):
        call(operation, arrays, settings, written)


@pytest.mark.parametrize(
    ("operation", "name"), [("upsample_argmax", "logits"), ("label_regions", "mask_logits")]
)
def test_a_lent_workspace_overlaps_nothing(operation, name):
    arrays, settings, written = results_of(operation)
    memory = aligned(1 << 20)
    inside = memory[64 : 64 + arrays[name].nbytes]
    arrays[name] = inside.view(np.float32).reshape(arrays[name].shape)
    with refused(ArgumentError, "workspace"):
        call(operation, arrays, settings | {"workspace": memory}, written)


def test_overlap_is_seen_through_dlpack_and_gaps_between_rows():
    memory = torch.zeros(64)
    logits, past = memory[:4].view(1, 1, 2, 2), memory[3:7].view(1, 1, 2, 2)
    rest = (torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2))
    with refused(ArgumentError, "out"):
        ops.warp_blend(torch.zeros(1, 1, 2, 2), past, *rest, out=logits.numpy())
    with refused(ArgumentError, "out"):
        ops.warp_blend(logits.numpy(), torch.zeros(1, 1, 2, 2), *rest, out=past)
    camera = np.zeros((8, 16), np.uint8)  # two rows of brightness, pitched; `out` lies in the last
    luma, chroma, out = camera[:6:4, :2], camera[6:7, :2].reshape(1, 1, 2), camera[4:5].view("f4")
    settings = {"size_hw": (1, 1), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    out = out.reshape(-1)[:3].reshape(3, 1, 1)
    with refused(ArgumentError, "out"):
        ops.preprocess((luma, chroma), **settings, out=out)


def test_arrays_beside_each_other_and_empty_ones_are_sound():
    memory = np.zeros(8, np.float32)
    logits, out = memory[:4].reshape(1, 1, 2, 2), memory[4:].reshape(1, 1, 2, 2)
    rest = (np.zeros((1, 2, 2, 2), np.float32), np.zeros((1, 2, 2), np.float32))
    assert ops.warp_blend(logits, logits, *rest, out=out) is out
    empty = memory[2:2].reshape(0, 5).view(np.int32)
    assert ops.mask_boxes(memory.reshape(2, 2, 2)[:0], (8, 8), out=empty) is empty


@pytest.mark.needs_cuda
def test_overlap_on_a_gpu_is_refused():
    require_cuda()
    whole = ops.DeviceArray.from_numpy(np.zeros((2, 3, 2, 2), np.float32))
    arrays, settings, _ = results_of("crop_regions")
    arrays["boxes"] = np.int32([[0, 0, 7, 7, 9], [1, 1, 3, 3, 9]])
    on_gpu = {name: ops.DeviceArray.from_numpy(array) for name, array in arrays.items()}
    on_gpu["mask_logits"] = whole.view((2, 2, 2))
    with refused(ArgumentError, "out", "mask_logits"):
        ops.crop_regions(**on_gpu, **settings, out=whole)


# --- bfloat16, which NumPy lacks: the same numbers in float32 are the truth ---


ODD = [0.0, -0.0, 1.0, -3.5, 3e38, -1e-38, 1e-40, np.inf, -np.inf, np.nan]


@pytest.mark.needs_cuda
def test_a_device_array_holds_bfloat16():
    require_cuda()
    tensor = torch.tensor(ODD).to(torch.bfloat16)
    wide = tensor.float().numpy()
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
    # NumPy's name for the types that others add to it: ml_dtypes' bfloat16 has it too
    foreign = SimpleNamespace(__cuda_array_interface__=array.__cuda_array_interface__)
    assert ops.all_finite(foreign).numpy()[0] == 0


@pytest.mark.needs_cuda
def test_buffers_and_feeds_may_be_bfloat16():
    require_cuda()
    workspace = Workspace("cuda:0")
    tensor = torch.tensor([1.0, -2.5, 3e38, 0.0]).to(torch.bfloat16)
    buffer = workspace.array("image", (4,), "bfloat16")
    buffer.copy_from(tensor, workspace.stream)
    again = workspace.array("image", (2, 2), "bfloat16")
    assert again.__cuda_array_interface__["data"] == buffer.__cuda_array_interface__["data"]
    np.testing.assert_array_equal(workspace.fetch(buffer), tensor.float().numpy())
    spec = TensorSpec(name="image", dtype="bfloat16", shape=(4,))
    assert read_feed(spec, buffer)[1:3] == ("bfloat16", (4,))
    assert DeviceResult(tensor, 7).__cuda_array_interface__["typestr"] == "<V2"
    workspace.close()
