"""Run the golden sample once through every freshly built plan, and refuse plans that fail it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NoReturn, Protocol

from zsseg_rt.backends.base import BuiltGraph, CompiledGraph, GoldenVerdict
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import BackendError
from zsseg_rt.runtime.self_check import SelfCheck, StageCheck

_log = logging.getLogger(__name__)


class Checked(Protocol):
    """An engine, as far as it runs golden samples."""

    bundle: Bundle
    config: EngineConfig

    def self_check(self) -> SelfCheck:
        """Run the bundle's golden sample."""

    def close(self) -> None:
        """Free everything."""


def prove_plans(engine: Checked, graphs: Mapping[str, CompiledGraph]) -> None:
    """Compare graphs that a builder made with the bundle's golden sample, once per build."""
    built = [graph for graph in graphs.values() if isinstance(graph, BuiltGraph)]
    if not built:
        return
    try:
        _prove(engine, built)
    except BaseException:
        engine.close()
        raise


def _prove(engine: Checked, built: Sequence[BuiltGraph]) -> None:
    if engine.bundle.golden is None:
        _log.warning("%s: has no golden sample; its plans are unchecked", engine.bundle.path)
        return
    sample = engine.bundle.golden.sha256
    verdicts = [(graph, graph.golden_verdict(sample)) for graph in built]
    for graph, verdict in verdicts:
        if verdict is not None and not verdict.passed:
            _refuse([graph], verdict)
    fresh = [graph for graph, verdict in verdicts if verdict is None]
    if not fresh:
        return
    stages = engine.self_check().stages
    if engine.config.min_region_score is not None:  # which changes all but the graphs' own results
        stages = tuple(stage for stage in stages if any(_gives(one, stage) for one in built))
        fresh = [graph for graph in fresh if any(_gives(graph, stage) for stage in stages)]
    failure = next((stage for stage in stages if not stage.passed), None)
    if failure is None:
        for graph in fresh:
            graph.keep_golden_verdict(GoldenVerdict(sample=sample, passed=True))
        return
    # A stage that no graph gives: any of the new ones may be to blame.
    blamed = [graph for graph in built if _gives(graph, failure)] or fresh
    verdict = GoldenVerdict(
        sample=sample,
        passed=False,
        stage=failure.stage,
        error=failure.error,
        tolerance=failure.tolerance,
    )
    for graph in blamed:
        graph.keep_golden_verdict(verdict)
    _refuse(blamed, verdict)


def _gives(graph: BuiltGraph, stage: StageCheck) -> bool:
    return any(spec.name == stage.stage for spec in graph.outputs)


def _refuse(graphs: Sequence[BuiltGraph], verdict: GoldenVerdict) -> NoReturn:
    names = ", ".join(graph.plan_name for graph in graphs)
    raise BackendError(
        f"plan: expected the golden sample within {verdict.tolerance:.2g} at {verdict.stage}, got "
        f"{verdict.error:.2g} from {names}. Use precision='float32' or backend='torch'; to build "
        "it again, remove the file."
    )
