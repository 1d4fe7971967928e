"""ONNX files of a bundle: written in several precisions, described with hash and interface."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import zsseg_rt
from zsseg_rt.bundles.specs import FileEntry, GraphEntry
from zsseg_rt.onnx.check import check_graph
from zsseg_rt.onnx.graph import Graph
from zsseg_rt.onnx.half import to_half
from zsseg_rt.onnx.network import OPSET, Network
from zsseg_rt.onnx.operations import Shape
from zsseg_rt.onnx.writer import save_onnx, with_exact_halves

GraphFiles = dict[str, dict[str, GraphEntry]]

DEFAULT_PRECISIONS = ("float32", "float16")
GRAPH_PRECISIONS = (*DEFAULT_PRECISIONS, "bfloat16")


def weights_of(module: Any) -> dict[str, npt.NDArray[Any]]:
    """A torch module's tensors by key, as arrays; those on the CPU are shared."""
    return {
        key: np.ascontiguousarray(value.detach().cpu().numpy())
        for key, value in module.state_dict().items()
    }


WrittenGraph = Callable[[], Network]  # Makes a bundle's graph when it is written: it takes memory


def written_graph(
    function: Callable[..., Any], inputs: Mapping[str, Shape], outputs: Sequence[str] = ()
) -> WrittenGraph:
    """A graph of what ``function(ops, **inputs)`` returns: float32 values by name or in order."""

    def network() -> Network:
        graph = Graph()
        values = {name: graph.input(name, shape) for name, shape in inputs.items()}
        results = function(graph, **values)
        if not isinstance(results, Mapping):
            results = results if isinstance(results, tuple) else (results,)
            results = dict(zip(outputs, results, strict=True))
        for name, value in results.items():
            graph.output(name, value)
        return graph.network()

    return network


def image_network(
    encode: Callable[..., Any],
    size_hw: tuple[int, int],
    outputs: Sequence[str] = ("patch_embeds",),
) -> WrittenGraph:
    """A graph of ``encode(ops, image=)`` of [1, 3, H, W]."""
    return written_graph(encode, {"image": (1, 3, *size_hw)}, outputs)


def provenance() -> dict[str, Any]:
    """The package and the operator set, for a manifest."""
    return {"package": f"zsseg_rt {zsseg_rt.__version__}", "opset": OPSET}


def save_graphs(
    graphs: Mapping[str, WrittenGraph],
    folder: Path,
    precisions: Sequence[str],
    half: Collection[str] = (),
) -> GraphFiles:
    """Write ``NAME.PRECISION.onnx`` for every graph and precision, and describe the files.

    ``half`` are inputs and outputs that float16 graphs take and give in float16.
    """
    entries: GraphFiles = {}
    for name, graph in graphs.items():
        network, entries[name] = graph(), {}
        for precision in precisions:
            edges = half if precision == "float16" else ()
            full = precision == "float32"
            one = with_exact_halves(network) if full else to_half(network, precision, half=edges)
            path = folder / f"{name}.{precision}.onnx"
            save_onnx(one, name, path)
            entries[name][precision] = describe_graph(path, folder)
    return entries


def describe_graph(path: Path, root: Path) -> GraphEntry:
    """Describe an ONNX file under ``root`` with its hash and interface."""
    header = check_graph(path)
    file = FileEntry.describe(path, root)
    return GraphEntry(**vars(file), inputs=header.inputs, outputs=header.outputs)
