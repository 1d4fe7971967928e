"""Frames, RGB or NV12, on the host or a GPU, and windows on them.

Frames that keep their shape are resized to a whole number of cells, so that windows which begin at
multiples of a cell have cells that coincide. A frame that would take more windows than it may is
labelled in one, as a letterbox.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.common.arrays import Array, gpu_index
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ConfigError, FrameError

_CUDA_KINDS = (2, 13)  # DLPack's numbers of CUDA memory and managed memory
MOST_SIDE = 32767  # pixels, of what kernels take
_EXPECTED = "a uint8 NumPy array [H, W, 3]"


def check_frame(frame: Any) -> None:
    """Refuse what is no uint8 array [H, W, 3] in C order; nothing is converted in silence."""
    if not isinstance(frame, np.ndarray):
        raise FrameError(
            f"frame: expected {_EXPECTED}, got {described(frame)}. {_conversion(frame)}"
        )
    if isinstance(frame, np.ma.MaskedArray):
        raise FrameError("frame: expected a plain array, got a masked one. Use .filled(0).")
    if frame.ndim != 3 or frame.shape[2] != 3:
        raise FrameError(
            f"frame: expected shape [H, W, 3], got {frame.shape}.{_reshaping(frame.shape)}"
        )
    _check_sides(frame.shape)
    if frame.dtype != np.uint8:
        raise FrameError(f"frame: expected uint8, got {frame.dtype}. {_scaling(frame)}")
    if not frame.flags.c_contiguous:
        raise FrameError(
            f"frame: expected a C-contiguous array, got strides {frame.strides} of a view. "
            "Use np.ascontiguousarray(frame), which copies it."
        )


def check_device_frame(frame: Any, device: str) -> None:
    """Refuse what is no uint8 array [H, W, 3] on a GPU, as far as the array tells by itself."""
    check_place("frame", frame, device)
    shape = getattr(frame, "shape", None)
    if shape is None or len(shape) != 3 or shape[2] != 3:
        description = "an array without a shape" if shape is None else tuple(shape)
        raise FrameError(f"frame: expected shape [H, W, 3], got {description}.")
    _check_sides(shape)
    dtype = str(getattr(frame, "dtype", "uint8")).removeprefix("torch.")
    if dtype != "uint8":
        raise FrameError(f"frame: expected uint8, got {dtype}. Convert it on the GPU first.")


def check_place(name: str, array: Any, device: str) -> None:
    """Refuse what does not lie on a GPU, as far as it tells by itself."""
    tell = getattr(array, "__dlpack_device__", None)
    place = None if tell is None else tell()
    on_gpu = place is not None and place[0] in _CUDA_KINDS
    if isinstance(array, np.ndarray) or not (on_gpu or hasattr(array, "__cuda_array_interface__")):
        raise FrameError(
            f"{name}: expected an array on {device} with __dlpack__ or __cuda_array_interface__, "
            f"got {described(array)} in host memory. Use segment(frame)."
        )
    if place is not None and place[1] != gpu_index(device):
        raise FrameError(
            f"{name}: expected an array on {device}, got one on cuda:{place[1]}. Copy it there, "
            "or use an engine on its GPU."
        )


def _check_sides(shape: tuple[int, ...]) -> None:
    if not all(1 <= side <= MOST_SIDE for side in shape[:2]):
        raise FrameError(
            f"frame: expected sides from 1 to {MOST_SIDE}, got {tuple(shape)}. Check that the "
            "frame was read."
        )


def described(frame: Any) -> str:
    """A frame's type in words."""
    if frame is None:
        return "NoneType"
    if isinstance(frame, (str, PathLike)):
        return f"the path {str(frame)!r}"
    if isinstance(frame, (list, tuple)):
        return f"a {type(frame).__name__} of {len(frame)}"
    kind = type(frame)
    return f"{kind.__module__}.{kind.__qualname__}"


