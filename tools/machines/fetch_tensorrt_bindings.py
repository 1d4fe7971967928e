#!/usr/bin/env python3
"""Fetch the Python bindings of several TensorRT versions for the API conformance test.

Only the bindings (about 1 MB each) are fetched, with pip, for the running Python; the test imports
them against stub libraries. Bindings that are already there are not fetched again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "tensorrt_bindings"

# requirement -> the module it holds
BINDINGS = {
    "tensorrt-cu12-bindings==10.3.0": "tensorrt_bindings",
    "tensorrt-cu12-bindings==10.7.0": "tensorrt_bindings",
    "tensorrt-cu12-bindings==10.13.3.9": "tensorrt_bindings",
    "tensorrt-cu13-bindings==10.16.1.11": "tensorrt_bindings",
    "tensorrt-cu13-bindings==11.0.0.114": "tensorrt_bindings",
    "tensorrt-cu13-bindings==11.4.0.106": "tensorrt_bindings",
    "tensorrt-rtx-cu13-bindings==1.7.1.116": "tensorrt_rtx_bindings",
}


def fetch(requirement: str, folder: Path) -> str:
    """Unpack one wheel under ``folder``; return an empty string, or why that failed."""
    target = folder / requirement.replace("==", "-")
    if target.is_dir():
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", scratch]
        done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            return (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(unpacked)
        unpacked.rename(target)
    return ""


def main() -> int:
    """Fetch all; succeed if at least one version is there, and say which are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to unpack them")
    folder = parser.parse_args().folder
    reasons = {requirement: fetch(requirement, folder) for requirement in BINDINGS}
    for requirement, reason in reasons.items():
        print(f"{requirement}: {reason or 'ready'}")
    return 0 if "" in reasons.values() else 1


if __name__ == "__main__":
    sys.exit(main())
