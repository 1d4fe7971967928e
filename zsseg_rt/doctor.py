"""Look at the machine: what can run here, and what to do about what cannot."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zsseg_rt.config import default_cache_dir
from zsseg_rt.errors import BackendUnavailableError
from zsseg_rt.extras import install_command

__all__ = ["Finding", "examine"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: What was looked at.
        status: ``"ok"``, ``"absent"`` (optional and not there) or ``"bad"`` (must be mended).
        detail: What was found.
        remedy: What to do; empty when nothing is needed.
    """

    topic: str
    status: str
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Examine CPU, native core, CUDA, backends, OpenCV and cache; nothing is changed."""
    checks: list[Callable[[], Finding]] = [
        _python,
        _native_core,
        _cuda,
        _tensorrt,
        _openvino,
        _torch,
        _opencv,
        _jetson,
        _cache,
    ]
    return [check() for check in checks]


def _python() -> Finding:
    return Finding(
        topic="python",
        status="ok",
        detail=f"{platform.python_version()} on {platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} usable CPU(s), {sys.executable}",
    )


def _native_core() -> Finding:
    try:
        from zsseg_rt import _C
    except ImportError as exc:
        return Finding(
            topic="native core",
            status="bad",
            detail=f"zsseg_rt._C cannot be imported: {exc}",
            remedy="Install the package again: pip install . (needs a C++17 compiler)",
        )
    return Finding(
        topic="native core",
        status="ok",
        detail=f"kernels for {_C.cpu_isa()}; CUDA kernels "
        f"{'built in' if _C.built_with_cuda else 'not built in'}",
        remedy=""
        if _C.built_with_cuda
        else "For GPU kernels install the CUDA toolkit (nvcc) and install the package again.",
    )


def _cuda() -> Finding:
    try:
        from zsseg_rt import _C
    except ImportError:
        return Finding(topic="CUDA", status="absent", detail="unknown without the native core")
    count = _C.cuda_device_count()
    if count == 0:
        return Finding(
            topic="CUDA",
            status="absent",
            detail="no NVIDIA GPU visible",
            remedy="With a GPU: check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES.",
        )
    devices = [_C.cuda_device_properties(index) for index in range(count)]
    names = ", ".join(
        f"cuda:{i} {d['name']} sm {d['compute_capability']}" for i, d in enumerate(devices)
    )
    return Finding(topic="CUDA", status="ok", detail=names)


def _tensorrt() -> Finding:
    found = [
        f"{name} {version}"
        for name in ("tensorrt", "tensorrt_rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12")
        if (version := _version(name)) is not None
    ]
    if found:
        return Finding(topic="TensorRT", status="ok", detail=", ".join(found))
    return Finding(
        topic="TensorRT",
        status="absent",
        detail="no TensorRT package found",
        remedy=f"{install_command('tensorrt', 'rtx')}; on a Jetson use JetPack's "
        "python3-libnvinfer through a venv made with --system-site-packages.",
    )


def _openvino() -> Finding:
    version = _version("openvino")
    if version is None:
        return Finding(
            topic="OpenVINO",
            status="bad",
            detail="not installed; it is the CPU's backend",
            remedy="pip install openvino",
        )
    from zsseg_rt.backends._openvino import auto_precision
    from zsseg_rt.backends._openvino_core import process_core

    try:
        core = process_core()
    except BackendUnavailableError as exc:
        return Finding(
            topic="OpenVINO",
            status="bad",
            detail=f"{version} is installed and cannot be imported: {exc.__cause__}",
            remedy="pip install --force-reinstall openvino",
        )
    devices = ", ".join(
        f"{d} ({core.get_property(d, 'FULL_DEVICE_NAME')})" for d in core.available_devices
    )
    capabilities = ", ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return Finding(
        topic="OpenVINO",
        status="ok",
        detail=f"{version}; {devices}; CPU can: {capabilities}; precision auto is "
        f"{auto_precision(core)}",
    )


def _torch() -> Finding:
    version = _version("torch")
    if version is None:
        return Finding(
            topic="torch",
            status="absent",
            detail="not installed; only export, training and backend 'torch' need it",
            remedy=install_command("train"),
        )
    return Finding(topic="torch", status="ok", detail=version)


def _opencv() -> Finding:
    try:
        import cv2
    except ImportError:
        return Finding(
            topic="OpenCV",
            status="bad",
            detail="not installed; photos cannot be read",
            remedy=f"{install_command('opencv')} (on a Jetson: apt install python3-opencv)",
        )
    build = cv2.getBuildInformation()
    has = {name: _build_flag(build, name) for name in ("GStreamer", "FFMPEG")}
    detail = ", ".join(f"{name} {'yes' if present else 'no'}" for name, present in has.items())
    remedy = "" if has["GStreamer"] else "CSI cameras need a GStreamer build (JetPack's OpenCV)."
    return Finding(
        topic="OpenCV", status="ok", detail=f"{cv2.__version__}; {detail}", remedy=remedy
    )


def _jetson() -> Finding:
    model = Path("/proc/device-tree/model")
    release = Path("/etc/nv_tegra_release")
    if not release.is_file():
        return Finding(topic="Jetson", status="absent", detail="not a Jetson")
    name = model.read_text(errors="replace").strip("\0\n") if model.is_file() else "unknown board"
    first = release.read_text(errors="replace").splitlines()[0]
    return Finding(topic="Jetson", status="ok", detail=f"{name}; {first}")


def _cache() -> Finding:
    folder = default_cache_dir()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(existing, os.W_OK):
        return Finding(
            topic="cache",
            status="bad",
            detail=f"{folder} is not writable",
            remedy="Set ZSSEG_HOME to a folder you can write.",
        )
    return Finding(topic="cache", status="ok", detail=str(folder))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build_flag(build: str, name: str) -> bool:
    lines = [line for line in build.splitlines() if line.strip().startswith(f"{name}:")]
    return bool(lines) and "YES" in lines[0]
