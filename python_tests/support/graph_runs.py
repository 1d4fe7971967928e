"""Run graph files on OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import get_backend


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
