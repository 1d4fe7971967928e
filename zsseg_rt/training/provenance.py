"""What a result was made on, for result files."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np

import zsseg_rt

__all__ = ["describe_machine"]


def describe_machine() -> dict[str, str]:
    """Processor, system and versions; nothing that names a person or a host."""
    return {
        "cpu": _cpu_name(),
        "usable_cpus": str(len(os.sched_getaffinity(0))),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "zsseg_rt": zsseg_rt.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
