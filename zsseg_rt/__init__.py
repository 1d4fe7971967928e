"""Zero-shot semantic segmentation at the edge: name classes at run time, label every pixel.

Example:
    >>> from zsseg_rt import Engine
    >>> with Engine("street.zsseg") as engine:  # doctest: +SKIP
    ...     engine.set_classes(["road", "person", "forklift"])
    ...     engine.segment(frame).save("mask.png")
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from typing import Any

from zsseg_rt import errors

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "bundles.bundle",
    "ClassShare": "results.segmentation",
    "Component": "results.annotations",
    "DeviceSegmentation": "results.segmentation",
    "Engine": "engine",
    "EngineConfig": "config",
    "Frame": "results.segmentation",
    "FrameMemory": "runtime.frame_memory",
    "Lane": "runtime.lane",
    "Nv12Frame": "runtime.frames",
    "Polygon": "results.annotations",
    "Rotation": "common.recordings",
    "Segmentation": "results.segmentation",
    "Stream": "stream.runner",
    "Vocabulary": "text.vocabulary",
    "read_photo": "photos",
}
__all__ = sorted([*_HOMES, *errors.__all__, "__version__"])


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import zsseg_rt`` stays light."""
    if name not in __all__:
        raise AttributeError(f"module 'zsseg_rt' has no attribute {name!r}")
    return getattr(importlib.import_module(f"zsseg_rt.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if not any(os.path.exists(f"{__path__[0]}/_C{suffix}") for suffix in EXTENSION_SUFFIXES):  # noqa: PTH110
    from pathlib import Path

    from zsseg_rt.common.extras import CoreFinder

    sys.meta_path.append(CoreFinder(Path(__path__[0]), __version__))
