"""Compare a bundle's graphs and the runtime with what torch or NumPy computed, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.bundles.quantization import NARROW
from zsseg_rt.bundles.specs import GraphEntry
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import BundleError
from zsseg_rt.runtime.families.registry import create_family
from zsseg_rt.runtime.self_check import (
    TOLERANCES,
    StageCheck,
    read_golden,
    scaled_error,
    stage_tolerance,
)

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Every comparison that was made for a bundle."""

    stages: tuple[StageCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether every stage passed."""
        return all(stage.passed for stage in self.stages)

    def require(self, bundle: str) -> None:
        """Raise unless every stage passed."""
        for stage in self.stages:
            if not stage.passed:
                raise BundleError(
                    f"{bundle}: {stage.where}: {stage.stage}: expected within {stage.tolerance:g} "
                    f"of the model, got {stage.error:.3g}. The bundle was not written; check the "
                    "model's weights, or leave this precision out."
                )


def verify_bundle(path: Path, *, runtime: bool = True) -> VerifyReport:
    """Run every graph of a bundle, then the engine, on the golden sample.

    Each graph is fed the golden sample's own inputs, so an error is reported where it arises.
    Graphs run on OpenVINO in float32: a float16 graph then shows the error of its weights and its
    structure; errors from a GPU's arithmetic are left to ``Engine.self_check`` on that GPU.

    Args:
        path: Bundle folder.
        runtime: Whether to run the engine too.

    Raises:
        BundleError: The bundle cannot be read, or has no golden sample, or a damaged one.
        BackendError: A graph cannot be run.
    """
    bundle = Bundle.load(path)
    golden = read_golden(bundle, create_family(bundle, EngineConfig()))
    stages = list(_graph_stages(bundle, golden))
    if runtime:
        stages += _runtime_stages(bundle)
    return VerifyReport(stages=tuple(stages))


def _graph_stages(bundle: Bundle, golden: Arrays) -> Iterator[StageCheck]:
    for name, variants in bundle.graphs.items():
        for precision, entry in variants.items():
            # no CPU computes FP8; what it loses is measured when it is written
            if precision != "fp8" and all(spec.name in golden for spec in entry.inputs):
                yield from _one_graph(bundle, f"{name} {precision}", precision, entry, golden)


def _one_graph(
    bundle: Bundle, where: str, precision: str, entry: GraphEntry, golden: Arrays
) -> Iterator[StageCheck]:
    from zsseg_rt.backends.registry import get_backend

    computed = "int8" if precision == "int8" else "float32"
    graph = get_backend("openvino").load(
        bundle.path / entry.file, device="cpu", precision=computed, options=BackendOptions()
    )
    session = graph.session()
    try:
        feeds = {spec.name: np.ascontiguousarray(golden[spec.name]) for spec in entry.inputs}
        found = session.run(feeds)
        for spec in entry.outputs:
            stage = "prompt_embeds" if spec.name == "text_embeds" else spec.name
            yield StageCheck(
                where=where,
                stage=stage,
                error=scaled_error(found[spec.name], golden[stage]),
                tolerance=stage_tolerance(bundle, precision, stage)
                if precision in NARROW
                else TOLERANCES[precision].graph,
            )
    finally:
        session.close()
        graph.close()


def _runtime_stages(bundle: Bundle) -> tuple[StageCheck, ...]:
    from zsseg_rt.engine import Engine

    precision = "float32" if "float32" in bundle.graphs["image_encoder"] else "auto"
    config = EngineConfig(device="cpu", backend="openvino", precision=precision, use_cache=False)
    with Engine(bundle, config) as engine:
        return engine.self_check().stages