def _conversion(frame: Any) -> str:
    """The call that makes a frame of what is no NumPy array."""
    if frame is None:
        return (
            "cv2.imread and VideoCapture.read give None for what they cannot read: check the path "
            "or the camera."
        )
    if isinstance(frame, (str, PathLike)):
        return "Use zsseg_rt.read_photo(path), which gives RGB."
    if isinstance(frame, (list, tuple)) and any(hasattr(part, "shape") for part in frame):
        return "For several frames use engine.segment_batch(frames)."
    calls = {
        "PIL": 'Use np.array(image.convert("RGB")).',
        "torch": "Use tensor.cpu().numpy(), with the channels last and values from 0 to 255.",
    }
    return calls.get(type(frame).__module__.partition(".")[0], "Use np.asarray(...).")


def _reshaping(shape: tuple[int, ...]) -> str:
    calls = (
        (len(shape) == 2, "For a grey frame use cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB)."),
        (shape[2:] == (1,), "For a grey frame use np.repeat(frame, 3, axis=2)."),
        (shape[2:] == (4,), "To drop alpha use np.ascontiguousarray(frame[..., :3])."),
        (len(shape) == 3 and shape[0] == 3,
         "To move channels last use np.ascontiguousarray(frame.transpose(1, 2, 0))."),
        (len(shape) == 4, "Give one frame at a time, or use engine.segment_batch(frames)."),
    )  # fmt: skip
    return next((f" {call}" for applies, call in calls if applies), "")


def _scaling(frame: Any) -> str:
    """How values become 0 to 255, judged by the values that are there."""
    if frame.dtype.kind == "f" and np.max(frame, initial=0.0) <= 1.0:
        return "For values from 0 to 1 use (frame * 255).round().astype(np.uint8)."
    if frame.dtype.kind == "f":
        return "For values from 0 to 255 use frame.round().clip(0, 255).astype(np.uint8)."
    if frame.dtype == np.uint16:
        return "For 16-bit values use (frame >> 8).astype(np.uint8)."
    if frame.dtype.kind in "iub":
        return "For values from 0 to 255 use frame.astype(np.uint8)."
    return "Convert it first."


_MATRICES = ("bt601", "bt709", "bt601-full", "bt709-full")


