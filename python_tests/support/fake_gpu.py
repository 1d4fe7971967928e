"""Runs of backend torch on a GPU that is not there: torch's fake tensors have no values.

Whatever reads a value back fails. What would be launched, and what would be copied between host and
GPU, is noted.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zsseg_rt.backends._torch_program import Program
from zsseg_rt.onnx.reader import map_file, read_network

DEVICE = torch.device("cuda:0")
# These answer a question, make a view, or take memory: no kernel runs.
NO_LAUNCHES = {"prim.device.default", "aten._unsafe_view.default", "aten.empty_like.default"}


class Watch(TorchDispatchMode):
    """Notes launches, and copies between host and GPU; work on the host is done there for real."""

    def __init__(self):
        super().__init__()
        self.launched, self.crossed = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        to_gpu = "cuda" in str(kwargs.get("device"))
        if not to_gpu and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        places = {tensor.device.type for tensor in tensors}
        if kwargs.get("device") is not None:
            places.add(torch.device(kwargs["device"]).type)
        if "copy" in str(func) and len(places) > 1:
            self.crossed.append(str(func))
        if not func.is_view and str(func) not in NO_LAUNCHES:
            self.launched.append(str(func))
        return func(*args, **kwargs)


class FusedAttention(TorchFunctionMode):
    """Stands for torch's fused attention, and is as particular about its arguments.

    On a machine without a GPU torch would take attention apart.
    """

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, _k, v, mask = (*args, None)[:4]
        for tensor in args[:3]:
            assert (tensor.ndim, tensor.dtype) == (4, q.dtype)
            assert tensor.stride(-1) == 1  # otherwise it is copied first
            assert tensor.shape[-1] <= 256
        if mask is not None:
            assert mask.dtype == q.dtype
            assert mask.stride(-1) == 1
            assert all(stride % 8 == 0 for stride in mask.stride()[:-1])  # otherwise it is copied
        self.calls += 1
        rows = q.transpose(1, 2)  # the kernels write heads side by side
        return torch.empty_like(rows[..., : v.shape[-1]]).transpose(1, 2)


class FakeRun:
    """A run of a graph."""

    def __init__(self, path: Path, *, fused: bool = True) -> None:
        network = read_network(map_file(path))
        program = Program(network)
        self.num_fused = program.fuse_attention() if fused else 0
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            program.place(DEVICE)
            feeds = {}
            for spec in network.inputs:
                shape = [5 if isinstance(size, str) else size for size in spec.shape]
                dtype = getattr(torch, spec.dtype)
                feeds[spec.name] = torch.empty(shape, device=DEVICE, dtype=dtype)
            with FusedAttention() as attentions, Watch() as watch:
                results = program.run(feeds)
        assert all(result.device == DEVICE for result in results.values())
        self.crossed, self.fused_attention = watch.crossed, attentions.calls
        self.launched = watch.launched + ["attention"] * attentions.calls
