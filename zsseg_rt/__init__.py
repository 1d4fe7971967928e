"""Zero-shot semantic segmentation at the edge: name classes at run time, label every pixel.

Example:
    >>> from zsseg_rt import Engine
    >>> with Engine("street.zsseg") as engine:  # doctest: +SKIP
    ...     engine.set_classes(["road", "person", "forklift"])
    ...     engine.segment(frame).save("mask.png")
"""

from __future__ import annotations

import importlib
from typing import Any

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
    "DatasetError",
    "DeviceError",
    "EndOfSource",
    "Engine",
    "EngineConfig",
    "EngineStateError",
    "Frame",
    "FrameMemory",
    "Lane",
    "PrecisionNotApplied",
    "Segmentation",
    "ShapeError",
    "SourceError",
    "Stream",
    "TrainingError",
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
    "Frame": "result",
    "FrameMemory": "steady.memory",
    "Lane": "lane",
    "Segmentation": "result",
    "Stream": "stream.runner",
    "Vocabulary": "text.vocabulary",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import zsseg_rt`` stays light."""
    if name not in __all__:
        raise AttributeError(f"module 'zsseg_rt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zsseg_rt.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
