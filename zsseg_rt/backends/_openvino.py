"""OpenVINO on the CPU: the default where there is no GPU.

Compiled models are cached on disk with a hash of their own, because OpenVINO notices a truncated
cache file but computes with one whose weights were damaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zsseg_rt.backends._mapped_files import page_out
from zsseg_rt.backends._openvino_core import process_core
from zsseg_rt.backends.base import Array, BackendOptions, Session, TensorSpec
from zsseg_rt.backends.feeds import check_feed, check_names
from zsseg_rt.backends.onnx_header import GraphHeader, read_header
from zsseg_rt.errors import (
    BackendError,
    DeviceError,
    DTypeError,
    PrecisionNotApplied,
    ShapeError,
)
from zsseg_rt.files import sha256_of

__all__ = ["BACKEND", "OpenVinoBackend", "auto_precision"]

_log = logging.getLogger(__name__)
# Public name -> (what the CPU must be capable of, OpenVINO's name).
_PRECISIONS = {
    "float32": ("FP32", "f32"),
    "bfloat16": ("BF16", "bf16"),
    "float16": ("FP16", "f16"),
}
_CHECKSUMS = "checksums.json"
# Lines of OpenVINO's messages that name its own source, not the problem.
_BOILERPLATE = ("Exception from", "Check '", "FrontEnd API failed", "Model wasn't", "Summary:")
# A compiled model is about as large as its graph; room for both it and a neighbour's.
_CACHE_HEADROOM = 1.2


class OpenVinoBackend:
    """Loads graphs with OpenVINO's CPU plugin."""

    @property
    def name(self) -> str:
        """``"openvino"``."""
        return "openvino"

    def load(
        self, graph_path: Path, *, device: str, precision: str, options: BackendOptions
    ) -> Session:
        """Load one ONNX file; see :class:`zsseg_rt.backends.base.Backend`.

        ``precision="auto"`` takes bfloat16 where the CPU computes in it natively, else float32.
        """
        if device != "cpu":
            raise DeviceError(
                f"device: expected 'cpu' for backend 'openvino', got {device!r}. "
                "Use backend='tensorrt' or 'torch' on a GPU."
            )
        core = process_core()
        header = read_header(graph_path)
        capabilities = list(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        settings = _settings(precision, capabilities, options)
        compiled = _compile(core, graph_path, settings, options)
        applied = _applied_precision(compiled)
        if precision not in ("auto", applied):
            raise PrecisionNotApplied(
                f"precision: expected {precision!r}, but OpenVINO compiled {graph_path.name} for "
                f"{applied!r} on this CPU ({', '.join(capabilities)}). Use precision='auto'."
            )
        if precision == "auto":
            _log.info("%s: precision auto is %s on this CPU", graph_path.name, applied)
        return _OpenVinoSession(compiled, header, applied, options)


class _OpenVinoSession:
    def __init__(
        self, compiled: Any, header: GraphHeader, precision: str, options: BackendOptions
    ) -> None:
        from openvino import Tensor

        self._tensor = Tensor
        self._compiled: Any = compiled
        self._request: Any = compiled.create_infer_request()
        self._header, self._precision = header, precision
        self._ranges = options.dynamic_axes

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._header.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._header.outputs

    @property
    def device(self) -> str:
        return "cpu"

    @property
    def precision(self) -> str:
        return self._precision

    def run(self, feeds: Mapping[str, Array], *, stream: int = 0) -> dict[str, Array]:
        if self._request is None:
            raise BackendError("session: expected an open one, got a closed one. Load it again.")
        check_names(feeds, self.inputs)
        for spec in self.inputs:
            self._check_array(spec, feeds[spec.name])
        try:
            for spec in self.inputs:
                self._request.set_tensor(spec.name, self._share(feeds[spec.name]))
            self._request.infer()
        except RuntimeError as exc:
            raise BackendError(f"OpenVINO failed while running: {_problem(exc)}") from exc
        return {spec.name: self._request.get_tensor(spec.name).data for spec in self.outputs}

    def close(self) -> None:
        self._request = self._compiled = None

    def _check_array(self, spec: TensorSpec, array: Array) -> None:
        if not isinstance(array, np.ndarray):
            raise DTypeError(
                f"{spec.name}: expected a NumPy array, got {type(array).__name__}. "
                "Backend 'openvino' takes arrays on the CPU."
            )
        check_feed(spec, array.dtype.name, array.shape, self._ranges)
        if not array.flags.c_contiguous:
            raise ShapeError(
                f"{spec.name}: expected a C-contiguous array, got strides {array.strides}. "
                "Call numpy.ascontiguousarray first."
            )

    def _share(self, array: np.ndarray[Any, Any]) -> Any:
        # OpenVINO refuses to borrow read-only memory; only such a feed is copied.
        return self._tensor(array, shared_memory=bool(array.flags.writeable))


def _settings(precision: str, capabilities: list[str], options: BackendOptions) -> dict[str, Any]:
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if options.num_threads:
        settings["INFERENCE_NUM_THREADS"] = options.num_threads
    if precision == "auto":
        # With BF16 the plugin's own choice stands: it knows whether the CPU only emulates it.
        if "BF16" not in capabilities:
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        return settings
    needed, hint = _PRECISIONS.get(precision, ("", ""))
    if needed not in capabilities:
        offered = [name for name, (flag, _) in _PRECISIONS.items() if flag in capabilities]
        raise PrecisionNotApplied(
            f"precision: expected one this CPU computes in ({', '.join(offered)}; OpenVINO reports "
            f"{', '.join(capabilities)}), got {precision!r}. Use precision='auto'."
        )
    settings["INFERENCE_PRECISION_HINT"] = hint
    return settings


def auto_precision(core: Any) -> str:
    """What ``precision="auto"`` takes on this CPU, by its public name."""
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "float32"
    return _public_name(core.get_property("CPU", "INFERENCE_PRECISION_HINT"))


def _applied_precision(compiled: Any) -> str:
    """The precision the compiled model reports, by its public name."""
    return _public_name(compiled.get_property("INFERENCE_PRECISION_HINT"))


def _public_name(kind: Any) -> str:
    hints = {hint: name for name, (_, hint) in _PRECISIONS.items()}
    applied = str(kind.get_type_name())
    return hints.get(applied, applied)


def _compile(core: Any, graph_path: Path, settings: dict[str, Any], options: BackendOptions) -> Any:
    folder = _cache_folder(core, graph_path, settings, options.cache_dir)
    if folder is None:
        return _compile_once(core, graph_path, settings)
    from filelock import FileLock

    with FileLock(folder.with_suffix(".lock")):
        _drop_damaged(folder)
        try:
            return _compile_cached(core, graph_path, settings, folder)
        except BackendError as exc:
            _log.warning("%s: compiling again without the cache: %s", folder, exc)
            shutil.rmtree(folder, ignore_errors=True)
            return _compile_once(core, graph_path, settings)


def _compile_cached(core: Any, graph_path: Path, settings: dict[str, Any], folder: Path) -> Any:
    """A model out of the cache, put there first if need be.

    A model fresh from compiling keeps the graph's weights beside its own; one out of the cache
    keeps the mapped file instead, whose pages are given back once they have been read.
    """
    settings = {**settings, "CACHE_DIR": str(folder)}
    compiled = _compile_once(core, graph_path, settings)
    _write_checksums(folder)
    if not compiled.get_property("LOADED_FROM_CACHE"):
        del compiled
        compiled = _compile_once(core, graph_path, settings)
    page_out(folder)
    return compiled


def _compile_once(core: Any, graph_path: Path, settings: dict[str, Any]) -> Any:
    try:
        return core.compile_model(str(graph_path), "CPU", settings)
    except RuntimeError as exc:
        raise BackendError(
            f"{graph_path}: OpenVINO cannot compile the graph: {_problem(exc)}"
        ) from exc


def _cache_folder(
    core: Any, graph_path: Path, settings: dict[str, Any], cache_dir: Path | None
) -> Path | None:
    """The folder for this graph and these settings; None where nothing can be cached."""
    if cache_dir is None:
        return None
    status = graph_path.stat()
    version = core.get_versions("CPU")["CPU"].build_number
    parts = [str(graph_path.resolve()), status.st_size, status.st_mtime_ns, version, settings]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir / "openvino" / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK) or not os.access(folder.parent, os.W_OK):
            raise PermissionError(f"no permission to write in {folder.parent}")
        free = shutil.disk_usage(folder).free
        if not any(folder.glob("*.blob")) and free < status.st_size * _CACHE_HEADROOM:
            raise OSError(f"{free / 1e6:.0f} MB free, too few for a compiled model")
    except OSError as exc:
        _log.warning("%s: compiled models are not cached: %s", cache_dir, exc)
        return None
    return folder


