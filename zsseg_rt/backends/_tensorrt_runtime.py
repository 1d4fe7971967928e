"""How TensorRT-RTX runs a plan: with the kernels it compiled before, and as a CUDA graph.

RTX compiles a plan's kernels on the GPU that runs it, which takes seconds. They are kept in a file
beside the plan, so that only the first process waits for them. RTX records its launches as CUDA
graphs by itself, since only it knows when the kernels for a shape are ready; its allocations forbid
a capture around it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from zsseg_rt.backends._tensorrt_api import TensorRT, require
from zsseg_rt.backends.plan_cache import kernels_path
from zsseg_rt.common.files import Cache

_MAX_BYTES = 1 << 30
_log = logging.getLogger(__name__)


class RuntimeSettings:
    """What all execution contexts of one RTX plan share."""

    def __init__(
        self, api: TensorRT, engine: Any, plan_path: Path | None, *, captures: bool, logger: Any
    ) -> None:
        self._engine, self._logger, self.captures = engine, logger, captures
        self._trt = api.module
        self._path = None if plan_path is None else kernels_path(plan_path)
        self._cache = Cache(Path() if plan_path is None else plan_path.parent, "kernels")
        runtime_config = self._new_config()
        made = runtime_config.create_runtime_cache()
        self._kernels = require(made, "create_runtime_cache", logger)
        self._saved = self._load()

    def config(self, *, captures: bool) -> Any:
        """A configuration for one more execution context; it shares the kernels."""
        runtime_config = self._new_config()
        placed = runtime_config.set_runtime_cache(self._kernels)
        require(placed, "set_runtime_cache", self._logger)
        trt = self._trt
        on, off = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE, trt.CudaGraphStrategy.DISABLED
        runtime_config.cuda_graph_strategy = on if captures else off
        return runtime_config

    def save(self) -> None:
        """Write the kernels if there are new ones; where that fails, there is a warning."""
        serialized = None if self._path is None else self._kernels.serialize()
        if self._path is None or serialized is None:
            return
        data = bytes(serialized)
        if data != self._saved:
            self._cache.keep(self._path.name, data, else_="Starts stay slow until that is fixed.")
            self._saved = data

    def _new_config(self) -> Any:
        made = self._engine.create_runtime_config()
        return require(made, "create_runtime_config", self._logger)

    def _load(self) -> bytes:
        """Take over what an earlier process compiled, and return it."""
        if self._path is None:
            return b""
        entry = self._cache.read(self._path.name, max_bytes=_MAX_BYTES)
        if entry is not None and self._kernels.deserialize(entry.data):
            return entry.data
        if entry is not None:
            _log.info("tensorrt: %s is for another GPU or driver: compiling again", self._path)
        return b""
