"""Turn models and weights into bundles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsseg_rt.export.dense_onnx import export_dense_bundle
    from zsseg_rt.export.exporters import export_bundle, export_graphs
    from zsseg_rt.export.golden import verify_bundle

__all__ = ["export_bundle", "export_dense_bundle", "export_graphs", "verify_bundle"]

# Loaded at first use: the command line reads the options alone.
_HOMES = {
    "export_bundle": "zsseg_rt.export.exporters",
    "export_dense_bundle": "zsseg_rt.export.dense_onnx",
    "export_graphs": "zsseg_rt.export.exporters",
    "verify_bundle": "zsseg_rt.export.golden",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
