"""Look at the machine: what can run here, and what to do about what cannot."""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import os
import platform
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import zsseg_rt
from zsseg_rt.backends._tensorrt_api import load_tensorrt, wanted_flavours
from zsseg_rt.backends.base import ANY_PRECISION
from zsseg_rt.backends.registry import requested
from zsseg_rt.common.extras import install_command, remedy, why_not
from zsseg_rt.common.files import default_cache_dir, ensure_home, why_unwritable
from zsseg_rt.common.process import usable_cpus
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ArgumentError, BackendUnavailableError, ConfigError, CudaError
from zsseg_rt.stream.uris import rtsp_library

_TEGRA_RELEASE = Path("/etc/nv_tegra_release")  # of every Jetson, and of nothing else
DEV, SYSFS = Path("/dev"), Path("/sys/class/video4linux")

# <linux/videodev2.h>: what a device is, and its buffers, of which none are asked for.
_QUERYCAP, _CAPABILITY = 0x80685600, struct.Struct("16s 32s 32s I I I 3I")
_REQBUFS, _REQUESTBUFFERS = 0xC0145608, struct.Struct("5I")
_CAN_CAPTURE, _HAS_DEVICE_CAPS = 0x1, 0x80000000
_VIDEO_CAPTURE, _MEMORY_MMAP = 1, 1

_PROBLEMS = {
    errno.ENOENT: ("not in /dev", "In a container, pass it in: --device PATH."),
    errno.EACCES: ("forbidden", "sudo usermod -aG video $USER, then log in again."),
    errno.EPERM: ("forbidden", "sudo usermod -aG video $USER, then log in again."),
    errno.EBUSY: ("busy", "Close the program that uses it; fuser PATH names it."),
    errno.ENODEV: ("unplugged", "Plug it in again."),
    errno.ENXIO: ("unplugged", "Plug it in again."),
    errno.ENOTTY: ("no camera", ""),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str  # What was looked at
    status: str  # "ok", "absent" (optional and missing) or "bad" (must be fixed)
    detail: str  # What was found
    remedy: str = ""  # What to do; empty when nothing is needed


def examine() -> list[Finding]:
    """Examine CPU, native core, CUDA, backends, cameras, settings and cache; changes nothing."""
    opencv = f"{install_command('opencv')} (on a Jetson: apt install python3-opencv)"
    stream, videos = install_command("stream"), "only videos, cameras and overlay videos need it"
    openvino = ("openvino", "it is the CPU backend", "bad", "pip install openvino")
    return [
        _python(),
        _native_core(),
        _cuda(),
        _tensorrt(),
        _package("OpenVINO", *openvino, _about_openvino),
        _torch(),
        _package("OpenCV", "cv2", "photos cannot be read", "bad", opencv),
        _package("PyAV", "av", videos, "absent", stream, _about_pyav),
        _gstreamer(),
        _cameras(),
        _jetson(),
        _environment(),
        _cache(),
    ]


def _python() -> Finding:
    machine = f"{platform.machine()}, {usable_cpus()} usable CPU(s)"
    return Finding("python", "ok", f"{platform.python_version()} on {machine}, {sys.executable}")


def _native_core() -> Finding:
    try:
        from zsseg_rt.ops import core
    except ImportError as exc:
        detail = f"zsseg_rt._C cannot be imported: {exc}"
        return Finding("native core", "bad", detail, remedy(Path(zsseg_rt.__file__).parent))
    try:
        instruction_set = core.cpu_isa()
    except ArgumentError as exc:
        advice = "Unset ZSSEG_CPU_ISA, or name an instruction set that this CPU has."
        return Finding("native core", "bad", str(exc), advice)
    detail = f"kernels for {instruction_set}; CUDA kernels"
    if core.built_with_cuda:
        return Finding("native core", "ok", f"{detail} built in")
    advice = "For GPU kernels: ZSSEG_CUDA=ON pip install . in a checkout, with nvcc on PATH."
    return Finding("native core", "ok", f"{detail} not built in", advice)


def _cuda() -> Finding:
    try:
        from zsseg_rt.ops import core
    except ImportError:
        return Finding("CUDA", "absent", "unknown without the native core")
    checked = "nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
    try:
        count = core.cuda_device_count()
        devices = [core.cuda_device_properties(index) for index in range(count)]
    except CudaError as exc:
        return Finding("CUDA", "bad", str(exc), f"Check {checked}.")
    if count == 0:
        return Finding("CUDA", "absent", "no NVIDIA GPU visible", f"With a GPU: check {checked}.")
    names = ", ".join(
        f"cuda:{i} {d['name']} sm {d['compute_capability']}" for i, d in enumerate(devices)
    )
    return Finding("CUDA", "ok", names)


def _tensorrt() -> Finding:
    names = ("tensorrt", "tensorrt_rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12")
    packages = [f"{name} {version}" for name in names if (version := _version(name)) is not None]
    if not packages:
        return Finding(
            "TensorRT",
            "absent",
            "no TensorRT package found",
            f"{install_command('tensorrt', 'rtx')}; on a Jetson use JetPack's "
            "python3-libnvinfer through a venv made with --system-site-packages.",
        )
    try:
        load_tensorrt()
    except BackendUnavailableError as exc:
        reason, _, remedy = str(exc).partition(" Run: ")
        detail = f"{', '.join(packages)}; {reason}"
        return Finding("TensorRT", "bad", detail, f"Run: {remedy}")
    except ConfigError:
        pass  # a finding of the environment
    return Finding("TensorRT", "ok", ", ".join(packages))


def _package(
    topic: str, package: str, use: str, absent: str, command: str, about: Callable[[], str] = str
) -> Finding:
    """Whether a package can be imported, its version, and more about it."""
    ensure_home()
    try:
        module = import_module(package)
    except ImportError as exc:
        reason, remedy = why_not(exc, package, command)
        if reason == "nothing" and _version(package) is None:
            return Finding(topic, absent, f"not installed; {use}", command)
        return Finding(topic, "bad", f"expected {package}, got {reason}", remedy)
    return Finding(topic, "ok", f"{_version(package) or module.__version__}{about()}")


def _about_openvino() -> str:
    from zsseg_rt.backends._openvino import BACKEND, process_core

    core = process_core()
    devices = ", ".join(
        f"{d} ({core.get_property(d, 'FULL_DEVICE_NAME')})" for d in core.available_devices
    )
    choice = BACKEND.choose(("float32", "float16"), "auto", device="cpu", allowed=ANY_PRECISION)
    capabilities = ", ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return f"; {devices}; CPU supports: {capabilities}; precision auto is {choice.precision}"


def _about_pyav() -> str:
    import av

    return f"; libx264 {'yes' if 'libx264' in av.codecs_available else 'no'}"


def _torch() -> Finding:
    version = _version("torch")
    if version is None:
        detail = "not installed; only export, training and backend 'torch' need it"
        return Finding("torch", "absent", detail, install_command("train"))
    return Finding("torch", "ok", version)


def _gstreamer() -> Finding:
    try:
        from zsseg_rt.stream.gstreamer.rtsp_sink import report
    except ImportError as exc:  # of the compiled core, which has a line of its own
        return Finding("GStreamer", "absent", f"was not looked at: {exc}")
    detail, remedy = report(is_jetson=_TEGRA_RELEASE.is_file())
    return Finding("GStreamer", "absent" if remedy else "ok", detail, remedy)


def _cameras() -> Finding:
    devices = find_devices()
    if not devices:
        advice = "To use one here, plug it in; in a container, pass it in: --device /dev/video0."
        return Finding("cameras", "absent", "no /dev/videoN found", advice)
    lines = [
        " ".join(filter(None, [str(d.path), d.name, f"({d.problem})" if d.problem else ""]))
        for d in devices
    ]
    remedies = dict.fromkeys(f"{d.path}: {d.remedy}" for d in devices if d.remedy)
    status = "absent" if all(d.problem for d in devices) else "ok"
    return Finding("cameras", status, "; ".join(lines), " ".join(remedies))


def _jetson() -> Finding:
    model = Path("/proc/device-tree/model")
    if not _TEGRA_RELEASE.is_file():
        return Finding("Jetson", "absent", "not a Jetson")
    name = model.read_text(errors="replace").strip("\0\n") if model.is_file() else "unknown board"
    first = _TEGRA_RELEASE.read_text(errors="replace").splitlines()[0]
    return Finding("Jetson", "ok", f"{name}; {first}")


def _environment() -> Finding:
    """The variables that an engine with default settings and its streams read."""
    problems = []
    for check in (partial(requested, EngineConfig()), wanted_flavours, rtsp_library):
        try:
            check()
        except ConfigError as exc:
            problems.append(str(exc))
    names = ("ZSSEG_DEVICE", "ZSSEG_BACKEND", "ZSSEG_TENSORRT", "ZSSEG_RTSP_LIBRARY")
    settings = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    if problems:
        advice = "Unset the variable, or use one of these values."
        return Finding("environment", "bad", "; ".join(problems), advice)
    detail = ", ".join(settings) or f"none of {', '.join(names)} is set"
    return Finding("environment", "ok", detail)


def _cache() -> Finding:
    folder = default_cache_dir()
    problem = why_unwritable(folder)
    detail = os.fsencode(f"{folder}: {problem}" if problem else folder).decode(errors="replace")
    if problem:
        return Finding("cache", "bad", detail, "Set ZSSEG_HOME to a folder you can write to.")
    return Finding("cache", "ok", detail)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True, kw_only=True)
