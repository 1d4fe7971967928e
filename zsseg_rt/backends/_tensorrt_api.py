"""Find TensorRT, full or RTX: without ``$ZSSEG_TENSORRT`` the full ``tensorrt`` comes first."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

from zsseg_rt.common.extras import install_command, unavailable
from zsseg_rt.errors import BackendError, BackendUnavailableError, ConfigError

FLAVOURS = ("tensorrt", "tensorrt_rtx")
MINIMUM_VERSION = (10, 3)

# TensorRT's data type names and NumPy's
DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "fp8", "INT8": "int8",
    "UINT8": "uint8", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
}  # fmt: skip

_REMEDY = (
    f"{install_command('tensorrt', 'rtx')} (rtx is for RTX GPUs); on a Jetson "
    "use JetPack's own package through a virtual environment with --system-site-packages."
)
_log = logging.getLogger("zsseg_rt.tensorrt")
_loggers: dict[str, tuple[Any, Any]] = {}  # by flavour: its module and logger
_loggers_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class TensorRT:
    """One imported flavour."""

    module: Any  # The Python module
    flavour: str  # "tensorrt" or "tensorrt_rtx"
    version: str  # Its full version

    @property
    def is_rtx(self) -> bool:
        """Whether plans hold kernels that are compiled on the GPU they run on."""
        return self.flavour == "tensorrt_rtx"

    @property
    def label(self) -> str:
        """Flavour and version in one word."""
        return f"{self.flavour}-{self.version}"


def load_tensorrt() -> TensorRT:
    """Import the chosen or the first installed flavour; constructs no TensorRT object."""
    wanted = wanted_flavours()
    flavour = next((name for name in wanted if importlib.util.find_spec(name) is not None), None)
    if flavour is None:
        raise BackendUnavailableError(
            f"backend: expected the package {' or '.join(wanted)}, got nothing. Run: {_REMEDY}"
        )
    try:
        module = importlib.import_module(flavour)
    except ImportError as exc:
        expected = f"backend: expected {flavour!r} (ZSSEG_TENSORRT={'|'.join(FLAVOURS)} chooses)"
        raise unavailable(exc, flavour, expected, _REMEDY) from exc
    version = str(getattr(module, "__version__", "0"))
    api = TensorRT(module=module, flavour=flavour, version=version)
    _check_version(api)
    return api


def start_logging(api: TensorRT) -> Any:
    """Return the process's logger of a flavour, its complaints forgotten.

    TensorRT keeps the first logger that it is given, for all that follow, and warns at every other.
    ``last_messages()`` returns the last complaints, newest last, as one line.
    """
    with _loggers_lock:
        entry = _loggers.get(api.flavour)
        if entry is None or entry[0] is not api.module:
            entry = _loggers[api.flavour] = (api.module, _make_logger(api))
    entry[1].kept.clear()
    return entry[1]


def _make_logger(api: TensorRT) -> Any:
    trt = api.module
    levels = {
        int(trt.ILogger.Severity.INTERNAL_ERROR): logging.CRITICAL,
        int(trt.ILogger.Severity.ERROR): logging.ERROR,
        int(trt.ILogger.Severity.WARNING): logging.WARNING,
    }

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.kept: deque[str] = deque(maxlen=8)

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(int(severity), logging.DEBUG)
            text = " ".join(message.split())
            if level >= logging.ERROR:
                self.kept.append(text)
            # an error reaches the caller as an exception: the log is for further diagnosis
            _log.log(min(level, logging.WARNING), "%s: %s", api.flavour, text)

        def last_messages(self) -> str:
            return " | ".join(self.kept) or "TensorRT gave no reason"

    return Logger()


def require(result: Any, what: str, logger: Any) -> Any:
    """Return ``result``, or raise if TensorRT answered None or False."""
    if result is None or result is False:
        raise BackendError(f"tensorrt: expected {what} to succeed, got: {logger.last_messages()}")
    return result


def start(api: TensorRT, make: Any, logger: Any) -> Any:
    """A ``Builder`` or a ``Runtime``."""
    try:
        return require(make(logger), f"trt.{make.__name__}", logger)
    except TypeError as exc:  # pybind11's "factory function returned nullptr"
        raise BackendError(
            f"tensorrt: expected {api.label} to start, got: {logger.last_messages()}. Check the "
            "driver with nvidia-smi."
        ) from exc


def wanted_flavours() -> tuple[str, ...]:
    """The packages to look for, in order: both, or the one that ``$ZSSEG_TENSORRT`` names."""
    flavour = os.environ.get("ZSSEG_TENSORRT")
    if flavour and flavour not in FLAVOURS:
        raise ConfigError(f"ZSSEG_TENSORRT: expected one of {', '.join(FLAVOURS)}, got {flavour!r}")
    return (flavour,) if flavour else FLAVOURS


def _check_version(api: TensorRT) -> None:
    numbers = tuple(int(part) for part in re.findall(r"\d+", api.version)[:2])
    too_old = not api.is_rtx and numbers < MINIMUM_VERSION
    flags = getattr(api.module, "NetworkDefinitionCreationFlag", None)
    if too_old or not hasattr(flags, "STRONGLY_TYPED"):
        raise BackendUnavailableError(
            f"backend: expected tensorrt 10.3 or newer, or tensorrt_rtx 1.7, got {api.flavour} "
            f"{api.version}. Run: {_REMEDY}"
        )
