"""Build a bundle's TensorRT plans before a camera waits for them, each in a process of its own.

A build takes minutes and several times the weights in memory. In a child process, the kernel's
out-of-memory killer ends the build alone, and what was finished stays in the cache.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsseg_rt import errors
from zsseg_rt.backends.base import BackendOptions
from zsseg_rt.backends.registry import Placement, chosen_graph, usable_cache
from zsseg_rt.bundles.bundle import Bundle
from zsseg_rt.common.child_process import ChildError, ChildProcess, answer_requests
from zsseg_rt.common.process import held_interrupts
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ArgumentError, BackendError, DeviceError
from zsseg_rt.onnx.check import graph_memory
from zsseg_rt.runtime.families.registry import create_family

_PLACEMENT = Placement(backend="tensorrt", device="cuda:0")
COMMAND = (sys.executable, "-m", "zsseg_rt.runtime.plan_builds")
_MB = 1 << 20
_LEAST_WORKSPACE = 16  # MB
# Of a build's process. TensorRT-RTX 1.7 took 327 MB for 3 MB of weights, 1423 MB for 348 MB.
_OWN_BYTES, _WEIGHTS_AT_ONCE = 350 * _MB, 3.5


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """The target of a build."""

    # Such as "8.9"; None takes this machine's first GPU, and full TensorRT takes None alone
    compute_capability: str | None = None
    precision: str = "auto"  # As in EngineConfig
    # Most MB that the layers of a plan may take to work in; None: a quarter of the GPU's memory, or
    # TensorRT's own limit where no GPU is
    workspace: int | None = None
    cache_dir: Path | None = None  # As in EngineConfig; plans are kept in engines below it

    def __post_init__(self) -> None:
        EngineConfig(precision=self.precision)
        if self.workspace is not None and self.workspace < _LEAST_WORKSPACE:
            raise ArgumentError(
                f"workspace: expected at least {_LEAST_WORKSPACE} MB, got {self.workspace}. Leave "
                "it out to let TensorRT choose."
            )


@dataclass(frozen=True, kw_only=True)
class PlannedBuild:
    """One plan to build, and the memory that it is expected to take."""

    graph: str  # The graph's name in the bundle
    path: Path  # Its ONNX file
    precision: str  # What it is built in
    weights: int  # Bytes of the file, and so of the weights on the GPU
    # Bytes of the tensors that are alive at one time, at most, with the most classes: what a lane
    # takes beside the weights. Fused layers need less
    activations: int
    peak: int  # Bytes that the building process is expected to take at most


@dataclass(frozen=True, kw_only=True)
class BuiltPlan:
    """A plan in the cache."""

    graph: str  # The graph's name in the bundle
    path: Path  # The plan's file
    size: int  # Its bytes
    precision: str  # What its layers multiply in
    was_there: bool  # Whether the cache held it already
    seconds: float  # What the build took, its process included
    peak: int  # Most bytes that its process held


def plan_builds(bundle: Bundle, settings: BuildSettings) -> tuple[PlannedBuild, ...]:
    """List what :func:`build_plans` will build; nothing is opened but the bundle."""
    family = create_family(bundle, EngineConfig())
    allowed = bundle.auto_precisions(family.auto_precisions)
    builds = []
    for name in family.graphs:
        choice, path = chosen_graph(
            bundle, name, placement=_PLACEMENT, precision=settings.precision, allowed=allowed
        )
        weights = path.stat().st_size
        memory = graph_memory(
            path,
            float_bytes=4 if choice.precision == "float32" else 2,
            axes={axis: bounds[2] for axis, bounds in family.axes.items()},
        )
        builds.append(
            PlannedBuild(
                graph=name,
                path=path,
                precision=choice.precision,
                weights=weights,
                activations=memory.activations,
                peak=_OWN_BYTES + round(_WEIGHTS_AT_ONCE * weights),
            )
        )
    return tuple(builds)


def build_plans(
    bundle: Bundle,
    settings: BuildSettings,
    on_progress: Callable[[str, float], None] = lambda graph, fraction: None,
) -> Iterator[BuiltPlan]:
    """Build every plan that is not in the cache, and give each as it is finished."""
    planned = plan_builds(bundle, settings)
    cache = usable_cache(settings.cache_dir or EngineConfig().cache_folder)
    if cache is None:
        raise ArgumentError(
            "cache_dir: expected a folder that can be written, where engines find their plans. "
            "Set ZSSEG_HOME to one."
        )
    axes = dict(create_family(bundle, EngineConfig()).axes)
    job = {
        "axes": axes,
        "cache_dir": str(cache),
        "compute_capability": settings.compute_capability,
        "workspace": None if settings.workspace is None else settings.workspace * _MB,
    }
    for one in planned:
        job |= {"path": str(one.path), "precision": one.precision}
        started = time.monotonic()
        answer = _in_a_child(one, job, on_progress)
        if answer["path"] is None:
            raise BackendError(
                f"{one.graph}: expected its plan in {cache}, but it could not be written there. "
                "Free space or allow writing."
            )
        yield BuiltPlan(
            graph=one.graph, seconds=time.monotonic() - started,
            **{**answer, "path": Path(answer["path"])},
        )  # fmt: skip


def _in_a_child(
    one: PlannedBuild, job: Mapping[str, Any], on_progress: Callable[[str, float], None]
) -> dict[str, Any]:
    """Run one build; a child that ends without an answer becomes an error that says why."""
    with ExitStack() as open_things:
        with held_interrupts():  # or nobody would know a child that was just begun
            child = ChildProcess(COMMAND)
            open_things.callback(child.kill)  # nothing where it has ended
        try:
            answer: dict[str, Any] = child.request(
                "build", lambda fraction: on_progress(one.graph, fraction), **job
            )
        except ChildError as error:
            if error.kind:
                kind = getattr(errors, error.kind, BackendError)
                raise kind(str(error)) from error
            hint = (
                f" About {one.peak / _MB:.0f} MB are needed. Close other programs, add swap, or "
                "name a smaller workspace."
            )
            raise BackendError(
                f"{one.graph}: expected the build of its plan to end, but {error}"
                f"{hint if error.killed else ''} Plans that were finished before are kept."
            ) from error
        child.close()
        return answer


def _capability_here() -> str | None:
    """The capability that an engine on this machine's first GPU looks for."""
    from zsseg_rt.backends._tensorrt_api import load_tensorrt
    from zsseg_rt.backends._tensorrt_session import open_gpu

    if not load_tensorrt().is_rtx:
        return None
    try:
        return open_gpu(_PLACEMENT.device).compute_capability
    except DeviceError as error:
        raise DeviceError(
            "compute_capability: expected a GPU here or the target's name, such as 8.9, got "
            "neither. Name the target."
        ) from error


def _build(job: Mapping[str, Any], on_note: Callable[[Any], None]) -> dict[str, Any]:
    """Build what a request describes; the child's side."""
    from zsseg_rt.backends._tensorrt import BACKEND

    steps = list[float]()

    def note(_: str, fraction: float) -> None:
        steps.append(fraction)
        on_note(fraction)

    options = BackendOptions(
        cache_dir=Path(job["cache_dir"]),
        dynamic_axes={name: tuple(bounds) for name, bounds in job["axes"].items()},
        compute_capability=job["compute_capability"] or _capability_here(),
        workspace=job["workspace"],
        progress=note,
    )
    plan = BACKEND.build_plan(Path(job["path"]), precision=job["precision"], options=options)
    return {
        "path": None if plan.path is None else str(plan.path),
        "size": len(plan.data) if plan.path is None else plan.path.stat().st_size,
        "precision": plan.report["precision"],
        "was_there": not steps,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    answer_requests(_build)
