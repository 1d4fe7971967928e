"""Find a backend by name, or the one to use, and load a bundle's graphs with it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsseg_rt.backends.base import Backend, BackendOptions, Choice, CompiledGraph, Session
from zsseg_rt.bundles.bundle import MANIFEST, Bundle
from zsseg_rt.bundles.specs import NARROW, GraphEntry
from zsseg_rt.common.checks import canonical_device, check_device_name
from zsseg_rt.common.extras import install_command
from zsseg_rt.common.files import why_not_made
from zsseg_rt.config import BACKENDS, EngineConfig
from zsseg_rt.errors import BackendUnavailableError, BundleError, ConfigError, DeviceError
from zsseg_rt.onnx.reader import map_file, read_interface

_log = logging.getLogger(__name__)
_PACKAGES = {
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt_rtx"),
    "torch": ("torch",),
}
_REMEDIES = {
    "openvino": "pip install openvino",
    "tensorrt": f"{install_command('tensorrt', 'rtx')} (on a Jetson use JetPack's own)",
    "torch": install_command("torch"),
}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The backend and device an engine runs on."""

    backend: str
    device: str


def is_installed(name: str) -> bool:
    """Whether a backend's packages can be found; nothing is imported."""
    return any(importlib.util.find_spec(package) is not None for package in _PACKAGES[name])


def get_backend(name: str) -> Backend:
    """Return a backend by its public name."""
    if not is_installed(name):
        raise BackendUnavailableError(
            f"backend: expected the package(s) {' or '.join(_PACKAGES[name])} for {name!r}, "
            f"got nothing. Run: {_REMEDIES[name]}"
        )
    backend: Backend = importlib.import_module(f"zsseg_rt.backends._{name}").BACKEND
    return backend


