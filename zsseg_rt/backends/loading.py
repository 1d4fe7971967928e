"""Load a bundle's graphs: which variant, at what precision, with which cache."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zsseg_rt.backends import registry
from zsseg_rt.backends.base import BackendOptions, Choice, CompiledGraph, Session
from zsseg_rt.backends.registry import Placement
from zsseg_rt.bundles.bundle import MANIFEST, Bundle
from zsseg_rt.bundles.specs import NARROW, GraphEntry
from zsseg_rt.common.files import why_unwritable
from zsseg_rt.errors import BundleError
from zsseg_rt.onnx.reader import map_file, read_interface

_log = logging.getLogger(__name__)


def usable_cache(folder: Path | None) -> Path | None:
    """Return the cache folder, made if absent; None, and one warning, if it cannot be written."""
    if folder is None:
        return None
    problem = why_unwritable(folder)
    try:
        if not problem:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        problem = exc.strerror or str(exc)
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
    choice = registry.get_backend(placement.backend).choose(
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
    backend = registry.get_backend(placement.backend)
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
    backend = "openvino" if registry.is_installed("openvino") else "torch"
    graph = registry.get_backend(backend).load(
        bundle.open_path(bundle.graph("text_encoder", "float32")),
        device="cpu",
        precision="float32",
        options=BackendOptions(num_threads=num_threads, cache_dir=cache_dir),
    )
    return graph.session()
