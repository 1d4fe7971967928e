"""Every error the package raises on purpose; all derive from :class:`ZssegError`.

A message reads *argument: expected X, got Y. What to do.*
"""

from __future__ import annotations

import re

__all__ = [
    "ArgumentError",
    "BackendError",
    "BackendUnavailableError",
    "BundleError",
    "BundleVersionError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "CudaError",
    "DTypeError",
    "DatasetError",
    "DeviceError",
    "EndOfSource",
    "EngineStateError",
    "FetchError",
    "FrameError",
    "PrecisionNotApplied",
    "ShapeError",
    "SourceError",
    "TrainingError",
    "VocabularyError",
    "ZssegError",
]


_ARGUMENT = re.compile(r"((?:--)?[A-Za-z_][\w.-]*)((?:\[[^\]]*\])*): ")


class ZssegError(Exception):
    """Base of every deliberate error of this package.

    Attributes:
        argument: The name of what was wrong: ``"policy"`` if the message reads *policy: expected
            ...*, ``"class_names"`` if it reads *class_names[3]: ...*. None if it names nothing.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        named = _ARGUMENT.match(message)
        self.argument = None if named is None else named[1]

    def renamed(self, argument: str) -> ZssegError:
        """The same error, of an argument that the caller knows by another name."""
        return type(self)(argument + str(self).removeprefix(self.argument or ""))


class ShapeError(ZssegError, ValueError):
    """An array has the wrong shape or memory layout."""


class DTypeError(ZssegError, TypeError):
    """An array has the wrong element type."""


class ArgumentError(ZssegError, ValueError):
    """A setting is outside its range."""


class ConfigError(ArgumentError):
    """An engine setting does not exist or has a bad value; on the command line a usage error."""


class DeviceError(ZssegError):
    """An array or a model is on the wrong device, or there is no such device."""


class FrameError(ShapeError, DTypeError, DeviceError, ArgumentError):
    """A frame does not fit the engine, by its kind, size or place; others may."""


class BundleError(ZssegError):
    """A bundle is incomplete, altered or not a bundle; names the key and the file."""


class BundleVersionError(BundleError):
    """A bundle was written by a newer format than this package reads."""


class CheckpointError(ZssegError, ValueError):
    """A checkpoint does not hold what the architecture needs; names the first offending keys."""


class BackendError(ZssegError):
    """A backend refused a graph or failed while running it."""


class BackendUnavailableError(BackendError, ImportError):
    """A backend's package is not installed; names the extra that installs it."""


class PrecisionNotApplied(BackendError):  # noqa: N818 - a fixed public name
    """The precision that was asked for cannot be given, or was not given."""


class CudaError(ZssegError, RuntimeError):
    """A CUDA call failed."""


class CaptureError(CudaError):
    """A capture, a recorded CUDA graph, cannot hold what was asked for; says what and why."""


class VocabularyError(ZssegError, ValueError):
    """Class names or embeddings are unusable.

    Attributes:
        unknown: The names that a bundle cannot embed, where that is what is wrong; all of them.
    """

    unknown: tuple[str, ...] = ()


class SourceError(ZssegError):
    """An image, video or camera cannot be read."""


class EndOfSource(SourceError):  # noqa: N818 - a fixed public name
    """A source has no more frames."""


class DatasetError(SourceError):
    """A data set is missing, incomplete or inconsistent; names the file and where to get it."""


class FetchError(ZssegError):
    """Published weights cannot be fetched; names the file, its address and where it belongs."""


class TrainingError(ZssegError, RuntimeError):
    """Training cannot continue; says what is saved and how to resume."""


class EngineStateError(ZssegError, RuntimeError):
    """An engine is closed, or busy in another thread."""