class Device:
    """A video device."""

    path: Path  # Its file, /dev/videoN
    name: str  # What its driver calls it; empty if that is unknown
    problem: str = ""  # What is wrong with it; empty if pictures can be had
    remedy: str = ""  # What to do about that; empty if nothing can be done


def find_devices(dev: Path = DEV, sysfs: Path = SYSFS) -> list[Device]:
    """Look for video devices, and open each for a moment."""
    files = {path.name for folder in (dev, sysfs) for path in folder.glob("video*")}
    names = sorted((n for n in files if re.fullmatch(r"video[0-9]+", n)), key=lambda n: int(n[5:]))
    return [_examine(dev / name, _name(sysfs / name)) for name in names]


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text(errors="replace").strip()
    except OSError:
        return ""


def _examine(path: Path, name: str) -> Device:
    try:
        problem, remedy = "", ""
        if not _gives_pictures(path):
            problem = "gives no pictures"
    except OSError as exc:
        problem, remedy = _PROBLEMS.get(exc.errno or 0, (exc.strerror or str(exc), ""))
    return Device(path=path, name=name, problem=problem, remedy=remedy.replace("PATH", str(path)))


def _gives_pictures(path: Path) -> bool:
    """Whether it is the device of a camera's pictures; many have another for metadata."""
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        answer = bytearray(_CAPABILITY.size)
        fcntl.ioctl(descriptor, _QUERYCAP, answer)
        *_, of_all, of_this, _, _, _ = _CAPABILITY.unpack(answer)
        if not (of_this if of_all & _HAS_DEVICE_CAPS else of_all) & _CAN_CAPTURE:
            return False
        none = bytearray(_REQUESTBUFFERS.pack(0, _VIDEO_CAPTURE, _MEMORY_MMAP, 0, 0))
        fcntl.ioctl(descriptor, _REQBUFS, none)  # refused while another program has buffers
        return True
    finally:
        os.close(descriptor)
