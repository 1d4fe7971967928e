"""Frames that keep their shape: where windows lie on them.

A frame is resized to a whole number of cells, so that windows which begin at multiples of a cell
have cells that coincide. Their logits are averaged on the grid of the whole frame, before anything
is upsampled. A frame that would take more windows than it may is labelled in one, as a letterbox.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from zsseg_rt.bundles.specs import HeadSpec, PreprocessSpec
from zsseg_rt.config import EngineConfig
from zsseg_rt.errors import ConfigError, FrameError
from zsseg_rt.runtime.inputs.checks import MOST_SIDE

_MOST_PLANS = 64
_log = logging.getLogger(__name__)

Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowPlan:
    """Where windows lie on frames of one size.

    Attributes:
        whole_hw: Pixels that the frame is resized to.
        places: Row and column of each window's first cell.
        origins: Row and column of each window's first pixel of the resized frame.
        shares: float32 [H, W] on the frame's grid: one over the windows that cover a cell.
    """

    whole_hw: Pair
    places: tuple[Pair, ...]
    origins: tuple[Pair, ...]
    shares: npt.NDArray[np.float32]

    def in_equal_batches(self, at_once: int) -> tuple[WindowPlan, int]:
        """The same in as few batches of one size, at most so many windows, and that size.

        The last is filled with windows that lie beyond the grid, which have no share.
        """
        count = len(self.places)
        batches = -(-count // at_once)
        size = -(-count // batches)
        missing = batches * size - count
        beyond, again = self.shares.shape, self.origins[-1]
        places = (*self.places, *[(beyond[0], beyond[1])] * missing)
        return replace(self, places=places, origins=(*self.origins, *[again] * missing)), size


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How an engine lays windows of its bundle's size on frames.

    Attributes:
        size_hw: Pixels of a window.
        grid_hw: Cells of a window.
        step_hw: Pixels from a cell to the next.
        corners: Whether the outermost cells lie on the outermost pixels.
        stride_hw: Cells from a window to the next at the frame's own size; None resizes the frame.
        letterbox: Whether one window takes the whole frame, with room beside it.
        most: How many windows a frame may take; one that would take more is a letterbox.
    """

    size_hw: Pair
    grid_hw: Pair
    step_hw: Pair
    corners: bool
    stride_hw: Pair | None = None
    letterbox: bool = False
    most: int = 1
    _plans: dict[Pair, WindowPlan] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, preprocess: PreprocessSpec, head: HeadSpec, config: EngineConfig) -> Windows | None:
        """Those that a configuration asks for; None stretches frames to one window."""
        letterbox = config.resize == "letterbox"
        if config.windows is None and not letterbox:
            return None
        size_hw, corners = preprocess.size_hw, head.align == "corners"
        step_hw = _steps(size_hw, head.grid_hw, corners)
        return cls(
            size_hw=size_hw,
            grid_hw=head.grid_hw,
            step_hw=step_hw,
            corners=corners,
            stride_hw=_stride(config.windows, size_hw, step_hw),
            letterbox=letterbox,
            most=config.max_windows,
        )

    def plan(self, frame_hw: Pair) -> WindowPlan:
        """Where windows lie on frames of a size; remembered for the sizes seen last.

        Raises:
            FrameError: A window is larger than the frame.
        """
        plan = self._plans.pop(frame_hw, None) or self._make(frame_hw)
        self._plans[frame_hw] = plan
        for oldest in list(self._plans)[: max(0, len(self._plans) - _MOST_PLANS)]:
            self._plans.pop(oldest, None)
        return plan

    def _make(self, frame_hw: Pair) -> WindowPlan:
        if self.stride_hw is not None and any(map(int.__lt__, frame_hw, self.size_hw)):
            raise FrameError(
                f"frame: expected at least {_text(self.size_hw)} pixels, one window, got "
                f"{_text(frame_hw)}. Make it larger."
            )
        cells = self._cells(frame_hw)
        starts = [self._starts(axis, cells[axis]) for axis in (0, 1)]
        whole_hw = tuple(
            (n - 1) * step + 1 if self.corners else n * step
            for n, step in zip(cells, self.step_hw, strict=True)
        )
        if len(starts[0]) * len(starts[1]) > self.most or max(whole_hw) > MOST_SIDE:
            _remark_on_letterboxes(self.most)
            return replace(self, stride_hw=None, letterbox=True)._make(frame_hw)
        places = tuple((top, left) for top in starts[0] for left in starts[1])
        step_y, step_x = self.step_hw
        return WindowPlan(
            whole_hw=(whole_hw[0], whole_hw[1]),
            places=places,
            origins=tuple((top * step_y, left * step_x) for top, left in places),
            shares=self._shares(cells, places),
        )

    def _cells(self, frame_hw: Pair) -> Pair:
        """Cells of the resized frame, to the nearest whole number."""
        (height, width), (frame_h, frame_w) = self.size_hw, frame_hw
        above = height * frame_w, width * frame_h  # scales by rows and by columns, in one unit
        unit = frame_h * frame_w
        scale = 0 if self.stride_hw is not None else (min if self.letterbox else max)(above)
        cells = []
        for side, step, most in zip(frame_hw, self.step_hw, self.grid_hw, strict=True):
            less = 1 if self.corners else 0
            scaled = side - less if not scale else side * scale / unit - less
            number = int(scaled / step + 0.5) + less
            cells.append(min(max(number, 1), most) if self.letterbox else max(number, most))
        return cells[0], cells[1]

    def _starts(self, axis: int, cells: int) -> list[int]:
        """First cells of windows along an axis; the last one ends with the frame."""
        window = self.grid_hw[axis]
        room = cells - window
        if room <= 0:
            return [0]
        if self.stride_hw is not None:
            stride = self.stride_hw[axis]
            return [min(i * stride, room) for i in range(math.ceil(room / stride) + 1)]
        gaps = math.ceil(room / max(window // 2, 1))  # windows overlap by half, or more
        return [(2 * i * room + gaps) // (2 * gaps) for i in range(gaps + 1)]

    def _shares(self, cells: Pair, places: tuple[Pair, ...]) -> npt.NDArray[np.float32]:
        counts = np.zeros(cells, np.float32)
        for top, left in places:
            counts[top : top + self.grid_hw[0], left : left + self.grid_hw[1]] += 1
        return np.asarray(1 / counts, np.float32)


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


@functools.cache
def _numbers(windows: str) -> tuple[int, int, int]:
    height, width, stride = map(int, re.split(r"[x+]", windows))
    return height, width, stride


def _stride(windows: str | None, size_hw: Pair, step_hw: Pair) -> Pair | None:
    """The stride in cells; None where it follows from the frame."""
    if windows in (None, "auto"):
        return None
    height, width, stride = _numbers(str(windows))
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


@functools.cache
def _remark_on_letterboxes(most: int) -> None:
    """Say once that windows are left out, whatever sizes a source goes through."""
    _log.warning(
        "a frame would take more than %d windows: such frames keep their shape in one. "
        "EngineConfig(max_windows=N) and --max-windows N allow more.",
        most,
    )


def _text(size_hw: tuple[int, ...]) -> str:
    return "x".join(map(str, size_hw))
