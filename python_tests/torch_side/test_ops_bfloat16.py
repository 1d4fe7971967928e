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
from zsseg_rt.backends._tensorrt_session import read_feed  # noqa: E402
from zsseg_rt.backends._torch import DeviceResult  # noqa: E402
from zsseg_rt.common.arrays import TensorSpec  # noqa: E402
from zsseg_rt.errors import DTypeError  # noqa: E402
from zsseg_rt.runtime.workspace import Workspace  # noqa: E402

ODD = [0.0, -0.0, 1.0, -3.5, 3e38, -1e-38, 1e-40, np.inf, -np.inf, np.nan]


def bfloat16(values):
    tensor = torch.tensor(np.asarray(values, np.float32)).to(torch.bfloat16)
    return tensor, tensor.float().numpy()


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


@pytest.mark.needs_cuda
def test_buffers_and_feeds_may_be_bfloat16():
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
    spec = TensorSpec(name="image", dtype="bfloat16", shape=(4,))
    assert read_feed(spec, buffer)[1:3] == ("bfloat16", (4,))
    assert DeviceResult(tensor, 7).__cuda_array_interface__["typestr"] == "<V2"
    workspace.close()
