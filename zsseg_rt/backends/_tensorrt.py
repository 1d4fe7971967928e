"""TensorRT, full or RTX: plans are built from the bundle's ONNX and cached.

Needs ``tensorrt`` 10.3 to 11.x or ``tensorrt_rtx`` 1.7; ``$ZSSEG_TENSORRT`` chooses between them.
RTX builds without a GPU, for any GPU it supports; full TensorRT builds on the GPU it runs on.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from zsseg_rt.backends._tensorrt_api import TensorRT, load_tensorrt
from zsseg_rt.backends._tensorrt_build import build, capability_member, require_capability
from zsseg_rt.backends._tensorrt_session import (
    Gpu,
    PlanRefused,
    TensorRTGraph,
    on_device,
    open_gpu,
)
from zsseg_rt.backends.base import BackendOptions, Choice, CompiledGraph, pick_choice
from zsseg_rt.backends.plan_cache import Plan, PlanCache, PlanKey
from zsseg_rt.bundles.specs import NARROW
from zsseg_rt.common.files import sha256_of
from zsseg_rt.errors import BackendError
from zsseg_rt.onnx.check import check_graph

_PREFERRED = ("float16", "bfloat16", "float32", "int8", "fp8")

_WORKSPACE_PART = 4  # of the GPU's memory

_log = logging.getLogger(__name__)


class TensorRTBackend:
    """Runs graphs with TensorRT on an NVIDIA GPU."""

    name = "tensorrt"

    def choose(
        self, variants: Collection[str], asked: str, *, device: str, allowed: Sequence[str]
    ) -> Choice:
        """Choose; the precision is the graph's own."""
        offers = [Choice(variant=name, precision=name) for name in _PREFERRED if name in variants]
        return pick_choice(offers, asked, allowed, where="TensorRT", narrow=NARROW)

    def load(
        self, graph_path: Path, *, device: str, precision: str, options: BackendOptions
    ) -> CompiledGraph:
        """Load a graph from a cached plan or a fresh build; a refused plan is built again once."""
        gpu = open_gpu(device)
        require_capability(precision, gpu.compute_capability)
        api = load_tensorrt()
        if options.compute_capability is None and api.is_rtx:
            options = replace(options, compute_capability=gpu.compute_capability)
        job = _PlanJob(api, Path(graph_path), precision, options, gpu)
        with on_device(gpu.index):
            plan = job.get()
            try:
                return TensorRTGraph(api, gpu, plan)
            except PlanRefused as exc:
                if plan.path is None:
                    raise
                job.discard(str(exc))
                return TensorRTGraph(api, gpu, job.get())

    def build_plan(
        self, graph_path: Path, *, precision: str = "auto", options: BackendOptions | None = None
    ) -> Plan:
        """Build a plan, or take it from the cache, without running it.

        With RTX this needs no GPU; without ``options.compute_capability`` it is for every GPU that
        RTX supports by default. Full TensorRT builds for ``cuda:0``.
        """
        api = load_tensorrt()
        options = options or BackendOptions()
        if options.compute_capability is not None:
            capability_member(api, options.compute_capability)
        if api.is_rtx:
            return _PlanJob(api, Path(graph_path), precision, options, None).get()
        gpu = open_gpu("cuda:0")
        with on_device(gpu.index):
            return _PlanJob(api, Path(graph_path), precision, options, gpu).get()


class _PlanJob:
    """One plan to obtain: from the cache, or by building it."""

    def __init__(
        self,
        api: TensorRT,
        graph_path: Path,
        precision: str,
        options: BackendOptions,
        gpu: Gpu | None,
    ) -> None:
        self._api, self._graph_path = api, graph_path
        self._precision, self._options = precision, options
        # TensorRT's own limit is all memory, which a board's CPU needs as well.
        part = None if gpu is None else gpu.total_memory // _WORKSPACE_PART
        self._most_workspace = part if options.workspace is None else options.workspace
        self._plans = PlanCache(options.cache_dir)
        self._key = PlanKey(
            graph_name=graph_path.stem,
            graph_sha256=_hash_graph(graph_path),
            runtime=api.label,
            target=_target(api, options.compute_capability, gpu),
            precision=precision,
            shapes=options.dynamic_axes or {},
        )

    def get(self) -> Plan:
        return self._plans.get_or_build(self._key, self._build)

    def discard(self, reason: str) -> None:
        self._plans.discard(self._key, reason)

    def _build(self) -> Plan:
        _log.info(
            "tensorrt: building %s with %s for %s",
            self._graph_path.name,
            self._api.label,
            self._key.target,
        )
        header = check_graph(self._graph_path)
        if header.token_rows:
            raise BackendError(
                f"{self._graph_path}: expected a graph of images, got one that looks up tokens "
                f"({', '.join(header.token_rows)}). Run text encoders with openvino or torch."
            )
        return build(
            self._api,
            self._graph_path,
            precision=self._precision,
            options=self._options,
            capability=self._options.compute_capability,
            most_workspace=self._most_workspace,
        )


def _target(api: TensorRT, capability: str | None, gpu: Gpu | None) -> str:
    """A plan's target: of RTX a compute capability, of full TensorRT the exact GPU."""
    if api.is_rtx or gpu is None:
        return f"sm{capability.replace('.', '')}" if capability else "default"
    size = f"{gpu.multiprocessors}sm-{round(gpu.total_memory / 2**30)}gb"
    versions = f"driver{gpu.driver}-cuda{gpu.runtime}"
    return f"sm{gpu.compute_capability.replace('.', '')}-{gpu.name}-{size}-{versions}"


def _hash_graph(graph_path: Path) -> str:
    try:
        return sha256_of(graph_path)
    except OSError as exc:
        raise BackendError(f"graph: expected a readable ONNX file, got {exc}") from exc


BACKEND = TensorRTBackend()