def _drop_damaged(folder: Path) -> None:
    """Empty the folder unless every cached model has the content that was written."""
    blobs = {blob.name: blob for blob in folder.glob("*.blob")}
    if not blobs:
        return
    try:
        recorded = json.loads((folder / _CHECKSUMS).read_text())
    except (OSError, ValueError) as exc:
        reason = f"its checksums are unreadable ({exc})"
    else:
        found = {name: sha256_of(blob) for name, blob in blobs.items()}
        if found == recorded:
            return
        reason = "its content changed since it was written"
    _log.warning("%s: the cached model is not used, %s; compiling again", folder, reason)
    for path in folder.iterdir():
        path.unlink(missing_ok=True)


def _write_checksums(folder: Path) -> None:
    checksums = folder / _CHECKSUMS
    if checksums.exists():
        return
    temporary = folder / f"{_CHECKSUMS}.tmp"
    try:
        found = {blob.name: sha256_of(blob) for blob in folder.glob("*.blob")}
        temporary.write_text(json.dumps(found))
        temporary.replace(checksums)
    except OSError as exc:
        _log.warning("%s: the cached model will not be used: %s", folder, exc)


def _problem(exc: Exception) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    informative = [line for line in lines if not line.startswith(_BOILERPLATE)]
    return (informative or lines or [type(exc).__name__])[0]


BACKEND = OpenVinoBackend()
