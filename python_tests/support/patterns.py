"""Small graphs, run as they are written and as backend torch rewrites them."""

import numpy as np
import torch
from onnx import TensorProto, helper

from support.graphs import write_graph
from zsseg_rt.backends._torch_graph.program import Program

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
RNG = np.random.default_rng(0)


def node(op_type, inputs, outputs, **attributes):
    return helper.make_node(op_type, inputs.split(), outputs.split(), **attributes)


def weights(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


def check(path, nodes, inputs, outputs, constants, *, tolerance=1e-5):
    """Run a graph as it is written and rewritten; returns what was rewritten, and the operators.

    Rewritten, it runs twice, as a session does: on other values first.
    """
    path = write_graph(path / "g.onnx", nodes, inputs, outputs, constants)
    dtypes = {FLOAT: np.float32, HALF: np.float16}
    feeds = {
        name: torch.from_numpy(RNG.standard_normal(shape).astype(dtypes[kind]))
        for name, (kind, shape) in inputs.items()
    }
    plain, rewritten = Program.read(path), Program.read(path)
    counts = rewritten.rewrite()
    with torch.inference_mode():
        for program in (plain, rewritten):
            program.place(torch.device("cpu"), None)
        expected, kept = plain.run(feeds), {}
        rewritten.run({name: feed + 1 for name, feed in feeds.items()}, kept=kept)
        for name, result in rewritten.run(feeds, kept=kept).items():
            torch.testing.assert_close(result, expected[name], atol=tolerance, rtol=tolerance)
    return counts, [made.op_type for made in rewritten.nodes]
