"""Look at the machine: what can run here, and what to do about what cannot."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zsseg_rt
from zsseg_rt.backends import registry
from zsseg_rt.backends._tensorrt_api import wanted_flavours
from zsseg_rt.backends.base import ANY_PRECISION
from zsseg_rt.backends.registry import requested
from zsseg_rt.common.checkout import remedy
from zsseg_rt.common.cpus import usable_cpus
from zsseg_rt.common.extras import install_command
from zsseg_rt.common.files import why_unwritable
from zsseg_rt.common.files.home import default_cache_dir
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ArgumentError, BackendUnavailableError, ConfigError, CudaError
from zsseg_rt.stream.devices import find_devices
from zsseg_rt.stream.gstreamer.report import report
from zsseg_rt.stream.gstreamer.source import keeps_to_host
from zsseg_rt.stream.rtsp import RtspSettings

_TEGRA_RELEASE = Path("/etc/nv_tegra_release")  # of every Jetson, and of nothing else


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: What was looked at.
        status: ``"ok"``, ``"absent"`` (optional and missing) or ``"bad"`` (must be fixed).
        detail: What was found.
        remedy: What to do; empty when nothing is needed.
    """

    topic: str
    status: str
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Examine CPU, native core, CUDA, backends, cameras, settings and cache; changes nothing."""
    checks: list[Callable[[], Finding]] = [
        _python,
        _native_core,
        _cuda,
        _tensorrt,
        _openvino,
        _torch,
        _opencv,
        _pyav,
        _gstreamer,
        _cameras,
        _jetson,
        _environment,
        _cache,
    ]
    return [check() for check in checks]


def _python() -> Finding:
    return Finding(
        topic="python",
        status="ok",
        detail=f"{platform.python_version()} on {platform.machine()}, "
        f"{usable_cpus()} usable CPU(s), {sys.executable}",
    )


def _native_core() -> Finding:
    try:
        from zsseg_rt.ops import core
    except ImportError as exc:
        return Finding(
            topic="native core",
            status="bad",
            detail=f"zsseg_rt._C cannot be imported: {exc}",
            remedy=remedy(Path(zsseg_rt.__file__).parent),
        )
    try:
        instruction_set = core.cpu_isa()
    except ArgumentError as exc:
        return Finding(
            topic="native core",
            status="bad",
            detail=str(exc),
            remedy="Unset ZSSEG_CPU_ISA, or name an instruction set that this CPU has.",
        )
    return Finding(
        topic="native core",
        status="ok",
        detail=f"kernels for {instruction_set}; CUDA kernels "
        f"{'built in' if core.built_with_cuda else 'not built in'}",
        remedy=""
        if core.built_with_cuda
        else "For GPU kernels, install the CUDA toolkit (nvcc) and install the package again.",
    )


def _cuda() -> Finding:
    try:
        from zsseg_rt.ops import core
    except ImportError:
        return Finding(topic="CUDA", status="absent", detail="unknown without the native core")
    try:
        count = core.cuda_device_count()
        devices = [core.cuda_device_properties(index) for index in range(count)]
    except CudaError as exc:
        return Finding(
            topic="CUDA",
            status="bad",
            detail=str(exc),
            remedy="Check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES.",
        )
    if count == 0:
        return Finding(
            topic="CUDA",
            status="absent",
            detail="no NVIDIA GPU visible",
            remedy="With a GPU: check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES.",
        )
    names = ", ".join(
        f"cuda:{i} {d['name']} sm {d['compute_capability']}" for i, d in enumerate(devices)
    )
    return Finding(topic="CUDA", status="ok", detail=f"{names}; {_auto_precisions('cuda:0')}")


def _auto_precisions(device: str) -> str:
    """What precision auto takes on a GPU, with every backend that is installed."""
    told = []
    for name in filter(registry.is_installed, ("tensorrt", "torch")):
        choose = registry.get_backend(name).choose
        both, plain = (
            choose(held, "auto", device=device, allowed=ANY_PRECISION).precision
            for held in (("float32", "float16"), ("float32",))
        )
        told.append(f"{name} {both}, {plain} of bundles in float32 alone")
    return ("precision auto is " + "; ".join(told)) if told else "no backend for it is installed"


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
            detail="not installed; it is the CPU backend",
            remedy="pip install openvino",
        )
    from zsseg_rt.backends._openvino import BACKEND
    from zsseg_rt.backends._openvino_core import process_core

    try:
        core = process_core()
    except BackendUnavailableError as exc:
        return Finding(
            topic="OpenVINO",
            status="bad",
            detail=f"{version} is installed but cannot be imported: {exc.__cause__}",
            remedy="pip install --force-reinstall openvino",
        )
    devices = ", ".join(
        f"{d} ({core.get_property(d, 'FULL_DEVICE_NAME')})" for d in core.available_devices
    )
    choice = BACKEND.choose(("float32", "float16"), "auto", device="cpu", allowed=ANY_PRECISION)
    capabilities = ", ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return Finding(
        topic="OpenVINO",
        status="ok",
        detail=f"{version}; {devices}; CPU supports: {capabilities}; precision auto is "
        f"{choice.precision}",
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
    try:
        taken = _attention_kinds()
    except ConfigError as exc:
        remedy = "Unset ZSSEG_TORCH_ATTENTION."
        return Finding(topic="torch", status="bad", detail=str(exc), remedy=remedy)
    return Finding(topic="torch", status="ok", detail=f"{version}{taken}")


def _attention_kinds() -> str:
    """Which attention kernels backend torch takes here; nothing without a GPU that torch sees."""
    try:
        from zsseg_rt.ops import core

        if core.cuda_device_count() == 0 or not registry.is_installed("torch"):
            return ""  # without importing torch
    except (ImportError, CudaError):
        return ""
    from zsseg_rt.backends._torch_graph.attention import kinds_on

    found = kinds_on("cuda:0")
    told = ", ".join(f"{kind} for {case}" for case, kind in found.items())
    return f"; attention on cuda:0: {told}" if found else ""


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
    return Finding(topic="OpenCV", status="ok", detail=cv2.__version__)


def _pyav() -> Finding:
    version = _version("av")
    if version is None:
        return Finding(
            topic="PyAV",
            status="absent",
            detail="not installed; only videos, cameras and overlay videos need it",
            remedy=install_command("stream"),
        )
    try:
        import av
    except ImportError as exc:
        return Finding(
            topic="PyAV",
            status="bad",
            detail=f"{version} is installed and cannot be imported: {exc}",
            remedy="pip install --force-reinstall av",
        )
    encoder = "yes" if "libx264" in av.codecs_available else "no"
    return Finding(topic="PyAV", status="ok", detail=f"{version}; libx264 {encoder}")


def _gstreamer() -> Finding:
    found = report(is_jetson=_TEGRA_RELEASE.is_file())
    return Finding(
        topic="GStreamer",
        status="ok" if found.is_complete else "absent",
        detail=found.detail,
        remedy=found.remedy,
    )


def _cameras() -> Finding:
    devices = find_devices()
    if not devices:
        return Finding(
            topic="cameras",
            status="absent",
            detail="no /dev/videoN found",
            remedy="To use one here, plug it in; in a container, pass it in: --device /dev/video0.",
        )
    told = [
        " ".join(filter(None, [str(d.path), d.name, f"({d.problem})" if d.problem else ""]))
        for d in devices
    ]
    remedies = dict.fromkeys(f"{d.path}: {d.remedy}" for d in devices if d.remedy)
    return Finding(
        topic="cameras",
        status="absent" if all(d.problem for d in devices) else "ok",
        detail="; ".join(told),
        remedy=" ".join(remedies),
    )


def _jetson() -> Finding:
    model = Path("/proc/device-tree/model")
    if not _TEGRA_RELEASE.is_file():
        return Finding(topic="Jetson", status="absent", detail="not a Jetson")
    name = model.read_text(errors="replace").strip("\0\n") if model.is_file() else "unknown board"
    first = _TEGRA_RELEASE.read_text(errors="replace").splitlines()[0]
    return Finding(topic="Jetson", status="ok", detail=f"{name}; {first}")


def _environment() -> Finding:
    """The variables that an engine with default settings and its streams read."""
    checks: list[Callable[[], object]] = [
        lambda: requested(EngineConfig()),
        wanted_flavours,
        RtspSettings.from_environment,
        keeps_to_host,
    ]
    problems = []
    for check in checks:
        try:
            check()
        except ConfigError as exc:
            problems.append(str(exc))
    names = (
        *("ZSSEG_DEVICE", "ZSSEG_BACKEND", "ZSSEG_TENSORRT"),
        "ZSSEG_CAMERA_FRAMES",
        *("ZSSEG_RTSP_LIBRARY", "ZSSEG_RTSP_PROTOCOLS", "ZSSEG_RTSP_LATENCY_MS"),
    )
    given = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    if problems:
        return Finding(
            topic="environment",
            status="bad",
            detail="; ".join(problems),
            remedy="Unset the variable, or use one of these values.",
        )
    detail = ", ".join(given) or f"none of {', '.join(names)} is set"
    return Finding(topic="environment", status="ok", detail=detail)


def _cache() -> Finding:
    folder = default_cache_dir()
    problem = why_unwritable(folder)
    detail = os.fsencode(f"{folder}: {problem}" if problem else folder).decode(errors="replace")
    if problem:
        return Finding(
            topic="cache",
            status="bad",
            detail=detail,
            remedy="Set ZSSEG_HOME to a folder you can write to.",
        )
    return Finding(topic="cache", status="ok", detail=detail)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