def requested(config: EngineConfig) -> Placement:
    """The choice of the configuration, or the environment's; both results may be ``auto``."""
    backend, device = config.backend, config.device
    if backend == "auto":
        backend = os.environ.get("ZSSEG_BACKEND") or "auto"
    if device == "auto":
        device = canonical_device(os.environ.get("ZSSEG_DEVICE") or "auto")
    if backend not in BACKENDS:
        raise ConfigError(f"ZSSEG_BACKEND: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    check_device_name("ZSSEG_DEVICE", device)
    return Placement(backend=backend, device=device)


def choose(config: EngineConfig) -> Placement:
    """Resolve ``auto``: a GPU if a backend can use one, otherwise the CPU with OpenVINO."""
    asked = requested(config)
    backend, device = asked.backend, asked.device
    if device == "auto":
        device = _choose_device(backend)
    if device != "cpu":
        _require_gpu(device)
    if backend == "auto":
        backend = _choose_backend(device)
    if backend == "openvino" and device != "cpu":
        raise DeviceError(f"device: expected 'cpu' for backend 'openvino', got {device!r}")
    if backend == "tensorrt" and device == "cpu":
        raise DeviceError("device: expected 'cuda:N' for backend 'tensorrt', got 'cpu'")
    return Placement(backend=backend, device=device)


def _choose_device(backend: str) -> str:
    from zsseg_rt import ops

    if backend == "tensorrt":
        return "cuda:0"
    if backend == "openvino" or ops.cuda_device_count() == 0:
        return "cpu"
    usable = is_installed("tensorrt") or _torch_has_cuda()
    return "cuda:0" if usable else "cpu"


def _choose_backend(device: str) -> str:
    if device == "cpu":
        return "openvino" if is_installed("openvino") else "torch"
    return "tensorrt" if is_installed("tensorrt") else "torch"


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, by its version and without importing it."""
    return is_installed("torch") and "+cpu" not in importlib.metadata.version("torch")


def _require_gpu(device: str) -> None:
    from zsseg_rt import ops

    index = int(device.split(":")[1])
    count = ops.cuda_device_count()
    if index >= count:
        there = f"'cuda:0' to 'cuda:{count - 1}'" if count else "'cpu', as no NVIDIA GPU is visible"
        raise DeviceError(
            f"device: expected {there}, got {device!r}. Check the driver with nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or use device='cpu'."
        )


# --- the graphs of a bundle ---


def usable_cache(folder: Path | None) -> Path | None:
    """Return the cache folder, made if absent; None, and one warning, if it cannot be written."""
    if folder is None:
        return None
    problem = why_not_made(folder)
    if not problem:
        return folder
    _log.warning(
        "%s: cannot be used as the cache: %s; nothing is kept for the next start. Set ZSSEG_HOME "
        "to a folder you can write to.",
        folder, problem,
    )  # fmt: skip
    return None


def chosen_graph(
    bundle: Bundle, name: str, *, placement: Placement, precision: str, allowed: Sequence[str]
) -> tuple[Choice, Path]:
    """How a graph of a bundle is computed, and the file of that variant."""
    choice = get_backend(placement.backend).choose(
        bundle.variants(name),
        bundle.asked_of(name, precision),
        device=placement.device,
        allowed=allowed,
    )
    return choice, bundle.open_path(bundle.graph(name, choice.variant))


def load_graph(
    bundle: Bundle,
    name: str,
    *,
    placement: Placement,
    precision: str,
    allowed: Sequence[str],
    options: BackendOptions,
) -> CompiledGraph:
    """Compile one graph of a bundle."""
    backend = get_backend(placement.backend)
    choice, path = chosen_graph(
        bundle, name, placement=placement, precision=precision, allowed=allowed
    )
    graph = backend.load(path, device=placement.device, precision=choice.precision, options=options)
    try:
        where = f"{bundle.path / MANIFEST}: graphs.{name}.{choice.variant}"
        _check_stated(where, bundle.graph(name, choice.variant), path)
    except BundleError:
        graph.close()
        raise
    _log.info(
        "%s: %s on %s at %s, from the %s graph",
        name, placement.backend, placement.device, graph.precision, choice.variant,
    )  # fmt: skip
    return graph


def load_graphs(bundle: Bundle, names: Iterable[str], **settings: Any) -> dict[str, CompiledGraph]:
    """Compile graphs of a bundle that fit each other; the settings are :func:`load_graph`'s."""
    graphs = {name: load_graph(bundle, name, **settings) for name in names}
    check_connections(bundle, graphs)
    encoder = graphs["image_encoder"]
    bundle.check_sizes((*encoder.inputs, *encoder.outputs))
    return graphs


def precision_of(graphs: Mapping[str, CompiledGraph]) -> str:
    """The precision the image encoder runs at, or that of 8 bits if any graph does."""
    narrow = [graph.precision for graph in graphs.values() if graph.precision in NARROW]
    return narrow[0] if narrow else graphs["image_encoder"].precision


def check_connections(bundle: Bundle, graphs: Mapping[str, CompiledGraph]) -> None:
    """Refuse graphs of which one gives another dtype than the next one takes.

    Within one precision the manifest is checked; here the graphs may be of several.
    """
    sources = {
        spec.name: (name, spec.dtype) for name, graph in graphs.items() for spec in graph.outputs
    }
    for name, graph in graphs.items():
        for spec in graph.inputs:
            producer, dtype = sources.get(spec.name, (name, spec.dtype))
            if dtype != spec.dtype:
                raise BundleError(
                    f"{bundle.path}: {spec.name}: expected {spec.dtype}, which {name} in "
                    f"{graph.precision} takes, got {dtype} from {producer} in "
                    f"{graphs[producer].precision}. Export both graphs in the same precisions."
                )


def _check_stated(where: str, entry: GraphEntry, path: Path) -> None:
    for side, specs in zip(("inputs", "outputs"), read_interface(map_file(path)), strict=True):
        stated = {spec.name: spec.dtype for spec in getattr(entry, side)}
        dtypes = {spec.name: spec.dtype for spec in specs}
        if stated != dtypes:
            raise BundleError(
                f"{where}.{side}: expected the graph's {dtypes}, got {stated}. Export the bundle "
                "again."
            )


def load_text_encoder(bundle: Bundle, *, num_threads: int, cache_dir: Path | None) -> Session:
    """Open a bundle's text encoder on the CPU, in float32."""
    backend = "openvino" if is_installed("openvino") else "torch"
    graph = get_backend(backend).load(
        bundle.open_path(bundle.graph("text_encoder", "float32")),
        device="cpu",
        precision="float32",
        options=BackendOptions(num_threads=num_threads, cache_dir=cache_dir),
    )
    return graph.session()
