"""Zero-shot semantic segmentation at the edge: name classes at run time, label every pixel.

Example:
    >>> from zsseg_rt import Engine
    >>> with Engine("street.zsseg") as engine:  # doctest: +SKIP
    ...     engine.set_classes(["road", "person", "forklift"])
    ...     engine.segment(frame).save("mask.png")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsseg_rt.bundle import Bundle
    from zsseg_rt.config import EngineConfig
    from zsseg_rt.engine import Engine
    from zsseg_rt.errors import (
        ArgumentError,
        BackendError,
        BackendUnavailableError,
        BundleError,
        BundleVersionError,
        CheckpointError,
        ConfigError,
        CudaError,
        DeviceError,
        DTypeError,
        EndOfSource,
        EngineStateError,
        PrecisionNotApplied,
        ShapeError,
        SourceError,
        VocabularyError,
        ZssegError,
    )
    from zsseg_rt.result import ClassShare, Segmentation
    from zsseg_rt.vocabulary import Vocabulary

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BackendError",
    "BackendUnavailableError",
    "Bundle",
    "BundleError",
    "BundleVersionError",
    "CheckpointError",
    "ClassShare",
    "ConfigError",
    "CudaError",
    "DTypeError",
    "DeviceError",
    "EndOfSource",
    "Engine",
    "EngineConfig",
    "EngineStateError",
    "PrecisionNotApplied",
    "Segmentation",
    "ShapeError",
    "SourceError",
    "Vocabulary",
    "VocabularyError",
    "ZssegError",
    "__version__",
]

_HOMES = {
    "Bundle": "bundle",
    "ClassShare": "result",
    "Engine": "engine",
    "EngineConfig": "config",
    "Segmentation": "result",
    "Vocabulary": "vocabulary",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import zsseg_rt`` stays light."""
    if name not in __all__:
        raise AttributeError(f"module 'zsseg_rt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zsseg_rt.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
