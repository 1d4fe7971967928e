"""What backend torch asks of a GPU, told without one.

torch's device "meta" stands for the GPU: its tensors have no values, so whatever reads one fails,
and all that goes between it and the host is seen.
"""

import contextlib
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from conftest import require_cuda  # noqa: E402
from support.graphs import write_graph  # noqa: E402
from zsseg_rt import ops  # noqa: E402
from zsseg_rt.backends import _torch  # noqa: E402
from zsseg_rt.backends._torch_program import Program  # noqa: E402
from zsseg_rt.backends._torch_settings import exact_float32  # noqa: E402
from zsseg_rt.onnx.reader import map_file, read_network  # noqa: E402

STORED = Path(__file__).parents[1] / "bundles" / "v1"
GRAPHS = sorted(STORED.glob("*/*.onnx"))
DTYPES = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16}
DEVICE = torch.device("meta")


class Watch(TorchDispatchMode):
    """Notes every operation whose result lies on the device, and those that cross over to it."""

    def __init__(self):
        super().__init__()
        self.launched, self.crossed = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before, after = (
            {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
            for tree in ((args, kwargs), result)
        )
        if DEVICE.type in after:
            self.launched.append(str(func))
        if before and after and before != after and "copy" in str(func):
            self.crossed.append(str(func))
        return result


def run_on_device(path):
    """Run a graph on the device; returns what was watched."""
    program = Program(read_network(map_file(path)))
    program.place(DEVICE, None)
    feeds = {}
    for value in onnx.load(path).graph.input:
        kind = value.type.tensor_type
        shape = [axis.dim_value or 5 for axis in kind.shape.dim]
        feeds[value.name] = torch.empty(shape, device=DEVICE, dtype=DTYPES[kind.elem_type])
    with torch.no_grad(), Watch() as watch:
        results = program.run(feeds)
    assert all(result.device == DEVICE for result in results.values())
    return watch


@pytest.mark.parametrize("path", GRAPHS, ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_a_run_neither_waits_nor_copies(path):
    """No value is read back and no constant is sent, so that a run can be captured."""
    watch = run_on_device(path)
    assert watch.launched
    assert watch.crossed == []


def write_one(path, node, constants, kind=TensorProto.FLOAT, rank=2):
    """A graph of one node: x [6, 8] and constants to y."""
    axes = [f"axis{axis}" for axis in range(rank)]
    return write_graph(path, [node], {"x": (kind, [6, 8])}, {"y": (kind, axes)}, constants)


def picked(path, x):
    """What a graph makes of x, on the host."""
    program = Program(read_network(map_file(path)))
    program.place(torch.device("cpu"), None)
    (result,) = program.run({"x": torch.from_numpy(x)}).values()
    return result.numpy()


X = np.arange(48, dtype=np.float32).reshape(6, 8)


@pytest.mark.parametrize(
    ("start", "end", "step", "expected"),
    [
        (1, 4, 1, X[:, 1:4]),
        (-3, 2**63 - 1, 1, X[:, -3:]),
        (0, 8, 3, X[:, ::3]),
        (6, 1, -2, X[:, 6:1:-2]),
        (5, 5, 1, X[:, 5:5]),
    ],
)
def test_slices_are_views_where_they_ascend(tmp_path, start, end, step, expected):
    node = helper.make_node("Slice", ["x", "starts", "ends", "axes", "steps"], ["y"])
    held = {"starts": start, "ends": end, "axes": -1, "steps": step}
    path = write_one(
        tmp_path / "slice.onnx", node, {name: np.array([number]) for name, number in held.items()}
    )
    np.testing.assert_array_equal(picked(path, X), expected)
    watch = run_on_device(path)
    assert watch.crossed == []
    copies = [name for name in watch.launched if "slice" not in name and "alias" not in name]
    assert copies == ([] if step > 0 else ["aten.flip.default"])


@pytest.mark.parametrize("indices", [0, -1, [2], [3, 4, 5], [-2, -1], [-1, 0], [4, 1, 1], [[0, 2]]])
def test_gather_takes_any_indices(tmp_path, indices):
    node = helper.make_node("Gather", ["x", "indices"], ["y"], axis=0)
    path = write_one(
        tmp_path / "gather.onnx", node, {"indices": np.array(indices)}, rank=1 + np.ndim(indices)
    )
    np.testing.assert_array_equal(picked(path, X), X[indices])
    watch = run_on_device(path)
    assert watch.crossed == []
    is_view = np.ndim(indices) == 0 or indices in ([2], [3, 4, 5], [-2, -1])
    assert ("aten.index_select.default" in watch.launched) == (not is_view)


@pytest.mark.parametrize("bounds", [(-1.0, 20.0), (None, 20.0), (3.5, None)])
def test_clip_reads_no_bounds_back(tmp_path, bounds):
    names = [name if held is not None else "" for name, held in zip("ab", bounds, strict=True)]
    node = helper.make_node("Clip", ["x", *names], ["y"])
    held = {n: np.float32(b) for n, b in zip(names, bounds, strict=True) if n}
    path = write_one(tmp_path / "clip.onnx", node, {n: np.array(b) for n, b in held.items()})
    np.testing.assert_array_equal(picked(path, X), np.clip(X, *bounds))
    assert run_on_device(path).launched == ["aten.clamp.default"]


@pytest.mark.parametrize("op_type", ["LayerNormalization", "Softmax"])
def test_norms_of_half_precision_are_one_kernel(tmp_path, op_type):
    """It computes in float32 inside: the sums here are beyond float16."""
    constants = {"scale": np.ones(8, np.float16), "bias": np.zeros(8, np.float16)}
    names = list(constants) if op_type == "LayerNormalization" else []
    node = helper.make_node(op_type, ["x", *names], ["y"])
    held = {name: constants[name] for name in names}
    path = write_one(tmp_path / "norm.onnx", node, held, TensorProto.FLOAT16)
    launched = run_on_device(path).launched
    assert [name for name in launched if "_to_copy" not in name] == launched[:1]
    assert len(launched) <= 2  # and the widening of the graph's output
    x = (60000 * np.sin(X)).astype(np.float16)
    wide = x.astype(np.float64)
    if op_type == "Softmax":
        expected = np.exp(wide - wide.max(1, keepdims=True))
        expected /= expected.sum(1, keepdims=True)
    else:
        expected = (wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    np.testing.assert_allclose(picked(path, x), expected, atol=2e-3)  # float16 rounds the result


@pytest.mark.parametrize("asked", [True, False])
def test_only_tf32_is_turned_off(monkeypatch, asked):
    """cuDNN stays on, and benchmarks kernels where the caller asked for that."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", asked)
    before = (cudnn.enabled, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    assert before[0]
    with contextlib.suppress(KeyError), exact_float32():
        assert (cudnn.enabled, cudnn.benchmark) == (True, asked)
        assert not cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        raise KeyError  # settings are restored after errors too
    assert (cudnn.enabled, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


class Lent:
    """As much of a tensor as a result needs, in this package's memory on the device."""

    dtype = "torch.float32"

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def data_ptr(self):
        return self.array.__cuda_array_interface__["data"][0]


def test_results_name_the_stream_that_wrote_them():
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    result = _torch.DeviceResult(tensor, 77)
    assert result.__cuda_array_interface__["stream"] == 77
    assert _torch.DeviceResult(tensor, 0).__cuda_array_interface__["stream"] == 1
    view = result.view((1, 4))
    assert view.shape == view.__cuda_array_interface__["shape"] == (1, 4)
    assert view.__cuda_array_interface__["data"] == result.__cuda_array_interface__["data"]
    assert not hasattr(result, "__dlpack__")


@pytest.mark.needs_cuda
def test_results_are_used_on_their_own_stream_at_once():
    require_cuda()
    stream = ops.Stream(0)
    values = np.ones((1, 3, 4), np.float32)
    array = ops.DeviceArray.from_numpy(values, 0, stream.handle)
    result = _torch.DeviceResult(Lent(array), stream.handle)
    flag = ops.all_finite(result, stream=stream.handle)
    assert flag.numpy(stream.handle)[0] == 1
