"""Find a backend by name, or the one to use when none was asked for."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass

from zsseg_rt.backends.base import Backend
from zsseg_rt.common.checks import canonical_device, check_device_name
from zsseg_rt.common.extras import install_command
from zsseg_rt.config import BACKENDS, EngineConfig
from zsseg_rt.errors import BackendUnavailableError, ConfigError, DeviceError

_PACKAGES = {
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt_rtx"),
    "torch": ("torch",),
}
_REMEDIES = {
    "openvino": "pip install openvino",
    "tensorrt": f"{install_command('tensorrt', 'rtx')} (on a Jetson use JetPack's own)",
    "torch": install_command("torch"),
}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The backend and device an engine runs on."""

    backend: str
    device: str


def is_installed(name: str) -> bool:
    """Whether a backend's packages can be found; nothing is imported."""
    return any(importlib.util.find_spec(package) is not None for package in _PACKAGES[name])


def get_backend(name: str) -> Backend:
    """Return a backend by its public name."""
    if not is_installed(name):
        raise BackendUnavailableError(
            f"backend: expected the package(s) {' or '.join(_PACKAGES[name])} for {name!r}, "
            f"got nothing. Run: {_REMEDIES[name]}"
        )
    backend: Backend = importlib.import_module(f"zsseg_rt.backends._{name}").BACKEND
    return backend


def requested(config: EngineConfig) -> Placement:
    """The choice of the configuration, or the environment's; both results may be ``auto``."""
    backend, device = config.backend, config.device
    if backend == "auto":
        backend = os.environ.get("ZSSEG_BACKEND") or "auto"
    if device == "auto":
        device = canonical_device(os.environ.get("ZSSEG_DEVICE") or "auto")
    if backend not in BACKENDS:
        raise ConfigError(f"ZSSEG_BACKEND: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    check_device_name("ZSSEG_DEVICE", device)
    return Placement(backend=backend, device=device)


def choose(config: EngineConfig) -> Placement:
    """Resolve ``auto``: a GPU if a backend can use one, otherwise the CPU with OpenVINO."""
    asked = requested(config)
    backend, device = asked.backend, asked.device
    if device == "auto":
        device = _choose_device(backend)
    if device != "cpu":
        _require_gpu(device)
    if backend == "auto":
        backend = _choose_backend(device)
    if backend == "openvino" and device != "cpu":
        raise DeviceError(f"device: expected 'cpu' for backend 'openvino', got {device!r}")
    if backend == "tensorrt" and device == "cpu":
        raise DeviceError("device: expected 'cuda:N' for backend 'tensorrt', got 'cpu'")
    return Placement(backend=backend, device=device)


def _choose_device(backend: str) -> str:
    from zsseg_rt import ops

    if backend == "tensorrt":
        return "cuda:0"
    if backend == "openvino" or ops.cuda_device_count() == 0:
        return "cpu"
    usable = is_installed("tensorrt") or _torch_has_cuda()
    return "cuda:0" if usable else "cpu"


def _choose_backend(device: str) -> str:
    if device == "cpu":
        return "openvino" if is_installed("openvino") else "torch"
    return "tensorrt" if is_installed("tensorrt") else "torch"


def _torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, by its version and without importing it."""
    return is_installed("torch") and "+cpu" not in importlib.metadata.version("torch")


def _require_gpu(device: str) -> None:
    from zsseg_rt import ops

    index = int(device.split(":")[1])
    count = ops.cuda_device_count()
    if index >= count:
        there = f"'cuda:0' to 'cuda:{count - 1}'" if count else "'cpu', as no NVIDIA GPU is visible"
        raise DeviceError(
            f"device: expected {there}, got {device!r}. Check the driver with nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or use device='cpu'."
        )
