"""Compare a bundle's graphs and the runtime with what torch computed, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.bundle import Bundle, GraphEntry
from zsseg_rt.errors import BundleError

__all__ = ["StageError", "VerifyReport", "verify_bundle"]

# Largest |graph - torch| relative to the stage's largest value. float32: the same sums in another
# order, worst seen 6e-6 through twelve blocks at 512x512; float16: weights and activations rounded
# to 11 bits (relative 5e-4) through the same blocks, worst seen 4e-3.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2}

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class StageError:
    """How far one array is from torch's.

    Attributes:
        where: What computed it: a graph and its precision, or ``"runtime"``.
        stage: Name of the array in the golden sample.
        error: Largest absolute difference over torch's largest value; for the runtime's
            ``labels``, the share of pixels with a clear winner that differ.
        tolerance: Largest accepted error.
    """

    where: str
    stage: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN never is."""
        return self.error <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Every comparison that was made for a bundle."""

    stages: tuple[StageError, ...]

    @property
    def passed(self) -> bool:
        """Whether every stage passed."""
        return all(stage.passed for stage in self.stages)

    def require(self, bundle: str) -> None:
        """Raise unless every stage passed.

        Raises:
            BundleError: A stage disagrees; the message names the first.
        """
        for stage in self.stages:
            if not stage.passed:
                raise BundleError(
                    f"{bundle}: {stage.where}: {stage.stage}: expected within {stage.tolerance:g} "
                    f"of torch, got {stage.error:.3g}. The bundle was not written; check the "
                    "model's weights, or leave this precision out."
                )


def verify_bundle(path: Path, *, runtime: bool = True) -> VerifyReport:
    """Run every graph of a bundle, then the engine, on the golden sample.

    Each graph is fed with torch's own inputs, so an error is reported where it arises. Graphs run
    on OpenVINO in float32: a float16 graph then shows the error of its weights and its structure;
    what a GPU's arithmetic adds is for ``Engine.self_check`` on that GPU.

    Args:
        path: Bundle folder.
        runtime: Whether to run the engine too.

    Raises:
        BundleError: The bundle cannot be read or has no golden sample.
        BackendError: A graph cannot be run.
    """
    bundle = Bundle.load(path)
    golden = _read_golden(bundle)
    stages = list(_graph_stages(bundle, golden))
    if runtime:
        stages += _runtime_stages(bundle)
    return VerifyReport(stages=tuple(stages))


def _read_golden(bundle: Bundle) -> Arrays:
    if bundle.golden is None:
        raise BundleError(f"{bundle.path}: golden: expected a golden sample, got none")
    with np.load(bundle.open_path(bundle.golden), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _graph_stages(bundle: Bundle, golden: Arrays) -> Iterator[StageError]:
    for name, variants in bundle.graphs.items():
        for precision, entry in variants.items():
            if all(spec.name in golden for spec in entry.inputs):
                yield from _one_graph(bundle, f"{name} {precision}", precision, entry, golden)


def _one_graph(
    bundle: Bundle, where: str, precision: str, entry: GraphEntry, golden: Arrays
) -> Iterator[StageError]:
    from zsseg_rt.backends.registry import get_backend

    session = get_backend("openvino").load(
        bundle.path / entry.file, device="cpu", precision="float32", options=BackendOptions()
    )
    try:
        feeds = {spec.name: np.ascontiguousarray(golden[spec.name]) for spec in entry.inputs}
        found = session.run(feeds)
        for spec in entry.outputs:
            stage = "prompt_embeds" if spec.name == "text_embeds" else spec.name
            yield StageError(
                where=where,
                stage=stage,
                error=_scaled_error(found[spec.name], golden[stage]),
                tolerance=TOLERANCES[precision],
            )
    finally:
        session.close()


def _runtime_stages(bundle: Bundle) -> list[StageError]:
    from zsseg_rt.config import EngineConfig
    from zsseg_rt.engine import Engine

    precision = "float32" if "float32" in bundle.graphs["image_encoder"] else "auto"
    config = EngineConfig(device="cpu", backend="openvino", precision=precision, use_cache=False)
    with Engine(bundle, config) as engine:
        check = engine.self_check()
    return [
        StageError(where="runtime", stage=s.stage, error=s.error, tolerance=s.tolerance)
        for s in check.stages
    ]


def _scaled_error(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    scale = max(float(np.abs(expected).max(initial=0.0)), 1e-6)
    return float(np.abs(found.astype(np.float64) - expected).max(initial=0.0)) / scale
