"""What a backend is: something that loads an ONNX graph and runs it on one device.

Feeds and results are arrays on the session's device: NumPy on the CPU, :class:`DeviceArray`
(or anything with ``__dlpack__`` / ``__cuda_array_interface__``) on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Array", "Backend", "BackendOptions", "Session", "TensorSpec"]

Array = Any  # numpy.ndarray or an object with __dlpack__ / __cuda_array_interface__


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One named input or output of a graph.

    Attributes:
        name: The graph's own name for it.
        dtype: NumPy name, such as ``"float32"``.
        shape: Sizes; a string names a dynamic axis.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """Settings that a caller may give to any backend; each uses what applies to it.

    Attributes:
        num_threads: CPU threads; 0 lets the backend choose.
        cache_dir: Folder for compiled models and plans; None disables caching.
        dynamic_axes: ``{axis name: (min, opt, max)}`` for every named dynamic axis.
        compute_capability: Target GPU such as ``"8.9"`` where a backend builds for another machine.
        progress: Called with (step name, fraction in [0, 1]) during long builds.
    """

    num_threads: int = 0
    cache_dir: Path | None = None
    dynamic_axes: Mapping[str, tuple[int, int, int]] | None = None
    compute_capability: str | None = None
    progress: Callable[[str, float], None] | None = None


class Session(Protocol):
    """A loaded graph. Not thread-safe; results are scratch that the next ``run`` may overwrite."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs, in graph order."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs, in graph order."""

    @property
    def device(self) -> str:
        """Where feeds and results live: ``"cpu"`` or ``"cuda:N"``."""

    @property
    def precision(self) -> str:
        """The precision the graph really runs at, as one of the public precision names."""

    def run(self, feeds: Mapping[str, Array], *, stream: int = 0) -> dict[str, Array]:
        """Run the graph once.

        Args:
            feeds: One C-contiguous array a graph input, of the spec's dtype and shape.
            stream: CUDA stream handle to enqueue on; ignored on the CPU.

        Returns:
            One array a graph output, valid until the next ``run`` or ``close``.

        Raises:
            ShapeError: A feed is missing, unknown, or has the wrong shape.
            DTypeError: A feed has the wrong dtype.
            BackendError: The backend failed.
        """

    def close(self) -> None:
        """Free the graph. Calling it twice is harmless; ``run`` afterwards raises BackendError."""


class Backend(Protocol):
    """A way to run ONNX graphs."""

    @property
    def name(self) -> str:
        """The public name: ``"openvino"``, ``"tensorrt"`` or ``"torch"``."""

    def load(
        self, graph_path: Path, *, device: str, precision: str, options: BackendOptions
    ) -> Session:
        """Load one ONNX file.

        Args:
            graph_path: The ``.onnx`` file.
            device: ``"cpu"`` or ``"cuda:N"``.
            precision: A public precision name or ``"auto"``.
            options: Threads, caches, shapes.

        Raises:
            BackendUnavailableError: The backend's package is missing.
            DeviceError: The device is absent or not one this backend serves.
            PrecisionNotApplied: This backend cannot give the precision on this device.
            BackendError: The graph cannot be read or compiled.
        """