@dataclass(frozen=True, eq=False)
class Nv12Frame:
    """A frame in two planes.

    A plane's rows may lie further apart than they are long, as decoders leave them.

    Attributes:
        luma: uint8 [H, W], brightness; H and W are even.
        chroma: uint8 [H / 2, W / 2, 2], U then V of every two by two pixels.
        colour_matrix: ``"bt601"`` (most cameras) or ``"bt709"`` (most HD video): how the planes
            become RGB. Brightness is from 16 to 235 and colour from 16 to 240, or both from 0 to
            255 with ``"bt601-full"`` and ``"bt709-full"``.

    Example:
        >>> planes = np.full((4, 6), 235, np.uint8), np.full((2, 3, 2), 128, np.uint8)
        >>> Nv12Frame(*planes, colour_matrix="bt709").shape
        (4, 6, 3)
    """

    luma: Array
    chroma: Array
    colour_matrix: str = "bt601"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the RGB frame that the planes stand for."""
        height, width = self.luma.shape
        return int(height), int(width), 3

    @property
    def device(self) -> str:
        """Where both planes are, of those on a GPU."""
        return str(self.luma.device)


def planes_of(frame: Any) -> tuple[Any, dict[str, Any]]:
    """A frame as kernels take it, and the keyword that planes need."""
    if isinstance(frame, Nv12Frame):
        return (frame.luma, frame.chroma), {"colour_matrix": frame.colour_matrix}
    return frame, {}


def as_nv12(frame: Any) -> Nv12Frame | None:
    """The frame in planes, of which a plain pair may be given; None for any other frame."""
    if isinstance(frame, tuple) and len(frame) == 2 and getattr(frame[0], "ndim", 2) != 3:
        return Nv12Frame(*frame)
    return frame if isinstance(frame, Nv12Frame) else None


def check_nv12(frame: Nv12Frame, device: str) -> None:
    """Refuse planes that are no NV12 frame, as far as they tell by themselves."""
    if frame.colour_matrix not in _MATRICES:
        raise FrameError(
            f"colour_matrix: expected one of {', '.join(_MATRICES)}, got {frame.colour_matrix!r}"
        )
    shapes = []
    for name, plane in (("luma", frame.luma), ("chroma", frame.chroma)):
        if device != "cpu":
            check_place(name, plane, device)
        elif not isinstance(plane, np.ndarray) or isinstance(plane, np.ma.MaskedArray):
            raise FrameError(
                f"{name}: expected a plain NumPy array, got {described(plane)}. For planes on a "
                "GPU use segment_device."
            )
        dtype = str(getattr(plane, "dtype", "uint8")).removeprefix("torch.")
        if dtype != "uint8":
            raise FrameError(f"{name}: expected uint8, got {dtype}. Convert it first.")
        shapes.append(tuple(getattr(plane, "shape", ())))
    luma, chroma = shapes
    if len(luma) != 2 or not all(1 <= side <= MOST_SIDE for side in luma):
        raise FrameError(f"luma: expected shape [H, W] with sides from 1 to 32767, got {luma}.")
    if luma[0] % 2 or luma[1] % 2:
        raise FrameError(
            f"luma: expected even sides, got {luma}. NV12 has one colour for two by two pixels."
        )
    expected = (luma[0] // 2, luma[1] // 2, 2)
    if chroma != expected:
        raise FrameError(
            f"chroma: expected shape {expected}, got {chroma}. Give U and V in the last axis, as "
            "in plane.reshape(H // 2, W // 2, 2)."
        )


_MOST_PLANS = 64
_log = logging.getLogger(__name__)

Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowPlan:
    """Where windows lie on frames of one size."""

    whole_hw: Pair  # Pixels that the frame is resized to
    places: tuple[Pair, ...]  # Row and column of each window's first cell
    origins: tuple[Pair, ...]  # Row and column of each window's first pixel of the resized frame
    # float32 [H, W] on the frame's grid: one over the windows that cover a cell
    shares: npt.NDArray[np.float32]


class Windows:
    """How an engine lays windows of its bundle's size on frames."""

    def __init__(self, preprocess: PreprocessSpec, head: HeadSpec, config: EngineConfig) -> None:
        self._size_hw, self._grid_hw = preprocess.size_hw, head.grid_hw  # of a window
        self._corners = head.align == "corners"  # whether outermost cells lie on outermost pixels
        # Pixels from a cell to the next; cells from a window to the next at the frame's own size,
        # None where it is resized
        self._step_hw = _steps(self._size_hw, head.grid_hw, self._corners)
        self._stride_hw = _stride(config.windows, self._size_hw, self._step_hw)
        self._letterbox = config.resize == "letterbox"
        self._most = config.max_windows
        self.plan = functools.lru_cache(_MOST_PLANS)(self._plan)
        """Where windows lie on frames of a size; remembered for the sizes seen last."""

    @classmethod
    def of(cls, preprocess: PreprocessSpec, head: HeadSpec, config: EngineConfig) -> Windows | None:
        """Those that a configuration asks for; None stretches frames to one window."""
        asked = config.windows is not None or config.resize == "letterbox"
        return cls(preprocess, head, config) if asked else None

    def _plan(self, frame_hw: Pair) -> WindowPlan:
        stride_hw = self._stride_hw
        if stride_hw is not None and any(map(int.__lt__, frame_hw, self._size_hw)):
            raise FrameError(
                f"frame: expected at least {_text(self._size_hw)} pixels, one window, got "
                f"{_text(frame_hw)}. Make it larger."
            )
        plan = self._laid(self._cells(frame_hw, stride_hw, self._letterbox), stride_hw)
        if plan is None:
            _remark_on_letterboxes(self._most)
            plan = self._laid(self._cells(frame_hw, None, True), None)
            assert plan is not None, "it is one window"
        return plan

    def _laid(self, cells: Pair, stride_hw: Pair | None) -> WindowPlan | None:
        """The plan of so many cells; None where it has too many windows or pixels."""
        tops, lefts = (self._starts(axis, cells[axis], stride_hw) for axis in (0, 1))
        (step_y, step_x), less = self._step_hw, 1 if self._corners else 0
        whole_hw = (cells[0] - less) * step_y + less, (cells[1] - less) * step_x + less
        if len(tops) * len(lefts) > self._most or max(whole_hw) > MOST_SIDE:
            return None
        places = tuple((top, left) for top in tops for left in lefts)
        counts = np.zeros(cells, np.float32)
        for top, left in places:
            counts[top : top + self._grid_hw[0], left : left + self._grid_hw[1]] += 1
        return WindowPlan(
            whole_hw=whole_hw,
            places=places,
            origins=tuple((top * step_y, left * step_x) for top, left in places),
            shares=np.asarray(1 / counts, np.float32),
        )

    def _cells(self, frame_hw: Pair, stride_hw: Pair | None, letterbox: bool) -> Pair:
        """Cells of the resized frame, to the nearest whole number."""
        (height, width), (frame_h, frame_w) = self._size_hw, frame_hw
        above = height * frame_w, width * frame_h  # scales by rows and by columns, in one unit
        unit = frame_h * frame_w
        scale = 0 if stride_hw is not None else (min if letterbox else max)(above)
        cells = []
        for side, step, most in zip(frame_hw, self._step_hw, self._grid_hw, strict=True):
            less = 1 if self._corners else 0
            scaled = side - less if not scale else side * scale / unit - less
            number = int(scaled / step + 0.5) + less
            cells.append(min(max(number, 1), most) if letterbox else max(number, most))
        return cells[0], cells[1]

    def _starts(self, axis: int, cells: int, stride_hw: Pair | None) -> list[int]:
        """First cells of windows along an axis; the last one ends with the frame."""
        window = self._grid_hw[axis]
        room = cells - window
        if room <= 0:
            return [0]
        if stride_hw is not None:
            stride = stride_hw[axis]
            return [min(i * stride, room) for i in range(math.ceil(room / stride) + 1)]
        gaps = math.ceil(room / max(window // 2, 1))  # windows overlap by half, or more
        return [(2 * i * room + gaps) // (2 * gaps) for i in range(gaps + 1)]


def _steps(size_hw: Pair, grid_hw: Pair, corners: bool) -> Pair:
    """Pixels from a cell to the next; a whole number, or windows' cells would not coincide."""
    less = 1 if corners else 0
    steps = []
    for side, cells in zip(size_hw, grid_hw, strict=True):
        span, gaps = side - less, max(cells - less, 1)
        if span % gaps:
            raise ConfigError(
                "windows: expected a bundle whose cells are a whole number of pixels apart, got "
                f"{cells} cells in {side} pixels. Leave windows and resize out."
            )
        steps.append(max(span // gaps, 1))
    return steps[0], steps[1]


def _stride(windows: str | None, size_hw: Pair, step_hw: Pair) -> Pair | None:
    """The stride in cells; None where it follows from the frame."""
    if windows is None or windows == "auto":
        return None
    height, width, stride = map(int, re.split(r"[x+]", windows))
    if (height, width) != size_hw:
        raise ConfigError(
            f"windows: expected those of the bundle's size, {_text(size_hw)}+STRIDE, got "
            f"{windows!r}. 'auto' chooses them."
        )
    unit = math.lcm(*step_hw)
    if stride % unit or not 0 < stride <= min(size_hw):
        raise ConfigError(
            f"windows: expected a stride that is a multiple of {unit} pixels, so that cells of "
            f"windows coincide, up to {min(size_hw)}, got {stride}."
        )
    return stride // step_hw[0], stride // step_hw[1]


@functools.cache  # once, whatever sizes a source goes through
def _remark_on_letterboxes(most: int) -> None:
    _log.warning(
        "a frame would take more than %d windows: such frames keep their shape in one. "
        "EngineConfig(max_windows=N) and --max-windows N allow more.",
        most,
    )


def _text(size_hw: tuple[int, ...]) -> str:
    return "x".join(map(str, size_hw))
