"""Run graphs on OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import get_backend
from zsseg_rt.onnx.graph import Graph
from zsseg_rt.onnx.writer import save_onnx


def run_file(path: Path, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Outputs by name, in float32 on the CPU."""
    options = BackendOptions(num_threads=1)
    graph = get_backend("openvino").load(path, device="cpu", precision="float32", options=options)
    session = graph.session()
    try:
        outputs = session.run({name: np.ascontiguousarray(value) for name, value in feeds.items()})
        return {name: np.array(value) for name, value in outputs.items()}
    finally:
        session.close()
        graph.close()


def run_encoder(embed: Callable[[Graph, Any], Any], image: np.ndarray, path: Path) -> np.ndarray:
    """Embeddings of an image tower that ``embed`` writes into a graph, by the file of it."""
    graph = Graph()
    graph.output("patch_embeds", embed(graph, graph.input("image", image.shape)))
    save_onnx(graph.network(), "image_encoder", path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return run_file(path, {"image": image})["patch_embeds"]
