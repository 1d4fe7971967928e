"""Importing this registers every target."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Sequence

from tools.torture.target import BUILDS, TARGETS

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

from tools.torture.targets import clients, conditions  # noqa: E402

_NEEDS = {"torch": ("torch", "accelerate"), "stream": ("av",), "server": ("fastapi", "av")}


def available(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split target names into those that can be tried here, and the others with the reason."""
    missing = {}
    for name in names:
        group = TARGETS[name].group
        absent = [part for part in _NEEDS.get(group, ()) if not importlib.util.find_spec(part)]
        if absent:
            missing[name] = f"needs {' and '.join(absent)}"
        if group == "rtsp" and not clients.can_serve():
            missing[name] = "needs GStreamer's RTSP server"
        if group == "disk" and not conditions.can_mount():
            missing[name] = "needs root, to have a small disk of its own"
        if group in BUILDS and not os.environ.get(BUILDS[group]):
            missing[name] = f"needs {BUILDS[group]}, another build of the core"
    return [name for name in names if name not in missing], missing
