"""Motion between two frames, from small pictures of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zsseg_rt.common.extras import import_opencv

SIDE = 128  # of the small pictures, whatever the frame's shape
_SAMPLED = 256  # sides that a larger frame is sampled at before its pixels are averaged
_STILL_SIDE = 32
# Few cells that change much matter more than many that change a little: 2 levels in one cell of 30
# spare as much of a still scene, but also 5 % of a moving one instead of 1 %.
_STILL_LEVELS = 6
_STILL_SHARE = 0.01
# A cut leaves a mean difference of 28 to 100 levels after the flow is undone, moving cameras 1 to
# 12, unless they are so fast that no flow is found. Dark and dull pictures differ less.
_CUT_SHARE = 0.5  # of the grey picture's standard deviation
_CUT_LEVELS = (10.0, 25.0)  # the least and the largest threshold

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class BlendSettings:
    """How much the past counts; chosen by benchmarks/steady.py.

    Attributes:
        most: Weight of the past where nothing moves.
        per_blur: What is taken off per unit of blur. Sampling between cells blurs: by ``t (1 - t)``
            per axis, in cells squared, at fraction ``t`` of a cell. What moves by fractions of a
            cell would be blurred anew with every frame.
        least: What remains at least of the above.
        sure_levels: Mean difference, in levels of 255, that noise alone explains. From there on the
            weight falls.
        lost_levels: Mean difference from which on the past does not count at all.
    """

    most: float = 0.86
    per_blur: float = 0.5
    least: float = 0.72
    sure_levels: float = 10.0
    lost_levels: float = 80.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Glance:
    """A frame, much reduced.

    Attributes:
        colours: uint8 [128, 128, 3], in the frame's channel order.
        grey: uint8 [128, 128].
    """

    colours: Bytes
    grey: Bytes

    @classmethod
    def at(cls, frame: Bytes, channel_order: str) -> Glance:
        """Reduce a frame, whatever its shape.

        Shapes:
            frame: uint8 [H, W, 3], checked.
        """
        cv2 = load_opencv()
        height, width = frame.shape[:2]
        if max(height, width) > _SAMPLED:  # 0.2 ms for 720p; the mean of all pixels takes 8 ms
            frame = cv2.resize(frame, (min(width, _SAMPLED), min(height, _SAMPLED)))
        colours = cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        code = cv2.COLOR_BGR2GRAY if channel_order == "bgr" else cv2.COLOR_RGB2GRAY
        return cls(colours=colours, grey=cv2.cvtColor(colours, code))


@dataclass(frozen=True, kw_only=True, eq=False)
class Motion:
    """Where the cells of a grid were one frame before; the arguments of ``ops.warp_blend``.

    Attributes:
        flow: float32 [1, h, w, 2]: x, then y, in cells.
        past_weight: float32 [1, h, w], in [0, 1].
    """

    flow: Floats
    past_weight: Floats

    @classmethod
    def none(cls, grid_hw: tuple[int, int]) -> Motion:
        """No past."""
        return cls(
            flow=np.zeros((1, *grid_hw, 2), np.float32),
            past_weight=np.zeros((1, *grid_hw), np.float32),
        )


class MotionEstimator:
    """Finds motion by dense inverse search optical flow; for one thread at a time.

    Source:
        Kroeger et al., "Fast Optical Flow using Dense Inverse Search", ECCV 2016.
    """

    def __init__(self, settings: BlendSettings | None = None) -> None:
        self._cv2 = cv2 = load_opencv()
        self._settings = settings or BlendSettings()
        self._search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._pixels = np.dstack(np.meshgrid(*(np.arange(SIDE, dtype=np.float32),) * 2))

    def between(self, past: Glance, now: Glance, grid_hw: tuple[int, int]) -> Motion | None:
        """Find where each cell of a grid over a frame was in the one before.

        Returns:
            The motion; None where the frames have nothing to do with each other: a scene cut, or
            motion too fast to be found.
        """
        cv2 = self._cv2
        flow = self._search.calc(now.grey, past.grey, None)
        origin = self._pixels + flow
        inside = cv2.inRange(origin, (-0.5, -0.5), (SIDE - 0.5, SIDE - 0.5))
        moved = cv2.remap(
            past.colours, origin, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        difference = cv2.absdiff(now.colours, moved)  # in colour: red and blue may be equally grey
        if _is_cut(cv2, now.grey, difference, inside):
            return None
        rows, columns = grid_hw
        cells = _average(cv2, flow, grid_hw)
        cells *= np.array([columns / SIDE, rows / SIDE], np.float32)
        weight = self._trust(cells, _average(cv2, difference.reshape(SIDE, -1), grid_hw))
        weight *= (_average(cv2, inside, grid_hw) / 255) ** 2  # cells that come in are partly new
        return Motion(flow=cells[None], past_weight=weight[None])

    def _trust(self, cells: Floats, difference: Floats) -> Floats:
        settings = self._settings
        fraction = cells - np.floor(cells)
        blur = (fraction * (1 - fraction)).sum(axis=-1)
        trust = np.maximum(settings.most - settings.per_blur * blur, settings.least)
        span = settings.lost_levels - settings.sure_levels
        likeness = np.clip((settings.lost_levels - difference) / span, 0.0, 1.0)
        return np.asarray(trust * likeness, np.float32)


def is_still(past: Glance, now: Glance) -> bool:
    """Whether under 1 % of 32x32 grey cells differ by more than 6 levels of 255."""
    cv2 = load_opencv()
    size = (_STILL_SIDE, _STILL_SIDE)
    cells = [cv2.resize(g.grey, size, interpolation=cv2.INTER_AREA) for g in (past, now)]
    changed = int((cv2.absdiff(*cells) > _STILL_LEVELS).sum())
    return changed < _STILL_SHARE * _STILL_SIDE**2


def load_opencv() -> Any:
    """Import OpenCV with its optical flow."""
    purpose = "with its optical flow"
    return import_opencv(purpose, argument="memory", needs="DISOpticalFlow_create")


def _is_cut(cv2: Any, grey: Bytes, difference: Bytes, inside: Bytes) -> bool:
    if not inside.any():
        return True
    contrast = float(cv2.meanStdDev(grey)[1][0, 0])
    threshold = min(max(_CUT_SHARE * contrast, _CUT_LEVELS[0]), _CUT_LEVELS[1])
    mean = float(np.mean(cv2.mean(difference, inside)[:3]))
    return mean > threshold


def _average(cv2: Any, picture: npt.NDArray[Any], grid_hw: tuple[int, int]) -> Floats:
    """Means over cells; channels laid out side by side are averaged, too."""
    return np.asarray(cv2.resize(picture, grid_hw[::-1], interpolation=cv2.INTER_AREA), np.float32)
