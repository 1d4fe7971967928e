"""Where a result was made, for result files."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np

import zsseg_rt
from zsseg_rt.common.process import usable_cpus


def describe_machine(*modules: ModuleType) -> dict[str, str]:
    """Processor, system and versions; nothing that identifies a person or a host."""
    machine = {
        "cpu": _cpu_name(),
        "usable_cpus": str(usable_cpus()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "zsseg_rt": zsseg_rt.__version__,
    }
    return machine | {module.__name__: str(module.__version__) for module in modules}


def describe_commit(folder: Path) -> str:
    """The commit of a folder's checkout, "-dirty" if changed; "unknown" without a checkout."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
